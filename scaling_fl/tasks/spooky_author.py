"""Who wrote it: Poe (EAP), Lovecraft (HPL) or Mary Shelley (MWS), from Kaggle's competition."""

from datasets import Dataset

from scaling_fl.tasks.corpus import pick
from scaling_fl.tasks.reading import read_table
from scaling_fl.tasks.task import Source

COLUMNS = ("id", "text", "author")


def _read(path: str, split: str, text_column: str | None, label_column: str | None) -> Dataset:
    return pick(read_table(path, COLUMNS), path, text_column or "text", label_column or "author")


SOURCE = Source(_read, labels={author: author for author in ("EAP", "HPL", "MWS")})

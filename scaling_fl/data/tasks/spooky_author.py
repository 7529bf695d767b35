"""Who wrote it: Poe (EAP), Lovecraft (HPL) or Mary Shelley (MWS), from Kaggle's competition."""

from datasets import Dataset

from scaling_fl.data.corpus import read_labelled
from scaling_fl.data.source import Source

COLUMNS = ("id", "text", "author")


def _read(path: str, split: str, text_column: str | None, label_column: str | None) -> Dataset:
    return read_labelled(path, text_column or "text", label_column or "author", COLUMNS)


SOURCE = Source(_read, labels={author: author for author in ("EAP", "HPL", "MWS")})

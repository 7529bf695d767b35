"""Who wrote it: Poe (EAP), Lovecraft (HPL) or Mary Shelley (MWS), from Kaggle's competition."""

from scaling_fl.tasks.corpus import make_corpus, pick, require_paths
from scaling_fl.tasks.reading import read_table
from scaling_fl.tasks.task import Corpus, Source

COLUMNS = ("id", "text", "author")


def _read(train_path: str | None, test_path: str | None, text_column: str | None, label_column: str | None) -> Corpus:
    train, test = (
        pick(read_table(path, COLUMNS), path, text_column or "text", label_column or "author")
        for path in require_paths("spooky_author", train_path, test_path)
    )
    return make_corpus(train, test, {author: author for author in ("EAP", "HPL", "MWS")})


SOURCE = Source(_read)

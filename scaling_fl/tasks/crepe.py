"""AG News and Yelp reviews, as the CSV files of Crepe (Zhang et al. 2015, arXiv 1509.01626)."""

from scaling_fl.tasks.corpus import make_corpus, pick, require_paths
from scaling_fl.tasks.reading import read_table
from scaling_fl.tasks.task import Corpus, Source

AGNEWS_COLUMNS = ("Class Index", "Title", "Description")
AGNEWS_LABELS = {"1": "World", "2": "Sports", "3": "Business", "4": "Sci/Tech"}
YELP_COLUMNS = ("stars", "text")
YELP_LABELS = {stars: stars for stars in ("1", "2", "3", "4", "5")}


def _unescape(rows: dict[str, list]) -> dict[str, list]:
    return {"text": [text.replace("\\n", "\n") for text in rows["text"]]}


def _read_agnews(
    train_path: str | None, test_path: str | None, text_column: str | None, label_column: str | None
) -> Corpus:
    """Leave backslashes alone: in this file one stands for a new line, even before an n."""
    train, test = (
        pick(read_table(path, AGNEWS_COLUMNS), path, text_column or "Description", label_column or "Class Index")
        for path in require_paths("agnews", train_path, test_path)
    )
    return make_corpus(train, test, AGNEWS_LABELS)


def _read_yelp(
    train_path: str | None, test_path: str | None, text_column: str | None, label_column: str | None
) -> Corpus:
    """Undo how Crepe writes a new line: as a backslash and an n."""
    train, test = (
        pick(read_table(path, YELP_COLUMNS), path, text_column or "text", label_column or "stars")
        for path in require_paths("yelp", train_path, test_path)
    )
    return make_corpus(train.map(_unescape, batched=True), test.map(_unescape, batched=True), YELP_LABELS)


AGNEWS = Source(_read_agnews)
YELP = Source(_read_yelp)

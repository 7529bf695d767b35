"""AG News and Yelp reviews, as the CSV files of Crepe (Zhang et al. 2015, arXiv 1509.01626)."""

from datasets import Dataset

from scaling_fl.tasks.corpus import pick
from scaling_fl.tasks.reading import read_table
from scaling_fl.tasks.task import Source

AGNEWS_COLUMNS = ("Class Index", "Title", "Description")
AGNEWS_LABELS = {"1": "World", "2": "Sports", "3": "Business", "4": "Sci/Tech"}
YELP_COLUMNS = ("stars", "text")
YELP_LABELS = {stars: stars for stars in ("1", "2", "3", "4", "5")}


def _unescape(rows: dict[str, list]) -> dict[str, list]:
    return {"text": [text.replace("\\n", "\n") for text in rows["text"]]}


def _read_agnews(path: str, split: str, text_column: str | None, label_column: str | None) -> Dataset:
    """Leave backslashes alone: in this file one stands for a new line, even before an n."""
    rows = read_table(path, AGNEWS_COLUMNS)
    return pick(rows, path, text_column or "Description", label_column or "Class Index")


def _read_yelp(path: str, split: str, text_column: str | None, label_column: str | None) -> Dataset:
    """Undo how Crepe writes a new line: as a backslash and an n."""
    rows = pick(read_table(path, YELP_COLUMNS), path, text_column or "text", label_column or "stars")
    return rows.map(_unescape, batched=True)


AGNEWS = Source(_read_agnews, labels=AGNEWS_LABELS)
YELP = Source(_read_yelp, labels=YELP_LABELS)

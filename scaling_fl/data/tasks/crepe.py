"""AG News and Yelp reviews, as the CSV files of Crepe (Zhang et al. 2015, arXiv 1509.01626)."""

from datasets import Dataset

from scaling_fl.data.cache import mapped
from scaling_fl.data.corpus import read_labelled
from scaling_fl.data.source import Source

AGNEWS_COLUMNS = ("Class Index", "Title", "Description")
AGNEWS_LABELS = {"1": "World", "2": "Sports", "3": "Business", "4": "Sci/Tech"}
YELP_COLUMNS = ("stars", "text")
YELP_LABELS = {stars: stars for stars in ("1", "2", "3", "4", "5")}


def _unescape(rows: dict[str, list]) -> dict[str, list]:
    return {"text": [text.replace("\\n", "\n") for text in rows["text"]]}


def _read_agnews(path: str, split: str, text_column: str | None, label_column: str | None) -> Dataset:
    """Leave backslashes alone: in this file one stands for a new line, even before an n."""
    return read_labelled(path, text_column or "Description", label_column or "Class Index", AGNEWS_COLUMNS)


def _read_yelp(path: str, split: str, text_column: str | None, label_column: str | None) -> Dataset:
    """Undo how Crepe writes a new line: as a backslash and an n."""
    rows = read_labelled(path, text_column or "text", label_column or "stars", YELP_COLUMNS)
    return mapped(rows, _unescape, batched=True)


AGNEWS = Source(_read_agnews, labels=AGNEWS_LABELS)
YELP = Source(_read_yelp, labels=YELP_LABELS)

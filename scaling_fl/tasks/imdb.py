"""Film reviews, good or bad (Maas et al. 2011): from the hub, tables, or the original's folders."""

from pathlib import PurePosixPath

from datasets import Dataset, load_dataset

from scaling_fl.tasks.corpus import pick
from scaling_fl.tasks.reading import FORMATS, locate, read_folders, read_table, reason
from scaling_fl.tasks.task import Source

HUB_ID = "stanfordnlp/imdb"
LABELS = {"0": "neg", "1": "pos"}


def _read(path: str, split: str, text_column: str | None, label_column: str | None) -> Dataset:
    return pick(_read_part(path, split), path, text_column or "text", label_column or "label")


def _read_own(text_column: str | None, label_column: str | None) -> tuple[Dataset, Dataset]:
    """Load the labelled splits of the hub; the third one, "unsupervised", has no labels."""
    try:
        train, test = (load_dataset(HUB_ID, split=split) for split in ("train", "test"))
    except Exception as error:
        raise ValueError(
            f"the data set {HUB_ID} cannot be loaded from the hub: "
            f"give train_path and test_path, or go online ({reason(error)})"
        ) from error
    columns = text_column or "text", label_column or "label"
    return pick(train, HUB_ID, *columns), pick(test, HUB_ID, *columns)


def _read_part(path: str, split: str) -> Dataset:
    """Read a table, or the folders neg and pos of an aclImdb folder or of its part."""
    if PurePosixPath(path).suffix.lower() in FORMATS:
        return read_table(path)
    filesystem, inner = locate(path)
    is_part = any(filesystem.isdir(f"{inner}/{label}") for label in LABELS.values())
    return read_folders(path if is_part else f"{path.rstrip('/')}/{split}", tuple(LABELS.values()))


SOURCE = Source(_read, _read_own, labels=LABELS)

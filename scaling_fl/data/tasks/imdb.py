"""Film reviews, good or bad (Maas et al. 2011): from the hub, tables, or the original's folders."""

from datasets import Dataset

from scaling_fl.data.columns import Columns
from scaling_fl.data.files import is_table, locate, read_folders, read_table, reason
from scaling_fl.data.tasks.task import Task
from scaling_fl.hub import load_split

HUB_ID = "stanfordnlp/imdb"
LABELS = {"0": "neg", "1": "pos"}


def _read(path: str, split: str, columns: Columns) -> Dataset:
    """Read a table, or the folders neg and pos of an aclImdb folder or of its part."""
    if is_table(path):
        return read_table(path, columns=columns)
    filesystem, inner = locate(path)
    is_part = any(filesystem.isdir(f"{inner}/{label}") for label in LABELS.values())
    return read_folders(path if is_part else f"{path.rstrip('/')}/{split}", tuple(LABELS.values()))


def _read_own() -> tuple[Dataset, Dataset]:
    """Load the labelled splits of the hub; the third one, "unsupervised", has no labels."""
    try:
        return load_split(HUB_ID, "train"), load_split(HUB_ID, "test")
    except Exception as error:
        raise ValueError(
            f"task_name='imdb': expected the data set {HUB_ID} of the hub, got an error: {reason(error)}. "
            "Give train_path and test_path, or go online"
        ) from error


TASK = Task(_read, _read_own, labels=LABELS)

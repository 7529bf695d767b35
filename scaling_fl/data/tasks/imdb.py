"""Film reviews, good or bad (Maas et al. 2011): from the hub, tables, or the original's folders."""

from datasets import Dataset

from scaling_fl.data.corpus import pick, read_labelled
from scaling_fl.data.files import is_table, locate, read_folders, reason
from scaling_fl.data.source import Source
from scaling_fl.hub import load_split

HUB_ID = "stanfordnlp/imdb"
LABELS = {"0": "neg", "1": "pos"}


def _read(path: str, split: str, text_column: str | None, label_column: str | None) -> Dataset:
    columns = text_column or "text", label_column or "label"
    return read_labelled(path, *columns) if is_table(path) else pick(_read_part(path, split), path, *columns)


def _read_own(text_column: str | None, label_column: str | None) -> tuple[Dataset, Dataset]:
    """Load the labelled splits of the hub; the third one, "unsupervised", has no labels."""
    try:
        train, test = (load_split(HUB_ID, split) for split in ("train", "test"))
    except Exception as error:
        raise ValueError(
            f"the data set {HUB_ID} cannot be loaded from the hub: "
            f"give train_path and test_path, or go online ({reason(error)})"
        ) from error
    columns = text_column or "text", label_column or "label"
    return pick(train, HUB_ID, *columns), pick(test, HUB_ID, *columns)


def _read_part(path: str, split: str) -> Dataset:
    """Read the folders neg and pos of an aclImdb folder or of its part."""
    filesystem, inner = locate(path)
    is_part = any(filesystem.isdir(f"{inner}/{label}") for label in LABELS.values())
    return read_folders(path if is_part else f"{path.rstrip('/')}/{split}", tuple(LABELS.values()))


SOURCE = Source(_read, _read_own, labels=LABELS)

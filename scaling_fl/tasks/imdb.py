"""Film reviews, good or bad (Maas et al. 2011): from the hub, tables, or the original's folders."""

from pathlib import PurePosixPath

from datasets import Dataset, load_dataset

from scaling_fl.tasks.corpus import make_corpus, pick, require_paths
from scaling_fl.tasks.reading import FORMATS, locate, read_folders, read_table, reason
from scaling_fl.tasks.task import Corpus, Source

HUB_ID = "stanfordnlp/imdb"
LABELS = {"0": "neg", "1": "pos"}


def _read(train_path: str | None, test_path: str | None, text_column: str | None, label_column: str | None) -> Corpus:
    text_column, label_column = text_column or "text", label_column or "label"
    if train_path is None and test_path is None:
        hub = _load_hub()
        parts = [pick(hub[split], HUB_ID, text_column, label_column) for split in ("train", "test")]
    else:
        paths = require_paths("imdb", train_path, test_path)
        parts = [
            pick(_read_part(path, split), path, text_column, label_column)
            for path, split in zip(paths, ("train", "test"), strict=True)
        ]
    train, test = parts
    return make_corpus(train, test, LABELS)


def _load_hub() -> dict[str, Dataset]:
    """Load the labelled splits; the third one, "unsupervised", has no labels."""
    try:
        return {split: load_dataset(HUB_ID, split=split) for split in ("train", "test")}
    except Exception as error:
        raise ValueError(
            f"the data set {HUB_ID} cannot be loaded from the hub: "
            f"give train_path and test_path, or go online ({reason(error)})"
        ) from error


def _read_part(path: str, split: str) -> Dataset:
    """Read a table, or the folders neg and pos of an aclImdb folder or of its part."""
    if PurePosixPath(path).suffix.lower() in FORMATS:
        return read_table(path)
    filesystem, inner = locate(path)
    is_part = any(filesystem.isdir(f"{inner}/{label}") for label in LABELS.values())
    return read_folders(path if is_part else f"{path.rstrip('/')}/{split}", tuple(LABELS.values()))


SOURCE = Source(_read)

"""Any labelled texts: a CSV, JSON Lines or parquet file, or a data set of the hub."""

from pathlib import PurePosixPath

from datasets import Dataset, load_dataset

from scaling_fl.tasks.corpus import pick
from scaling_fl.tasks.reading import FORMATS, read_table, reason
from scaling_fl.tasks.task import Source


def _read(path: str, split: str, text_column: str | None, label_column: str | None) -> Dataset:
    rows = read_table(path) if _is_table(path) else _load_hub(path, split)
    return pick(rows, path, text_column or "text", label_column or "label")


def _is_table(path: str) -> bool:
    return PurePosixPath(path).suffix.lower() in FORMATS or "://" in path


def _load_hub(name: str, split: str) -> Dataset:
    try:
        return load_dataset(name, split=split)
    except Exception as error:
        raise ValueError(
            f"{name!r} is neither a file that ends in {', '.join(FORMATS)} nor a data set of the hub "
            f"with a split {split!r} that can be loaded ({reason(error)})"
        ) from error


SOURCE = Source(_read, is_whole=lambda path: not _is_table(path))

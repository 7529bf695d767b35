"""Any labelled texts: a CSV, TSV, JSON Lines or parquet file, or a data set of the hub."""

import os

from datasets import Dataset

from scaling_fl.data.corpus import pick, read_labelled
from scaling_fl.data.files import SHOWN, is_table, reason
from scaling_fl.data.source import Source
from scaling_fl.hub import load_split


def _read(path: str, split: str, text_column: str | None, label_column: str | None) -> Dataset:
    columns = text_column or "text", label_column or "label"
    return read_labelled(path, *columns) if _is_file(path) else pick(_load_hub(path, split), path, *columns)


def _is_file(path: str) -> bool:
    return is_table(path) or "://" in path or os.path.isfile(path)


def _load_hub(name: str, split: str) -> Dataset:
    try:
        return load_split(name, split)
    except Exception as error:
        raise ValueError(
            f"{name!r} is neither a file that ends in {SHOWN} nor a data set of the hub "
            f"with a split {split!r} that can be loaded ({reason(error)})"
        ) from error


SOURCE = Source(_read, is_whole=lambda path: not _is_file(path))

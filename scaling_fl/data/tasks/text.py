"""Any labelled texts: a CSV, TSV, JSON Lines or parquet file, or a data set of the hub."""

import os

from datasets import Dataset

from scaling_fl.data.columns import Columns
from scaling_fl.data.files import SHOWN, is_table, read_table, reason
from scaling_fl.data.tasks.task import Task
from scaling_fl.hub import load_split


def _is_file(path: str) -> bool:
    return is_table(path) or "://" in path or os.path.isfile(path)


def _read(path: str, split: str, columns: Columns) -> Dataset:
    if _is_file(path):
        return read_table(path, columns=columns)
    try:
        return load_split(path, split)
    except Exception as error:
        raise ValueError(
            f"{path!r}: expected a file that ends in {SHOWN}, or a data set of the hub with a split {split!r}, got an "
            f"error: {reason(error)}"
        ) from error


TASK = Task(_read, is_whole=lambda path: not _is_file(path))

"""Read rows from tables of any format and from folders of texts, from any fsspec URL."""

import glob
import os
from collections.abc import Iterator, Sequence
from pathlib import PurePosixPath
from typing import Any

import fsspec
from datasets import Dataset

from scaling_fl.data.cache import Row, store
from scaling_fl.data.columns import NOT_UTF8, ColumnError, Columns
from scaling_fl.data.csv_rows import read_csv
from scaling_fl.data.json_rows import read_json
from scaling_fl.data.parquet_rows import read_parquet
from scaling_fl.errors import one_line
from scaling_fl.hub import load_split
from scaling_fl.storage import check_reachable

FORMATS = {".csv": "csv", ".tsv": "csv", ".tab": "csv", ".jsonl": "json", ".ndjson": "json", ".json": "json"}
FORMATS |= {".parquet": "parquet"}
PACKED = (".gz", ".bz2", ".xz")  # after the ending of a file of text
SHOWN = ".csv, .tsv, .jsonl, .json, .parquet"
VERSION = 1  # of the rows that are read: another one ignores the rows in the cache


def read_table(
    path: str, names: Sequence[str] = (), columns: Columns | None = None, fields: Columns | None = None
) -> Dataset:
    """Return the rows of a file, one column a field. All fields are strings.

    Args:
        path: a local path or fsspec URL whose ending is a key of FORMATS.
        names: the column names of a CSV without a header. A header with the columns to read is used where there is one.
        columns: of the texts and of the labels; others are ignored. None reads all.
        fields: in place of `columns`, those to read as far as they exist, lists of turns and trees as JSON. CSV has no
            lists, and all of its fields are read.

    Raises:
        ValueError: the file is missing, empty, not readable, or of another kind, or lacks a column.
    """
    kind = _format(path)
    if kind is None:
        raise ValueError(f"{path!r}: expected a file that ends in {SHOWN}, got another ending")

    def rows() -> Iterator[Row]:
        if kind == "csv":
            return read_csv(path, columns, names)
        return read_json(path, columns, fields) if kind == "json" else read_parquet(path, columns, fields)

    try:
        filesystem, inner = fsspec.core.url_to_fs(path)
        check_reachable(filesystem, inner)
        if not filesystem.isfile(inner):
            raise ValueError("expected the path or fsspec URL of a file, got none (there is no such file)")
        if filesystem.size(inner) == 0:
            raise ValueError("expected rows, got an empty file")
        key = VERSION, filesystem.info(inner), columns, list(names), *([fields] if fields else [])
        return store(fsspec.utils.tokenize(*key), rows)
    except ColumnError:
        raise
    except Exception as error:
        ours = "" if type(error) is ValueError else f"expected {kind}, got an error: "
        raise ValueError(f"{path!r}: {ours}{reason(error)}") from error


def is_file(path: str) -> bool:
    """Tell whether a path is that of a file, and not the name of a data set of the hub or a folder."""
    return is_table(path) or "://" in path or os.path.isfile(path)


def read_split(path: str, split: str, columns: Columns | None = None, fields: Columns | None = None) -> Dataset:
    """Return the rows of a file, or all columns of a split of a data set of the hub.

    Args:
        path: of the file, or a name of the hub.
        split: of the data set.
        columns: as of `read_table`.
        fields: as of `read_table`.

    Raises:
        ValueError: it cannot be read.
    """
    if is_file(path):
        return read_table(path, columns=columns, fields=fields)
    try:
        return load_split(path, split)
    except Exception as error:
        raise ValueError(
            f"{path!r}: expected a file that ends in {SHOWN}, or a data set of the hub with a split {split!r}, got an "
            f"error: {reason(error)}"
        ) from error


def is_table(path: str) -> bool:
    """Tell whether a path ends as tables do."""
    return _format(path) is not None


def _format(path: str) -> str | None:
    path = path.lower()
    packed = next((ending for ending in PACKED if path.endswith(ending)), "")
    kind = FORMATS.get(PurePosixPath(path.removesuffix(packed)).suffix)
    return None if packed and kind == "parquet" else kind


def reason(error: Exception) -> str:
    """Return in one line why something cannot be read."""
    # fsspec says itself which package a scheme needs.
    cause = error if isinstance(error, ImportError) else error.__cause__ or error
    return NOT_UTF8.format(cause.reason) if isinstance(cause, UnicodeDecodeError) else one_line(cause)


def locate(path: str) -> tuple[fsspec.AbstractFileSystem, str]:
    """Return the file system of a local path or URL, and the path in it.

    Raises:
        ValueError: no file system has this scheme, or its package is missing.
    """
    try:
        return fsspec.core.url_to_fs(path)
    except Exception as error:
        raise ValueError(f"{path!r}: expected a local path or fsspec URL, got an error: {reason(error)}") from error


def read_folders(path: str, labels: Sequence[str] = ("*",)) -> Dataset:
    """Return the texts of a folder that has a folder for each label and a .txt file for each text.

    Raises:
        ValueError: there is no such folder, or nothing in it.
    """
    filesystem, inner = locate(path)
    files: dict[str, Any] = {}
    for label in labels:
        found = filesystem.glob(f"{glob.escape(inner)}/{label}/*.txt", detail=True)
        if not found:
            raise ValueError(f"'{path}/{label}/*.txt': expected a folder of .txt files for each label, got none")
        files |= found
    return store(fsspec.utils.tokenize(VERSION, files), lambda: _folder_rows(filesystem, sorted(files)))


def _folder_rows(filesystem: fsspec.AbstractFileSystem, files: Sequence[str]) -> Iterator[Row]:
    yield "text", "label"
    for name in files:
        # Real corpora hold single bytes that are not UTF-8; losing one letter beats losing the text.
        with filesystem.open(name, "r", encoding="utf-8", errors="replace") as file:
            yield file.read(), PurePosixPath(name).parent.name

"""Read rows from CSV, JSON Lines and parquet files and from folders of texts, from any fsspec URL."""

import csv
import glob
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import datasets
import fsspec
import pyarrow.parquet as pq  # type: ignore[import-untyped]
from datasets import Dataset, Features, Value, load_dataset
from fsspec.implementations.local import LocalFileSystem

FORMATS = {".csv": "csv", ".jsonl": "json", ".json": "json", ".parquet": "parquet"}


def read_table(path: str, names: Sequence[str] = ()) -> Dataset:
    """Return the rows of a file, one column a field. All fields of a CSV are strings.

    Args:
        path: a local path or fsspec URL that ends in .csv, .jsonl, .json or .parquet.
        names: the column names of a CSV without a header. One that has them in its header will do.

    Raises:
        ValueError: the file is missing, empty, not readable, or of another kind.
    """
    kind = FORMATS.get(PurePosixPath(path).suffix.lower())
    if kind is None:
        raise ValueError(f"{path!r} is no table: a file that ends in {', '.join(FORMATS)} would do")
    try:
        filesystem, inner = fsspec.core.url_to_fs(path)
        if not filesystem.isfile(inner):
            raise ValueError("there is no such file, and a local path or fsspec URL of one would do")
        if filesystem.size(inner) == 0:
            raise ValueError("it is empty")
        if kind == "csv":
            return _read_csv(path, names)
        local = _local(path)
        if kind == "parquet" and pq.read_metadata(local).num_rows == 0:
            raise ValueError("it has no row")
        return load_dataset(kind, data_files=glob.escape(local))["train"]
    except Exception as error:
        raise ValueError(f"{path!r} cannot be read as {kind}: {reason(error)}") from error


def reason(error: Exception) -> str:
    """Return in one line why something cannot be read."""
    cause = error.__cause__ or error
    if isinstance(cause, UnicodeDecodeError):
        return f"it is not UTF-8 ({cause.reason}): save it as that"
    if "corresponds to no data" in str(cause):
        return "it has no row"
    return " ".join(str(cause).split())[:200] or type(cause).__name__


def _read_csv(path: str, names: Sequence[str]) -> Dataset:
    """Take every field as a string as it stands: pandas would make numbers, and NaN of "null"."""
    first = next(_csv_rows(path), None)
    if first is None:
        raise ValueError("it is empty")
    has_header = not names or set(names) <= set(first)
    if not has_header and len(first) != len(names):
        raise ValueError(f"it has {len(first)} columns, not the {len(names)} expected: {', '.join(names)}")
    columns = tuple(first if has_header else names)
    twice = sorted({name for name in columns if columns.count(name) > 1})
    if twice:
        raise ValueError(f"it has several columns called {', '.join(twice)}: rename them")
    return Dataset.from_generator(
        _csv_records,
        gen_kwargs={"path": path, "columns": columns, "has_header": has_header, "version": _version(path)},
        features=Features({name: Value("string") for name in columns}),
    )


def _csv_records(path: str, columns: tuple[str, ...], has_header: bool, version: str) -> Iterator[dict[str, str]]:
    number = 0
    for number, row in enumerate(_csv_rows(path), start=0 if has_header else 1):
        if len(row) != len(columns):
            raise ValueError(f"row {number} has {len(row)} fields, not {len(columns)}")
        if number > 0:
            yield dict(zip(columns, row, strict=True))
    if number == 0:
        raise ValueError("it has no row below its header")


def _csv_rows(path: str) -> Iterator[list[str]]:
    """Yield the fields of each line that is not blank."""
    csv.field_size_limit(sys.maxsize)
    with fsspec.open(path, "rt", encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(file, strict=True)
        try:
            yield from filter(None, reader)
        except csv.Error as error:
            raise ValueError(f"line {reader.line_num}: {error}") from None


def _version(path: str) -> str:
    """Return what changes with a file, by which datasets' cache tells a new one from the old."""
    filesystem, inner = fsspec.core.url_to_fs(path)
    return fsspec.utils.tokenize(filesystem.info(inner))


def _local(path: str) -> str:
    """Return a local file with these bytes: datasets refuses remote ones where HF_HUB_OFFLINE is set."""
    filesystem, inner = fsspec.core.url_to_fs(path)
    if isinstance(filesystem, LocalFileSystem):
        return inner
    copy = Path(datasets.config.HF_DATASETS_CACHE, "copies", _version(path))
    if not copy.exists():
        copy.parent.mkdir(parents=True, exist_ok=True)
        partial = f"{copy}.{os.getpid()}"
        filesystem.get_file(inner, partial)
        os.replace(partial, copy)
    return str(copy)


def read_folders(path: str, labels: Sequence[str] = ("*",)) -> Dataset:
    """Return the texts of a folder that has a folder for each label and a .txt file for each text.

    Raises:
        ValueError: there is no such folder, or nothing in it.
    """
    filesystem, inner = fsspec.core.url_to_fs(path)
    files: dict[str, Any] = {}
    for label in labels:
        found = filesystem.glob(f"{glob.escape(inner)}/{label}/*.txt", detail=True)
        if not found:
            raise ValueError(f"there are no texts {path}/{label}/*.txt: a folder of .txt files for each label would do")
        files |= found
    return Dataset.from_generator(_folder_records, gen_kwargs={"path": path, "files": files})


def _folder_records(path: str, files: Mapping[str, Any]) -> Iterator[dict[str, str]]:
    filesystem, _ = fsspec.core.url_to_fs(path)
    for name in sorted(files):
        # Real corpora hold single bytes that are not UTF-8; losing one letter beats losing the text.
        with filesystem.open(name, "r", encoding="utf-8", errors="replace") as file:
            yield {"text": file.read(), "label": PurePosixPath(name).parent.name}

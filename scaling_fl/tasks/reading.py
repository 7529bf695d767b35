"""Read rows from CSV, JSON Lines and parquet files and from folders of texts, from any fsspec URL."""

import csv
import glob
import os
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import datasets
import fsspec
import pyarrow.parquet as pq  # type: ignore[import-untyped]
from datasets import Dataset, Features, Value, load_dataset
from fsspec.implementations.local import LocalFileSystem

from scaling_fl.settings import one_line
from scaling_fl.stores import knock

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
        knock(filesystem, inner)
        if not filesystem.isfile(inner):
            raise ValueError("there is no such file, and a local path or fsspec URL of one would do")
        if filesystem.size(inner) == 0:
            raise ValueError("it is empty")
        if kind == "csv":
            return _read_csv(path, names)
        local = _local(path)
        if kind == "parquet":
            _check_parquet(local)
        else:
            _check_json(local)
        rows = load_dataset(kind, data_files=glob.escape(local))["train"]
        rows.data.validate(full=True)  # are texts UTF-8? Otherwise the first to look at them fails
        return rows
    except Exception as error:
        raise ValueError(f"{path!r} cannot be read as {kind}: {reason(error)}") from error


def reason(error: Exception) -> str:
    """Return in one line why something cannot be read."""
    # fsspec says itself which package a scheme needs.
    cause = error if isinstance(error, ImportError) else error.__cause__ or error
    if isinstance(cause, UnicodeDecodeError):
        return f"it is not UTF-8 ({cause.reason}): save it as that"
    if "Invalid UTF8" in str(cause):
        return "it is not UTF-8: save it as that"
    if "corresponds to no data" in str(cause):
        return "it has no row"
    return one_line(cause)


def _check_parquet(path: str) -> None:
    metadata = pq.read_metadata(path)
    if metadata.num_rows == 0:
        raise ValueError("it has no row")
    _check_names(metadata.schema.to_arrow_schema().names)


def _check_json(path: str) -> None:
    """Look at the first row, which pyarrow takes for one even if it is null, and then crashes the process."""
    with open(path, "rb") as file:
        start = file.read(2**16)
    if not re.match(rb"(\xef\xbb\xbf)?\s*(\[\s*)?(\{|\]|$)", start):
        raise ValueError('its first row is no object: rows such as {"text": "...", "label": "..."} in UTF-8 would do')


def _check_names(names: Sequence[str]) -> None:
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"it has several columns called {', '.join(twice)}: rename them")


def _read_csv(path: str, names: Sequence[str]) -> Dataset:
    """Take every field as a string as it stands: pandas would make numbers, and NaN of "null"."""
    first = next(_csv_rows(path), None)
    if first is None:
        raise ValueError("it is empty")
    has_header = not names or set(names) <= set(first)
    if not has_header and len(first) != len(names):
        raise ValueError(f"it has {len(first)} columns, not the {len(names)} expected: {', '.join(names)}")
    columns = tuple(first if has_header else names)
    _check_names(columns)
    separator = re.search(r"[;\t|]", columns[0])
    if len(columns) == 1 and separator:
        raise ValueError(f"its columns seem to be separated by {separator[0]!r}: commas would do")
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
        reader = csv.reader(_without_nul(file), strict=True)
        try:
            yield from filter(None, reader)
        except csv.Error as error:
            raise ValueError(f"line {reader.line_num}: {error}") from None


def _without_nul(lines: Iterable[str]) -> Iterator[str]:
    """Refuse what is no text, or UTF-16 without a byte order mark."""
    for number, line in enumerate(lines, start=1):
        if "\0" in line:
            raise ValueError(f"line {number} has a NUL byte, which is no text in UTF-8: save it as that")
        yield line


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


def locate(path: str) -> tuple[fsspec.AbstractFileSystem, str]:
    """Return the file system of a local path or URL, and the path in it.

    Raises:
        ValueError: no file system has this scheme, or its package is missing.
    """
    try:
        return fsspec.core.url_to_fs(path)
    except Exception as error:
        raise ValueError(f"{path!r} is no local path or fsspec URL: {reason(error)}") from error


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
            raise ValueError(f"there are no texts {path}/{label}/*.txt: a folder of .txt files for each label would do")
        files |= found
    return Dataset.from_generator(_folder_records, gen_kwargs={"path": path, "files": files})


def _folder_records(path: str, files: Mapping[str, Any]) -> Iterator[dict[str, str]]:
    filesystem, _ = fsspec.core.url_to_fs(path)
    for name in sorted(files):
        # Real corpora hold single bytes that are not UTF-8; losing one letter beats losing the text.
        with filesystem.open(name, "r", encoding="utf-8", errors="replace") as file:
            yield {"text": file.read(), "label": PurePosixPath(name).parent.name}

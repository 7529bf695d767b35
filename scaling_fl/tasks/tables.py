"""Read labelled texts from CSV, JSON Lines and parquet, from any fsspec URL."""

import csv
import glob
import os
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from fractions import Fraction
from pathlib import Path, PurePosixPath
from typing import Any

import datasets
import fsspec
import numpy as np
import pyarrow.parquet as pq  # type: ignore[import-untyped]
from datasets import ClassLabel, Dataset, Features, Value, load_dataset
from fsspec.implementations.local import LocalFileSystem

from scaling_fl.tasks.task import Corpus

FORMATS = {".csv": "csv", ".jsonl": "json", ".json": "json", ".parquet": "parquet"}
NUMBER = re.compile(r"-?[0-9]+(\.[0-9]+)?")


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


def label_name(value: object) -> str:
    """Return a label's name: 1, 1.0 and "1" are the same label, and there may be none ("")."""
    if value is None or value != value:
        return ""
    name = str(value).strip()
    return re.sub(r"\.0*$", "", name) if re.fullmatch(r"-?[0-9]+\.0*", name) else name


def sort_labels(names: Iterable[str]) -> tuple[str, ...]:
    """Sort labels by number where all are numbers, by the alphabet otherwise."""
    names = sorted(names)
    return tuple(sorted(names, key=Fraction) if all(map(NUMBER.fullmatch, names)) else names)


def pick(table: Dataset, path: str, text_column: str, label_column: str) -> Dataset:
    """Keep each row's `text` and `label`.

    Raises:
        ValueError: there is no such column, no row, or a row without a label or text.
    """
    for key, column in (("text_column", text_column), ("label_column", label_column)):
        if column not in table.column_names:
            raise ValueError(f"{key}={column!r} is not in {path!r}: {_some(table.column_names)} would do")
    if len(table) == 0:
        raise ValueError(f"{path!r} has no row: one or more would do")
    if text_column == label_column:
        raise ValueError(f"text_column and label_column are both {text_column!r}: two columns would do")
    rows = table.select_columns([text_column, label_column])
    rows = rows.rename_columns({text_column: "text", label_column: "label"})
    if not _is_text(rows.features["text"]):
        kind = rows.data.schema.field("text").type
        raise ValueError(f"text_column={text_column!r} of {path!r} holds {kind!s:.80}: a column of texts would do")
    if not isinstance(rows.features["label"], Value | ClassLabel):
        raise ValueError(
            f"label_column={label_column!r} of {path!r} holds lists, records or several types of values: "
            "texts alone or numbers alone would do"
        )
    for column, name in (("text", text_column), ("label", label_column)):
        missing = _is_missing(rows, column)
        if missing.any():
            raise ValueError(f"row {int(missing.argmax()) + 1} of {path!r} has no {name}: give it one or leave it out")
    return rows


def _is_text(feature: Any) -> bool:
    return getattr(feature, "dtype", None) in ("string", "large_string")


def _is_missing(rows: Dataset, column: str) -> np.ndarray:
    """Tell which rows have no value. The hub gives rows of a class that is not known the class -1."""
    values, feature = rows.with_format("arrow")[:][column], rows.features[column]
    missing = values.is_null(nan_is_null=True).to_numpy()
    if isinstance(feature, ClassLabel):
        missing = missing | (values.fill_null(-1).to_numpy() < 0)
    elif column == "label" and _is_text(feature):
        missing = missing | np.array([not label_name(value) for value in values.to_pylist()])
    return missing


def _some(names: Iterable[object]) -> str:
    """Return the first names, for people."""
    words = [" ".join(str(name).split()) for name in names]
    shown = [word if len(word) <= 24 else f"{word[:21]}..." for word in words[:8]]
    return ", ".join(shown + ["..."] * (len(words) > len(shown)))


def label_names_of(rows: Dataset) -> dict[object, str]:
    """Return the name of each value in the column `label`."""
    feature = rows.features["label"]
    known = feature.names if isinstance(feature, ClassLabel) else None
    return {value: label_name(known[value] if known else value) for value in rows.unique("label")}


def make_corpus(train: Dataset, test: Dataset, known: Mapping[str, str] | None = None) -> Corpus:
    """Replace labels by their indices.

    Args:
        train: rows of `text` and `label`.
        test: the same, of the test set.
        known: the name of each label that there may be; None takes those of `train` as they are.

    Raises:
        ValueError: a label is unknown, train has one only, or train and test differ in their labels.
    """
    in_train, in_test = set(label_names_of(train).values()), set(label_names_of(test).values())
    if known is None:
        known = {name: name for name in sort_labels(in_train)}
        if in_train != in_test:
            only_train, only_test = (sort_labels(only) for only in (in_train - in_test, in_test - in_train))
            raise ValueError(
                "the labels of train and test differ, and the same in both would do: "
                f"{_some(only_train) or 'none'} only in train, {_some(only_test) or 'none'} only in test"
            )
    names = tuple(known.values())
    unknown = (in_train | in_test).difference(known, names)
    if unknown:
        would_do = ", ".join({**known, **dict.fromkeys(names)})
        raise ValueError(f"there are unknown labels, {_some(sort_labels(unknown))}: {would_do} would do")
    if len(in_train) < 2:
        raise ValueError(f"there is one label only, {_some(in_train)}: a classifier needs two or more to train on")

    def indexed(rows: Dataset) -> Dataset:
        index = {value: names.index(known.get(name, name)) for value, name in label_names_of(rows).items()}
        features = Features({"text": rows.features["text"], "label": Value("int64")})
        return rows.map(_index_labels, batched=True, fn_kwargs={"index": index}, features=features)

    return Corpus(indexed(train), indexed(test), names)


def _index_labels(rows: dict[str, list], *, index: dict[object, int]) -> dict[str, list]:
    return {"text": rows["text"], "label": [index[label] for label in rows["label"]]}


def require_paths(task_name: str, train_path: str | None, test_path: str | None) -> tuple[str, str]:
    """Return the two paths.

    Raises:
        ValueError: one is missing.
    """
    missing = [key for key, path in (("train_path", train_path), ("test_path", test_path)) if path is None]
    if train_path is None or test_path is None:
        raise ValueError(f"task_name={task_name!r} needs {' and '.join(missing)}: a local path or any fsspec URL")
    return train_path, test_path

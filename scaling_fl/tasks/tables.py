"""Read labelled texts from CSV, JSON Lines and parquet, from any fsspec URL."""

import csv
from collections.abc import Iterable, Mapping, Sequence
from pathlib import PurePosixPath

import fsspec
import numpy as np
from datasets import Dataset, Features, Value, concatenate_datasets, load_dataset

from scaling_fl.tasks.task import Corpus

FORMATS = {".csv": "csv", ".jsonl": "json", ".json": "json", ".parquet": "parquet"}


def read_table(path: str, names: Sequence[str] = ()) -> Dataset:
    """Return the rows of a file, one column a field. All fields of a CSV are strings.

    Args:
        path: a local path or fsspec URL that ends in .csv, .jsonl, .json or .parquet.
        names: the column names of a CSV without a header. One that has them as its header will do.

    Raises:
        ValueError: the file is missing, empty, not readable, or of another kind.
    """
    kind = FORMATS.get(PurePosixPath(path).suffix.lower())
    if kind is None:
        raise ValueError(f"{path!r} is no table: a file that ends in {', '.join(FORMATS)} would do")
    try:
        filesystem, inner = fsspec.core.url_to_fs(path)
        if not filesystem.isfile(inner):
            raise ValueError(f"there is no file {path!r}")
        options: dict = {}
        if kind == "csv":
            options = _csv_options(path, names)
        return load_dataset(kind, data_files=path, split="train", **options)
    except ValueError:
        raise
    except Exception as error:
        cause = error.__cause__ or error
        raise ValueError(f"{path!r} cannot be read as {kind}: {' '.join(str(cause).split())[:300]}") from error


def _csv_options(path: str, names: Sequence[str]) -> dict:
    """Take every field as a string as it stands: pandas would make numbers, and NaN of "null"."""
    with fsspec.open(path, "rt", encoding="utf-8-sig", newline="") as file:
        first = next(csv.reader(file), None)
    if not first:
        raise ValueError(f"{path!r} is empty")
    has_header = not names or first == list(names)
    if not has_header and len(first) != len(names):
        raise ValueError(f"{path!r} has {len(first)} columns, not the {len(names)} expected: {', '.join(names)}")
    columns = first if has_header else list(names)
    twice = sorted({name for name in columns if columns.count(name) > 1})
    if twice:
        raise ValueError(f"{path!r} has several columns called {', '.join(twice)}: rename them")
    return {
        "column_names": columns,
        "header": 0 if has_header else None,
        "features": Features({name: Value("string") for name in columns}),
        "keep_default_na": False,
        "na_filter": False,
    }


def read_folders(path: str) -> Dataset:
    """Return the texts of a folder that has a folder for each label and a file for each text.

    Raises:
        ValueError: there is no such folder, or nothing in it.
    """
    filesystem, inner = fsspec.core.url_to_fs(path)
    labels = sorted(PurePosixPath(found).parent.name for found in filesystem.glob(f"{inner}/*/*.txt"))
    if not labels:
        raise ValueError(f"{path!r} is no folder with a folder of .txt files for each label")
    files = {label: f"{path}/{label}/*.txt" for label in dict.fromkeys(labels)}
    # Real corpora hold single bytes that are not UTF-8; losing one letter beats losing the text.
    texts = load_dataset("text", data_files=files, sample_by="document", encoding_errors="replace")
    return concatenate_datasets([rows.add_column("label", [label] * len(rows)) for label, rows in texts.items()])


def label_name(value: object) -> str:
    """Return a label's name: 1, 1.0 and "1" are the same label, and there may be none ("")."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return "" if value is None or value != value else str(value).strip()


def sort_labels(names: Iterable[str]) -> tuple[str, ...]:
    """Sort labels by number where all are numbers, by the alphabet otherwise."""
    names = set(names)
    are_numbers = all(name.removeprefix("-").isdecimal() for name in names)
    return tuple(sorted(names, key=int if are_numbers else None))


def pick(table: Dataset, path: str, text_column: str, label_column: str) -> Dataset:
    """Keep each row's `text` and `label`.

    Raises:
        ValueError: there is no such column, no row, or a row without a label or text.
    """
    for key, column in (("text_column", text_column), ("label_column", label_column)):
        if column not in table.column_names:
            raise ValueError(f"{key}={column!r} is not in {path!r}: {', '.join(table.column_names)} would do")
    if len(table) == 0:
        raise ValueError(f"{path!r} has no row")
    if text_column == label_column:
        raise ValueError(f"text_column and label_column are both {text_column!r}: two columns would do")
    rows = table.select_columns([text_column, label_column])
    rows = rows.rename_columns({text_column: "text", label_column: "label"})
    if getattr(rows.features["text"], "dtype", None) not in ("string", "large_string"):
        raise ValueError(f"text_column={text_column!r} of {path!r} holds {rows.features['text']}, not text")
    for column, name in (("text", text_column), ("label", label_column)):
        values = rows.with_format("arrow")[:][column]
        missing = values.is_null(nan_is_null=True).to_numpy()
        if column == "label" and getattr(rows.features["label"], "dtype", None) in ("string", "large_string"):
            missing = missing | np.array([not label_name(value) for value in values.to_pylist()])
        if missing.any():
            raise ValueError(f"row {int(missing.argmax()) + 1} of {path!r} has no {name}: give it one or leave it out")
    return rows


def label_names_of(rows: Dataset) -> dict[object, str]:
    """Return the name of each value in the column `label`."""
    known = getattr(rows.features["label"], "names", None)
    return {value: known[value] if known else label_name(value) for value in rows.unique("label")}


def make_corpus(
    train: Dataset, test: Dataset, label_names: tuple[str, ...] | None = None, shown: Mapping[str, str] | None = None
) -> Corpus:
    """Replace labels by their indices.

    Args:
        train: rows of `text` and `label`.
        test: the same, of the test set.
        label_names: the labels that there are; None takes those of `train`.
        shown: a better name for some labels, for the model's `id2label`.

    Raises:
        ValueError: a label is unknown, or train and test differ in their labels.
    """
    in_train, in_test = set(label_names_of(train).values()), set(label_names_of(test).values())
    if label_names is None:
        label_names = sort_labels(in_train)
        if in_train != in_test:
            raise ValueError(
                "the labels of train and test differ: "
                f"only train has {sorted(in_train - in_test)}, only test has {sorted(in_test - in_train)}"
            )
    unknown = sorted((in_train | in_test) - set(label_names))
    if unknown:
        raise ValueError(f"labels {unknown[:5]} are unknown: {', '.join(label_names)} would do")
    if len(label_names) < 2:
        raise ValueError(f"there is one label only, {label_names[0]!r}: a classifier needs two or more")

    def indexed(rows: Dataset) -> Dataset:
        index = {value: label_names.index(name) for value, name in label_names_of(rows).items()}
        features = Features({"text": rows.features["text"], "label": Value("int64")})
        return rows.map(_index_labels, batched=True, fn_kwargs={"index": index}, features=features)

    return Corpus(indexed(train), indexed(test), tuple((shown or {}).get(name, name) for name in label_names))


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

"""Make a corpus of rows: texts, and labels by number, the same numbers in train and test."""

from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence

import numpy as np
from datasets import ClassLabel, Dataset, Value
from fsspec.utils import tokenize

from scaling_fl.data.cache import cached
from scaling_fl.data.columns import ColumnError, Columns, find_columns
from scaling_fl.data.files import read_table
from scaling_fl.data.labels import NUMBER, check_alike, label_name, sort_labels
from scaling_fl.data.parquet_rows import as_texts, is_text
from scaling_fl.data.source import Corpus
from scaling_fl.errors import preview

MOST_LABELS = 1_000  # of a file whose labels are told to others: the column of labels may be that of texts


def read_labelled(path: str, text_column: str, label_column: str, names: Sequence[str] = ()) -> Dataset:
    """Read each row's `text` and `label` from a table.

    Args:
        path: a local path or fsspec URL of a table.
        text_column: the column of the texts.
        label_column: the column of the labels.
        names: the column names of a CSV without a header.

    Raises:
        ValueError: the file cannot be read, there is no such column, no row, or a row without a label or text.
    """
    _check_two(text_column, label_column)
    return pick(read_table(path, names, (text_column, label_column)), path, text_column, label_column)


def pick(table: Dataset, path: str, text_column: str, label_column: str) -> Dataset:
    """Keep each row's `text` and `label`, the labels as texts.

    Raises:
        ValueError: there is no such column, no row, or a row without a label or text.
    """
    columns: Columns = text_column, label_column
    try:
        find_columns(columns, table.column_names)
    except ColumnError as error:
        raise ValueError(error.sentence(path, columns)) from None
    if len(table) == 0:
        raise ValueError(f"{path!r} has no row: one or more would do")
    _check_two(*columns)
    rows = table.select_columns([text_column, label_column])
    rows = rows.rename_columns({text_column: "text", label_column: "label"})
    kind = rows.data.schema.field("text").type
    if not is_text(kind):
        raise ValueError(f"text_column={text_column!r} of {path!r} holds {kind!s:.80}: a column of texts would do")
    feature = rows.features["label"]
    if not isinstance(feature, Value | ClassLabel):
        raise ValueError(
            f"label_column={label_column!r} of {path!r} holds lists, records or several types of values: "
            "texts alone or numbers alone would do"
        )
    values = rows.with_format("arrow")[:]
    labels = as_texts(values["label"], getattr(feature, "names", None))
    for name, missing in ((text_column, values["text"].is_null().to_numpy()), (label_column, _is_missing(labels))):
        if missing.any():
            raise ValueError(f"row {int(missing.argmax()) + 1} of {path!r} has no {name}: give it one or leave it out")
    return rows if feature == Value("string") else _label(rows, labels, Value("string"), "as texts")


def _check_two(text_column: str, label_column: str) -> None:
    if text_column == label_column:
        raise ValueError(f"text_column and label_column are both {text_column!r}: two columns would do")


def _is_missing(labels: Sequence[str | None]) -> np.ndarray:
    """Tell which labels are none."""
    names = {label: label_name(label) for label in set(labels)}
    # Among words "nan" may be one, as the code of a language; among numbers it stands for none.
    words = {name for name in names.values() if not NUMBER.fullmatch(name)}
    none = {"", *words} if {word.lower() for word in words} <= {"", "nan"} else {""}
    return np.array([names[label] in none for label in labels])


def _label(rows: Dataset, labels: Sequence[object] | np.ndarray, feature: Value, *why: object) -> Dataset:
    """Replace the labels. They stay in memory, beside texts that stay in their file."""
    fingerprint = tokenize(rows._fingerprint, *why)  # what datasets would make of all labels takes long
    return cached(
        rows,
        lambda rows: rows.remove_columns("label").add_column(
            "label", labels, feature=feature, new_fingerprint=fingerprint
        ),
    )


def label_names_of(rows: Dataset) -> dict[object, str]:
    """Return the name of each value in the column `label`."""
    feature = rows.features["label"]
    known = feature.names if isinstance(feature, ClassLabel) else None
    return {value: label_name(known[value] if known else value) for value in rows.unique("label")}


def make_corpus(
    train: Dataset, test: Dataset, known: Mapping[str, str] | None = None, named: Sequence[str] = ()
) -> Corpus:
    """Replace labels by their indices.

    Args:
        train: rows of `text` and `label`.
        test: the same, of the test set.
        known: the name of each label that the task has; None takes those of `train` as they are.
        named: the labels that there may be, in the order of the classes, where the task does not know. Then train and
            test may lack some.

    Raises:
        ValueError: a label is unknown, train has one only, or train and test differ in their labels.
    """
    in_train, in_test = set(label_names_of(train).values()), set(label_names_of(test).values())
    is_known = known is not None
    known = known or {name: name for name in named or sort_labels(in_train | in_test)}
    names = tuple(known.values())
    check_alike({*known, *names, *in_train, *in_test})
    unknown = (in_train | in_test).difference(known, names)
    if unknown:
        would_do = preview(dict.fromkeys([*known, *names]))
        raise ValueError(f"there are unknown labels, {preview(sort_labels(unknown))}: {would_do} would do")
    if not named:
        if len(in_train) < 2:
            raise ValueError(
                f"there is one label only, {preview(in_train)}: a classifier needs two or more to train on"
            )
        in_train, in_test = ({known.get(name, name) for name in found} for found in (in_train, in_test))
        only_train, only_test = (sort_labels(only) for only in (in_train - in_test, in_test - in_train))
        # A small test set may well lack a label that the task is known to have.
        if only_test or (only_train and not is_known):
            raise ValueError(
                "the labels of train and test differ, and the same in both would do: "
                f"{preview(only_train) or 'none'} only in train, {preview(only_test) or 'none'} only in test"
            )
    return Corpus(index_labels(train, names, known), index_labels(test, names, known), names)


def index_labels(rows: Dataset, names: Sequence[str], known: Mapping[str, str] | None = None) -> Dataset:
    """Replace each label by the index of its name in `names`."""
    known = known or {}
    index = {value: names.index(known.get(name, name)) for value, name in label_names_of(rows).items()}
    values = rows.with_format("arrow")[:]["label"].to_pylist()
    return _label(rows, np.array([index[value] for value in values]), Value("int64"), tuple(names), dict(known))


def check_labels(rows: Dataset, known: Mapping[str, str] | None) -> list[str]:
    """Return the labels of a file before others are told of them.

    Args:
        rows: of `text` and `label`.
        known: the name of each label that there may be, if that is known.

    Raises:
        ValueError: a label is unknown, or there are so many that they may be texts.
    """
    found = label_names_of(rows)
    names = sorted(set(found.values()))
    if known is None and len(names) > MOST_LABELS:
        raise ValueError(f"label_column: expected at most {MOST_LABELS:,} different labels, got {len(names):,}")
    unknown = set(names).difference(known, known.values()) if known is not None else ()
    for number, value in enumerate(rows["label"], start=1) if unknown else ():
        if found[value] in unknown:
            raise ValueError(
                f"row {number}: expected a label out of {preview(known or ())}, got {preview([found[value]])}"
            )
    return names


def agree_on_labels(
    sites: Mapping[str, Mapping[str, Collection[str]]], known: Mapping[str, str] | None
) -> tuple[str, ...]:
    """Return the names of the labels of sites that have files of their own.

    Args:
        sites: what each site is called -> "train" and perhaps "test" -> the labels in that file.
        known: the name of each label that there may be; None takes those that two sites or more train on.

    Raises:
        ValueError: a label is of one site only, or there is one only, or no test file.
    """
    if not any("test" in labels for labels in sites.values()):
        raise ValueError("no site has a test file: [training file, test file] in site_paths of one or more would do")
    holders: defaultdict[str, dict[str, set[str]]] = defaultdict(lambda: {"train": set(), "test": set()})
    for site, labels in sites.items():
        for split, names in labels.items():
            for name in names:
                holders[known.get(name, name) if known else name][split].add(site)
    in_train = sort_labels(name for name, of in holders.items() if of["train"])
    names = tuple(dict.fromkeys(known.values())) if known else in_train
    check_alike({*names, *holders})
    of_one = []
    for name, of in sorted(holders.items()):
        have_it = of["train"] | of["test"]
        if known is None and len(have_it) == 1 and len(sites) > 1:
            of_one.append(f"{preview([name])} (of {min(have_it)})")
    if of_one:
        raise ValueError(
            f"labels: expected each at two sites or more, got {', '.join(of_one[:8])}. The setting labels can name "
            "those that there may be"
        )
    if len(names) < 2:
        raise ValueError(f"there is one label only, {preview(names)}: a classifier needs two or more to train on")
    return names

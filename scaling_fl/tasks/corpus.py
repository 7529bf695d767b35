"""Make a corpus of rows: texts, and labels by number, the same numbers in train and test."""

import re
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from fractions import Fraction
from typing import Any

import numpy as np
from datasets import ClassLabel, Dataset, Features, Value

from scaling_fl.tasks.task import Corpus

NUMBER = re.compile(r"-?[0-9]+(\.[0-9]+)?")


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
            raise ValueError(f"{key}={column!r} is not in {path!r}: {_some(map(repr, table.column_names))} would do")
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
        names = [label_name(value) for value in values.to_pylist()]
        # Among words "nan" may be one, as the code of a language; among numbers it stands for none.
        words = {name for name in names if not NUMBER.fullmatch(name)}
        none = {"", *words} if {word.lower() for word in words} <= {"", "nan"} else {""}
        missing = missing | np.array([name in none for name in names])
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
    is_known = known is not None
    known = known or {name: name for name in sort_labels(in_train | in_test)}
    names = tuple(known.values())
    unknown = (in_train | in_test).difference(known, names)
    if unknown:
        would_do = ", ".join({**known, **dict.fromkeys(names)})
        raise ValueError(f"there are unknown labels, {_some(sort_labels(unknown))}: {would_do} would do")
    if len(in_train) < 2:
        raise ValueError(f"there is one label only, {_some(in_train)}: a classifier needs two or more to train on")
    in_train, in_test = ({known.get(name, name) for name in found} for found in (in_train, in_test))
    only_train, only_test = (sort_labels(only) for only in (in_train - in_test, in_test - in_train))
    # A small test set may well lack a label that the task is known to have.
    if only_test or (only_train and not is_known):
        raise ValueError(
            "the labels of train and test differ, and the same in both would do: "
            f"{_some(only_train) or 'none'} only in train, {_some(only_test) or 'none'} only in test"
        )
    return Corpus(index_labels(train, names, known), index_labels(test, names, known), names)


def index_labels(rows: Dataset, names: Sequence[str], known: Mapping[str, str] | None = None) -> Dataset:
    """Replace each label by the index of its name in `names`."""
    found = {value: (known or {}).get(name, name) for value, name in label_names_of(rows).items()}
    index = {value: names.index(name) for value, name in found.items()}
    features = Features({"text": rows.features["text"], "label": Value("int64")})
    return rows.map(_index_labels, batched=True, fn_kwargs={"index": index}, features=features)


def agree_on_labels(
    sites: Mapping[str, Mapping[str, Collection[str]]], known: Mapping[str, str] | None
) -> tuple[str, ...]:
    """Return the names of the labels of sites that have files of their own.

    Args:
        sites: what each site is called -> "train" and perhaps "test" -> the labels in that file.
        known: the name of each label that there may be; None takes those that two sites or more train on.

    Raises:
        ValueError: a label is unknown, or known to one site only, or there is one only, or no test file.
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
    of_one = []
    for name, of in sorted(holders.items()):
        have_it = of["train"] | of["test"]
        if name not in names:
            raise ValueError(f"{min(have_it)} has the unknown label {_some([name])}: {_some(names)} would do")
        if known is None and len(have_it) == 1 and len(sites) > 1:
            of_one.append(f"{_some([name])} (of {min(have_it)})")
    if of_one:
        raise ValueError(
            f"labels that one site alone has are taken for slips: {', '.join(of_one[:8])}; "
            "labels that two sites or more have would do"
        )
    if len(in_train) < 2:
        raise ValueError(f"there is one label only, {_some(in_train)}: a classifier needs two or more to train on")
    return names


def _index_labels(rows: dict[str, list], *, index: dict[object, int]) -> dict[str, list]:
    return {"text": rows["text"], "label": [index[label] for label in rows["label"]]}

"""Read the labelled texts of a task: rows with a `text`, a `label` by its name, and perhaps the name of a `site`."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from datasets import ClassLabel, Dataset, Value
from fsspec.utils import tokenize

from scaling_fl.data.cache import cached, mapped
from scaling_fl.data.columns import KEYS, NAMES, ColumnError, Columns, find_columns
from scaling_fl.data.conversation_rows import read_conversations
from scaling_fl.data.labels import NUMBER, check_alike, label_name, name_site, settle_labels
from scaling_fl.data.parquet_rows import as_texts, check_texts
from scaling_fl.data.tasks import find_task, name_labels
from scaling_fl.data.tasks.task import Task
from scaling_fl.errors import preview

SPLITS = ("train", "test")
GivenColumns = tuple[str | None, ...]  # of texts, labels, and perhaps sites; None takes the task's, if it has any


def read_file(
    task_name: str,
    path: str,
    split: str,
    columns: GivenColumns = (None, None),
    known: Mapping[str, str] | None = None,
) -> Dataset:
    """Read the rows of one file of a task.

    Args:
        task_name: a key of TASKS.
        path: of the file.
        split: train or test.
        columns: of the texts, of the labels, and perhaps of the sites; None takes the task's.
        known: each possible label -> its name; None takes all labels as they are.

    Raises:
        ValueError: the task takes no files, or the file is missing or not as it should be.
    """
    task = find_task(task_name)
    if task.is_generative:
        return read_conversations(path, split, *columns[2:] if split == "train" else ())
    if task.read is None:
        raise ValueError(f"task_name: expected a task that takes files, got {task_name!r}, which brings its own texts")
    wanted = _columns(task, columns, split)
    rows = pick(task.read(path, split, wanted), path, wanted, known)
    return mapped(rows, task.clean, batched=True) if task.clean else rows


def read_task(
    task_name: str,
    train_path: str | None = None,
    test_path: str | None = None,
    columns: GivenColumns = (None, None),
    labels: Sequence[object] | None = None,
    *,
    needs_test: bool = True,
) -> tuple[dict[str, Dataset], tuple[str, ...]]:
    """Read the training and the test set of a task: train and test -> rows, and the names of the labels.

    Args:
        task_name: a key of TASKS.
        train_path: the training file, of a task that takes files.
        test_path: the test file.
        columns: of the texts, of the labels, and perhaps of the sites, which only the training set has; None takes the
            task's.
        labels: the possible labels, in the order of the classes; None takes the task's or those of the data.
        needs_test: False leaves the test set out where its path is missing.

    Raises:
        ValueError: there is no such task, or its data is missing or not as it should be.
    """
    task, known = find_task(task_name), name_labels(task_name, labels)
    paths = {"train_path": train_path, "test_path": test_path}
    if task.read is None and not task.is_generative:
        for key, value in [*paths.items(), *zip(KEYS, columns[:2], strict=False)]:
            if value is not None:
                raise ValueError(f"{key}: expected None, as task_name={task_name!r} has its own texts, got {value!r}")
    if task.read_own and not any(paths.values()):
        rows = [
            pick(table, task_name, _columns(task, columns, split), known)
            for split, table in zip(SPLITS, task.read_own(), strict=True)
        ]
    else:
        if train_path is not None and test_path is None and task.is_whole(train_path):
            paths["test_path"] = train_path
        if test_path is None and not needs_test:
            del paths["test_path"]
        _check_paths(task_name, paths)
        rows = [
            read_file(task_name, str(path), split, columns, known)
            for split, path in zip(SPLITS, paths.values(), strict=False)
        ]
    by_split = dict(zip(SPLITS, rows, strict=False))
    if task.is_generative:
        return by_split, ()
    found = [(split, split, of_split.unique("label")) for split, of_split in by_split.items()]
    return by_split, settle_labels(found, known, may_lack=labels is not None)


def _check_paths(task_name: str, paths: Mapping[str, str | None]) -> None:
    """Refuse paths that are missing."""
    if missing := [key for key, path in paths.items() if path is None]:
        hint = ". validation_fraction holds out a part of the training data" * (missing == ["test_path"])
        raise ValueError(f"{' and '.join(missing)}: expected a path or URL for task_name={task_name!r}, got None{hint}")


def sample(rows: Dataset, count: int | None, seed: int) -> Dataset:
    """Return at most `count` of the rows, at random by `seed`; None returns all."""
    if count is None or count >= len(rows):
        return rows
    return rows.select(np.random.default_rng(seed).permutation(len(rows))[:count])


def pick(table: Dataset, place: str, columns: Columns, known: Mapping[str, str] | None = None) -> Dataset:
    """Return each row's `text` and `label`, all labels by their names, and `site`, if there is a column of it.

    Args:
        table: of any columns.
        place: from which it was read.
        columns: of the texts, of the labels, and perhaps of the names of sites.
        known: each possible label -> its name; None takes all labels as they are.

    Raises:
        ValueError: there is no such column, no row, a row without a label, text or site, or a label that is not known.
    """
    try:
        find_columns(columns, table.column_names, place)
        check_texts(table.data.schema, columns[0])
    except ColumnError:
        raise
    except ValueError as error:
        raise ValueError(f"{place!r}: {error}") from None
    if len(table) == 0:
        raise ValueError(f"{place!r}: expected one row or more, got none")
    rows = table.select_columns(list(columns)).rename_columns(dict(zip(columns, NAMES, strict=False)))
    values = rows.with_format("arrow")[:]
    texts = {
        name: _as_texts(values, rows, name, column, place) for column, name in zip(columns[1:], NAMES[1:], strict=False)
    }
    labels, sites = texts["label"], [name_site(site) for site in texts.get("site", ())]
    names = {label: label_name(label) for label in set(labels)}
    none_names = _none_of(names)
    none = {label for label, name in names.items() if name in none_names}
    is_missing = [values["text"].is_null().to_numpy(), np.array([label in none for label in labels])]
    is_missing += [np.array([site == "" for site in sites])] * ("site" in texts)
    for column, missing in zip(columns, is_missing, strict=True):
        if missing.any():
            number = int(missing.argmax()) + 1
            raise ValueError(f"{place!r}: row {number}: expected a value in {column!r}, got none. Leave the row out")
    if known is not None:
        _check_known(labels, names, known, place)
        names = {label: known.get(name, name) for label, name in names.items()}
    rows = _replace(rows, "label", labels, [names[label] for label in labels], sorted(names.items()))
    return _replace(rows, "site", texts["site"], sites) if "site" in texts else rows


def _as_texts(values: Any, rows: Dataset, name: str, column: str, place: str) -> list[str | None]:
    """Return the values of a column, which has the name of `column` at its place, as texts."""
    feature, place = rows.features[name], f"{place!r}: {KEYS[NAMES.index(name)]}={column!r}"
    if not isinstance(feature, Value | ClassLabel):
        raise ValueError(
            f"{place}: expected texts alone or numbers alone, got lists, records or several types of values"
        )
    return as_texts(values[name], place, getattr(feature, "names", None))


def _replace(rows: Dataset, name: str, before: list[str | None], by_row: list[str], how: object = None) -> Dataset:
    """Return rows with other texts in a column, if they differ; the new ones depend on the rows and on `how`."""
    if rows.features[name] == Value("string") and before == by_row:
        return rows
    # The texts stay in memory, beside those that stay in their file. To hash all of them would take datasets long.
    new = {"feature": Value("string"), "new_fingerprint": tokenize(rows._fingerprint, name, how)}
    return cached(rows, lambda rows: rows.remove_columns(name).add_column(name, by_row, **new))


def _columns(task: Task, given: GivenColumns, split: str) -> Columns:
    """Return the columns to read; those of the sites are read for training."""
    columns: Columns = given[0] or task.columns[0], given[1] or task.columns[1]
    if split == "train" and given[2:] and given[2] is not None:
        columns = (*columns, given[2])
    for column, key in zip(columns, KEYS, strict=False):
        first = KEYS[columns.index(column)]
        if first != key:
            raise ValueError(f"{first}, {key}: expected two columns, got {column!r} for both")
    return columns


def _none_of(names: Mapping[str | None, str]) -> set[str]:
    """Return the names that stand for no label. Among words "nan" may be one, as the code of a language."""
    words = {name for name in names.values() if not NUMBER.fullmatch(name)}
    return {"", *words} if {word.lower() for word in words} <= {"", "nan"} else {""}


def _check_known(
    labels: Sequence[str | None], names: Mapping[str | None, str], known: Mapping[str, str], place: str
) -> None:
    """Refuse a label that is not one of the possible ones."""
    possible = dict.fromkeys([*known, *known.values()])
    check_alike([*possible, *names.values()])
    for number, label in enumerate(labels if set(names.values()) - set(possible) else (), start=1):
        if names[label] not in possible:
            raise ValueError(
                f"{place!r}: row {number}: expected a label out of {preview(possible)}, got {preview([names[label]])}"
            )

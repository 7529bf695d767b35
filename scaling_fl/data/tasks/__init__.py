"""What is learned: a name for each task, and how its texts are read."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from datasets import Dataset

from scaling_fl.data.corpus import make_corpus
from scaling_fl.data.labels import label_name
from scaling_fl.data.source import Corpus, Source
from scaling_fl.data.tasks import bbcnews, crepe, imdb, spooky_author, text

TASKS: dict[str, Source] = {
    "bbcnews": bbcnews.SOURCE,
    "agnews": crepe.AGNEWS,
    "imdb": imdb.SOURCE,
    "yelp": crepe.YELP,
    "spooky_author": spooky_author.SOURCE,
    "text": text.SOURCE,
}


def task_defaults(task_name: str) -> dict[str, Any]:
    """Return the configuration that suits a task; none for one that is unknown."""
    return TASKS[task_name].defaults if task_name in TASKS else {}


def read_task(
    task_name: str,
    train_path: str | None = None,
    test_path: str | None = None,
    text_column: str | None = None,
    label_column: str | None = None,
    labels: Sequence[object] | None = None,
) -> Corpus:
    """Read a task's labelled texts.

    Args:
        task_name: a key of TASKS.
        train_path: the training file, of a task that takes files.
        test_path: the test file.
        text_column: the column of the texts; None takes the task's own.
        label_column: the column of the labels; None takes the task's own.
        labels: the labels that there may be, in the order of the classes; None takes the task's own or those found.

    Raises:
        ValueError: there is no such task, or its data is missing or not what it should be.
    """
    source, columns = _source(task_name), (text_column, label_column)
    named = tuple(name_labels(task_name, labels) or ())
    given = {"train_path": train_path, "test_path": test_path}
    missing = [key for key, path in given.items() if path is None]
    if source.read_own and len(missing) == 2:
        return make_corpus(*source.read_own(*columns), source.labels, named)
    if source.read is None:
        key, path = next((key, path) for key, path in given.items() if path is not None)
        raise ValueError(f"task_name={task_name!r} brings its own texts: leave out {key}={path!r}")
    if train_path is not None and test_path is None and source.is_whole(train_path):
        test_path = train_path
    if train_path is None or test_path is None:
        raise ValueError(f"task_name={task_name!r} needs {' and '.join(missing)}: a local path or any fsspec URL")
    train, test = (source.read(path, split, *columns) for path, split in ((train_path, "train"), (test_path, "test")))
    return make_corpus(train, test, source.labels, named)


def name_labels(task_name: str, labels: Sequence[object] | None) -> Mapping[str, str] | None:
    """Return the name of each label that there may be; None if that is for the data to say.

    Args:
        task_name: a key of TASKS.
        labels: as the setting has them.

    Raises:
        ValueError: the task has its own, or two of the labels are the same one, or one is none.
    """
    source = _source(task_name)
    if labels is None:
        return source.labels
    if source.labels is not None:
        own = ", ".join(dict.fromkeys(source.labels.values()))
        raise ValueError(f"labels: expected None, as task_name={task_name!r} has its own ({own}), got {list(labels)!r}")
    names = [label_name(label) for label in labels]
    if len(set(names)) < len(names) or "" in names:
        raise ValueError(f"labels: expected names that differ and are not empty, got {list(labels)!r}")
    return {name: name for name in names}


def read_rows(
    task_name: str, path: str, split: str, text_column: str | None = None, label_column: str | None = None
) -> Dataset:
    """Read the rows of one file of a task, their labels as they stand there.

    Args:
        task_name: a key of TASKS.
        path: of the file.
        split: train or test.
        text_column: the column of the texts; None takes the task's own.
        label_column: the column of the labels; None takes the task's own.

    Raises:
        ValueError: there is no such task, it takes no files, or the file is missing or not what it should be.
    """
    source = _source(task_name)
    if source.read is None:
        raise ValueError(f"task_name={task_name!r} brings its own texts: without {path!r}, or another task, would do")
    return source.read(path, split, text_column, label_column)


def _source(task_name: str) -> Source:
    if task_name not in TASKS:
        raise ValueError(f"task_name={task_name!r} is unknown: {', '.join(TASKS)} would do")
    return TASKS[task_name]


def sample(corpus: Corpus, max_train: int | None, max_test: int | None, seed: int) -> Corpus:
    """Return the corpus with at most so many examples, drawn at random by `seed`."""

    def drawn(rows: Dataset, count: int | None) -> Dataset:
        if count is None or count >= len(rows):
            return rows
        return rows.select(np.random.default_rng(seed).permutation(len(rows))[:count])

    return Corpus(drawn(corpus.train, max_train), drawn(corpus.test, max_test), corpus.label_names)

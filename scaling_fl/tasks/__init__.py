"""What is learned: a name for each task, and how its texts are read."""

from typing import Any

from datasets import Dataset

from scaling_fl.tasks import bbcnews, crepe, imdb, spooky_author, text
from scaling_fl.tasks.corpus import make_corpus
from scaling_fl.tasks.task import Corpus, Source

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
) -> Corpus:
    """Read a task's labelled texts.

    Raises:
        ValueError: there is no such task, or its data is missing or not what it should be.
    """
    source, columns = _source(task_name), (text_column, label_column)
    given = {"train_path": train_path, "test_path": test_path}
    missing = [key for key, path in given.items() if path is None]
    if source.read_own and len(missing) == 2:
        return make_corpus(*source.read_own(*columns), source.labels)
    if source.read is None:
        key, path = next((key, path) for key, path in given.items() if path is not None)
        raise ValueError(f"task_name={task_name!r} brings its own texts: leave out {key}={path!r}")
    if train_path is not None and test_path is None and source.is_whole(train_path):
        test_path = train_path
    if train_path is None or test_path is None:
        raise ValueError(f"task_name={task_name!r} needs {' and '.join(missing)}: a local path or any fsspec URL")
    train, test = (source.read(path, split, *columns) for path, split in ((train_path, "train"), (test_path, "test")))
    return make_corpus(train, test, source.labels)


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

    def drawn(rows: Any, count: int | None) -> Any:
        return rows if count is None or count >= len(rows) else rows.shuffle(seed=seed).select(range(count))

    return Corpus(drawn(corpus.train, max_train), drawn(corpus.test, max_test), corpus.label_names)

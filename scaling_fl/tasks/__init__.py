"""What is learned: a name for each task, and how its texts are read."""

from typing import Any

from scaling_fl.tasks import bbcnews, crepe, imdb, spooky_author, text
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
    if task_name not in TASKS:
        raise ValueError(f"task_name={task_name!r} is unknown: {', '.join(TASKS)} would do")
    return TASKS[task_name].read(train_path, test_path, text_column, label_column)


def sample(corpus: Corpus, max_train: int | None, max_test: int | None, seed: int) -> Corpus:
    """Return the corpus with at most so many examples, drawn at random by `seed`."""

    def drawn(rows: Any, count: int | None) -> Any:
        return rows if count is None or count >= len(rows) else rows.shuffle(seed=seed).select(range(count))

    return Corpus(drawn(corpus.train, max_train), drawn(corpus.test, max_test), corpus.label_names)

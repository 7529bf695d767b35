"""The tasks by name."""

from collections.abc import Mapping, Sequence
from typing import Any

from scaling_fl.data.labels import label_name
from scaling_fl.data.tasks import bbcnews, crepe, imdb, instruct, spooky_author, text
from scaling_fl.data.tasks.task import Task

TASKS: dict[str, Task] = {
    "bbcnews": bbcnews.TASK,
    "agnews": crepe.AGNEWS,
    "imdb": imdb.TASK,
    "yelp": crepe.YELP,
    "spooky_author": spooky_author.TASK,
    "text": text.TASK,
    "instruct": instruct.TASK,
}


def find_task(task_name: str) -> Task:
    """Return a task.

    Raises:
        ValueError: there is no such task.
    """
    if task_name not in TASKS:
        raise ValueError(f"task_name: expected {', '.join(TASKS)}, got {task_name!r}")
    return TASKS[task_name]


def task_defaults(task_name: str) -> dict[str, Any]:
    """Return the configuration that suits a task; none for one that is unknown."""
    return TASKS[task_name].defaults if task_name in TASKS else {}


def is_generative(task_name: str) -> bool:
    """Tell whether a language model learns the answers of a task; False for one that is unknown."""
    return task_name in TASKS and TASKS[task_name].is_generative


def name_labels(task_name: str, labels: Sequence[object] | None) -> Mapping[str, str] | None:
    """Return each possible label -> its name; None to take the labels of the data.

    Args:
        task_name: a key of TASKS.
        labels: as the setting has them.

    Raises:
        ValueError: the task has labels itself, or two of the labels are the same one, or one is empty.
    """
    task = find_task(task_name)
    known = task.labels
    if labels is None:
        return known
    if task.is_generative:
        raise ValueError(f"labels: expected None, as task_name={task_name!r} has no labels, got {list(labels)!r}")
    if known is not None:
        own = ", ".join(dict.fromkeys(known.values()))
        raise ValueError(f"labels: expected None, as task_name={task_name!r} has its own ({own}), got {list(labels)!r}")
    names = [label_name(label) for label in labels]
    if len(set(names)) < len(names) or "" in names:
        raise ValueError(f"labels: expected names that differ and are not empty, got {list(labels)!r}")
    return {name: name for name in names}

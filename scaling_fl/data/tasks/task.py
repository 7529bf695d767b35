"""What makes a task."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from datasets import Dataset

from scaling_fl.data.columns import Columns
from scaling_fl.data.files import read_table

Read = Callable[[str, str, Columns], Dataset]


@dataclass(frozen=True)
class Task:
    """A task: how its tables are read, which labels it has, and the configuration that suits it.

    Args:
        read: takes a path, "train" or "test", and the columns to read, and returns a table; None if the task takes no
            files.
        read_own: returns the training and the test table of a task that brings them.
        columns: of the texts and of the labels, unless the settings name others.
        labels: each label in the files -> its name; None takes the labels that the files have.
        clean: changes a batch of texts.
        is_whole: tells whether a path stands for both, train and test.
        defaults: of settings.
        is_generative: a row is a conversation, of which a language model learns the answers. Then the task has neither
            columns nor labels, and `read` is not used.
    """

    read: Read | None = None
    read_own: Callable[[], tuple[Dataset, Dataset]] | None = None
    columns: Columns = ("text", "label")
    labels: Mapping[str, str] | None = None
    clean: Callable[[dict[str, list]], dict[str, list]] | None = None
    is_whole: Callable[[str], bool] = lambda path: False
    defaults: dict[str, Any] = field(default_factory=dict)
    is_generative: bool = False


def from_table(*header: str) -> Read:
    """Return what reads tables; `header` names the columns of a CSV that has no header."""
    return lambda path, split, columns: read_table(path, header, columns)

"""What is learned: labelled texts, their tokens, and the score of a model on them."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from datasets import Dataset


@dataclass(frozen=True)
class Corpus:
    """Labelled texts as read: columns `text` (string) and `label` (index into `label_names`)."""

    train: Dataset
    test: Dataset
    label_names: tuple[str, ...]


@dataclass(frozen=True)
class Source:
    """A task: how its rows are read, what labels there may be, and the configuration that suits it.

    Rows have a `text` and a `label`. The columns that they are read from may be None, for the task's own.
    """

    read: Callable[[str, str, str | None, str | None], Dataset] | None = None  # path, "train" or "test", columns
    read_own: Callable[[str | None, str | None], tuple[Dataset, Dataset]] | None = None  # of the task that has its own
    is_whole: Callable[[str], bool] = lambda path: False  # one path stands for both, train and test
    labels: Mapping[str, str] | None = None  # label -> name; None takes those of the data
    defaults: dict[str, Any] = field(default_factory=dict)

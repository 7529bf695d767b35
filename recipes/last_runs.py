"""The last recorded runs, for the recipes that print or ask something after them."""

import os

from scaling_fl import Run
from scaling_fl.records.observers import runs_dir


def last_runs(count: int) -> list[Run]:
    """Return the last recorded runs, in their order."""
    numbers = sorted(int(name) for name in os.listdir(runs_dir()) if name.isdigit())
    return [Run.load(os.path.join(runs_dir(), str(number))) for number in numbers[-count:]]

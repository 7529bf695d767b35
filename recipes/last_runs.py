"""The last recorded runs, for the recipes that print or ask something after them."""

import sys
from pathlib import Path

from scaling_fl import Run
from scaling_fl.records.observers import runs_dir


def last_runs(count: int) -> list[Run]:
    """Return the last runs that are complete, in their order; end the program if there are fewer.

    Runs that others have started since, which are not complete, and runs that failed, are none of them.
    """
    paths = [path.parent for path in Path(runs_dir()).glob("*/run.json") if path.parent.name.isdigit()]
    runs = (
        Run.load(path) for path in sorted(paths, key=lambda path: int(path.name)) if (path / "config.json").exists()
    )
    found = [run for run in runs if run.status == "COMPLETED"][-count:]
    if len(found) < count:
        sys.exit(f"error: {runs_dir()}: expected at least {count} complete runs, got {len(found)}")
    return found

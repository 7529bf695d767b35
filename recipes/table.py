"""Print a table of runs of recipes from their records: recipes/table.py NAME=FOLDER ... --machine "2 cores, 24 GB".

NAME is that of a recipe, such as flowertune_nlp or nvflare_peft, and FOLDER that of its run.
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from scaling_fl import Run, Settings
from scaling_fl.command.arguments import read_file
from scaling_fl.training.metrics import Metrics

# Files whose settings come before those of a recipe's own.
SHARED = {
    **{f"flowertune_{name}": "flowertune" for name in ("nlp", "finance", "medical", "code", "openllama")},
    "nvflare_peft": "nvflare_sft",
}
PATHS = {"model", "train_path", "test_path"}  # of which the value says nothing to others
QUIET = {"report", "job_name", "checkpoints_dir", "author"}  # which change no result
COLUMNS = (
    *("recipe", "settings that differ", "rounds", "minutes", "peak MB", "MB sent"),
    *("loss before", "loss after", "accuracy", "machine"),
)


def settings_of(recipe: str) -> dict[str, Any]:
    """Return the settings of a recipe's files."""
    folder = Path(__file__).parent
    files = [folder / f"{name}.yaml" for name in (SHARED.get(recipe), recipe) if name]
    return {name: value for path in files for name, value in read_file(str(path)).items()}


def find_changed(recipe: str, run: Run) -> str:
    """Return the settings of a run that differ from those of its recipe."""
    given, own = vars(run.settings), vars(Settings(**settings_of(recipe)))
    changed = [name for name, value in given.items() if name not in QUIET and value != own[name]]
    return ", ".join(name if name in PATHS else f"{name}={given[name]}" for name in changed) or "none"


def count_bytes(run: Run, trained: list[Metrics]) -> int:
    """Return the bytes between a server and the sites of all rounds, both ways, as FlowerTune counts them."""
    if run.settings.centralised:
        return 0
    message = json.loads(Path(run.folder, "info.json").read_text())["message"]
    size = message["bytes" if run.settings.comm_dtype == "exact" else "bytes_sent"]
    return 2 * size * sum(metrics["sites.cohort"] for metrics in trained)


def make_row(recipe: str, run: Run, machine: str) -> Iterator[str]:
    """Yield the cells of a run."""
    trained = [metrics for metrics in run.history if metrics["round"] > 0]
    losses = [metrics["validation.loss"] for metrics in run.history if "validation.loss" in metrics]
    yield recipe
    yield find_changed(recipe, run)
    yield str(len(trained))
    yield f"{sum(metrics['time.round_s'] for metrics in run.history) / 60:.2f}"
    yield f"{max(size for metrics in trained for size in metrics['site.memory_mb'].values()):,.0f}"
    yield f"{count_bytes(run, trained) / 1e6:,.1f}"
    yield f"{losses[0]:.4f}"
    yield f"{losses[-1]:.4f}"
    yield f"{run.history[-1]['validation.accuracy']:.4f}"
    yield machine


def main() -> None:
    """Print the table as Markdown."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+", metavar="NAME=FOLDER")
    parser.add_argument("--machine", required=True, help="such as '2 cores, 24 GB'")
    given = parser.parse_args()
    lines = [COLUMNS, ("---",) * len(COLUMNS)]
    for word in given.runs:
        recipe, _, folder = word.partition("=")
        lines.append(tuple(make_row(recipe, Run.load(folder), given.machine)))
    print("\n".join(f"| {' | '.join(cells)} |" for cells in lines))


if __name__ == "__main__":
    main()

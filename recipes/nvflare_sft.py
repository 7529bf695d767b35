"""Print the losses by step of the three runs of recipes/nvflare_sft.sh beside each other.

They are a centralised run, one site, and one site with small messages: the last three, or those of the folders that
are given.
"""

import sys
from collections.abc import Iterator, Sequence

from last_runs import last_runs

from scaling_fl import Run

NAMES = "centralised", "one site", "half messages"


def losses_of(run: Run) -> dict[int, float]:
    """Return the training loss of a run by the number of the step, of each point that was recorded."""
    return {
        step: loss
        for metrics in run.history
        for step, loss in zip(metrics.get("step.number", ()), metrics.get("step.loss", ()), strict=True)
    }


def compare(runs: Sequence[Run]) -> Iterator[str]:
    """Yield the lines of the table, and what follows from it. Several sites have fewer steps than a centralised run."""
    losses = [losses_of(run) for run in runs]
    yield "{:>10}{:>15}{:>15}{:>15}".format("step", *NAMES)
    for step in losses[0]:
        yield f"{step:>10}" + "".join(f"{of_run[step]:>15.4f}" if step in of_run else f"{'-':>15}" for of_run in losses)
    last = [run.history[-1]["validation.loss"] for run in runs]
    yield f"{'validation':>10}" + "".join(f"{loss:>15.4f}" for loss in last)
    alike = "the same" if runs[0].sha256 == runs[1].sha256 else "not the same"
    yield f"The weights of the centralised run and of the one site are {alike}, bit for bit."
    if changes := [abs(losses[2][step] - loss) for step, loss in losses[1].items() if step in losses[2]]:
        yield f"With half of the bytes in a message, no training loss changes by more than {max(changes):.1e}."


if __name__ == "__main__":
    print("\n" + "\n".join(compare([Run.load(path) for path in sys.argv[1:]] or last_runs(3))))

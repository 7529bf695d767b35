"""Print the figures that Flower published for its quickstart with Hugging Face beside those of a run.

The run is the last one, or that of the folder that is given.
"""

import os
import sys
from collections.abc import Iterator

from last_runs import last_runs

from scaling_fl import Run

MIB, SECONDS = 16.74, 151.02  # Flower writes MB
LOSSES = 0.022265, 0.022134, 0.022124
TO_MEAN = 500 / 16  # each is a sum of the means of 16 batches, over 500 examples
# Name, metric, what Flower published for rounds 1, 2 and 3, and what the metric is divided by.
TABLE = (
    ("validation accuracy", "validation.accuracy", (0.5024, 0.5176, 0.5042), 1.0),
    ("validation loss", "validation.loss", tuple(loss * TO_MEAN for loss in LOSSES), 1.0),
    ("the same as Flower prints it", "validation.loss", LOSSES, TO_MEAN),
)


def compare(run: Run) -> Iterator[tuple[str, str, str]]:
    """Yield lines of the table: the name of a figure, Flower's, and that of the run."""
    size = sum(weight.numel() * weight.element_size() for weight in run.model.state_dict().values())
    yield "size of the model, MiB", f"{MIB}", f"{size / 2**20:.2f}"
    yield "seconds, all rounds", f"{SECONDS}", f"{sum(metrics['time.round_s'] for metrics in run.history):.2f}"
    for name, metric, published, divisor in TABLE:
        for metrics in run.history:
            round_ = metrics["round"]
            if round_ > 0 and metric in metrics:
                theirs = f"{published[round_ - 1]:.4f}" if round_ <= len(published) else "-"
                yield f"{name}, round {round_}", theirs, f"{metrics[metric] / divisor:.4f}"


def main() -> None:
    """Print the table, and what Flower's figures mean."""
    run = Run.load(sys.argv[1]) if len(sys.argv) > 1 else last_runs(1)[0]
    print(f"\n{'':40} {'Flower':>10} {os.path.relpath(run.folder):>10}")
    for name, theirs, ours in compare(run):
        print(f"{name:40} {theirs:>10} {ours:>10}")
    print(
        "Flower prints MiB as MB, and divides the sum of a site's 16 batch losses by its 500 examples, so that its "
        "losses\nare some 32 times too small. Its seconds are those of its authors' machine."
    )


if __name__ == "__main__":
    main()

"""Draw the partitions: how many examples of each label each of ten sites has.

The data is 4,000 examples of six labels, one twice as common as the others. For `natural` they have 40 owners with one
to three labels each, in ten groups.

    python benchmarks/partitions.py
"""

import argparse
from functools import partial
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from picture import shrink

from scaling_fl import PARTITIONERS, partition_indices

NUM_SITES, NUM_OWNERS = 10, 40
LABELS = np.arange(4000) % 7 % 6
PANELS = {
    "iid": "iid",
    "sizes": "sizes, linear",
    "by_label": "by_label",
    "shards": "shards, shards_per_site=2",
    "few_labels": "few_labels, labels_per_site=2",
    "dirichlet": "dirichlet, alpha=0.5",
    "dirichlet_sites": "dirichlet_sites, alpha=0.5",
    "natural": "natural, 40 owners, num_sites=10",
}
COLOURS = ("#0072b2", "#56b4e9", "#009e73", "#f2bc3e", "#d55e00", "#8a6bbf")


def choose_owners(labels: np.ndarray, seed: int) -> list[str]:
    """Return an owner for each example; owners have different sizes, and one to three labels."""
    random = np.random.default_rng(seed)
    sizes = random.lognormal(0, 1, NUM_OWNERS)
    has = np.zeros((NUM_OWNERS, labels.max() + 1), bool)
    for owner in range(NUM_OWNERS):
        has[owner, random.choice(has.shape[1], random.integers(1, 4), replace=False)] = True
    chances = (has * sizes[:, None]) / (has * sizes[:, None]).sum(axis=0)
    return [f"owner {random.choice(NUM_OWNERS, p=chances[:, label])}" for label in labels]


def draw(path: Path, seed: int) -> None:
    """Draw a panel for each partition, with a bar for each site."""
    figure = Figure(figsize=(13, 6), layout="constrained", facecolor="white")
    grid = figure.subplots(2, 4, sharex=True)
    for axes, (name, title) in zip(grid.flat, PANELS.items(), strict=True):
        given = {"owners": choose_owners(LABELS, seed)} if name == "natural" else {}
        parts = partition_indices(LABELS, NUM_SITES, partial(PARTITIONERS[name], **given), seed)
        counts = np.array([np.bincount(LABELS[part], minlength=len(COLOURS)) for part in parts])
        ends = counts.cumsum(axis=1)
        for label, colour in enumerate(COLOURS):
            axes.bar(range(NUM_SITES), counts[:, label], bottom=ends[:, label] - counts[:, label], color=colour)
        axes.set_title(title, loc="left", fontsize=11)
        axes.set_ylim(0, 1.05 * ends.max())
        axes.set_xticks(range(NUM_SITES))
        axes.spines[["top", "right"]].set_visible(False)
    for axes in grid[:, 0]:
        axes.set_ylabel("examples")
    for axes in grid[1]:
        axes.set_xlabel("site")
    figure.savefig(path, dpi=110)
    shrink(path, 1200)


def main() -> None:
    """Draw the picture of docs/partitions.md."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent.parent / "docs", help="its folder")
    parser.add_argument("--seed", type=int, default=1, help="of the partitions")
    arguments = parser.parse_args()
    draw(arguments.output / "partitions.png", arguments.seed)


if __name__ == "__main__":
    main()

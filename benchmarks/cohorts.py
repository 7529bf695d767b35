"""Show that a round costs what its cohort costs, however many sites there are.

Federations of more and more sites over one data set let twenty of them train for two steps in each round. Printed are
the seconds of a steady round, the peak memory of the process, the bytes of a checkpoint and those of a round's line in
the record, and each as a multiple of that of the smallest federation.

    python benchmarks/cohorts.py --sites 40 1000 4000
"""

import argparse
import json
import statistics
from pathlib import Path
from tempfile import TemporaryDirectory

from commands import Command, put_data, put_model

NUM_SAMPLED = 20
NUM_ROUNDS = 8
MEASURES = ("round, s", "memory, MB", "checkpoint, bytes", "record, bytes")


def measure(num_sites: int, settings: dict, folder: Path) -> tuple[float, ...]:
    """Train a federation, and return its MEASURES."""
    checkpoints = folder / f"checkpoints-{num_sites}"
    run = Command(
        folder,
        str(num_sites),
        "with",
        settings | {"num_sites": num_sites, "checkpoints_dir": str(checkpoints), "keep_checkpoints": 1},
    )
    rounds = run.rounds()
    seconds = statistics.median(of["time.train_s"] + of["time.aggregate_s"] for of in rounds[2:])
    (checkpoint,) = checkpoints.glob("round-*.pt")
    return seconds, rounds[-1]["sites.memory_mb.worst"], checkpoint.stat().st_size, len(json.dumps(rounds[-1]))


def main() -> None:
    """Measure federations of the sizes asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sites", nargs="+", type=int, default=[40, 1_000, 4_000])
    sizes = parser.parse_args().sites
    with TemporaryDirectory() as name:
        folder = Path(name)
        settings = {
            **{"task_name": "text", "model": put_model(folder, small=True), "site_ids": [0]},
            **{"train_path": str(put_data(folder / "train.csv", 4 * max(sizes))), "num_rounds": NUM_ROUNDS},
            **{"test_path": str(put_data(folder / "test.csv", 20)), "report": False},
            **{"sites_per_round": NUM_SAMPLED, "local_steps": 2, "batch_size": 4, "max_seq_len": 64},
        }
        found = {size: measure(size, settings, folder) for size in sizes}
    print(f"{'sites':>6}", *(f"{measure:>18}        " for measure in MEASURES))
    for size, values in found.items():
        cells = (f"{value:>18,.2f} ({value / first:.3f})" for value, first in zip(values, found[sizes[0]], strict=True))
        print(f"{size:>6,}", *cells)


if __name__ == "__main__":
    main()

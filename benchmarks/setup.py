"""What the files of each site cost before training starts: CPU seconds of runs without a round, for 16 to 1,000 sites.

./run-local.sh benchmarks/setup.py
"""

import argparse
import os
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from processes import SCRIPT, cpu_of_ended

FEW = 2  # sites of the run that tells what a start costs without them
TARGET_MS = 20
WORDS = "a site has a few texts of its own such as this one and none of them is long".split()  # noqa: SIM905


def main() -> None:
    """Print a line for each number of sites."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sites", type=int, nargs="+", default=[16, 256, 1000])
    parser.add_argument("--examples", type=int, default=20, help="of each site")
    parser.add_argument("--model", default="minilm")
    arguments = parser.parse_args()
    with TemporaryDirectory() as folder:
        write_files(Path(folder), max(arguments.sites), arguments.examples)
        floor = cpu_seconds(Path(folder), FEW, arguments.model)
        print(f"sites | CPU seconds | ms a site (target: {TARGET_MS})\n{FEW:>5} | {floor:>11.1f} |")
        for num_sites in arguments.sites:
            seconds = cpu_seconds(Path(folder), num_sites, arguments.model)
            print(f"{num_sites:>5} | {seconds:>11.1f} | {1e3 * (seconds - floor) / (num_sites - FEW):.1f}", flush=True)


def write_files(folder: Path, num_sites: int, num_examples: int) -> None:
    """Write a training file for each site, and a test file."""
    for name in ("test", *range(num_sites)):
        rows = [
            f"{' '.join(WORDS[row % 5 :])} {name} {row},{'yes' if row % 2 else 'no'}" for row in range(num_examples)
        ]
        (folder / f"{name}.csv").write_text("\n".join(["text,label", *rows]) + "\n")


def cpu_seconds(folder: Path, num_sites: int, model: str) -> float:
    """Return the CPU seconds that a run of so many sites takes until it has evaluated the first model."""
    paths = [f"{folder}/{site}.csv" for site in range(num_sites)]
    settings = folder / "settings.json"  # a thousand paths are too long for a command line
    first = f'["{paths[0]}", "{folder}/test.csv"]'
    listed = ", ".join([first, *(f'"{path}"' for path in paths[1:])])
    settings.write_text(f'{{"site_ids": {[0] * num_sites}, "site_paths": [{listed}]}}')
    before = cpu_of_ended()
    subprocess.run(
        [
            *(sys.executable, SCRIPT, "--unobserved", "with", settings, "task_name=text", f"model={model}"),
            *("num_rounds=0", "max_seq_len=16", "val_batch_size=64", "report=False"),
        ],
        env={**os.environ, "RANKS": "1", "HF_DATASETS_CACHE": str(folder / f"cache-{num_sites}")},
        stdout=subprocess.DEVNULL,
        check=True,
    )
    return cpu_of_ended() - before


if __name__ == "__main__":
    main()

"""Where the seconds of one command go, from starting Python to its end: imports, set-up, rounds, saving, report, exit.

Each line is a median of some runs of the README's first command, or of the command whose settings follow. The moments
are those at which lines of its output arrive.

    ./run-local.sh benchmarks/timeline.py
    RANKS=2 ./run-local.sh benchmarks/timeline.py --repetitions 5 num_rounds=3 max_train_examples=64
"""

import argparse
import os
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from itertools import pairwise
from tempfile import TemporaryDirectory

from processes import SCRIPT, cpu_of_ended

IMPORTS = "import scaling_fl.command.__main__ as command; command.load('experiment')"
ROUND = re.compile(r" +(\d+) \|")


def main() -> None:
    """Print the seconds of each part of a command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("settings", nargs="*", help="such as num_rounds=3")
    options = parser.parse_args()
    run([sys.executable, "-c", IMPORTS])  # so that files are in memory
    runs = [time_parts(options.settings) for _ in range(options.repetitions)]
    total = statistics.median(sum(parts.values()) for parts, _ in runs)
    print(f"{'part':44} seconds  of all")
    for name in runs[0][0]:
        seconds = statistics.median(parts[name] for parts, _ in runs)
        print(f"{name:44} {seconds:>7.2f} {seconds / total:>6.0%}")
    cpu = statistics.median(seconds for _, seconds in runs)
    print(f"{'all':44} {total:>7.2f}\n{'CPU seconds of all processes':44} {cpu:>7.2f}")


def time_parts(settings: Sequence[str]) -> tuple[dict[str, float], float]:
    """Return the seconds of each part of a command, and the CPU seconds of all its processes."""
    imports, _, _ = run([sys.executable, "-c", IMPORTS])
    with TemporaryDirectory() as folder:
        end, lines, cpu = run([sys.executable, str(SCRIPT), "with", *settings], folder)
    first = lines[0][0]
    rounds = [(moment, int(found[1])) for moment, line in lines if (found := ROUND.match(line))]
    moments = [moment for moment, _ in rounds]
    steps = [later - earlier for earlier, later in pairwise(moments)]
    last = next(moment for moment, line in reversed(lines) if line.startswith("final "))
    parts = {
        "imports": imports,
        "settings, ranks, model and data": first - imports,
        "evaluation of the first model": moments[0] - first,
        "first round": steps[0] if steps else 0.0,
        f"{len(steps) - 1} rounds after it" if steps else "rounds after it": sum(steps[1:]),
        "model and weights saved": last - moments[-1],
        "report and exit": end - last,
    }
    return parts, cpu


def run(command: Sequence[str], folder: str | None = None) -> tuple[float, list[tuple[float, str]], float]:
    """Return the seconds of a command, the lines of its output with their moments, and its CPU seconds."""
    before = cpu_of_ended()
    environment = {**os.environ, "SACRED_RUNS_DIR": f"{folder}/runs"}
    began = time.monotonic()
    process = subprocess.Popen(command, cwd=folder, env=environment, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    lines = [(time.monotonic() - began, line) for line in process.stdout]
    if process.wait():
        raise SystemExit("".join(line for _, line in lines))
    return time.monotonic() - began, lines, cpu_of_ended() - before


if __name__ == "__main__":
    main()

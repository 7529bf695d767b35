"""Run one federation on 1, 2 and 4 ranks, and once killed and resumed; draw README's pictures of it.

All four runs must end with the same SHA-256 of their weights. The fourth starts on 4 ranks, gets SIGKILL after its
second round, and resumes on 3. Beside their accuracies it takes a picture of the report of the second run, if Chromium
is on PATH.

    python benchmarks/picture.py
"""

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from PIL import Image
from processes import SCRIPT

SETTINGS = [
    "num_rounds=5",
    "max_train_examples=320",
    "max_test_examples=256",
    "max_seq_len=64",
    "batch_size=8",
    "learning_rate=1e-4",
]
KILL_AFTER = 2  # rounds
PATIENCE = 600.0  # seconds until the round after which to kill
# Later lines are thinner and drawn over the earlier ones, so that each shows where all lie on one another.
LINES: list[dict[str, Any]] = [
    {"color": "#56b4e9", "linewidth": 15, "alpha": 0.55},
    {"color": "#0072b2", "linewidth": 8},
    {"color": "#f2bc3e", "linewidth": 3.5},
    {"color": "#1c2026", "linewidth": 0, "marker": "X", "markersize": 9},
]
PAGE_SIZE = 900, 950  # pixels of the report
SHOWN_WIDTH = 700  # of README's picture


def start(ranks: int, folder: Path, settings: list[str]) -> subprocess.Popen[str]:
    """Start the command on local ranks, with its record in a folder."""
    env = {**os.environ, "RANKS": str(ranks), "SACRED_RUNS_DIR": str(folder / "runs"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(SCRIPT), "with", *settings, f"checkpoints_dir={folder / 'checkpoints'}"]
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True, start_new_session=True)


def finish(process: subprocess.Popen[str]) -> str:
    """Wait for a run, and return the SHA-256 of its weights."""
    output = process.communicate()[0]
    if process.returncode != 0:
        raise SystemExit(f"a run failed with status {process.returncode}:\n{output}")
    (found,) = re.findall(r"^weights +SHA-256 (\w{64})$", output, re.MULTILINE)
    return found


def kill(process: subprocess.Popen[str], folder: Path) -> None:
    """Send SIGKILL to the command and all its ranks, as soon as round `KILL_AFTER` has left its checkpoint."""
    end = time.monotonic() + PATIENCE
    try:
        while not (folder / "checkpoints" / f"round-{KILL_AFTER}.pt").exists():
            if process.poll() is not None or time.monotonic() > end:
                raise SystemExit(f"round {KILL_AFTER} left no checkpoint in {folder}")
            time.sleep(0.02)
        if process.poll() is not None:
            raise SystemExit("the run ended before it could be killed")
    finally:
        os.killpg(process.pid, signal.SIGKILL)  # it leads a session of its own, in which its ranks are
        process.communicate()


def run_all(folder: Path, settings: list[str]) -> tuple[str, dict[str, Path]]:
    """Run the federation in four ways, and return the SHA-256 of all and the record of each.

    Raises:
        SystemExit: they do not end with the same weights.
    """
    runs, hashes = {}, []
    for ranks in (1, 2, 4):
        place = folder / str(ranks)
        hashes.append(finish(start(ranks, place, settings)))
        runs[f"{ranks} rank{'s' if ranks > 1 else ''}"] = place / "runs" / "1"
        print(f"{ranks} ranks: {hashes[-1]}", flush=True)
    place = folder / "killed"
    kill(start(4, place, settings), place)
    hashes.append(finish(start(3, place, settings)))
    runs[f"4 ranks, killed (-9) after round {KILL_AFTER},\nresumed on 3"] = place / "runs" / "2"
    print(f"killed and resumed: {hashes[-1]}", flush=True)
    return only(hashes), runs


def only(hashes: list[str]) -> str:
    """Return the SHA-256 that all runs have.

    Raises:
        SystemExit: they differ.
    """
    if len(set(hashes)) != 1:
        raise SystemExit(f"expected one SHA-256, got {hashes}")
    return hashes[0]


def draw(path: Path, sha256: str, runs: dict[str, Path]) -> None:
    """Draw the validation accuracies of all runs by round, one over the other."""
    figure = Figure(figsize=(7, 6), layout="constrained", facecolor="white")
    axes = figure.subplots()
    for (name, run), style in zip(runs.items(), LINES, strict=True):
        rounds = [json.loads(line) for line in (run / "rounds.jsonl").read_text().splitlines()]
        accuracies = [round_["validation.accuracy"] for round_ in rounds]
        axes.plot(range(len(rounds)), accuracies, label=name, solid_capstyle="round", **style)
    axes.set_xlabel("round")
    axes.set_ylabel("validation accuracy")
    axes.set_title("One federation of four sites, run in four ways", loc="left", fontsize=13)
    axes.set_ylim(0, 1.03)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="lower right", frameon=False, handlelength=3.5, labelspacing=0.9)
    caption = f"all four end with the same weights: SHA-256\n{sha256}"
    figure.text(0.02, -0.02, caption, fontsize=11, family="monospace", va="top")
    figure.savefig(path, dpi=120, bbox_inches="tight", pad_inches=0.15)
    shrink(path)


def shrink(path: Path, width: int = SHOWN_WIDTH) -> None:
    """Make a PNG smaller: to a width, with at most 128 colours."""
    with Image.open(path) as image:
        opaque = image.convert("RGB")
    opaque.thumbnail((width, 10 * width), Image.Resampling.LANCZOS)
    opaque.quantize(128, dither=Image.Dither.NONE).save(path, optimize=True)


def take_picture(page: Path, path: Path) -> bool:
    """Take a picture of the top of a page with a browser, if there is one."""
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if browser is None:
        return False
    with tempfile.TemporaryDirectory() as profile:
        options = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", f"--user-data-dir={profile}"]
        size = "--window-size={},{}".format(*PAGE_SIZE)
        command = [browser, *options, size, f"--screenshot={path}", page.resolve().as_uri()]
        subprocess.run(command, check=True, capture_output=True, timeout=120)
    shrink(path)
    return True


def main() -> None:
    """Run, compare and draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("settings", nargs="*", help=f"of the federation (default: {' '.join(SETTINGS)})")
    parser.add_argument("--output", type=Path, default=SCRIPT.parent.parent / "docs", help="folder of the pictures")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        sha256, runs = run_all(Path(folder), arguments.settings or SETTINGS)
        draw(arguments.output / "placement.png", sha256, runs)
        report = runs["2 ranks"] / "report.html"
        if not (report.exists() and take_picture(report, arguments.output / "report.png")):
            print("no picture of the report: expected a report and chromium on PATH")


if __name__ == "__main__":
    main()

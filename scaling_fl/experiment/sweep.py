"""Train the runs of a sweep, each by the command in a process of its own, some at a time."""

import fcntl
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from scaling_fl.distributed.launch import python_path
from scaling_fl.distributed.signals import GRACE_SECONDS, Interrupted, ending_signals, set_handlers
from scaling_fl.errors import one_line
from scaling_fl.experiment.centralised import count_ranks
from scaling_fl.experiment.child import COMMAND
from scaling_fl.experiment.grid import Point, find_done
from scaling_fl.experiment.settings import Settings
from scaling_fl.storage import naming_place

OUTPUT = "output.txt"  # what a run prints, in its folder. Its processes keep it locked
POLL_SECONDS = 0.05


def say(*lines: str) -> None:
    """Print lines.

    Raises:
        WriteError: standard output cannot be written to.
    """
    with naming_place("the standard output"):
        print(*lines, sep="\n", flush=True)


@dataclass
class Outcome:
    """What became of a run of the grid: the folder of its record if it is done, otherwise what went wrong."""

    point: Point
    record: Path | None = None
    problem: str = "not started"


@dataclass(frozen=True)
class _Child:
    outcome: Outcome
    number: str  # of all, for people
    folder: Path
    process: subprocess.Popen
    started: float


def train_all(points: Sequence[Point], folder: Path, parallel: int) -> list[Outcome]:
    """Train those runs of a grid that are not done, so many at a time, and return what became of each.

    A run that fails ends no other.

    Args:
        points: of the grid.
        folder: of the sweep, in which each run has a folder.
        parallel: the most runs at a time.

    Raises:
        Interrupted: a signal has ended all runs.
        WriteError: standard output cannot be written to. All runs have ended.
    """
    outcomes = [Outcome(point) for point in points]
    numbers = [f"[{number}/{len(points)}] {point.name}" for number, point in enumerate(points, start=1)]
    waiting = [of for of in zip(outcomes, numbers, strict=True) if not _is_done(*of, folder / of[0].point.folder)]
    running: list[_Child] = []
    stop: list[int] = []  # a handler that raised could lose a process that is being started
    before = set_handlers(dict.fromkeys(ending_signals(), lambda number, _: stop.append(number)))
    try:
        while (waiting or running) and not stop:
            while waiting and len(running) < parallel:
                outcome, number = waiting.pop(0)
                try:
                    child = _start(outcome, number, folder / outcome.point.folder, parallel)
                    running += [child] if child else []
                except OSError as error:
                    outcome.problem = f"could not be started: {one_line(error)}"
                    say(f"{number}: {outcome.problem}")
            for child in [child for child in running if child.process.poll() is not None]:
                running.remove(child)
                _finish(child)
            time.sleep(POLL_SECONDS)
    finally:
        _end(running, stop)
        set_handlers(before)
    if stop:
        num_done = sum(outcome.record is not None for outcome in outcomes)
        say(
            f"stopped   {num_done} of {len(points)} runs are done. The same command skips these and goes on with the "
            "others: from their checkpoints if checkpoints_dir is given, otherwise from round 0"
        )
        raise Interrupted(stop[0])
    return outcomes


def _is_done(outcome: Outcome, number: str, folder: Path) -> bool:
    """Tell whether a run has been trained before, and note where."""
    outcome.record = find_done(folder, outcome.point.settings())
    if outcome.record:
        outcome.problem = ""
        say(f"{number}: done before, in {outcome.record}")
    return outcome.record is not None


def _start(outcome: Outcome, number: str, folder: Path, parallel: int) -> _Child | None:
    """Start a run; return None if another sweep has trained it meanwhile.

    Raises:
        OSError: it cannot be started, or a process of an earlier sweep still trains it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    settings = outcome.point.settings()
    words = [f"{name}={value!r}" for name, value in settings.items()]
    with (folder / OUTPUT).open("ab") as output:
        _lock(output)
        if _is_done(outcome, number, folder):
            return None
        output.truncate(0)
        say(f"{number}: started, and prints into {folder / OUTPUT}")
        # In a session of its own, so that the Ctrl-C of a terminal reaches this process alone.
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", COMMAND, "with", *words],
            env={**os.environ, **find_variables(settings, parallel), "SACRED_RUNS_DIR": str(folder)},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
    return _Child(outcome, number, folder, process, time.monotonic())


def find_variables(settings: Mapping[str, Any], parallel: int) -> dict[str, str]:
    """Return the environment variables of a run: modules are found as in this process, and runs share the cores."""
    found = {"PYTHONPATH": python_path()}
    if os.environ.get("RANKS") == "auto":
        found["RANKS"] = str(max(1, count_ranks(Settings(**settings)) // parallel))
    return found


def _lock(output: IO[bytes]) -> None:
    """Lock a file for this process and those that inherit it."""
    try:
        fcntl.flock(output, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise BlockingIOError(
            f"expected no other process that trains it, got one, which writes {output.name}"
        ) from None


def _finish(child: _Child) -> None:
    """Note what became of a run whose process has ended."""
    outcome, seconds = child.outcome, time.monotonic() - child.started
    status = child.process.returncode
    if status == 0:
        outcome.record = find_done(child.folder, outcome.point.settings())
    if outcome.record:
        outcome.problem = ""
        say(f"{child.number}: done in {seconds:.0f} s, in {outcome.record}")
        return
    outcome.problem = _explain(child.folder / OUTPUT, status)
    say(f"{child.number}: failed after {seconds:.0f} s: {outcome.problem.splitlines()[0]}")


def _explain(output: Path, status: int) -> str:
    """Return the errors that a run has printed, otherwise its last line and how it ended."""
    lines = output.read_text("utf-8", "replace").splitlines()
    errors = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    if errors:
        return "\n".join(errors)
    end = f"ended by {signal.Signals(-status).name}" if status < 0 else f"ended with status {status}"
    last = next((line.strip() for line in reversed(lines) if line.strip()), "")
    return f"{end}{last and f' after: {last}'}"


def _end(running: Sequence[_Child], stop: Sequence[int]) -> None:
    """Ask runs to end, and end those that do not, or all at a second Ctrl-C."""
    for child in running:
        with suppress(ProcessLookupError):
            child.process.send_signal(signal.SIGTERM)
    deadline = time.monotonic() + GRACE_SECONDS + 15
    while any(child.process.poll() is None for child in running):
        if stop.count(signal.SIGINT) > 1 or time.monotonic() > deadline:
            for child in running:
                with suppress(ProcessLookupError):
                    os.killpg(child.process.pid, signal.SIGKILL)
        time.sleep(POLL_SECONDS)

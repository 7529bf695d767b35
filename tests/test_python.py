"""Python calls the library: a run in a process of its own, which is that of the command."""

import json
import logging
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import Command, refusal, succeed
from waiting import wait_until

from scaling_fl import PeerError, Run, Settings, plan, train

pytestmark = pytest.mark.long
WARM = pytest.mark.usefixtures("warm")  # the others start a fresh Python, as a user does


def children(process: int | str = "self") -> set[int]:
    """The processes that a process has started, from any thread, and that have not ended."""
    lists = Path(f"/proc/{process}/task").glob("*/children")
    return {int(child) for path in lists for child in path.read_text().split()}


OTHERS: set[int] = set()  # processes of other tests, such as a database


@pytest.fixture(autouse=True)
def _others() -> None:
    OTHERS.clear()
    OTHERS.update(children())


def own_children() -> set[int]:
    """The processes that this test has started, and that have not ended."""
    return children() - OTHERS


def state() -> dict[str, Any]:
    """What training changes in a process for good."""
    return {
        "threads": (sorted(thread.name for thread in threading.enumerate()), torch.get_num_threads()),
        "handlers": [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)],
        "environment": {name: value for name, value in os.environ.items() if name != "PYTEST_CURRENT_TEST"},
        "random": (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()),
        "folder": os.getcwd(),
        "logging": (logging.getLogger().level, list(logging.getLogger().handlers)),
        "children": children() | {process.pid or 0 for process in multiprocessing.active_children()},
        "deterministic": torch.are_deterministic_algorithms_enabled(),
    }


@pytest.fixture
def settings(small_run: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Settings]:
    """A small run, in an empty folder. After the test the process is as before."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    before = state()
    yield Settings(**small_run)
    assert state() == before


def but(settings: Settings, **changes: Any) -> Settings:
    return Settings(**vars(settings) | changes)


def without_times(history: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The metrics that do not depend on the machine."""
    parts = ("time.", "seconds", "memory", "rank", "speed.", "comm.bytes")
    return [{name: of[name] for name in of if not any(part in name for part in parts)} for of in history]


@WARM
def test_a_run_from_python_is_that_of_the_command_and_a_second_one_inherits_nothing(
    settings: Settings, command: Command, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    told: list[dict[str, Any]] = []
    succeed(command(ranks=2))
    of_command = Run.load("runs/1")
    first = train(settings, ranks=2, on_round=told.append)
    printed = capfd.readouterr()
    train(but(settings, seed=2))
    third = train(settings)
    assert first.sha256 == third.sha256 == of_command.sha256 != Run.load("runs/3").sha256
    assert [run.folder for run in (first, third)] == [str(tmp_path / "runs" / number) for number in ("2", "4")]
    assert without_times(first.history) == without_times(of_command.history) == without_times(told)
    assert [of["round"] for of in told] == list(first.rounds.index) == [0, 1, 2]
    assert {path.name for path in Path(first.folder).iterdir()} == {
        path.name for path in Path(of_command.folder).iterdir()
    }
    lines = printed.out.splitlines()
    assert f"weights   SHA-256 {first.sha256}" in lines
    assert sum(line.startswith("    ") for line in lines) == 3
    assert printed.err == ""
    output = first.model(**first.tokenizer(["wheat and rice"], return_tensors="pt"))
    assert output.logits.shape == (1, len(first.labels))
    assert os.path.getsize(first.report(tmp_path / "report.html")[0]) > 10_000
    assert first.settings == settings


@WARM
def test_a_run_that_on_round_ends_continues_to_the_bits_of_one_that_went_on(settings: Settings) -> None:
    settings = but(settings, checkpoints_dir="checkpoints")
    whole = train(but(settings, checkpoints_dir=None))
    part = train(settings, on_round=lambda metrics: np.mean(metrics["round"]) < 1)
    assert (part.status, len(part.history)) == ("COMPLETED", 2)
    rest = train(Run.load(part.folder).settings)
    assert rest.sha256 == whole.sha256 != part.sha256
    assert without_times(rest.history) == without_times(whole.history)


@WARM
def test_a_plan_is_that_of_the_command_as_data(
    settings: Settings, command: Command, capfd: pytest.CaptureFixture[str]
) -> None:
    printed = succeed(command("plan", ranks=2))
    planned = plan(settings, ranks=2)
    assert capfd.readouterr() == ("", "")
    for number, site in enumerate(planned["sites"]):
        row = f"{number:>4} | {site['rank']:>4} | {site['device']:>6} | {site['examples']:>8,} | {site['tokens']:>10,}"
        assert f"{row} | {site['steps']:>13,} | " in printed
    assert f"{planned['weights']:,} weights shared" in printed
    assert {device["rank"] for device in planned["devices"]} == {0, 1}
    assert not Path("runs/1").exists()


@WARM
def test_what_is_wrong_is_one_error_and_never_an_exit(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    assert refusal(lambda: train(but(settings, num_rounds=-1))) == "num_rounds: expected a whole number >= 0, got -1"
    assert refusal(lambda: train(settings, ranks=0)) == "ranks: expected a whole number >= 1, got 0"
    assert not Path("runs").exists()
    assert "expected" in refusal(lambda: train(but(settings, train_path="nowhere.csv"), ranks=2))
    assert refusal(lambda: Run.load("runs")).startswith("'runs': expected the folder of a run")
    failed = Run.load("runs/1")
    assert (failed.status, failed.history, len(failed.rounds)) == ("FAILED", [], 0)
    for name in ("model", "tokenizer", "sha256", "labels"):
        assert "got one that is FAILED. train(run.settings) continues" in refusal(
            lambda name=name: getattr(failed, name)
        )
    assert refusal(lambda: train({"num_rounds": 1})) == "settings: expected Settings(...), got {'num_rounds': 1}"
    with monkeypatch.context() as patch:
        patch.setenv("RANK", "0")
        assert refusal(lambda: train(settings)).startswith("settings: expected to be called in a process without RANK")


def kill_a_rank(number: int, metrics: dict[str, Any]) -> None:
    """Kill the rank of this number."""
    (run,) = own_children()
    os.kill(sorted(children(run))[number], signal.SIGKILL)


@WARM
@pytest.mark.parametrize("number", [0, 1])
def test_a_rank_that_is_killed_is_a_peer_error(settings: Settings, number: int) -> None:
    with pytest.raises(PeerError, match=f"rank {number} was ended by SIGKILL"):
        train(but(settings, num_rounds=100_000), ranks=2, on_round=partial(kill_a_rank, number))


def interrupt_after(seconds: float) -> None:
    """Let KeyboardInterrupt come to the main thread."""
    thread = threading.Timer(seconds, signal.raise_signal, [signal.SIGINT])
    thread.start()


def interrupt_run(settings: Settings, moment: float | str) -> list[str]:
    """Train until an interrupt comes after some seconds or after round 1, and return the status of the run, if any."""

    def interrupt(metrics: dict[str, Any]) -> None:
        if metrics["round"] == 1:
            raise KeyboardInterrupt

    def train_until_it_comes() -> None:
        if isinstance(moment, float):
            interrupt_after(moment)
        train(but(settings, num_rounds=100_000, checkpoints_dir="checkpoints"), ranks=2, on_round=interrupt)

    with pytest.raises(KeyboardInterrupt):
        train_until_it_comes()
    assert not own_children()
    return [json.loads(path.read_text())["status"] for path in Path("runs").glob("*/run.json")]


@pytest.mark.parametrize("moment", [0.0, 1.0])
def test_an_interrupt_while_packages_are_imported_ends_the_run(settings: Settings, moment: float) -> None:
    assert interrupt_run(settings, moment) in ([], ["INTERRUPTED"])


@WARM
@pytest.mark.parametrize("moment", [0.3, 0.8, "round 1"])
def test_an_interrupt_ends_the_run_and_nothing_is_left_of_it(settings: Settings, moment: float | str) -> None:
    statuses = interrupt_run(settings, moment)
    assert statuses in ([], ["INTERRUPTED"])
    if moment == "round 1":
        assert statuses == ["INTERRUPTED"]
        again = train(but(settings, num_rounds=2, checkpoints_dir="checkpoints"))
        assert again.sha256 == train(but(settings, num_rounds=2)).sha256


def test_a_run_ends_with_the_process_that_started_it(small_run: dict[str, Any], tmp_path: Path) -> None:
    values = {name: str(value) if isinstance(value, Path) else value for name, value in small_run.items()}
    code = f"""
from scaling_fl import Settings, train
train(Settings(**{values | {"num_rounds": 100_000}!r}), ranks=2, on_round=lambda metrics: print("told", flush=True))
"""
    caller = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, cwd=tmp_path)
    assert caller.stdout is not None
    next(line for line in caller.stdout if line == "told\n")
    (run,) = children(caller.pid)
    caller.kill()
    caller.wait()
    wait_until(lambda: not Path(f"/proc/{run}/cmdline").exists())
    assert json.loads((tmp_path / "runs" / "1" / "run.json").read_text())["status"] == "INTERRUPTED"

"""Trackers: TensorBoard and W&B for real, and one that fails, which a plugin adds to accelerate."""

import json
import os
import random
import signal
import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from helpers import Command, succeed, weights_hash
from warm import wait_for_exit

from scaling_fl import Settings, train
from scaling_fl.distributed.world import world
from scaling_fl.experiment.trackers import flatten_metrics, flatten_settings, tracked
from scaling_fl.records.rounds import Record

BOARD = {"trackers": ["tensorboard"]}
FAILING = """
import os, signal
from accelerate.tracking import GeneralTracker, LOGGER_TYPE_TO_CLASS

class Failing(GeneralTracker):
    name, requires_logging_directory, tracker = "failing", False, None
    def __init__(self, project): pass
    def start(self):
        if os.environ.get("FAIL") == "start":
            raise RuntimeError("no key")
    def log(self, values, step=None):
        import random, torch
        torch.manual_seed(step); random.seed(step); torch.set_num_threads(2)
        if os.environ.get("FAIL") == "kill":
            if step == 2:
                os.kill(os.getpid(), signal.SIGKILL)
        elif step > 0:
            raise RuntimeError("server lost")

LOGGER_TYPE_TO_CLASS["failing"] = Failing
"""
MISSING = "import sys; sys.modules |= dict.fromkeys(['accelerate', 'accelerate.tracking', 'tensorboard'])"


@pytest.fixture
def plugin(tmp_path: Path) -> dict[str, Any]:
    """The settings of a run that has a tracker that fails from round 1 on."""
    (tmp_path / "failing.py").write_text(FAILING)
    return {"plugins": ["failing"], "trackers": ["tensorboard", "failing"]}


def read_board(run: Path) -> dict[str, list[tuple[int, float]]]:
    """Return steps and values by metric, of all files in the run's folder, without those of the settings."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    files = list((run / "tensorboard").glob("events*"))
    assert len(files) == 1, "one process wrote"
    events = EventAccumulator(str(files[0])).Reload()
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def rounds_of(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "rounds.jsonl").read_text().splitlines()]


def test_tensorboard_has_what_the_record_has_once_and_no_sites_and_the_weights_are_the_same(
    command: Command, tmp_path: Path
) -> None:
    plain = succeed(command("--unobserved"))
    tracked = succeed(command(ranks=2, **BOARD))
    assert weights_hash(plain) == weights_hash(tracked)
    board, rounds = read_board(tmp_path / "runs/1"), rounds_of(tmp_path / "runs/1")
    expected = Counter(name for line in rounds for name, value in line.items() if isinstance(value, int | float))
    del expected["round"]
    assert {name: len(points) for name, points in board.items()} == expected
    assert board["validation.loss"] == [(line["round"], pytest.approx(line["validation.loss"])) for line in rounds]
    assert not [name for name in board if name.startswith(("site.", "rank."))]


def test_a_run_that_was_killed_after_a_tracker_wrote_a_round_has_each_round_once_when_it_resumes(
    start: Callable[..., tuple[int, Path]], command: Command, plugin: dict[str, Any], tmp_path: Path
) -> None:
    plugin |= {"job_name": "a" * 7_000, "checkpoints_dir": "checkpoints"}
    pid, _ = start(env={"FAIL": "kill"}, **plugin)
    assert wait_for_exit(pid) == -signal.SIGKILL
    os.remove(tmp_path / "checkpoints/round-2.pt")  # as if the kill had come before it
    assert [step for step, _ in read_board(tmp_path / "runs/1")["validation.loss"]] == [0, 1, 2]
    settings = plugin | {"trackers": ["tensorboard"], "track_sites": True, "num_rounds": 3}
    succeed(command(**settings))
    seconds = [rounds_of(tmp_path / "runs" / number)[1]["time.train_s"] for number in ("1", "2")]
    assert seconds[0] == seconds[1], "round 1 was not trained again"
    board = read_board(tmp_path / "runs/2")
    assert [step for step, _ in board["validation.loss"]] == [0, 1, 2, 3]
    assert [step for step, _ in board["site.accuracy/3"]] == [1, 2, 3]
    succeed(command(**settings | {"num_rounds": 4}))
    assert [step for step, _ in read_board(tmp_path / "runs/3")["validation.loss"]] == [0, 1, 2, 3, 4]
    assert [step for step, _ in read_board(tmp_path / "runs/2")["validation.loss"]] == [0, 1, 2, 3], "untouched"
    (file,) = (tmp_path / "runs/3/tensorboard").glob("*/hparams.yml")
    parameters = yaml.safe_load(file.read_text())
    assert (parameters["num_rounds"], len(parameters["job_name"])) == (4, 500)


def state() -> dict[str, Any]:
    from accelerate import PartialState

    return {
        "accelerate": dict(PartialState._shared_state),
        "environment": dict(os.environ),
        "generators": (random.getstate(), torch.get_rng_state().tolist()),
        "threads": (threading.active_count(), torch.get_num_threads()),
    }


def test_trackers_leave_the_process_as_it_was(small_run: dict[str, Any], tmp_path: Path) -> None:
    before = state()
    with world(), tracked(Settings(**small_run | BOARD), Record(str(tmp_path))) as record:
        record.add_round(0, {"validation.loss": 1.5, "validation.confusion": [[0, 1, 7]]})
    assert state() == before
    assert read_board(tmp_path) == {"validation.loss": [(0, 1.5)]}


@pytest.mark.long
@pytest.mark.usefixtures("warm")
def test_two_runs_that_a_process_starts_from_python_have_a_board_each(
    small_run: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for seed, ranks in ((1, 2), (2, 1)):
        train(Settings(**small_run | BOARD | {"job_name": "one", "seed": seed}), ranks=ranks)
    boards = [read_board(tmp_path / "runs" / number) for number in ("1", "2")]
    assert [[step for step, _ in board["train.loss"]] for board in boards] == [[1, 2], [1, 2]]
    assert boards[0]["train.loss"] != boards[1]["train.loss"]


def test_without_trackers_nothing_of_them_is_imported_or_written(command: Command, tmp_path: Path) -> None:
    (tmp_path / "missing.py").write_text(MISSING)
    succeed(command(plugins=["missing"]))
    assert not (tmp_path / "runs/1/tensorboard").exists()
    status, output = command(plugins=["missing"], **BOARD)
    assert status == 1
    assert "error: trackers: expected the package accelerate, got " in output


@pytest.mark.long
def test_a_tracker_that_fails_later_warns_once_and_changes_nothing(
    command: Command, plugin: dict[str, Any], tmp_path: Path
) -> None:
    output = succeed(command(ranks=2, num_rounds=3, **plugin))
    assert output.count("warning: the tracker failing failed and gets no more of this run: server lost") == 1
    assert output.count("failing failed") == 1
    assert weights_hash(output) == weights_hash(succeed(command("--unobserved", num_rounds=3)))
    assert len(rounds_of(tmp_path / "runs/1")) == len(read_board(tmp_path / "runs/1")["validation.loss"]) == 4


@pytest.mark.parametrize(
    ("trackers", "sentence"),
    [
        (["failing"], "trackers: expected a tracker that can start, got 'failing' (no key)"),
        (["wandb_"], "trackers: expected some of aim, "),
        (["clearml"], "track_sites: expected True, as clearml also takes what a run prints, got False"),
        (["tensorboard"] * 2, "trackers: expected a list of different names of trackers"),
    ],
)
def test_a_tracker_that_cannot_start_ends_the_run_before_training(
    command: Command, plugin: dict[str, Any], tmp_path: Path, trackers: list[str], sentence: str
) -> None:
    status, output = command(ranks=2, env={"FAIL": "start"}, **plugin | {"trackers": trackers})
    assert status == 1
    assert output.count("error: ") == 1, output
    assert f"error: {sentence}" in output
    assert "Traceback" not in output
    assert not list(tmp_path.glob("runs/*/rounds.jsonl"))


def test_wandb_gets_neither_the_command_line_nor_the_output(command: Command, tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    settings = {"trackers": ["wandb"], "site_settings": {3: {"learning_rate": 0.0012345}}, "log_every_steps": 2}
    succeed(command(env={"WANDB_MODE": "offline"}, **settings))
    (run,) = (tmp_path / "runs/1/wandb").glob("offline-run-*/run-*.wandb")
    sent = [run.read_bytes(), *(file.read_bytes() for file in (run.parent / "files").iterdir())]
    assert b"validation.loss" in run.read_bytes()
    assert b"step.loss" in run.read_bytes()
    assert not any(secret in part for part in sent for secret in (b"0.0012345", b"| train loss |", b"SHA-256"))


def test_settings_are_short_and_plain_and_hold_no_secrets_and_no_sites() -> None:
    settings = {
        "train_path": "zip://a.csv::https://me:pass@example.org/a.zip?day=1,2&key=secret",
        "test_path": "/data/part-?.csv",
        "labels": ["a" * 6_000, "b" * 1_000],
        "num_rounds": 3,
        "model": "a/b",
        "local_steps": None,
        "site_paths": ["/data/hospital.csv"],
    }
    flat = flatten_settings(settings, with_sites=False)
    assert flat["train_path"] == "zip://a.csv::https://example.org/a.zip"
    assert flat["test_path"] == "/data/part-?.csv"
    assert len(flat["labels"]) == 500
    assert (flat["num_rounds"], flat["model"], flat["local_steps"]) == (3, "a/b", "None")
    assert "site_paths" not in flat
    assert "hospital" in flatten_settings(settings, with_sites=True)["site_paths"]


def test_metrics_of_single_sites_are_left_out_unless_asked_for_and_lists_always() -> None:
    metrics = {
        **{"train.loss": 0.5, "site.loss": {0: 0.4, 3: 0.6}, "site.name": {0: "x"}, "rank.idle_s": {"1": 2.0}},
        **{"validation.confusion": [[0, 1, 7]], "site.confusion": {3: [[0, 1, 7]]}},
    }
    assert flatten_metrics(metrics, with_sites=False) == {"train.loss": 0.5}
    assert flatten_metrics(metrics, with_sites=True) == {
        **{"train.loss": 0.5, "site.loss/0": 0.4, "site.loss/3": 0.6, "rank.idle_s/1": 2.0}
    }

"""The best round and an early end are functions of the history; the best model is the one that was judged."""

import json
import math
import os
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import Command, long_but, succeed, weights_hash
from transformers import AutoModelForSequenceClassification

from scaling_fl.distributed.world import world
from scaling_fl.experiment.result import Run
from scaling_fl.records import checkpoint
from scaling_fl.records.best import Choice, find_best, is_over, load_best

LOSS, ACCURACY = "validation.loss", "validation.accuracy"


def of_values(values: list[float | None], name: str = LOSS) -> list[dict[str, Any]]:
    return [{} if value is None else {name: value} for value in values]


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([3, 2, 2, 1, 1], [0, 1, 1, 3, 3]),
        ([math.nan, 2, math.nan, -math.inf, 1], [None, 1, 1, 1, 4]),
        ([None, None, 5, None, 4], [None, None, 2, 2, 4]),
    ],
    ids=["ties", "not finite", "missing"],
)
@pytest.mark.parametrize(("name", "sign"), [(LOSS, 1), (ACCURACY, -1)])
def test_the_best_of_every_prefix_is_the_first_of_the_best_finite_values(
    values: list[float | None], expected: list[int | None], name: str, sign: int
) -> None:
    history = of_values([value if value is None else sign * value for value in values], name)
    assert [find_best(history[:end], Choice(name)) for end in range(1, len(history) + 1)] == expected


def test_a_last_round_that_longer_runs_do_not_evaluate_does_not_count() -> None:
    short, long = of_values([3, None, 2, 1]), of_values([3, None, 2, None, 2.5])
    assert find_best(short, Choice(LOSS, every=2)) == find_best(long, Choice(LOSS, every=2)) == 2
    assert not is_over(of_values([1, None, 2, 3]), Choice(LOSS, every=2, patience=2))
    assert is_over(of_values([1, None, 2, None, 3]), Choice(LOSS, every=2, patience=2))


def test_patience_counts_evaluated_rounds_and_starts_again_at_a_gain_only() -> None:
    history = of_values([5, 6, 4, 4, 7, 8])
    ends = [is_over(history[:end], Choice(LOSS, patience=3)) for end in range(1, 7)]
    assert ends == [False] * 5 + [True]
    assert not is_over(history, Choice(LOSS))


def lines(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "rounds.jsonl").read_text().splitlines()]


def best_of(run: Path) -> tuple[int, bytes]:
    """Return the best round of a run and the file of its weights."""
    round_ = json.loads((run / "info.json").read_text())["best"]["round"]
    return round_, (run / "best" / "model.safetensors").read_bytes()


# A rate so high that the loss soon rises
DIVERGING = {"learning_rate": 0.3, "num_rounds": 4}


def test_the_best_model_has_the_recorded_scores_and_outlives_its_checkpoint(command: Command, tmp_path: Path) -> None:
    output = succeed(command(**DIVERGING, checkpoints_dir="kept", keep_checkpoints=1))
    run = tmp_path / "runs" / "1"
    best, _ = best_of(run)
    assert best < 4, "the loss rises, or this tests nothing"
    assert re.search(
        rf"^best .*, after round {best}, by validation.loss \([\d.]+\) on the common test set$", output, re.M
    )
    assert Run.load(run).best_round == best
    weights = Run.load(run).best_model.state_dict()
    assert any(not torch.equal(weights[name], value) for name, value in Run.load(run).model.state_dict().items())
    assert sorted(os.listdir(tmp_path / "kept")) == ["best.pt", "round-4.pt"]
    assert checkpoint.read(str(tmp_path / "kept" / "best.pt"))["round"] == best
    succeed(command(model=run / "best", num_rounds=0, best_metric=None))
    again, recorded = lines(tmp_path / "runs" / "2")[0], lines(run)[best]
    assert again[ACCURACY] == recorded[ACCURACY]
    assert again[LOSS] == pytest.approx(recorded[LOSS], rel=1e-6)
    assert not (tmp_path / "runs" / "2" / "best").exists()


def test_without_checkpoints_the_best_model_is_kept_too(command: Command, tmp_path: Path) -> None:
    succeed(command(**DIVERGING))
    succeed(command(**DIVERGING, checkpoints_dir="kept"))
    assert best_of(tmp_path / "runs" / "1") == best_of(tmp_path / "runs" / "2")
    assert not (tmp_path / "runs" / "1" / "best.pt").exists()


def test_the_final_weights_load_strictly_without_our_library(command: Command, tmp_path: Path) -> None:
    succeed(command())
    weights = torch.load(tmp_path / "runs" / "1" / "final_model.pt", weights_only=True)
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / "runs" / "1" / "model")
    assert all(torch.equal(weights[name], value) for name, value in plain.state_dict().items())
    AutoModelForSequenceClassification.from_config(plain.config).load_state_dict(weights, strict=True)


def test_a_run_that_stopped_early_stays_stopped_and_says_so(command: Command, tmp_path: Path) -> None:
    settings = {**DIVERGING, "early_stopping_rounds": 1, "checkpoints_dir": "kept"}
    first = succeed(command(**settings))
    again = succeed(command(**{**settings, "num_rounds": 40}))
    for output in (first, again):
        assert "stopped   after round" in output
    assert weights_hash(first) == weights_hash(again)
    assert len(lines(tmp_path / "runs" / "1")) == len(lines(tmp_path / "runs" / "2")) < 5
    assert best_of(tmp_path / "runs" / "1") == best_of(tmp_path / "runs" / "2")


@pytest.mark.long
def test_stops_change_neither_the_weights_nor_the_best_model(command: Command, tmp_path: Path) -> None:
    settings = {**DIVERGING, "evaluate_every": 2}
    whole = succeed(command(**settings, checkpoints_dir="a"))
    for num_rounds in (1, 3, 4):
        last = succeed(command(**{**settings, "num_rounds": num_rounds}, checkpoints_dir="b", ranks=num_rounds % 2 + 1))
    assert weights_hash(last) == weights_hash(whole)
    assert [LOSS in line for line in lines(tmp_path / "runs" / "4")] == [True, True, True, True, True]
    assert [LOSS in line for line in lines(tmp_path / "runs" / "1")] == [True, False, True, False, True]
    assert best_of(tmp_path / "runs" / "1") == best_of(tmp_path / "runs" / "4")


@pytest.mark.parametrize("killed_at", long_but(1, [1, 2, 3]))
def test_a_run_that_was_killed_between_best_pt_and_its_checkpoint_picks_the_same_best_model(
    killed_at: int, command: Command, tmp_path: Path
) -> None:
    """As if it had been killed in that moment, as the file of the round is missing."""
    settings = {"num_rounds": 3, "checkpoints_dir": "kept"}
    whole = succeed(command(**settings))
    best = best_of(tmp_path / "runs" / "1")
    for round_ in range(killed_at, 4):
        os.remove(tmp_path / "kept" / f"round-{round_}.pt")
    assert weights_hash(succeed(command(**settings, keep_checkpoints=1))) == weights_hash(whole)
    assert best_of(tmp_path / "runs" / "2") == best


def test_a_best_model_that_is_not_kept_is_not_passed_off(command: Command, tmp_path: Path) -> None:
    """As a resumed run may choose by another metric than the one before, which kept other weights."""
    settings = {**DIVERGING, "checkpoints_dir": "kept", "keep_checkpoints": 1}
    succeed(command(**settings, best_metric=None))
    output = succeed(command(**settings))
    (best,) = re.findall(r"^best +is not kept: no file has the weights of round (\d) any more$", output, re.MULTILINE)
    run = Run.load(tmp_path / "runs" / "2")
    assert run.best_round == int(best)
    with pytest.raises(ValueError, match="expected a run with a best model, got one whose weights are not kept"):
        _ = run.best_model
    with pytest.raises(ValueError, match="expected a run with a best model, got best_metric=None"):
        _ = Run.load(tmp_path / "runs" / "1").best_model


def test_the_weights_of_another_round_are_not_taken_for_the_best(command: Command, tmp_path: Path) -> None:
    succeed(command(**DIVERGING, checkpoints_dir="kept"))
    best, _ = best_of(tmp_path / "runs" / "1")
    last = checkpoint.read(str(tmp_path / "kept" / "round-4.pt"))
    history, settings = last["history"], last["settings"]
    directory = str(tmp_path / "kept")
    with world():
        assert load_best(directory, best, history[best][LOSS], LOSS, settings) is not None
        assert load_best(directory, best, history[best][LOSS] + 1, LOSS, settings) is None
        assert load_best(directory, best, history[best][LOSS], LOSS, settings | {"seed": 7}) is None
        shutil.copy(f"{directory}/round-4.pt", f"{directory}/best.pt")  # as a run that was killed leaves one
        found = load_best(directory, 3, history[3][LOSS], LOSS, settings)
        expected = checkpoint.read(f"{directory}/round-3.pt")["server"]["weights"]
        assert found is not None
        assert all(torch.equal(found[name], weight) for name, weight in expected.items())

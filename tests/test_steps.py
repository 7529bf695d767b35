"""The loss and the learning rate by a count of steps that goes on over all rounds: numbers, ranks, resuming, places."""

import json
import math
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from helpers import Command, make_bert, make_examples, refusal, succeed, weights_hash
from matplotlib.figure import Figure
from test_report import only, write_run
from test_trackers import read_board
from torch import nn

from scaling_fl.distributed.collectives import rank
from scaling_fl.distributed.launch import launch
from scaling_fl.distributed.placement import place_sites
from scaling_fl.distributed.world import world
from scaling_fl.experiment.build import build
from scaling_fl.experiment.contradictions import find_contradictions
from scaling_fl.experiment.run import count_steps_before
from scaling_fl.experiment.settings import Settings
from scaling_fl.experiment.trackers import tracked
from scaling_fl.federation.local_training import LocalTraining
from scaling_fl.federation.round import Federation
from scaling_fl.federation.site import TRAINERS, Site
from scaling_fl.federation.step_log import StepLog
from scaling_fl.records.rounds import Record
from scaling_fl.report.steps import bounds, draw_by_step
from scaling_fl.training.loop import Batch
from scaling_fl.training.metrics import by_step
from scaling_fl.training.optimisers import OPTIMISERS
from scaling_fl.training.schedules import linear
from scaling_fl.training.scores import score_classes
from scaling_fl.training.seeds import derive_seed

SIZES, EPOCHS, BATCH_SIZE, ACCUMULATION, ROUNDS = (11, 7, 17), 2, 3, 2, 2
NUM_STEPS = [EPOCHS * math.ceil(size / BATCH_SIZE / ACCUMULATION) for size in SIZES]  # 4, 4, 6
DATA = [make_examples(size, seed) for seed, size in enumerate(SIZES)]
RATE = 0.2


def batches(site: Site, seed: int, start: int) -> Iterator[Batch]:
    return site.data.shuffled_batches(BATCH_SIZE, seed, start)


def make_federation(step_log: StepLog, **options: Any) -> Federation:
    training = LocalTraining(
        partial(OPTIMISERS["sgd"], lr=RATE),
        options.pop("batches", batches),
        score_classes,
        seed=3,
        num_epochs=EPOCHS,
        gradient_accumulation=ACCUMULATION,
        schedule=linear(ROUNDS, minimum=0.05),
        step_log=step_log,
    )
    topology = place_sites([0] * len(SIZES))
    sites = [
        Site(number, topology.sites[number], size, DATA[number], num_steps=NUM_STEPS[number])
        for number, size in enumerate(SIZES)
    ]
    return Federation(topology, sites, make_bert(dropout=0.0), train_site=training, **options)


def train_plainly(every: int) -> list[list[dict[str, Any]]]:
    """Train in a plain loop, and return of each round and point the losses of examples and the last rates by site."""
    model = make_bert(dropout=0.0).train()
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    rounds = []
    for round_ in range(1, ROUNDS + 1):
        points: list[dict[str, Any]] = []
        mean = {name: torch.zeros_like(tensor, dtype=torch.float64) for name, tensor in weights.items()}
        for site, examples in enumerate(DATA):
            model.load_state_dict(weights)
            step = 0
            for epoch in range(EPOCHS):
                order = list(examples.shuffled_batches(BATCH_SIZE, derive_seed(3, "order", round_, site, epoch)))
                for first in range(0, len(order), ACCUMULATION):
                    if step // every == len(points):
                        points.append({"losses": [], "rates": {}})
                    done = (round_ - 1 + step / NUM_STEPS[site]) / ROUNDS
                    rate = 0.05 + (RATE - 0.05) * (1 - done)
                    optimiser = torch.optim.SGD(model.parameters(), lr=rate)
                    losses = [of_one_text(model, batch) for batch in order[first : first + ACCUMULATION]]
                    torch.cat(losses).mean().backward()
                    optimiser.step()
                    optimiser.zero_grad()
                    points[step // every]["losses"] += [(site, loss.item()) for loss in torch.cat(losses)]
                    points[step // every]["rates"][site] = rate
                    step += 1
            for name, tensor in model.state_dict().items():
                mean[name] += tensor.double() * SIZES[site] / sum(SIZES)
        weights = {name: tensor.to(weights[name].dtype) for name, tensor in mean.items()}
        rounds.append(points)
    return rounds


def of_one_text(model: nn.Module, batch: Batch) -> torch.Tensor:
    logits = model(**{name: tensor for name, tensor in batch.items() if name != "labels"}).logits
    return nn.functional.cross_entropy(logits, batch["labels"], reduction="none")


@pytest.mark.parametrize("every", [1, 4])
def test_points_are_those_of_a_plain_loop(every: int) -> None:
    step_log, steps, seen = StepLog(every, with_sites=True), 0, []
    with world():
        federation = make_federation(step_log)
        for round_ in range(1, ROUNDS + 1):
            metrics = federation.train(round_)
            federation.global_model.step()
            found = step_log.gather(metrics["site.examples"], steps)
            steps = found["train.steps"]
            seen.append(found)
    expected = train_plainly(every)
    ends = [1, 2, 3, 4, 5, 6] if every == 1 else [4, 6]
    assert [found["step.number"] for found in seen] == [ends, [6 + end for end in ends]], "of the site of most steps"
    assert steps == 12
    for found, points in zip(seen, expected, strict=True):
        losses = [np.mean([loss for _, loss in point["losses"]]) for point in points]
        assert found["step.loss"] == pytest.approx(losses, rel=1e-4)
        assert found["step.learning_rate"] == pytest.approx([np.mean([*point["rates"].values()]) for point in points])
        for site, num_steps in enumerate(NUM_STEPS):
            of_site = [point for point in points if site in point["rates"]]
            assert len(of_site) == math.ceil(num_steps / every)
            means = [np.mean([loss for of, loss in point["losses"] if of == site]) for point in of_site]
            assert found["step.site_loss"][site] == pytest.approx(means, rel=1e-4)
            assert found["step.site_learning_rate"][site] == pytest.approx([point["rates"][site] for point in of_site])


def test_a_point_of_a_round_is_its_loss_to_the_bit_and_no_step_reads_a_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    reads: list[int] = []
    read, training = torch.Tensor.item, []
    monkeypatch.setattr(torch.Tensor, "item", lambda tensor: reads.extend(training) or read(tensor))

    def watched(site: Site, seed: int, start: int) -> Iterator[Batch]:
        training[:] = [site.number]
        yield from batches(site, seed, start)
        training.clear()

    step_log = StepLog(1_000)
    with world():
        metrics = make_federation(step_log, batches=watched).train(1)
        found = step_log.gather(metrics["site.examples"], 0)
    assert found["step.loss"] == [metrics["train.loss"]]
    assert not reads


def test_a_site_that_failed_is_left_out_and_a_point_without_targets_has_no_loss() -> None:
    def fail(model: nn.Module, site: Site, round_: int) -> dict[str, Any]:
        if site.number == 2:
            raise OSError("disk failure")
        return {"num_examples": 0}

    step_log = StepLog(1)
    with world():
        metrics = make_federation(step_log, min_sites=1).train(1, evaluate_local=fail)
        found = step_log.gather(metrics["site.examples"], 0)
        assert metrics["sites.failed"] == 1
        assert found["step.number"] == [1, 2, 3, 4], "and not 6"
        assert step_log.gather({0: 1, 1: 1}, 4) == {
            "train.steps": 4,
            **{name: [] for name in ("step.number", "step.loss", "step.learning_rate")},
        }, "nothing of the round before"
        optimiser = torch.optim.SGD([torch.zeros(1)], lr=0.5)
        score, steps = step_log.watch(0, optimiser, lambda output, batch, means: means.add("loss", output, 0), [1])
        for _ in steps:
            score(torch.tensor(0.0), {}, SimpleNamespace(extend=lambda of_batch: None))  # type: ignore[arg-type]
        assert step_log.gather([0], 4)["step.loss"] == [None]


def points_of(run: Path) -> list[dict[str, Any]]:
    lines = map(json.loads, (run / "rounds.jsonl").read_text().splitlines())
    return [{name: of for name, of in line.items() if name.startswith(("step.", "train."))} for line in lines]


def test_neither_ranks_nor_stops_change_a_point_and_logging_changes_no_weight(command: Command, tmp_path: Path) -> None:
    given = {"num_rounds": 3, "sites_per_round": 3, "site_settings": {1: {"batch_size": 2}}}
    logs = {"log_every_steps": 3, "log_sites_by_step": True}
    whole = succeed(command(**given, **logs))
    given["checkpoints_dir"] = "checkpoints"
    succeed(command("--unobserved", ranks=2, **given | {"num_rounds": 1}))
    succeed(command("--unobserved", ranks=2, **given | {"num_rounds": 2}, **logs))
    resumed = succeed(command(ranks=1, **given, **logs))
    assert weights_hash(whole) == weights_hash(resumed)
    one, two = (points_of(tmp_path / "runs" / number) for number in ("1", "2"))
    assert two[2:] == one[2:], "the first round of the second was not logged, and its steps count"
    assert len(two[1]) == 2, "the loss and accuracy of the round alone"
    numbers = [number for of_round in one for number in of_round.get("step.number", ())]
    assert numbers == sorted(set(numbers))
    assert numbers[-1] == one[-1]["train.steps"] >= 3 * 4
    scalars = json.loads((tmp_path / "runs/1/metrics.json").read_text())
    assert scalars["step.loss"]["steps"] == numbers
    assert scalars["step.loss"]["values"] == [loss for of_round in one for loss in of_round.get("step.loss", ())]
    assert not [name for name in scalars if "site_loss" in name]


def test_steps_of_rounds_that_were_not_logged_are_those_planned() -> None:
    def job(*history: dict[str, int]) -> Any:
        return SimpleNamespace(history=history, schedule=SimpleNamespace(most_steps=lambda round_: 10 * round_))

    assert count_steps_before(job({})) == 0
    assert count_steps_before(job({}, {}, {})) == 10 + 20
    assert count_steps_before(job({}, {}, {"train.steps": 7}, {}, {})) == 7 + 30 + 40


def build_with(given: dict[str, Any], every: int) -> str:
    """Return why a rank of two is refused, of which the second logs every so many steps."""
    with world():
        return refusal(lambda: build(Settings(**given, log_every_steps=[2, every][rank()])))


def test_ranks_that_log_other_steps_refuse_each_other(small_run: dict[str, Any]) -> None:
    sentence = "log_every_steps: expected the same on all ranks, got 2 on rank 0 and 3 on rank 1"
    assert launch(partial(build_with, small_run, 3), num_ranks=2, fork=True) == [sentence] * 2


def test_another_trainer_and_sites_without_steps_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(TRAINERS, "mine", lambda model, site, round_: {})
    assert find_contradictions(Settings(trainer="mine", log_every_steps=5)) == [
        "log_every_steps: expected None, as trainer='mine' does not know it, got 5"
    ]
    assert find_contradictions(Settings(log_sites_by_step=True)) == [
        "log_sites_by_step: expected False, as there is no log_every_steps, got True"
    ]


LINE = {
    **{"train.loss": 0.4, "train.steps": 12, "step.number": [8, 11, 12], "step.loss": [0.5, None, 0.25]},
    **{"step.learning_rate": [0.2, 0.1, 0.05], "step.site_loss": {0: [0.5, None], 1: [0.75]}},
}


@pytest.mark.parametrize("track_sites", [False, True])
def test_trackers_get_points_at_their_steps_and_those_of_sites_only_if_asked(
    small_run: dict[str, Any], tmp_path: Path, track_sites: bool
) -> None:
    assert dict(by_step(LINE, with_sites=track_sites))[11] == {"step.learning_rate": 0.1}
    settings = Settings(**small_run, trackers=["tensorboard"], track_sites=track_sites)
    with world(), tracked(settings, Record(str(tmp_path))) as record:
        record.add_round(2, LINE)
    board = read_board(tmp_path)
    assert board.pop("train.loss") == [(2, pytest.approx(0.4))], "at the round"
    assert board.pop("train.steps") == [(2, 12)]
    of_sites = {"step.site_loss/0": [(8, 0.5)], "step.site_loss/1": [(8, 0.75)]} if track_sites else {}
    rates = [(8, pytest.approx(0.2)), (11, pytest.approx(0.1)), (12, pytest.approx(0.05))]
    assert board == {"step.loss": [(8, 0.5), (12, 0.25)], "step.learning_rate": rates} | of_sites


def test_the_report_draws_points_sites_and_the_ends_of_rounds(tmp_path: Path) -> None:
    def add(round_: dict[str, Any]) -> None:
        if round_["round"] == 2:
            round_ |= json.loads(json.dumps(LINE))

    run = only(write_run(tmp_path / "run", num_rounds=2, change=add))
    axes = Figure().subplots()
    legend = draw_by_step(axes, [run], name="loss", y="loss")
    curve, end = axes.lines
    assert np.allclose(curve.get_xydata(), [[8, 0.5], [11, np.nan], [12, 0.25]], equal_nan=True)
    assert [*end.get_xdata()] == [12, 12]
    assert np.allclose(bounds(run, "loss"), [[0.5, np.nan, np.nan], [0.75, np.nan, np.nan]], equal_nan=True)
    assert [text for _, _, text in legend] == ["mean of the sites", "all sites", "end of a round"]
    assert len(draw_by_step(Figure().subplots(), [run, run], name="learning_rate", y="rate")) == 1
    (tmp_path / "run/rounds.jsonl").unlink()
    metric = {"steps": [8, 12], "values": [0.5, 0.25], "timestamps": []}
    losses = metric | {"steps": [0, 1]}
    (tmp_path / "run/metrics.json").write_text(json.dumps({"step.loss": metric, "train.loss": losses}))
    assert [*only(str(tmp_path / "run")).steps] == [0, 1], "steps are no rounds"

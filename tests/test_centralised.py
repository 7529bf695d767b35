"""The centralised twin of a federated run: it is ordinary training on all data, and a federation of one site is it."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import OPTIMISERS_HERE, Command, long_but, refusal, succeed, weights_hash

from scaling_fl.command.__main__ import add_setting
from scaling_fl.data.examples import join
from scaling_fl.distributed.launch import launch
from scaling_fl.distributed.world import world
from scaling_fl.experiment.build import Job, build
from scaling_fl.experiment.centralised import count_ranks, find_unused, without_federation
from scaling_fl.experiment.optimiser_states import check_states
from scaling_fl.experiment.parameters import PARAMETERS
from scaling_fl.experiment.result import Run
from scaling_fl.experiment.run import train_on_rank
from scaling_fl.experiment.settings import Settings
from scaling_fl.models.flat import flatten_
from scaling_fl.records.rounds import Record
from scaling_fl.report.runs import read
from scaling_fl.training.optimisers import OPTIMISERS
from scaling_fl.training.seeds import derive_seed


@pytest.fixture
def twin(small_run: dict[str, Any]) -> Settings:
    return Settings(**small_run | {"centralised": True, "num_local_epochs": 2, "learning_rate": 1e-2})


def build_twin(settings: Settings) -> Job:
    with world():
        return build(without_federation(settings))


def train(settings: Settings, folder: Path) -> tuple[list[dict[str, Any]], dict[str, torch.Tensor]]:
    """Train on one rank, and return the metrics of the rounds and the weights."""
    history: list[dict[str, Any]] = []
    folder.mkdir()

    def note(metrics: dict[str, Any]) -> bool:
        history.append(metrics)
        return True

    with world():
        train_on_rank(settings, Record(str(folder), goes_on=note))
    return history, torch.load(folder / "final_model.pt", weights_only=True)


def train_in_a_loop(settings: Settings) -> dict[str, torch.Tensor]:
    """Train in plain PyTorch: one model, one optimiser, all epochs of all rounds."""
    job = build_twin(settings)
    model, examples = job.loaded.model.train(), job.data.train[0]
    flatten_(model)  # as some CPUs multiply a single row in an order that depends on where in memory the weights are
    optimiser = OPTIMISERS[settings.optimiser](model.parameters(), lr=settings.learning_rate)
    for round_ in range(1, settings.num_rounds + 1):
        torch.manual_seed(derive_seed(settings.seed, "dropout", round_, 0))
        for epoch in range(settings.num_local_epochs):
            random = np.random.default_rng(derive_seed(settings.seed, "order", round_, 0, epoch))
            order = random.permutation(len(examples))
            for first in range(0, len(order), settings.batch_size):
                optimiser.zero_grad()
                model(**examples.select(order[first : first + settings.batch_size]).batch()).loss.backward()
                optimiser.step()
    return {name: weight.detach() for name, weight in model.named_parameters()}


def but(settings: Settings, **changes: Any) -> Settings:
    """Change settings; the parameters of an optimiser are its own."""
    of_others = dict.fromkeys(PARAMETERS["optimiser"]) if "optimiser" in changes else {}
    return Settings(**vars(settings) | of_others | changes)


@pytest.mark.parametrize("optimiser", long_but("adamw", OPTIMISERS_HERE))
def test_the_twin_is_a_plain_loop_and_a_federation_of_one_site_bit_for_bit(
    twin: Settings, optimiser: str, tmp_path: Path
) -> None:
    twin = but(twin, optimiser=optimiser, site_ids=[0, 0, 0])
    weights = train(twin, tmp_path / "twin")[1]
    expected = train_in_a_loop(twin)
    assert all(torch.equal(weights[name], expected[name]) for name in expected)
    one_site = but(twin, site_ids=[0])
    federated = but(one_site, centralised=False, optimiser_state="reset" if optimiser == "sgd" else "keep")
    of_twin, of_federated = (train(of, tmp_path / str(of.centralised)) for of in (one_site, federated))
    assert all(torch.equal(of_twin[1][name], of_federated[1][name]) for name in of_twin[1])
    assert [of["train.loss"] for of in of_twin[0][1:]] == [of["train.loss"] for of in of_federated[0][1:]]


def test_all_training_examples_are_pooled_and_what_is_held_out_is_evaluated_as_in_the_federation(
    twin: Settings, tmp_path: Path
) -> None:
    twin = but(twin, site_test_fraction=0.3, validation_fraction=0.2, num_rounds=0)
    with world():
        parts = build(but(twin, centralised=False)).data.train
    pooled = build_twin(twin).data
    assert set(pooled.train) == {0}
    assert [*pooled.train[0].starts] == [start for site in sorted(parts) for start in parts[site].starts]
    assert pooled.sizes[0].num_examples == len(pooled.train[0])
    some = build_twin(but(twin, eligible_sites=[1, 3]))
    assert [*some.data.train[0].starts] == [*parts[1].starts, *parts[3].starts]
    assert some.identity["eligible sites"] == [1, 3], "which a resumed run has, too"
    steps = build_twin(but(twin, num_rounds=2)).schedule.most_steps(1)
    build_twin(but(twin, num_rounds=2, lr_schedule="linear", lr_schedule_rounds=2, warmup_steps=2 * steps - 1))
    histories = [train(but(twin, centralised=is_twin), tmp_path / str(is_twin))[0] for is_twin in (True, False)]
    evaluated = [
        {name: value for name, value in history[0].items() if not name.startswith(("time.", "comm.", "rank."))}
        for history in histories
    ]
    assert evaluated[0] == evaluated[1]
    assert len(evaluated[0]["site.test_accuracy"]) == 4


def test_examples_of_several_files_are_joined(twin: Settings, corpus: tuple[Path, Path]) -> None:
    files = but(
        twin, train_path=None, test_path=None, site_ids=[0, 0], site_paths=[[*map(str, corpus)], str(corpus[0])]
    )
    with world():
        parts = build(but(files, centralised=False)).data.train
    joined = build_twin(files).data.train[0]
    for whole, part in ((range(len(parts[0])), parts[0]), (range(len(parts[0]), len(joined)), parts[1])):
        ours, theirs = joined.select(np.array(whole)).batch(), part.batch()
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert join([joined]).columns is joined.columns


def test_settings_of_a_federation_do_nothing_and_are_named(twin: Settings, tmp_path: Path) -> None:
    changes: dict[str, Any] = {
        **{"strategy": "fedadam", "sites_per_round": 2, "proximal_mu": 1.0, "comm_dtype": "float32"},
        **{"site_settings": {1: {"learning_rate": 1.0}}, "weight_by": "sites", "evaluate_local": True},
    }
    with world():
        assert find_unused(twin) == []
        assert {*find_unused(but(twin, **changes))} == {*changes}
        assert find_unused(but(twin, strategy="fedavg", server_learning_rate=0.5)) == ["server_learning_rate"]
        assert find_unused(but(twin, centralised=False, **changes)) == []
        assert find_unused(but(twin, optimiser="sgd", optimiser_state="keep")) == ["optimiser_state"]
        assert find_unused(but(twin, optimiser_state="keep")) == []
    first, second = (train(of, tmp_path / str(number))[1] for number, of in enumerate((twin, but(twin, **changes))))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_one_process_trains_whatever_ranks_says_and_several_are_refused(
    twin: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    for ranks in ("2", "auto"):
        monkeypatch.setenv("RANKS", ranks)
        assert count_ranks(twin) == 1
    assert count_ranks(but(twin, centralised=False)) > 1

    expected = "checkpoints_dir: expected a folder of this machine, as a centralised run keeps the state of its optim"
    elsewhere = but(twin, checkpoints_dir="s3://bucket/job")
    assert refusal(lambda: check_states(without_federation(elsewhere))).startswith(expected)
    check_states(without_federation(but(elsewhere, optimiser="sgd")))

    def refused() -> str:
        with world():
            return refusal(lambda: train_on_rank(twin))

    expected = "centralised: expected one rank, which trains on all data, got 2"
    assert launch(refused, num_ranks=2, fork=True) == [expected] * 2


def test_the_subcommand_is_the_setting(command: Command, tmp_path: Path) -> None:
    assert add_setting(["-c", "a comment", "with", "a=1"], "b=2") == ["-c", "a comment", "with", "b=2", "a=1"]
    assert add_setting([], "b=2") == ["with", "b=2"]
    federated = succeed(command(num_rounds=2))
    stopped = succeed(command(num_rounds=1, centralised=True, ranks=2, checkpoints_dir="c", keep_checkpoints=1))
    resumed = succeed(command(num_rounds=2, centralised=True, ranks=2, checkpoints_dir="c", sites_per_round=2))
    assert weights_hash(resumed) == weights_hash(succeed(command("centralised", num_rounds=2)))
    assert len({*map(weights_hash, (federated, stopped, resumed))}) == 3
    assert "sites     none: centralised, on the examples of 4 sites together, on cpu\n" in stopped
    assert "unused    sites_per_round, which are of a federation alone\n" in resumed
    assert "rounds    1, each of 1 epoch\n" in stopped
    assert [run.name for run in read([str(tmp_path / "runs" / number) for number in "12"])] == [
        "run 1",
        "run 2, centralised",
    ]
    assert Run.load(tmp_path / "runs" / "2").settings.centralised
    assert "centralised" in command(num_rounds=2, checkpoints_dir="c")[1]

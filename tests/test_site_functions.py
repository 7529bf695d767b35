"""A function trains and evaluates a site: its result counts, and its side effects do not."""

import os
import random
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest
import torch
from helpers import refusal
from torch import nn

from scaling_fl.distributed.launch import launch
from scaling_fl.distributed.placement import place_sites
from scaling_fl.distributed.world import world
from scaling_fl.federation.global_model import GlobalModel
from scaling_fl.federation.round import Federation
from scaling_fl.federation.site import Site, SiteFunction
from scaling_fl.federation.strategies import make_strategy

SIZES = (10, 30, 20)  # examples of each site


class OneNumber(nn.Module):
    """A model of one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.register_buffer("calls", torch.zeros(1))


def play(
    train_site: SiteFunction,
    evaluate_site: SiteFunction | None = None,
    evaluate_local: SiteFunction | None = None,
    **options: Any,
) -> tuple[dict, dict, Any]:
    """Return the metrics of a round, those of its evaluation, and the global weight after it."""
    with world():
        topology = place_sites([0] * len(SIZES))
        model = OneNumber()
        global_model = GlobalModel(model, make_strategy("fedavg"))
        sites = [Site(number, device, SIZES[number], data=number) for number, device in topology.sites.items()]
        federation = Federation(
            topology, sites, model, global_model, train_site=train_site, evaluate_site=evaluate_site, seed=0, **options
        )
        metrics = federation.train(1, evaluate_local)
        global_model.step()
        assert federation.model.get_buffer("calls").item() == 0
        return metrics, federation.evaluate(1), global_model.weights[0].item()


def move(model: nn.Module, site: Site, round_: int = 0, **returned: Any) -> dict[str, Any]:
    """Add the number of the site to the weight."""
    with torch.no_grad():
        model.get_parameter("weight").add_(site.number)
    return {"num_examples": site.num_examples, **returned}


def test_a_mean_is_over_examples_and_a_sum_over_its_count() -> None:
    def train_site(model: nn.Module, site: Site, round_: int) -> Mapping[str, Any]:
        return move(model, site, loss=float(site.number), tokens=(torch.tensor(8.0 * site.number), 4 + site.number))

    metrics, _, weight = play(train_site)
    assert weight == pytest.approx((0 * 10 + 1 * 30 + 2 * 20) / 60)
    assert metrics["train.loss"] == pytest.approx((0 * 10 + 1 * 30 + 2 * 20) / 60)
    assert metrics["train.tokens"] == pytest.approx((0 + 8 + 16) / (4 + 5 + 6))
    assert metrics["site.tokens"] == pytest.approx({0: 0, 1: 8 / 5, 2: 16 / 6})


def test_a_site_that_trains_on_fewer_examples_weighs_less() -> None:
    def train_site(model: nn.Module, site: Site, round_: int) -> Mapping[str, Any]:
        return move(model, site) | {"num_examples": (10, 3, 0)[site.number]}

    assert play(train_site)[2] == pytest.approx((0 * 10 + 1 * 3) / 13)


def test_an_evaluation_is_the_mean_over_all_evaluated_examples() -> None:
    def evaluate_site(model: nn.Module, site: Site, round_: int) -> Mapping[str, Any]:
        assert not model.training
        seen.append(model.get_parameter("weight").item())
        return {"num_examples": 5 * site.number, "accuracy": site.number / 4, "round": (round_, 1)}

    seen: list[float] = []
    _, validation, weight = play(lambda model, site, round_: move(model, site), evaluate_site)
    assert seen == [weight] * 3
    means = {"validation.accuracy": (5 * 0.25 + 10 * 0.5) / 15, "validation.round": 1.0}
    assert {name: value for name, value in validation.items() if not name.startswith("sites.")} == means | {
        "site.test_examples": {0: 0, 1: 5, 2: 10},
        "site.test_accuracy": {1: 0.25, 2: 0.5},
        "site.test_round": {0: 1.0, 1: 1.0, 2: 1.0},
    }
    assert (validation["sites.test_accuracy.worst"], validation["sites.test_accuracy.mean"]) == (0.25, 0.375)


def test_scores_of_nothing_are_left_out() -> None:
    def train_site(model: nn.Module, site: Site, round_: int) -> Mapping[str, Any]:
        count = np.int64((10, 0, 0)[site.number])
        return move(model, site) | {"num_examples": count, "loss": 1.0, "f1": (0.0, 0)}

    metrics, _, _ = play(train_site)
    assert metrics["train.loss"] == 1.0
    assert metrics["site.loss"] == {0: 1.0}
    assert metrics["site.examples"] == {0: 10, 1: 0, 2: 0}
    assert not [name for name in metrics if "f1" in name]


def test_a_round_of_no_site_leaves_weights_and_momentum_as_they_were() -> None:
    with world():
        topology, model = place_sites([0]), OneNumber()
        global_model = GlobalModel(model, make_strategy("fedavgm"))
        site, used = Site(0, topology.devices[0], 10), iter((10, 0, 10))

        def train_site(model: nn.Module, site: Site, round_: int) -> Mapping[str, Any]:
            with torch.no_grad():
                model.get_parameter("weight").add_(1)
            return {"num_examples": next(used)}

        federation = Federation(topology, [site], model, global_model, train_site=train_site)
        weights = []
        for round_ in (1, 2, 3):
            federation.train(round_)
            global_model.step()
            weights.append(global_model.weights[0].item())
    assert weights == pytest.approx([1.0, 1.0, 1.0 + 1.9])


def test_tensors_that_are_no_buffers_are_restored() -> None:
    def train_site(model: nn.Module, site: Site, round_: int) -> Mapping[str, Any]:
        model.seen += 1
        return move(model, site, seen=model.seen.item())

    class Counting(OneNumber):
        def __init__(self) -> None:
            super().__init__()
            self.seen = torch.zeros(1)

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(play.__globals__, "OneNumber", Counting)
        assert play(train_site)[0]["site.seen"] == {0: 1, 1: 1, 2: 1}


@pytest.mark.parametrize(
    ("returned", "expected"),
    [
        (None, "num_examples: expected a whole number from the site's function, got None"),
        ({"loss": 1.0}, "num_examples: expected a whole number from the site's function, got {'loss': 1.0}"),
        ({"num_examples": 11}, "num_examples: expected 0 to 10, the number of the site's examples, got 11"),
        ({"num_examples": -1}, "num_examples: expected 0 to 10, the number of the site's examples, got -1"),
        ({"num_examples": 1.5}, "num_examples: expected a whole number from the site's function, got 1.5"),
        ({"num_examples": 1, "f1": (0.5, -1)}, "f1, its count: expected at least 0, got -1"),
        (
            {"num_examples": 1, "seconds": 3.0},
            "seconds: expected another name of a score, got one that the federation measures itself",
        ),
        (
            {"num_examples": 1, "test_accuracy": 0.5},
            "test_accuracy: expected another name of a score, got one that the federation measures itself",
        ),
        (
            {"num_examples": 1, "loss": "low"},
            "loss: expected a mean, or (sum, count), from the site's function, got 'low'",
        ),
    ],
)
def test_invalid_results_of_a_function_are_refused(returned: Any, expected: str) -> None:
    assert refusal(lambda: play(lambda model, site, round_: returned)) == f"site 0 failed in round 1: {expected}"


def test_a_score_that_is_not_finite_is_divergence() -> None:
    def train_site(model: nn.Module, site: Site, round_: int) -> Mapping[str, Any]:
        return move(model, site, loss=float("nan"))

    assert refusal(lambda: play(train_site)).startswith("site 0 diverged in round 1: loss: expected a finite number")


def replace_weight(model: nn.Module) -> None:
    model.weight = nn.Parameter(torch.ones(1))


with_each_change = pytest.mark.parametrize(
    "change",
    [nn.Module.half, replace_weight, lambda model: model.requires_grad_(False)],
    ids=["type", "weight", "freezes"],
)


@with_each_change
def test_weights_that_are_not_trained_in_place_are_refused(change: Callable[[nn.Module], Any]) -> None:
    def train_site(model: nn.Module, site: Site, round_: int) -> Mapping[str, Any]:
        change(model)
        return {"num_examples": site.num_examples}

    assert refusal(lambda: play(train_site)).startswith(
        "site 0 failed in round 1: weight weight: expected to be trained in place"
    )


@with_each_change
def test_a_site_that_fails_leaves_a_model_that_the_next_can_train(change: Callable[[nn.Module], Any]) -> None:
    def train_site(model: nn.Module, site: Site, round_: int) -> Mapping[str, Any]:
        if site.number == 0:
            change(model)
        return move(model, site)

    metrics, _, weight = play(train_site, min_sites=2)
    assert metrics["sites.failed"] == 1
    assert weight == pytest.approx((1 * 30 + 2 * 20) / 50)


def test_a_site_may_evaluate_on_more_examples_than_it_trains_on() -> None:
    def evaluate_site(model: nn.Module, site: Site, round_: int) -> Mapping[str, Any]:
        assert not torch.is_grad_enabled()
        return {"num_examples": 1000, "accuracy": 0.5}

    counts = dict.fromkeys(range(3), 1000)
    validation = play(move, evaluate_site)[1]
    assert (validation["validation.accuracy"], validation["site.test_examples"]) == (0.5, counts)
    assert refusal(lambda: play(move, lambda model, site, round_: {"num_examples": -1})) == (
        "site 0 was not evaluated in round 1: num_examples: expected at least 0, got -1"
    )


def draw(model: nn.Module, site: Site, round_: int) -> Mapping[str, Any]:
    """Add random numbers of the global generators to the weight; leave a gradient and variables."""
    for _ in range(1 + site.number):
        step = random.random() + np.random.random() + torch.rand(()).item()
    weight = model.get_parameter("weight")
    assert weight.grad is None
    (weight * step).sum().backward()
    with torch.no_grad():
        weight.add_(weight.grad)
    assert "RANK" not in os.environ
    assert "TORCHELASTIC_RUN_ID" not in os.environ
    os.environ["LEFT_BEHIND"] = "1"
    return {"num_examples": site.num_examples, "loss": step}


def play_and_look() -> tuple[dict[str, Any], float, bool]:
    """Play, and return the state that changed in the process."""
    before = dict(os.environ), random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    metrics, _, weight = play(draw)
    after = dict(os.environ), random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    return metrics["site.loss"], weight, before == after


def test_a_function_may_use_the_global_generators_and_placement_changes_no_bit() -> None:
    alone = play_and_look()
    assert alone[2]
    assert len(set(alone[0].values())) == 3
    for num_ranks in (2, 3):
        assert launch(play_and_look, num_ranks=num_ranks, fork=True) == [alone] * num_ranks


def test_a_common_test_set_and_the_sites_are_evaluated_together() -> None:
    def evaluate_device(model: nn.Module, device: torch.device) -> Mapping[str, Any]:
        return {"accuracy": (3, 4)}

    def evaluate_site(model: nn.Module, site: Site, round_: int) -> Mapping[str, Any]:
        return {"num_examples": 4, "accuracy": (site.number, 4)}

    validation = play(move, evaluate_site, evaluate_device=evaluate_device)[1]
    assert validation["validation.accuracy"] == 0.75
    assert validation["site.test_accuracy"] == {0: 0.0, 1: 0.25, 2: 0.5}


class Counts:
    """An evaluation that leaves nothing behind, of a model that counts how often it computes."""

    leaves_nothing = True

    def __call__(self, model: nn.Module, site: Site, round_: int) -> Mapping[str, Any]:
        model.get_buffer("calls").add_(1)
        model.count = getattr(model, "count", 0) + 1
        return {"num_examples": 1, "calls": model.get_buffer("calls").item(), "count": model.count}


def test_a_model_that_changes_as_it_computes_is_the_same_at_each_site() -> None:
    validation = play(move, Counts())[1]
    assert set(validation["site.test_calls"].values()) == set(validation["site.test_count"].values()) == {1.0}


def test_a_site_is_evaluated_before_its_weights_are_averaged_and_evaluation_is_a_bystander() -> None:
    def evaluate_local(model: nn.Module, site: Site, round_: int) -> Mapping[str, Any]:
        assert not model.training
        assert not torch.is_grad_enabled()
        model.get_buffer("calls").add_(7)  # as some models do whenever they compute
        model.note = "left"
        random.random()
        return {"num_examples": 1, "weight": model.get_parameter("weight").item()}

    metrics, _, weight = play(move, evaluate_local=evaluate_local)
    assert metrics["site.local_weight"] == {0: 0.0, 1: 1.0, 2: 2.0}
    assert weight == play(move)[2]

"""A site that fails ends the run or is skipped in the round."""

import logging
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from helpers import Play, make_bert
from torch import nn

from scaling_fl.federation.global_model import GlobalModel
from scaling_fl.federation.round import Federation
from scaling_fl.federation.site import Site
from scaling_fl.training.loop import Batch, take_steps
from scaling_fl.training.metrics import Means

BROKEN = Play(site_ids=(0,) * 5, broken=(1, 3))


def test_a_site_that_fails_ends_the_run_and_is_named(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(OSError, match="disk failure") as caught:
        BROKEN.play()
    assert caught.value.__notes__ == ["(of site 1 in round 1)"]
    with pytest.raises(SystemExit):
        BROKEN.on_ranks(2)
    assert "failed with OSError: disk failure (of site 1 in round 1)" in capfd.readouterr().err


class Endless(Play):
    """Its sites have endless data unless they are broken."""

    def batches(self, site: Site, seed: int, start: int) -> Iterator[Batch]:
        while True:
            yield from super().batches(site, seed, start)


@pytest.mark.parametrize("broken", [(0, 2, 4), (1, 3)])
def test_a_site_that_fails_ends_the_sites_on_the_other_devices_of_its_rank(
    two_devices: Callable[[], None], broken: tuple[int, ...]
) -> None:
    two_devices()
    with pytest.raises(OSError, match="disk failure"):
        Endless(broken=broken).play()


def test_a_site_that_diverges_ends_the_run_and_is_named() -> None:
    with pytest.raises(ValueError, match=r"site 0 diverged in round 1: .*\. Use a lower learning_rate$"):
        Play(learning_rate=1e30).play()


def test_skipped_sites_are_counted_and_named_and_the_other_sites_continue(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        history, hashes = BROKEN.but(min_sites=1).play()
    assert [metrics["sites.failed"] for metrics in history[1:]] == [2, 2]
    assert [record.getMessage() for record in caplog.records] == [
        f"site {site} failed in round {round_} with OSError: disk failure; the round goes on without it"
        for round_ in (1, 2)
        for site in (1, 3)
    ]
    assert len(set(hashes)) == 3


def train_or_overflow(model: nn.Module, *arguments: Any) -> Means:
    """Train, and set the last weight to infinity if the disk fails."""
    try:
        return take_steps(model, *arguments)
    except OSError:
        *_, last = model.parameters()
        last.data[-1] = torch.inf
        return Means()


@pytest.mark.parametrize("what", [pytest.param("disk", marks=pytest.mark.long), "weight"])
def test_the_placement_of_a_failed_site_changes_no_bit(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if what == "weight":
        monkeypatch.setattr("scaling_fl.federation.local_training.take_steps", train_or_overflow)
        monkeypatch.setattr("scaling_fl.federation.aggregation.PIECE", 1_000)  # so that it is not in the first
    play = BROKEN.but(min_sites=3)
    alone = play.on_ranks(1)
    assert alone != Play().on_ranks(1)
    assert [play.on_ranks(num_ranks) for num_ranks in (2, 3)] == [alone, alone]


def test_a_run_without_failed_sites_does_not_depend_on_min_sites() -> None:
    whole, skipping = Play().play(), Play(min_sites=5).play()
    assert whole[1] == skipping[1]
    assert [metrics["sites.failed"] for metrics in skipping[0][1:]] == [0, 0]


def make_counting_bert() -> nn.Module:
    """Return a model that counts its batches, and whose loss depends on the count."""
    model = make_bert()
    model.register_buffer("seen", torch.tensor(0))

    def count(model: nn.Module, _: Any, output: Any) -> None:
        output.loss = output.loss * (1 + model.seen)
        model.seen += model.training

    model.register_forward_hook(count)
    return model


def test_state_that_a_site_leaves_in_the_model_changes_no_bit() -> None:
    play = Play(make_model=make_counting_bert)
    alone = play.on_ranks(1)
    assert alone != Play().on_ranks(1)
    assert play.on_ranks(2) == alone


def test_evaluating_a_round_changes_no_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    _, hashes = Play().play()
    monkeypatch.setattr(Federation, "evaluate", lambda self, round_: {})
    assert Play().play()[1] == hashes


def test_two_rounds_without_a_step_between_them_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(GlobalModel, "step", lambda self: None)
    with pytest.raises(ValueError, match=r"^the global model: expected a step after each round, got another round"):
        Play().play()


@pytest.mark.parametrize(("broken", "min_sites"), [((1, 3), 4), ((0, 1, 2, 3, 4), 1)])
def test_too_few_sites_end_the_run(broken: tuple[int, ...], min_sites: int) -> None:
    left = 5 - len(broken)
    with pytest.raises(
        ValueError, match=f"^min_sites: expected at least {min_sites} sites left in round 1, got {left} of 5: site "
    ):
        BROKEN.but(broken=broken, min_sites=min_sites).play()

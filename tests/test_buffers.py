"""Buffers such as batch norm's statistics are averaged for any size and type, and sites do not affect each other."""

import io
import itertools
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import Play, make_bert, refusal
from torch import Tensor, nn
from transformers import BertForSequenceClassification

from scaling_fl.distributed.world import world
from scaling_fl.federation.global_model import GlobalModel
from scaling_fl.federation.round import Federation
from scaling_fl.federation.strategies import make_strategy
from scaling_fl.models.flat import flatten_

SHARES = [Fraction(3, 8), Fraction(1, 8), Fraction(4, 8)]
HALVES = [Fraction(1, 2)] * 2


@pytest.fixture
def alone() -> Iterator[None]:
    with world():
        yield


def averaged(first: Tensor, locals_: Sequence[Tensor], shares: Sequence[Fraction], comm_dtype: str = "exact") -> Tensor:
    """Return a buffer after a round in which the sites change it to these values."""
    model = nn.Linear(2, 3)
    model.register_buffer("seen", first.clone())
    server, vector = GlobalModel(model, make_strategy("fedadam"), comm_dtype), flatten_(model)
    for local, share in zip(locals_, shares, strict=True):
        server.copy_to(vector)
        model.get_buffer("seen").copy_(local)
        server.exchange(vector, share)
    server.step()
    server.copy_to(vector)
    return model.get_buffer("seen")


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize(
    ("dtype", "exponents"),
    [
        (torch.float32, (-148, 128)),
        (torch.float32, (12, 14)),
        (torch.float64, (-900, 1023)),
        (torch.bfloat16, (-100, 100)),
        (torch.float16, (-14, 16)),
    ],
)
def test_a_mean_is_exact_for_values_of_any_size_in_any_order(dtype: torch.dtype, exponents: tuple[int, int]) -> None:
    torch.manual_seed(0)
    mantissas = torch.rand(4, 200, dtype=torch.float64) - 0.5
    first, *locals_ = torch.ldexp(mantissas, torch.randint(*exponents, (4, 200))).to(dtype)
    means = [
        averaged(first, [locals_[site] for site in order], [SHARES[site] for site in order])
        for order in itertools.permutations(range(3))
    ]
    assert all(torch.equal(mean, means[0]) for mean in means)
    limits = torch.finfo(dtype)
    for found, *terms in zip(means[0].tolist(), *(local.tolist() for local in locals_), strict=True):
        exact = sum(share * Fraction(term) for share, term in zip(SHARES, terms, strict=True))
        rounding = Fraction(limits.eps) * max(abs(exact), Fraction(limits.smallest_normal)) / 2
        assert abs(Fraction(found) - exact) <= rounding + max(map(abs, map(Fraction, terms))) / 2**50


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("comm_dtype", ["exact", "bfloat16", "float16"])
def test_a_statistic_may_change_by_any_amount(comm_dtype: str) -> None:
    found = averaged(torch.ones(2), [torch.tensor([5e3, 3e38]), torch.tensor([1e3, 0.0])], HALVES, comm_dtype)
    assert torch.equal(found, torch.tensor([3e3, 1.5e38]))


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.int8, torch.uint8, torch.bool])
def test_a_count_is_the_rounded_mean_and_a_flag_has_the_value_of_most_examples(dtype: torch.dtype) -> None:
    first, locals_ = torch.zeros(4).to(dtype), [torch.tensor([1, 1, 0, 1]), torch.tensor([0, 1, 1, 1])]
    assert averaged(first, locals_, [Fraction(1, 4), Fraction(3, 4)]).tolist() == [0, 1, 1, 1]
    assert averaged(first, locals_, HALVES).tolist() == [1, 1, 1, 1], "halves are rounded up"
    if dtype == torch.int64:
        assert averaged(first, [torch.full((4,), 7), torch.full((4,), -4)], HALVES).tolist() == [2] * 4


CONSTANTS = [
    torch.tensor([math.inf, -math.inf, math.nan, -0.0, 1 / 3, 1e-45, 3e38]),
    torch.tensor([math.inf, math.nan, -0.0, 1 / 3, 1e-310, 1.7e308], dtype=torch.float64),
    torch.tensor([2**62 + 1, -(2**63), 3]),
    torch.tensor([1 / 3 + 2j, complex(math.inf, -0.0)]),
    torch.tensor([True, False]),
]


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("constants", CONSTANTS, ids=lambda constants: str(constants.dtype))
def test_elements_that_no_site_changes_keep_their_bits(constants: Tensor) -> None:
    first = torch.cat([constants, torch.zeros_like(constants[:1])])
    local = torch.cat([constants, torch.ones_like(constants[:1])])
    found = averaged(first, [first, local, first], [Fraction(1, 3)] * 3)
    assert torch.equal(found[:-1].view(torch.uint8), constants.view(torch.uint8))
    assert found[-1].item() == pytest.approx(1 / 3 if found.dtype.is_floating_point or found.is_complex() else 0)


@pytest.mark.usefixtures("alone")
def test_a_site_that_does_not_change_a_buffer_counts_like_any_other() -> None:
    first = torch.full((2,), 8.0)
    assert averaged(first, [first, first / 2], [Fraction(1, 4), Fraction(3, 4)]).tolist() == [5.0, 5.0]


@pytest.mark.usefixtures("alone")
def test_a_mean_of_the_largest_numbers_does_not_overflow() -> None:
    largest = torch.tensor([1.0, -1.0], dtype=torch.float64) * torch.finfo(torch.float64).max
    assert torch.equal(averaged(torch.zeros_like(largest), [largest] * 10, [Fraction(1, 10)] * 10), largest)


@pytest.mark.usefixtures("alone")
def test_a_buffer_that_starts_infinite_has_the_mean_of_its_sites_if_all_are_finite() -> None:
    """Running minima and maxima start infinite."""
    first = torch.tensor([math.inf, -math.inf])
    found = averaged(first, [torch.tensor([1.0, 2.0]), torch.tensor([3.0, -math.inf])], HALVES)
    assert found.tolist() == [2.0, -math.inf]


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_buffer_that_becomes_infinite_or_nan_is_refused_by_its_name(value: float) -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    server, vector = GlobalModel(model, make_strategy("fedavg")), flatten_(model)
    model[1].running_var[1] = value
    for refuse in (server.check, lambda vector: server.exchange(vector, Fraction(1))):
        sentence = refusal(lambda refuse=refuse: refuse(vector))
        assert sentence.startswith(f"buffer 1.running_var: expected finite numbers, got {value}. ")


class CountsInPlace(nn.Module):
    """A cumulative mean over all batches: by batch norm with `momentum=None`, and by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("total", torch.zeros((), dtype=torch.float64))
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))
        self.register_buffer("cache", torch.zeros(3), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.count += 1
            self.total += x.detach().double().sum()
            self.cache += self.count
        return x * (1 + self.total.float() / 100) + self.cache.mean() / 100


class CountsInNewTensors(CountsInPlace):
    """The same, but replaces its buffers by new tensors and adds one buffer."""

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.count = self.count + 1
            self.total = self.total + x.detach().double().sum()
            self.cache = self.cache + self.count
            self.register_buffer("last", x.detach())
        return x * (1 + self.total.float() / 100) + self.cache.mean() / 100


def bert_with(make: Callable[[], nn.Module], dropout: float = 0.1) -> BertForSequenceClassification:
    """Return a model whose pooler contains a module with buffers."""
    model = make_bert(dropout=dropout)
    model.bert.pooler.activation = nn.Sequential(nn.Tanh(), make())
    return model


def batch_norm() -> BertForSequenceClassification:
    return bert_with(lambda: nn.BatchNorm1d(32, momentum=None))


def in_place() -> BertForSequenceClassification:
    return bert_with(CountsInPlace)


def new_tensors() -> BertForSequenceClassification:
    return bert_with(CountsInNewTensors)


def watch_buffers(server: GlobalModel, federation: Federation) -> list[Any]:
    return [server.sha256(), *(buffer.tolist() for _, buffer in federation.model.named_buffers())]


PLAY = Play(num_examples=40, watch=watch_buffers)  # two batches a site


def test_buffers_changed_by_one_site_change_no_bit_of_the_next_site() -> None:
    alone = PLAY.but(make_model=in_place).on_ranks(1)
    assert alone[1][-1][1:] != alone[1][0][1:], "the buffers must move"
    assert PLAY.but(make_model=in_place).on_ranks(2) == alone
    assert PLAY.but(make_model=new_tensors).on_ranks(1) == alone, "new tensors in their places are as good"
    assert PLAY.but(make_model=new_tensors).on_ranks(3) == alone


def test_counts_continue_from_round_to_round_and_after_resuming(tmp_path: Path) -> None:
    play = PLAY.but(make_model=batch_norm)
    _, watched = play.on_ranks(2)
    assert [of_round[-1] for of_round in watched] == [0, 0, 2, 4], "two batches a site and round"
    stopping = play.but(checkpoints_dir=str(tmp_path))
    stopping.but(num_rounds=1).on_ranks(1)
    assert stopping.on_ranks(3)[1][-1] == watched[-1]


def test_devices_of_a_rank_share_the_buffers(two_devices: Callable[[], None]) -> None:
    play = PLAY.but(make_model=lambda: bert_with(CountsInNewTensors, dropout=0.0))
    alone = play.play()
    two_devices()
    assert play.play() == alone


@pytest.mark.usefixtures("alone")
def test_a_cumulative_mean_is_that_of_all_batches_of_all_sites_and_rounds() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.BatchNorm1d(3, momentum=None), nn.Linear(3, 1))
    server, vector, batches = GlobalModel(model, make_strategy("fedavg")), flatten_(model), torch.randn(4, 2, 5, 8, 3)
    for of_round in batches:
        for of_site in of_round:
            server.copy_to(vector)
            for batch in of_site:
                model(batch)
            server.exchange(vector, Fraction(1, 2))
        server.step()
    server.copy_to(vector)
    assert model[0].num_batches_tracked == 4 * 5
    assert torch.allclose(model[0].running_mean, batches.mean((0, 1, 2, 3)), atol=1e-6)


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize(
    "local",
    [
        torch.tensor([1e-40, 1 / 3, 5e3, -3.4e38]),
        torch.tensor([1e-280, 1 / 3, 1.797e308], dtype=torch.float64),
        torch.tensor([2**53, -7, 0]),
        torch.tensor([complex(1 / 3, -3e38)]),
        torch.tensor([65504.0, 1e-7], dtype=torch.float16),
    ],
    ids=lambda local: str(local.dtype),
)
def test_one_site_has_the_buffers_of_ordinary_training(local: Tensor) -> None:
    assert torch.equal(averaged(torch.ones_like(local), [local], [Fraction(1)]), local)


def test_a_final_model_is_saved_with_its_buffers_by_torch_and_by_transformers(tmp_path: Path) -> None:
    def save(server: GlobalModel, federation: Federation) -> None:
        torch.save(federation.model.state_dict(), file := io.BytesIO())
        federation.model.save_pretrained(tmp_path)
        saved = torch.load(io.BytesIO(file.getvalue()))
        assert all(torch.equal(saved[name], tensor) for name, tensor in server.state_dict()["weights"].items())

    PLAY.but(make_model=batch_norm, num_rounds=1, watch=save).play()
    from safetensors.torch import load_file

    assert load_file(tmp_path / "model.safetensors")["bert.pooler.activation.1.num_batches_tracked"] == 2


class Breaks(CountsInPlace):
    """Its buffer overflows at a site."""

    def forward(self, x: Tensor) -> Tensor:
        if self.training and x.shape[0] > 15:
            self.total.fill_(math.inf)
        return x


def test_a_site_whose_statistic_is_not_finite_is_named_and_can_be_skipped(caplog: pytest.LogCaptureFixture) -> None:
    play = PLAY.but(
        make_model=lambda: bert_with(Breaks), site_ids=(0, 0), num_examples=31, batch_size=100, num_rounds=1
    )
    sentence = refusal(play.play)
    assert sentence.startswith(
        "site 0 failed in round 1: buffer bert.pooler.activation.1.total: expected finite numbers, got inf. "
    )
    assert "learning_rate" not in sentence
    with caplog.at_level(logging.WARNING):
        history, _ = play.but(min_sites=1).play()
    assert [record.getMessage() for record in caplog.records] == [f"{sentence}; the round goes on without it"]
    assert history[1]["sites.failed"] == 1


@pytest.mark.usefixtures("alone")
def test_a_checkpoint_without_counts_is_refused_in_one_sentence() -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    server = GlobalModel(model, make_strategy("fedavg"))
    state = deepcopy(server.state_dict())
    del state["weights"]["1.num_batches_tracked"]
    sentence = refusal(lambda: server.load_state_dict(state))
    assert sentence.startswith("the checkpoint: expected the buffer 1.num_batches_tracked, got none. ")

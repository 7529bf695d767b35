"""The exact mean and every strategy equal their formulas."""

import inspect
import itertools
import math
from collections.abc import Iterator
from copy import deepcopy
from fractions import Fraction

import pytest
import torch
from helpers import refusal
from torch import Tensor, nn

from scaling_fl.distributed.world import world
from scaling_fl.federation.aggregation import COMM_DTYPES
from scaling_fl.federation.global_model import GlobalModel
from scaling_fl.federation.strategies import STRATEGIES, make_strategy
from scaling_fl.models.flat import flatten_


@pytest.fixture(autouse=True)
def _alone() -> Iterator[None]:
    with world():
        yield


def make_server(strategy: str = "fedavg", comm_dtype: str = "exact", weights: Tensor | None = None) -> GlobalModel:
    model = nn.Linear(1, 100_003, bias=False)  # not a multiple of the pieces
    if weights is not None:
        model.weight.data.copy_(weights[:, None])
    return GlobalModel(model, make_strategy(strategy), comm_dtype)


def shares(counts: list[int]) -> list[Fraction]:
    return [Fraction(count, sum(counts)) for count in counts]


COUNTS = [17, 1, 250, 33, 8]


@pytest.fixture(params=["fused", "unfused"])
def arithmetic(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """With and without the fused multiply-add of the processor."""
    if request.param == "unfused":
        monkeypatch.setattr("scaling_fl.federation.fixed_point.is_fused", lambda origin: False)
    return request.param == "fused"


@pytest.mark.parametrize("scale", [1.0, 1000.0])
def test_the_order_of_the_sites_changes_no_bit(scale: float, arithmetic: bool) -> None:
    torch.manual_seed(0)
    start = torch.randn(100_003) * scale
    locals_ = [start + 1e-3 * torch.randn_like(start) for _ in COUNTS]
    hashes = set()
    for order in list(itertools.permutations(range(len(COUNTS))))[:12]:
        server = make_server(weights=start)
        for site in order:
            server.exchange(locals_[site].clone(), shares(COUNTS)[site])
        server.step()
        hashes.add(server.sha256())
    assert len(hashes) == 1


@pytest.mark.parametrize("scale", [1.0, 1000.0])
def test_a_weight_that_no_site_changes_keeps_its_bits(scale: float, arithmetic: bool) -> None:
    torch.manual_seed(0)
    start = scale * torch.randn(100_003) * 10.0 ** -torch.randint(12, (100_003,))
    server, has_moved = make_server("fedadam", weights=start), torch.rand(100_003) < 0.5
    for share in [*shares(COUNTS), *shares(COUNTS)]:
        server.exchange(torch.where(has_moved, start + 1e-3 * torch.randn_like(start), start), share / 2)
    server.step()
    stays = server.weights == start
    assert stays[~has_moved].all()
    assert stays[has_moved].double().mean() < 0.01


def test_the_mean_is_weighted_by_examples() -> None:
    server = make_server(weights=torch.zeros(100_003))
    server.exchange(torch.full((100_003,), 1.0), Fraction(3, 4))
    server.exchange(torch.full((100_003,), 5.0), Fraction(1, 4))
    server.step()
    assert torch.equal(server.weights, torch.full((100_003,), 2.0))


def test_a_missing_site_does_not_count_in_the_mean() -> None:
    server = make_server(weights=torch.zeros(100_003))
    server.exchange(torch.full((100_003,), 1.0), Fraction(1, 6))
    server.exchange(torch.full((100_003,), 4.0), Fraction(2, 6))
    server.step()
    assert torch.equal(server.weights, torch.full((100_003,), 3.0))


@pytest.mark.parametrize("comm_dtype", COMM_DTYPES)
def test_too_small_a_fraction_of_the_examples_is_refused_because_it_magnifies_rounding(comm_dtype: str) -> None:
    server = make_server(comm_dtype=comm_dtype, weights=torch.zeros(100_003))
    for site in range(2):
        server.exchange(torch.full((100_003,), 2.0 * site), Fraction(1, 2**11))
    server.step()
    assert torch.equal(server.weights, torch.ones(100_003))
    server.exchange(torch.zeros(100_003), Fraction(1, 2**16) - Fraction(1, 10**9))
    sentence = refusal(server.step)
    assert sentence.startswith(
        "the sites that are left: expected at least 1/65536 of the round's examples, got 1.5e-05. "
    )
    assert torch.equal(server.weights, torch.ones(100_003))


@pytest.mark.parametrize("comm_dtype", COMM_DTYPES)
def test_a_site_that_is_added_twice_is_refused(comm_dtype: str) -> None:
    server = make_server(comm_dtype=comm_dtype, weights=torch.zeros(100_003))
    for _ in range(2):
        server.exchange(torch.ones(100_003), Fraction(2, 3))
    assert refusal(server.step).startswith("the weights of a round's sites: expected a sum of at most 1, got 1.333. ")
    assert not server.weights.any()


def test_a_round_without_a_step_is_an_error_when_the_next_starts() -> None:
    server = make_server()
    server.start_round()
    server.exchange(server.weights + 1.0, Fraction(1, 3))
    before = server.sha256()
    assert refusal(server.start_round).startswith("the global model: expected a step after each round, got another ")
    assert server.sha256() == before
    server.step()
    server.start_round()


@pytest.mark.parametrize("number", [0, 1, 2])
@pytest.mark.parametrize("scale", [1.0, 1000.0])
def test_a_checked_site_changes_nothing_in_the_sum(number: int, scale: float, arithmetic: bool) -> None:
    torch.manual_seed(0)
    start = scale * torch.randn(100_003)
    locals_ = [start + 1e-3 * torch.randn_like(start) for _ in range(3)]
    bad = locals_[0].clone()
    bad[-1] = math.nan
    server, other = make_server(weights=start), make_server(weights=start)
    for site, local in enumerate(locals_):
        if site == number:
            with pytest.raises(FloatingPointError):
                server.check(bad)
            assert torch.equal(bad[:-1], locals_[0][:-1])
        server.check(local)
        server.exchange(local.clone(), Fraction(1, 10))
        other.exchange(local.clone(), Fraction(1, 10))
    assert torch.equal(server._mean._vector.values, other._mean._vector.values)
    server.step()
    other.step()
    assert server.sha256() == other.sha256()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 200.0])
@pytest.mark.parametrize("scale", [0.01, 1000.0])
@pytest.mark.parametrize("comm_dtype", COMM_DTYPES)
def test_a_weight_that_is_not_finite_or_out_of_range_is_refused(value: float, scale: float, comm_dtype: str) -> None:
    server = make_server(comm_dtype=comm_dtype, weights=scale * torch.randn(100_003))
    local = server.weights.clone()
    local[-1] += value
    with pytest.raises(FloatingPointError, match="a weight is not finite, or moved by 64 or more"):
        server.check(local)
    with pytest.raises(FloatingPointError, match="a weight is not finite, or moved by 64 or more"):
        server.exchange(local, Fraction(1, 2))


@pytest.mark.parametrize("scale", [1.0, 1000.0])
@pytest.mark.parametrize("comm_dtype", COMM_DTYPES)
def test_a_collected_replica_has_the_global_weights(comm_dtype: str, scale: float) -> None:
    torch.manual_seed(0)
    server = make_server(comm_dtype=comm_dtype, weights=scale * torch.randn(100_003))
    replica = server.weights + 1e-3
    server.exchange(replica, Fraction(1, 2))
    assert torch.equal(replica, server.weights)


@pytest.mark.parametrize(
    ("comm_dtype", "relative", "absolute"),
    [("exact", 2e-7, 1e-13), ("float32", 2e-7, 0.0), ("bfloat16", 2**-8, 0.0), ("float16", 2**-11, 2**-33)],
)
def test_every_comm_dtype_gives_the_mean_to_its_precision(comm_dtype: str, relative: float, absolute: float) -> None:
    torch.manual_seed(0)
    server = make_server(comm_dtype=comm_dtype, weights=torch.zeros(100_003))
    drift = 1e-4 * torch.randn(100_003)
    drift[:1000] *= 1e-4  # these vanish in float16 without scaling
    server.exchange(-drift, Fraction(1, 4))
    server.exchange(-3 * drift, Fraction(3, 4))
    server.step()
    errors = (server.weights + 2.5 * drift).abs()
    assert (errors <= 2.5 * relative * drift.abs() + absolute).all()
    assert (errors > 1e-3 * relative * drift.abs()).any() or comm_dtype == "exact", "it was rounded as it should be"


def test_a_round_without_trained_sites_changes_no_weight() -> None:
    server = make_server()
    before = server.sha256()
    for collects in (False, True, False):
        if collects:
            server.exchange(server.weights.clone(), Fraction(1))
        server.step()
        assert server.sha256() == before


def play_rounds(strategy: str, drifts: list[Tensor], **options: float) -> list[Tensor]:
    server = GlobalModel(nn.Linear(1, 5, bias=False), make_strategy(strategy, **options))
    server.weights.zero_()
    seen = [server.weights.clone()]
    for drift in drifts:
        server.exchange(server.weights - drift, Fraction(1))
        server.step()
        seen.append(server.weights.clone())
    return seen


def by_formula(
    strategy: str,
    drifts: list[Tensor],
    learning_rate: float,
    momentum: float = 0.0,
    beta2: float = 0.0,
    tau: float = 0.0,
) -> Tensor:
    """Compute the papers' equations in float64; the drift is the gradient."""
    weights, m, v = (torch.zeros(len(drifts[0]), dtype=torch.float64) for _ in range(3))
    v += tau**2
    for drift in drifts:
        g = drift.double()
        if strategy == "fedavg":
            weights -= learning_rate * g
        elif strategy == "fedavgm":
            m = momentum * m + g
            weights -= learning_rate * m
        elif strategy == "diloco":
            m = momentum * m + g
            weights -= learning_rate * (g + momentum * m)
        else:
            m = momentum * m + (1 - momentum) * g
            v = {
                "fedadagrad": v + g**2,
                "fedadam": beta2 * v + (1 - beta2) * g**2,
                "fedyogi": v - (1 - beta2) * g**2 * (v - g**2).sign(),
            }[strategy]
            weights -= learning_rate * m / (v.sqrt() + tau)
    return weights


OPTIONS = {"learning_rate": 0.3, "momentum": 0.6, "beta2": 0.5, "tau": 0.1}


def options_of(strategy: str) -> dict[str, float]:
    return {
        name: value for name, value in OPTIONS.items() if name in inspect.signature(STRATEGIES[strategy]).parameters
    }


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_every_strategy_follows_its_formula_and_its_options_act(strategy: str) -> None:
    torch.manual_seed(0)
    drifts = [torch.randn(5) for _ in range(4)]
    options = options_of(strategy)
    final = play_rounds(strategy, drifts, **options)[-1]
    assert torch.allclose(final.double(), by_formula(strategy, drifts, **options), atol=1e-6)
    for name in options:
        others = {key: value for key, value in options.items() if key != name}
        assert not torch.allclose(final, play_rounds(strategy, drifts, **others)[-1], atol=1e-3), name


@pytest.mark.parametrize(
    "options", [{}, {"learning_rate": 0.3, "momentum": 0.5, "tau": 0.02}], ids=["default", "given"]
)
@pytest.mark.parametrize("strategy", ["fedadagrad", "fedadam", "fedyogi"])
def test_an_adaptive_strategy_is_its_paper_for_fifty_rounds_of_drifts_of_all_sizes(
    strategy: str, options: dict[str, float]
) -> None:
    torch.manual_seed(0)
    sizes = 10.0 ** torch.arange(-8, 2, dtype=torch.float64)  # below tau and above
    drifts = [size * torch.randn(10, dtype=torch.float64) for size in torch.rand(50, 1, dtype=torch.float64) * sizes]
    for round_, drift in enumerate(drifts):
        drift *= (-1) ** (torch.arange(10) * round_)  # half of the weights' drifts change signs
        drift[round_ % 10 :: 3] = 0
    drifts[20:22] = [torch.zeros_like(drifts[0])] * 2
    weights = nn.Parameter(torch.zeros(10, dtype=torch.float64))
    optimiser = STRATEGIES[strategy]([weights], **options)
    defaults = {name: value.default for name, value in inspect.signature(STRATEGIES[strategy]).parameters.items()}
    del defaults["weights"]
    for drift in drifts:
        weights.grad = drift.clone()
        optimiser.step()
        assert torch.equal(weights.grad, drift)
    expected = by_formula(strategy, drifts, **defaults | options)
    assert (expected.abs() > 0).all()
    assert torch.allclose(weights.detach(), expected, rtol=1e-7, atol=0)


def test_a_round_of_no_site_leaves_the_state_of_a_strategy_as_it_was() -> None:
    server = GlobalModel(nn.Linear(1, 5, bias=False), make_strategy("fedyogi"))
    server.exchange(server.weights - torch.rand(5), Fraction(1))
    server.step()
    before = deepcopy(server.state_dict())
    assert {name: bool(value.any()) for name, value in before["optimiser"]["state"][0].items()} == {
        "m": True,
        "v": True,
    }
    server.step()
    for name, value in server.state_dict()["optimiser"]["state"][0].items():
        assert torch.equal(value, before["optimiser"]["state"][0][name]), name


def test_fedavg_sets_the_weights_to_the_mean() -> None:
    drifts = [torch.randn(5) for _ in range(3)]
    seen = play_rounds("fedavg", drifts)
    for before, after, drift in zip(seen, seen[1:], drifts, strict=False):
        assert torch.allclose(after, before - drift, atol=1e-7)


class WithBuffers(nn.Module):
    """A model with frozen weights, trained weights, and the buffers of a batch norm."""

    def __init__(self) -> None:
        super().__init__()
        self.frozen = nn.Linear(3, 3).requires_grad_(False)
        self.trained = nn.Linear(3, 2)
        self.norm = nn.BatchNorm1d(2)


def test_buffers_are_averaged_and_frozen_weights_are_not_sent() -> None:
    model = WithBuffers()
    server = GlobalModel(model, make_strategy("fedadam"))
    vector = flatten_(model)
    assert list(server.state_dict()["weights"]) == [
        "trained.weight",
        "trained.bias",
        "norm.weight",
        "norm.bias",
        "norm.running_mean",
        "norm.running_var",
        "norm.num_batches_tracked",
    ]
    for mean, share in ((2.0, Fraction(1, 4)), (6.0, Fraction(3, 4))):
        server.copy_to(vector)
        model.norm.running_mean.fill_(mean)
        server.exchange(vector, share)
    server.step()
    server.copy_to(vector)
    assert torch.equal(model.norm.running_mean, torch.tensor([5.0, 5.0])), "their mean, whatever the strategy"


def test_a_state_is_restored_completely_and_that_of_another_model_is_refused_by_name() -> None:
    drifts = [torch.randn(5) for _ in range(2)]
    server, other = (GlobalModel(nn.Linear(1, 5, bias=False), make_strategy("diloco")) for _ in range(2))
    for drift in drifts:
        server.exchange(server.weights - drift, Fraction(1))
        server.step()
    other.load_state_dict(deepcopy(server.state_dict()))
    for each in (server, other):
        each.exchange(each.weights - drifts[0], Fraction(1))
        each.step()
    assert server.sha256() == other.sha256()
    with pytest.raises(ValueError, match=r"^the checkpoint: expected this model's weight, \[7, 1\], got \[5, 1\]\. "):
        GlobalModel(nn.Linear(1, 7, bias=False), make_strategy("diloco")).load_state_dict(server.state_dict())

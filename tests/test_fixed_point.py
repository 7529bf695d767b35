"""The grid on which sums are exact: no order changes a bit, no product is a tie, and bits are integers."""

import itertools
import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from scaling_fl.federation.fixed_point import LIMIT, ORIGIN, UNIT, Grid, check_sizes, tie_free

CPU = torch.device("cpu")
TERMS = st.floats(-LIMIT, LIMIT, width=32, exclude_min=True, exclude_max=True)
COUNTS = [17, 1, 250, 33, 8]


@pytest.fixture(params=["fused", "unfused"])
def grid(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Grid:
    """With and without the fused multiply-add of the processor."""
    if request.param == "unfused":
        monkeypatch.setattr("scaling_fl.federation.fixed_point.is_fused", lambda origin: False)
    return Grid(CPU)


def add_up(grid: Grid, terms: list[Tensor], factors: list[float]) -> Tensor:
    total = grid.origin.expand_as(terms[0]).clone()
    for term, factor in zip(terms, factors, strict=True):
        grid.add(total, term.double(), tie_free(factor), total)
    return total


def test_this_processor_rounds_once() -> None:
    assert Grid(CPU)._is_fused, "slower, but as exact, if it does not"


@pytest.mark.parametrize("kind", ["like training", "halfway between two multiples"])
def test_the_order_of_the_terms_changes_no_bit(grid: Grid, kind: str) -> None:
    torch.manual_seed(0)
    if kind == "like training":
        counts, terms = COUNTS, [torch.randn(1_000) for _ in COUNTS]
    else:
        counts = [1, 1, 1, 1]
        # A quarter of these is half of an odd multiple, or an odd multiple, which makes the next tie go the other way.
        terms = [(2 * torch.randint(10**6, (1_000,)) + 1) * 2.0**-exponent for exponent in (43, 43, 42, 42)]
    factors = [count / sum(counts) for count in counts]
    orders = itertools.permutations(range(len(counts)))
    sums = [add_up(grid, [terms[i] for i in order], [factors[i] for i in order]) for order in orders]
    assert all(torch.equal(each, sums[0]) for each in sums)


def test_a_sum_is_within_its_bound_of_exact_arithmetic(grid: Grid) -> None:
    torch.manual_seed(0)
    terms, factors = [30 * torch.randn(50) for _ in COUNTS], [count / sum(COUNTS) for count in COUNTS]
    for found, *numbers in zip(add_up(grid, terms, factors).tolist(), *(term.tolist() for term in terms), strict=True):
        exact = sum(Fraction(count, sum(COUNTS)) * Fraction(term) for count, term in zip(COUNTS, numbers, strict=True))
        assert abs(Fraction(found) - Fraction(ORIGIN) - exact) <= len(COUNTS) * Fraction(UNIT)


@settings(deadline=None, database=None)
@given(term=TERMS, weight=st.fractions(0, 1).filter(bool))
def test_no_product_is_halfway_between_two_multiples(term: float, weight: Fraction) -> None:
    factor = tie_free(float(weight))
    assert factor == pytest.approx(float(weight), rel=2**-51)
    assert (Fraction(factor) * Fraction(term) / Fraction(UNIT)).denominator != 2


@pytest.mark.parametrize("size", [LIMIT, math.inf, math.nan])
def test_sizes_that_a_device_reports_together_are_checked(size: float) -> None:
    check_sizes([None, torch.tensor(math.nextafter(LIMIT, 0), dtype=torch.float64), torch.tensor(0.0).double()])
    with pytest.raises(FloatingPointError, match="not finite, or moved by 64 or more"):
        check_sizes([torch.tensor(1.0), torch.tensor(size), torch.tensor(0.0)])

"""Means are exact sums divided once, so that no order or grouping can change a bit."""

import math
import pickle
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from scaling_fl.training.metrics import Means, spread

TERMS = st.lists(
    st.tuples(st.sampled_from(["loss", "accuracy"]), st.floats(-1e300, 1e300), st.integers(1, 2**40)), min_size=1
)


def means_of(terms: list[tuple[str, float, int]]) -> Means:
    means = Means()
    for name, total, count in terms:
        means.add(name, torch.tensor(total, dtype=torch.float64), count)
    return means


def bits(means: Means) -> dict[str, str]:
    return {name: value.hex() for name, value in means.result().items()}


@settings(deadline=None, database=None)
@given(data=st.data(), terms=TERMS)
def test_order_and_grouping_change_no_bit_of_a_mean(data: st.DataObject, terms: list) -> None:
    shuffled = data.draw(st.permutations(terms))
    cuts = sorted(data.draw(st.lists(st.integers(0, len(terms)), max_size=4)))
    groups = [shuffled[start:end] for start, end in zip([0, *cuts], [*cuts, len(terms)], strict=True)]
    assert bits(Means().merge(map(means_of, groups))) == bits(means_of(terms))


@settings(deadline=None, database=None)
@given(terms=TERMS)
def test_a_mean_is_the_exact_sum_over_the_count_rounded_once(terms: list) -> None:
    for name, mean in means_of(terms).result().items():
        of_name = [(Fraction(total), count) for other, total, count in terms if other == name]
        assert mean == float(sum(total for total, _ in of_name) / sum(count for _, count in of_name))


def test_a_mean_weighs_examples_and_not_batches() -> None:
    assert means_of([("loss", 8.0, 2), ("loss", 1.0, 1)]).result() == {"loss": 3.0}


def test_terms_that_float_sums_would_lose_count() -> None:
    assert means_of([("loss", 1e300, 1), ("loss", 1.0, 1), ("loss", -1e300, 1)]).result() == {"loss": 1 / 3}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.bool])
def test_totals_may_be_of_any_type(dtype: torch.dtype) -> None:
    means = Means()
    means.add("right", torch.tensor(1, dtype=dtype), 4)
    assert means.result() == {"right": 0.25}


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_value_that_is_not_finite_is_refused_by_name(value: float) -> None:
    means = means_of([("accuracy", 1.0, 1), ("loss", value, 1)])
    with pytest.raises(FloatingPointError, match=f"^loss: expected a finite number, got {value}$"):
        means.settle()


def test_adding_copies_the_value_and_drops_the_graph() -> None:
    weight = torch.ones((), requires_grad=True)
    means = Means()
    means.add("loss", weight * 2, 1)
    assert not any(tensor.requires_grad for _, tensor, _ in means._pending)
    assert means.settle().result() == {"loss": 2.0}


def test_finished_values_are_not_counted_twice() -> None:
    means = means_of([("loss", 1.0, 1)]).settle()
    means.add("loss", torch.tensor(0.0), 1)
    assert means.result() == means.result() == {"loss": 0.5}


def test_means_survive_a_pickle() -> None:
    means = means_of([("loss", 0.1, 3), ("loss", 0.2, 4)])
    for copy in (pickle.loads(pickle.dumps(means)), pickle.loads(pickle.dumps(means.settle()))):
        assert bits(copy) == bits(means)
        assert bits(copy.merge([means])) == bits(means), "twice the sum over twice the count"


def test_merging_does_not_change_the_other_means() -> None:
    other = means_of([("loss", 1.0, 1)])
    Means().merge([other, other])
    assert other.result() == {"loss": 1.0}
    assert Means().result() == {}


def test_the_spread_over_sites_equals_that_of_numpy_without_failed_sites() -> None:
    losses, accuracies = [0.5, 2.0, 0.25], [0.75, 0.125, 1.0]
    by_site = {site: {"loss": losses[i], "accuracy": accuracies[i]} for i, site in enumerate((3, 0, 2))}
    metrics = spread(by_site)
    assert metrics["site.loss"] == {0: 2.0, 2: 0.25, 3: 0.5}
    assert metrics["site.accuracy"] == {0: 0.125, 2: 1.0, 3: 0.75}
    assert [*metrics["site.loss"]] == [0, 2, 3]
    assert (metrics["sites.loss.worst"], metrics["sites.accuracy.worst"]) == (2.0, 0.125)
    by_match = spread({0: {"test_exact_match": 0.5, "gain": 0.1}, 1: {"test_exact_match": 0.25, "gain": 0.2}})
    assert (by_match["sites.test_exact_match.worst"], by_match["sites.gain.worst"]) == (0.25, 0.1)
    for name, values in (("loss", losses), ("accuracy", accuracies)):
        assert metrics[f"sites.{name}.mean"] == pytest.approx(np.mean(values))
        assert metrics[f"sites.{name}.std"] == pytest.approx(np.std(values))

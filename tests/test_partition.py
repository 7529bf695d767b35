"""Every partition assigns each example to exactly one site."""

from functools import partial

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scaling_fl.data.partition import (
    MAX_SAMPLES,
    PARTITIONERS,
    Partitioner,
    by_label,
    dirichlet,
    iid,
    partition_indices,
)

SCHEMES: dict[str, Partitioner] = PARTITIONERS | {"dirichlet": partial(dirichlet, dirichlet_alpha=10.0)}
LABELS = np.random.default_rng(0).integers(0, 4, 200)


def as_lists(parts: list[np.ndarray]) -> list[list[int]]:
    return [part.tolist() for part in parts]


@pytest.mark.parametrize("scheme", SCHEMES)
@settings(deadline=None, database=None)
@given(labels=st.lists(st.integers(0, 5), min_size=1, max_size=60), num_sites=st.integers(1, 12), seed=st.integers(0))
def test_every_example_is_at_one_site_and_no_site_is_empty(
    scheme: str, labels: list[int], num_sites: int, seed: int
) -> None:
    try:
        parts = partition_indices(np.array(labels), num_sites, SCHEMES[scheme], seed)
    except ValueError:
        assert num_sites > len(labels) or scheme == "dirichlet"
        return
    assert len(parts) == num_sites
    assert min(map(len, parts)) > 0
    assert sorted(np.concatenate(parts)) == list(range(len(labels)))


@pytest.mark.parametrize("scheme", ["iid", "by_label"])
@pytest.mark.parametrize("num_sites", [1, 3, 7, 199, 200])
def test_sizes_differ_by_one_at_most(scheme: str, num_sites: int) -> None:
    sizes = [len(part) for part in partition_indices(LABELS, num_sites, SCHEMES[scheme], 1)]
    assert max(sizes) - min(sizes) <= 1


def test_by_label_partitions_the_sorted_labels() -> None:
    in_order = LABELS[np.concatenate(partition_indices(LABELS, 7, by_label, 1))]
    assert (np.diff(in_order) >= 0).all()


def test_iid_gives_each_site_the_labels_in_their_proportions() -> None:
    sorted_labels = np.arange(4000) // 1000
    for part in partition_indices(sorted_labels, 4, iid, 1):
        assert np.abs(np.bincount(sorted_labels[part]) / 250 - 1).max() < 0.25  # four standard deviations


def unevenness(alpha: float) -> float:
    """Return how unequal the sites' fractions of a label are: 0 for equal, 1 for all at one site."""
    labels = np.arange(4000) % 4
    parts = partition_indices(labels, 4, partial(dirichlet, dirichlet_alpha=alpha), 1)
    fractions = np.array([np.bincount(labels[part], minlength=4) for part in parts]) / 1000
    return (fractions.max(axis=0).mean() - 1 / 4) / (3 / 4)


def test_a_smaller_alpha_makes_the_sites_differ_more() -> None:
    uneven = [unevenness(alpha) for alpha in (0.05, 0.5, 5, 5000)]
    assert uneven == sorted(uneven, reverse=True)
    assert uneven[0] > 0.7
    assert uneven[-1] < 0.02


@pytest.mark.parametrize("alpha", [5e-324, 1e-9, 1e-3])
def test_a_tiny_alpha_is_refused_if_no_sample_gives_every_site_examples(alpha: float) -> None:
    with pytest.raises(ValueError, match="Use a larger dirichlet_alpha or fewer sites") as caught:
        partition_indices(LABELS, 9, partial(dirichlet, dirichlet_alpha=alpha), 1)
    assert f"each of 9 sites an example, got {alpha}, which did not in {MAX_SAMPLES} samples" in str(caught.value)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_more_sites_than_examples_are_refused(scheme: str) -> None:
    with pytest.raises(ValueError, match=r"expected at most 3 sites for 3 training examples, got 4$"):
        partition_indices(LABELS[:3], 4, SCHEMES[scheme], 1)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_partition_depends_on_its_seed(scheme: str) -> None:
    np.random.seed(0)  # must not change it
    first, again, other = (as_lists(partition_indices(LABELS, 5, SCHEMES[scheme], seed)) for seed in (1, 1, 2))
    assert first == again != other


@pytest.mark.parametrize(
    ("partitioner", "says"),
    [
        (lambda labels, num_sites, random: [np.arange(5), np.arange(5)], "expected each index from 0 to 9 in one part"),
        (
            lambda labels, num_sites, random: [np.arange(5), np.arange(6, 11)],
            "expected each index from 0 to 9 in one part",
        ),
        (lambda labels, num_sites, random: [np.arange(10)], "expected 2 parts with an example or more, got 1 with 10"),
        (
            lambda labels, num_sites, random: [np.arange(10), np.arange(0)],
            "expected 2 parts with an example or more, got 2",
        ),
    ],
    ids=["twice", "lost", "too few", "empty"],
)
def test_a_partition_that_loses_an_example_or_a_site_is_refused(partitioner: Partitioner, says: str) -> None:
    with pytest.raises(ValueError, match=rf"^partition: {says}"):
        partition_indices(LABELS[:10], 2, partitioner, 1)

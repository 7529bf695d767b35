"""The label mixes of partitions follow the formulas of their papers."""

from collections.abc import Callable
from contextlib import suppress
from functools import partial

import numpy as np
import pytest
from helpers import long_but
from hypothesis import given, settings
from hypothesis import strategies as st

from scaling_fl.data.label_skew import dirichlet, dirichlet_sites, few_labels, shards
from scaling_fl.data.partition import Partitioner, by_size, natural, partition_indices

PRIOR = np.array([0.1, 0.2, 0.3, 0.4])
POOL = np.repeat(np.arange(4), (PRIOR * 40_000).astype(int))
SIZES = st.lists(st.one_of(st.just(1), st.integers(1, 300)), min_size=1, max_size=12)  # of labels


def count_labels(labels: np.ndarray, parts: list[np.ndarray]) -> np.ndarray:
    """Return how many examples of each label (column) each site (row) has."""
    return np.array([np.bincount(labels[part], minlength=labels.max() + 1) for part in parts])


def assert_moments(samples: np.ndarray, mean: np.ndarray | float, variance: np.ndarray | float) -> None:
    """Compare the means and variances of the columns, within 4.5 standard errors."""
    squares = (samples - mean) ** 2
    for found, expected in ((samples, mean), (squares, variance)):
        error = found.std(axis=0) / np.sqrt(len(found))
        assert (np.abs(found.mean(axis=0) - expected) < 4.5 * error + 1e-12).all(), (found.mean(axis=0), expected)


@pytest.mark.parametrize("alpha", long_but(0.5, [0.05, 0.5, 5.0, 100.0]))
def test_the_mix_of_a_site_is_a_dirichlet_sample_around_the_prior(alpha: float) -> None:
    """The first 40 of 800 sites leave the pool nearly as it was. A site has 50 samples of its mix."""
    mixes = np.concatenate(
        [
            count_labels(POOL, partition_indices(POOL, 800, partial(dirichlet_sites, dirichlet_alpha=alpha), seed)[:40])
            for seed in range(25)
        ]
    )
    of_mix = PRIOR * (1 - PRIOR) / (alpha + 1)
    of_sample = PRIOR * (1 - PRIOR) * alpha / (alpha + 1) / 50
    assert_moments(mixes / 50, PRIOR, of_mix + of_sample)


@pytest.mark.parametrize("alpha", [0.5, 2.0, 50.0])
def test_the_fractions_of_a_label_are_a_dirichlet_sample_over_the_sites(alpha: float) -> None:
    labels = np.arange(4000) % 4
    fractions = [
        count_labels(labels, partition_indices(labels, 5, partial(dirichlet, dirichlet_alpha=alpha), seed)).T / 1000
        for seed in range(250)
    ]
    # One site of each, as the fractions of a label depend on each other; rounding adds less than 1e-6.
    assert_moments(np.concatenate(fractions)[:, :1], 1 / 5, 1 / 5 * 4 / 5 / (5 * alpha + 1))


def test_labels_that_are_used_up_leave_the_ratios_of_the_others() -> None:
    """Two labels of three are at the last site in the ratio that the pool still has, whatever its mix is."""
    labels = np.repeat([0, 1, 2], [1, 500, 499])
    for seed in range(20):
        counts = count_labels(
            labels, partition_indices(labels, 10, partial(dirichlet_sites, dirichlet_alpha=1e-3), seed)
        )
        assert counts.sum(axis=0).tolist() == [1, 500, 499]
        assert (np.count_nonzero(counts, axis=1) > 1).sum() <= 3  # a site has a second label only if the first ends


@given(
    sizes=SIZES,
    num_sites=st.one_of(st.integers(1, 12), st.integers(1, 1000)),
    exponent=st.floats(-3, 3),
    seed=st.integers(0, 2**32),
)
@settings(deadline=4_000, database=None, max_examples=60)
def test_any_alpha_gives_sites_of_equal_sizes(sizes: list[int], num_sites: int, exponent: float, seed: int) -> None:
    labels = np.repeat(np.arange(len(sizes)), sizes)
    num_sites = min(num_sites, len(labels))
    parts = partition_indices(labels, num_sites, partial(dirichlet_sites, dirichlet_alpha=10.0**exponent), seed)
    assert np.ptp(list(map(len, parts))) <= 1


@pytest.mark.parametrize("alpha", [5e-324, 1e-300, 1e-12, 1e12, 1e308])
@pytest.mark.filterwarnings("error")
def test_no_alpha_is_too_small_or_too_large(alpha: float) -> None:
    partition_indices(POOL, 100, partial(dirichlet_sites, dirichlet_alpha=alpha), 1)


@given(sizes=SIZES, num_sites=st.integers(1, 1000), exponent=st.floats(-3, 3), seed=st.integers(0, 2**32))
@settings(deadline=4_000, database=None, max_examples=20)
def test_dirichlet_is_quick_or_refuses(sizes: list[int], num_sites: int, exponent: float, seed: int) -> None:
    labels = np.repeat(np.arange(len(sizes)), sizes)
    with suppress(ValueError):
        partition_indices(labels, num_sites, partial(dirichlet, dirichlet_alpha=10.0**exponent), seed)


def test_each_site_has_random_shards_of_the_sorted_labels() -> None:
    """Twenty shards of one label each, two for each of ten labels: a site's second is as its first with 1/19."""
    labels = np.random.default_rng(0).permutation(1000) % 10
    counts = [count_labels(labels, partition_indices(labels, 10, shards, seed)) for seed in range(300)]
    found = np.concatenate(counts)
    assert set(found.ravel().tolist()) == {0, 50, 100}
    assert_moments((found == 100).any(axis=1)[::10, None], 1 / 19, 1 / 19 * 18 / 19)
    assert_moments(found[::10] / 100, 1 / 10, (1 / 10 * 9 / 10 / 2) * 18 / 19)  # two of twenty, without replacement


def test_more_shards_than_examples_are_refused() -> None:
    with pytest.raises(
        ValueError, match=r"^shards_per_site: expected at most 3, as 3 sites share 10 training examples"
    ):
        partition_indices(POOL[:10], 3, partial(shards, shards_per_site=4), 1)
    sizes = map(len, partition_indices(POOL[:10], 3, partial(shards, shards_per_site=3), 1))
    assert sorted(sizes) in ([3, 3, 4],)


@given(sizes=SIZES, num_sites=st.integers(1, 40), wanted=st.integers(1, 13), seed=st.integers(0, 2**32))
@settings(deadline=None, database=None)
def test_sites_have_exactly_so_many_labels_wherever_this_is_possible(
    sizes: list[int], num_sites: int, wanted: int, seed: int
) -> None:
    labels = np.repeat(np.arange(len(sizes)), sizes)
    pairs = sum(min(size, num_sites) for size in sizes)  # most that a label can be at a site
    is_possible = wanted <= len(sizes) <= num_sites * wanted <= pairs
    try:
        parts = partition_indices(labels, num_sites, partial(few_labels, labels_per_site=wanted), seed)
    except ValueError:
        assert not is_possible
        return
    assert is_possible
    counts = count_labels(labels, parts)
    assert (np.count_nonzero(counts, axis=1) == wanted).all()
    for of_label in counts.T:
        assert np.ptp(of_label[of_label > 0]) <= 1, "the sites that have a label have equal parts of it"


def test_a_site_has_any_labels_and_each_label_is_at_as_many_sites() -> None:
    labels = np.arange(2000) % 10
    has = [count_labels(labels, partition_indices(labels, 25, few_labels, seed)) > 0 for seed in range(200)]
    assert {tuple(of_seed.sum(axis=0).tolist()) for of_seed in has} == {(5,) * 10}
    pairs = {tuple(np.flatnonzero(of_site)) for of_seed in has for of_site in of_seed}
    assert len(pairs) == 45, "every pair of labels is somewhere"
    for site in (0, 24):  # the last one chooses among what others have left
        assert_moments(np.array([of_seed[site] for of_seed in has]), 1 / 5, 1 / 5 * 4 / 5)


@pytest.mark.parametrize(
    ("sizes", "num_sites", "wanted", "says"),
    [
        ([9, 9], 2, 3, "labels_per_site: expected at most 2, the number of labels in the training data, got 3"),
        ([9] * 7, 3, 2, "labels_per_site: expected at least 3, so that 3 sites have all 7 labels, got 2"),
        (
            [9, 1, 1],
            4,
            2,
            "labels_per_site: expected at most 1, as 4 sites share 11 training examples, got 2. The rarest",
        ),
    ],
)
def test_an_impossible_number_of_labels_is_refused(sizes: list[int], num_sites: int, wanted: int, says: str) -> None:
    labels = np.repeat(np.arange(len(sizes)), sizes)
    with pytest.raises(ValueError, match=r"^labels_per_site") as caught:
        partition_indices(labels, num_sites, partial(few_labels, labels_per_site=wanted), 1)
    assert str(caught.value).startswith(says)


FLOWER: dict[str, tuple[Partitioner, Callable[..., object]]] = {
    "dirichlet": (
        partial(dirichlet, dirichlet_alpha=0.5),
        lambda of, seed: of.DirichletPartitioner(6, "label", 0.5, min_partition_size=1, seed=seed),
    ),
    "dirichlet_sites": (  # of which six small sites leave the pool nearly as it was
        lambda labels, num_sites, random: dirichlet_sites(labels, 60, random, dirichlet_alpha=3.0)[:6],
        lambda of, seed: of.InnerDirichletPartitioner([10] * 6, "label", [0.5] * 6, seed=seed),
    ),
    "shards": (shards, lambda of, seed: of.ShardPartitioner(6, "label", num_shards_per_partition=2, seed=seed)),
    "few_labels": (
        few_labels,
        lambda of, seed: of.PathologicalPartitioner(6, "label", 2, "deterministic", seed=seed),
    ),
    "linear": (by_size, lambda of, seed: of.LinearPartitioner(6)),
    "exponential": (partial(by_size, sizes="exponential"), lambda of, seed: of.ExponentialPartitioner(6)),
    "natural": (
        partial(natural, owners=[f"owner {row * row % 11}" for row in range(600)]),
        lambda of, seed: of.NaturalIdPartitioner("owner"),
    ),
}


@pytest.mark.parametrize("name", FLOWER)
def test_partitions_have_the_distributions_of_flower(name: str) -> None:
    """Compare the mean sizes, and the mean counts of a site's most common labels, over seeds."""
    of = pytest.importorskip("flwr_datasets.partitioner")
    datasets = pytest.importorskip("datasets")
    ours, theirs = FLOWER[name]
    labels = np.arange(600) % 6
    rows = datasets.Dataset.from_dict(
        {"label": labels.tolist(), "owner": [f"owner {row * row % 11}" for row in range(600)]}
    )

    def sort(counts: np.ndarray) -> np.ndarray:
        return np.concatenate([np.sort(counts, axis=1), counts.sum(axis=1, keepdims=True)], axis=1).astype(float)

    found: list[list[np.ndarray]] = [[], []]
    for seed in range(1 if name in ("linear", "exponential", "natural") else 40):
        partitioner = theirs(of, seed)
        partitioner.dataset = rows.shuffle(seed=seed)  # type: ignore[attr-defined]
        num_sites = partitioner.num_partitions  # type: ignore[attr-defined]
        parts = [partitioner.load_partition(site)["label"][:] for site in range(num_sites)]  # type: ignore[attr-defined]
        found[0].append(sort(count_labels(labels, ours(labels, num_sites, np.random.default_rng(seed)))))
        found[1].append(sort(np.array([np.bincount(part, minlength=6) for part in parts])))
    if len(found[0]) == 1:
        assert np.abs(found[0][0][:, -1] - found[1][0][:, -1]).max() <= num_sites  # they round down, and fill the last
        assert len(found[0][0]) == len(found[1][0])
        return
    means, errors = zip(
        *((np.mean(of_us, axis=(0, 1)), np.std(np.mean(of_us, axis=1), axis=0)) for of_us in found), strict=True
    )
    assert (np.abs(means[0] - means[1]) <= 4.5 * np.hypot(*errors) / np.sqrt(40) + 1e-9).all(), means

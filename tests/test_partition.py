"""Every partition assigns each example to exactly one site."""

import os
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scaling_fl.data.label_skew import MAX_SAMPLES, by_label, dirichlet, few_labels, shards
from scaling_fl.data.partition import (
    PARTITIONERS,
    Partitioner,
    by_size,
    hash_parts,
    iid,
    name_sites,
    natural,
    partition_indices,
)


def by_owner(labels: np.ndarray, num_sites: int, random: np.random.Generator) -> list[np.ndarray]:
    """Partition examples of which each has an owner of its own, so that sites have groups of them."""
    return natural(labels, num_sites, random, owners=list(map(str, range(len(labels)))))


SCHEMES: dict[str, Partitioner] = PARTITIONERS | {
    "shards": partial(shards, shards_per_site=1),
    "few_labels": partial(few_labels, labels_per_site=1),
    "dirichlet": partial(dirichlet, dirichlet_alpha=10.0),
    "natural": by_owner,
}
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
        assert num_sites > len(labels) or scheme in ("dirichlet", "few_labels")
        return
    assert len(parts) == num_sites
    assert min(map(len, parts)) > 0
    assert sorted(np.concatenate(parts)) == list(range(len(labels)))


@pytest.mark.parametrize("scheme", ["iid", "by_label", "shards", "dirichlet_sites", "natural"])
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
    with pytest.raises(ValueError, match="Use a larger dirichlet_alpha, fewer sites, or") as caught:
        partition_indices(LABELS, 9, partial(dirichlet, dirichlet_alpha=alpha), 1)
    assert f"each of 9 sites 1 or more of 200 training examples, got {alpha}, which" in str(caught.value)
    assert f"did not in {MAX_SAMPLES} samples: in the best one site " in str(caught.value)


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


@given(
    shares=st.lists(st.floats(1e-9, 1e9), min_size=1, max_size=30),
    more=st.integers(0, 500),
    min_examples=st.integers(1, 5),
)
@settings(deadline=None, database=None)
def test_sizes_are_the_shares_up_to_rounding_and_the_minimum(shares: list[float], more: int, min_examples: int) -> None:
    total = len(shares) * min_examples + more
    parts = partition_indices(np.zeros(total), len(shares), partial(by_size, sizes=shares), 1, min_examples)
    sizes = np.array(list(map(len, parts)))
    assert sizes.min() >= min_examples
    free = sizes > min_examples  # their sizes are in the ratio of the shares: each has lost less than 1 by rounding
    ratios = np.array(shares)
    low, high = ((sizes - 1) / ratios)[free], ((sizes + 1) / ratios)[free]
    assert low.max(initial=0) <= high.min(initial=np.inf) * (1 + 1e-9)
    assert ((min_examples + 1) / ratios)[~free].min(initial=np.inf) * (1 + 1e-9) >= low.max(initial=0)


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ("linear", [100, 200, 300, 400]),
        ("exponential", [32, 87, 237, 644]),  # 1000 e^k / (1 + e + e^2 + e^3) is 32.06, 87.14, 236.88, 643.91
        ([3, 1, 1, 1], [500, 167, 167, 166]),
        ([1e308, 1e308, 1e308, 1e-300], [333, 333, 333, 1]),
    ],
)
def test_sizes_are_as_named_and_the_largest_remainders_round_up(sizes: str | list[float], expected: list[int]) -> None:
    parts = partition_indices(np.zeros(1000), 4, partial(by_size, sizes=sizes), 1)
    assert list(map(len, parts)) == expected


def test_another_number_of_shares_than_sites_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^sizes: expected a share for each of 4 sites, got 2$"):
        partition_indices(LABELS, 4, partial(by_size, sizes=[1, 2]), 1)


def test_sites_of_other_sizes_have_the_labels_in_their_proportions() -> None:
    sorted_labels = np.arange(8000) // 2000
    for part in partition_indices(sorted_labels, 3, by_size, 1):
        counts = np.bincount(sorted_labels[part], minlength=4)
        assert np.abs(counts - len(part) / 4).max() < 4 * np.sqrt(len(part) * 3 / 16)


def test_each_owner_is_whole_at_a_site_and_names_have_their_order() -> None:
    owners = ["10", "9", "007", "7", "Zoë", "a", "9", "007"]
    parts = partition_indices(np.zeros(8), 6, partial(natural, owners=owners), 1)
    assert name_sites(owners, parts) == ("007", "10", "7", "9", "Zoë", "a")
    assert as_lists(parts) == [[2, 7], [0], [3], [1, 6], [4], [5]]


@given(owners=st.lists(st.text(max_size=2), min_size=1, max_size=60), num_sites=st.integers(1, 12), data=st.data())
@settings(deadline=None, database=None)
def test_owners_are_not_divided_and_another_order_of_the_rows_gives_the_same_sites(
    owners: list[str], num_sites: int, data: st.DataObject
) -> None:
    def sites(owners: list[str]) -> list[set[str]]:
        parts = partition_indices(np.zeros(len(owners)), num_sites, partial(natural, owners=owners), 3)
        return [{owners[index] for index in part} for part in parts]

    if num_sites > len(set(owners)):
        with pytest.raises(ValueError, match=f"^(site_ids, num_sites|num_sites, site_ids): .* got {num_sites}"):
            sites(owners)
        return
    found = sites(owners)
    assert found == sites(data.draw(st.permutations(owners)))
    assert set().union(*found) == set(owners)
    assert sum(map(len, found)) == len(set(owners))
    assert [*map(min, found)] == sorted(map(min, found))


def test_owners_are_grouped_evenly() -> None:
    owners = [name for name, count in (("a", 8), ("b", 7), ("c", 6), ("d", 5), ("e", 4)) for _ in range(count)]
    parts = partition_indices(np.zeros(30), 2, partial(natural, owners=owners), 1)
    assert name_sites(owners, parts) == ("a, d, e", "b, c")  # 8 + 5 + 4 and 7 + 6
    (whole,) = (partition_indices(np.zeros(30), 1, partial(natural, owners=owners), 1),)
    assert name_sites(owners, whole) == ("a, b and 3 more",)
    equal = list("abcdef")
    groups = {name_sites(equal, partition_indices(np.zeros(6), 3, partial(natural, owners=equal), s)) for s in range(9)}
    assert len(groups) > 1  # by the seed


def test_thousands_of_owners_are_partitioned_in_a_second() -> None:
    owners = [f"{row % 4001}" for row in range(200_000)]
    start = time.perf_counter()
    parts = partition_indices(np.zeros(200_000), 4001, partial(natural, owners=owners), 1)
    assert len(set(name_sites(owners, parts))) == 4001
    assert len(hash_parts(parts)) == 64
    assert time.perf_counter() - start < 5  # on a busy machine


@pytest.mark.parametrize(
    ("partitioner", "says"),
    [
        (by_owner, ""),
        (iid, ""),
        (by_size, ""),
        (partial(by_size, sizes=[1e-9, 1, 1, 1]), ""),
        (partial(dirichlet, dirichlet_alpha=50), ""),
        (
            lambda labels, num_sites, random: np.split(np.arange(200), [20, 60, 140]),
            r"^min_examples: expected 40 or more at each site, got 20 at site 0\. Use a smaller min_examples",
        ),
        (
            lambda labels, num_sites, random: np.split(np.arange(200), [100, 130, 139]),
            r"got 30 at site 1, and 1 more sites have fewer\. Use",
        ),
    ],
)
def test_a_minimum_of_examples_is_met_or_refused(partitioner: Partitioner, says: str) -> None:
    def attempt() -> list[np.ndarray]:
        return partition_indices(LABELS, 4, partitioner, 1, min_examples=40)

    if says:
        with pytest.raises(ValueError, match=says):
            attempt()
    else:
        assert min(map(len, attempt())) >= 40
    with pytest.raises(
        ValueError, match="expected at most 3 sites for 200 training examples with min_examples=51, got"
    ):
        partition_indices(LABELS, 4, partitioner, 1, min_examples=51)


def test_dirichlet_samples_until_each_site_has_the_minimum_and_says_how_near_it_came() -> None:
    few = partial(dirichlet, dirichlet_alpha=1.0)
    assert min(map(len, partition_indices(LABELS, 4, few, 1))) < 30
    assert min(map(len, partition_indices(LABELS, 4, few, 1, min_examples=30))) >= 30
    with pytest.raises(ValueError, match=r"sites 50 or more of .*: in the best one site \d had \d\d\. Use a larger"):
        partition_indices(LABELS, 4, few, 1, min_examples=50)


def test_the_natural_site_that_has_too_few_examples_is_named() -> None:
    labels, owners = np.zeros(12), ["b"] * 9 + ["a"] * 2 + ["c"]
    says = r"^min_examples: expected 3 or more at each site, got 2 at site 0 \(a\), and 1 more sites have fewer\. Use"
    with pytest.raises(ValueError, match=says):
        partition_indices(labels, 3, partial(natural, owners=owners), 1, min_examples=3)
    parts = partition_indices(labels, 2, partial(natural, owners=owners), 1, min_examples=3)
    assert name_sites(owners, parts) == ("a, c", "b")


def test_the_digest_of_a_partition_is_that_of_its_sites_and_their_order() -> None:
    parts = [np.array([0, 2]), np.array([1, 3])]
    others: list[Callable[[], list]] = [
        lambda: parts[::-1],
        lambda: [np.array([0, 2, 1]), np.array([3])],
        lambda: [np.array([2, 0]), np.array([1, 3])],
    ]
    assert hash_parts(parts) == hash_parts([part.astype(np.int32) for part in parts])
    assert hash_parts(parts) not in {hash_parts(other()) for other in others}


# Of NumPy 1.26 and 2.4. Another partition for a seed would stop runs from resuming.
GOLDEN = {
    "iid": ["a3d8e80984ad", "0994d505a7e4"],
    "by_label": ["a82ecbddc4db", "af2decc0d2cf"],
    "shards": ["aa00b45bb294", "3a4340dec1e8"],
    "few_labels": ["29743fbdf41d", "3924e09359f0"],
    "dirichlet": ["7b8f5797acc9", "59c1930b0991"],
    "dirichlet_sites": ["13d7bc8ecd6e", "68f4e78fb16c"],
    "sizes": ["baf0b7445f35", "a59e144f2095"],
    "natural": ["3b2983cdd292", "770415ee8ea8"],
}
DIGESTS = """
import numpy as np
from scaling_fl.data.partition import PARTITIONERS, hash_parts, partition_indices
np.random.seed(7)
labels = np.arange(600) ** 2 % 7
for name, partitioner in PARTITIONERS.items():
    def call(*of, **given):
        more = {"owners": [str(row % 17) for row in range(600)]} if name == "natural" else {}
        return partitioner(*of, **given, **more)
    print(name, *(hash_parts(partition_indices(labels, sites, call, seed))[:12] for sites, seed in ((3, 1), (10, 2))))
"""


@pytest.mark.parametrize("hash_seed", ["0", "1"])
def test_a_seed_has_one_partition_on_all_machines(hash_seed: str) -> None:
    env = {**os.environ, "PYTHONHASHSEED": hash_seed}
    done = subprocess.run([sys.executable, "-c", DIGESTS], env=env, capture_output=True, text=True, check=True)
    assert {name: digests for name, *digests in map(str.split, done.stdout.splitlines())} == GOLDEN


def test_an_owner_with_the_name_of_a_group_is_told_from_it() -> None:
    owners = ["a, b"] * 20 + ["a"] * 10 + ["b"] * 10
    parts = partition_indices(np.zeros(40), 2, partial(natural, owners=owners), 1)
    assert sorted(name_sites(owners, parts)) == ["a, b (site 0)", "a, b (site 1)"]

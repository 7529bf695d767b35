"""Partition the indices of a training set over sites. Every index goes to exactly one site."""

import hashlib
import heapq
import inspect
import math
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np

from scaling_fl.data.label_skew import by_label, dirichlet, dirichlet_sites, few_labels, group_indices, shards
from scaling_fl.errors import printable

# Takes labels, a number of sites and a generator, and perhaps parameters by keyword; returns the indices of each site.
Partitioner = Callable[..., list[np.ndarray]]

SHOWN = 3  # values in the name of a site that has several


def iid(labels: np.ndarray, num_sites: int, random: np.random.Generator) -> list[np.ndarray]:
    """Split shuffled indices into parts whose sizes differ by one at most."""
    return np.array_split(random.permutation(len(labels)), num_sites)


def by_size(
    labels: np.ndarray,
    num_sites: int,
    random: np.random.Generator,
    *,
    sizes: str | Sequence[float] = "linear",
    min_examples: int = 1,
) -> list[np.ndarray]:
    """Split shuffled indices into parts of given sizes, up to rounding and `min_examples`.

    Args:
        labels: of the examples.
        num_sites: how many parts.
        random: shuffles.
        sizes: a share for each site, or `linear` (site k has k + 1 times the examples of site 0), or `exponential` (e
            times those of site k - 1).
        min_examples: a site whose share is smaller has so many.

    Raises:
        ValueError: there is another number of shares.
    """
    if sizes == "linear":
        shares = [site + 1.0 for site in range(num_sites)]
    elif sizes == "exponential":
        shares = [math.exp(site - num_sites + 1) for site in range(num_sites)]
    else:
        largest = max(map(float, sizes))
        shares = [share / largest for share in map(float, sizes)]
    if len(shares) != num_sites:
        raise ValueError(f"sizes: expected a share for each of {num_sites} sites, got {len(shares)}")
    counts = _round_shares(np.array(shares), len(labels), min_examples)
    return np.split(random.permutation(len(labels)), np.cumsum(counts)[:-1])


def natural(
    labels: np.ndarray,
    num_sites: int,
    random: np.random.Generator,
    *,
    owners: Sequence[str],
    min_examples: int = 1,
) -> list[np.ndarray]:
    """Give all examples of an owner to one site.

    With as many sites as owners, sites have the order of the owners' names. With fewer, each owner in turn, the largest
    first, joins the site that has the fewest examples so far; sites have the order of their first names.

    Args:
        labels: of the examples.
        num_sites: how many parts.
        random: decides among owners of the same size.
        owners: the name of the owner of each example.
        min_examples: the fewest that a site may have.

    Raises:
        ValueError: there are fewer owners than sites, or a site has too few examples.
    """
    counts = Counter(owners)
    names = sorted(counts)
    if num_sites > len(names):
        raise ValueError(
            f"num_sites, site_ids: expected at most {len(names)} sites, the number of values of site_column, got "
            f"{num_sites}. With num_sites=None each value is a site"
        )
    groups: list[list[str]] = [[] for _ in range(num_sites)]
    queue = [(0, group) for group in range(num_sites)]
    for index in sorted(random.permutation(len(names)), key=lambda index: -counts[names[index]]):
        size, group = heapq.heappop(queue)
        groups[group].append(names[index])
        heapq.heappush(queue, (size + counts[names[index]], group))
    sites = {name: site for site, group in enumerate(sorted(groups, key=min)) for name in group}
    parts = group_indices(np.fromiter((sites[owner] for owner in owners), np.int64, len(labels)))
    _check_sizes(parts, min_examples, lambda site: f"site {site} ({printable(name_sites(owners, [parts[site]])[0])})")
    return parts


PARTITIONERS: dict[str, Partitioner] = {
    "iid": iid,
    "by_label": by_label,
    "shards": shards,
    "few_labels": few_labels,
    "dirichlet": dirichlet,
    "dirichlet_sites": dirichlet_sites,
    "sizes": by_size,
    "natural": natural,
}


def partition_indices(
    labels: np.ndarray, num_sites: int, partitioner: Partitioner, seed: int, min_examples: int = 1
) -> list[np.ndarray]:
    """Return each site's indices into `labels`.

    Args:
        labels: of the examples.
        num_sites: how many parts.
        partitioner: returns them. It gets `min_examples` if it has a parameter of this name.
        seed: of its generator.
        min_examples: the fewest that a site may have.

    Raises:
        ValueError: there are too few examples for so many sites, or an index is not at one site alone, or a site has
            fewer than `min_examples`.
    """
    if len(labels) < num_sites * min_examples:
        each = f" with min_examples={min_examples}" * (min_examples > 1)
        raise ValueError(
            f"site_ids, num_sites: expected at most {len(labels) // min_examples} sites for {len(labels)} training "
            f"examples{each}, got {num_sites}"
        )
    if "min_examples" in inspect.signature(partitioner).parameters:
        partitioner = partial(partitioner, min_examples=min_examples)
    parts = partitioner(labels, num_sites, np.random.default_rng(seed))
    sizes = list(map(len, parts))
    if len(parts) != num_sites or not all(sizes):
        raise ValueError(
            f"partition: expected {num_sites} parts with an example or more, got {len(parts)} with "
            f"{min(sizes, default=0)} or more"
        )
    if not np.array_equal(np.sort(np.concatenate(parts)), np.arange(len(labels))):
        raise ValueError(f"partition: expected each index from 0 to {len(labels) - 1} in one part, got others")
    _check_sizes(parts, min_examples)
    return parts


def _check_sizes(parts: Sequence[np.ndarray], least: int, describe: Callable[[int], str] = "site {}".format) -> None:
    """Refuse sites with fewer than `least` examples."""
    few = [site for site, part in enumerate(parts) if len(part) < least]
    if few:
        more = f", and {len(few) - 1} more sites have fewer" * (len(few) > 1)
        raise ValueError(
            f"min_examples: expected {least} or more at each site, got {len(parts[few[0]])} at {describe(few[0])}"
            f"{more}. Use a smaller min_examples, fewer sites, or another partition"
        )


def hash_parts(parts: Sequence[np.ndarray]) -> str:
    """Return the SHA-256 of the indices of all sites."""
    digest = hashlib.sha256(np.array(list(map(len, parts)), "<i8").tobytes())
    digest.update(np.concatenate(parts).astype("<i8").tobytes())
    return digest.hexdigest()


def name_sites(owners: Sequence[str], parts: Sequence[np.ndarray]) -> tuple[str, ...]:
    """Return for each site the name of its owner, or the first names of several."""

    def name(of_site: list[str]) -> str:
        if len(of_site) <= SHOWN:
            return ", ".join(of_site)
        return f"{', '.join(of_site[: SHOWN - 1])} and {len(of_site) - SHOWN + 1} more"

    names = [name(sorted({owners[index] for index in part.tolist()})) for part in parts]
    counts = Counter(names)  # an owner may be called as a group of others
    return tuple(name if counts[name] == 1 else f"{name} (site {site})" for site, name in enumerate(names))


def _round_shares(shares: np.ndarray, total: int, least: int) -> np.ndarray:
    """Return whole numbers in the ratio of shares, by the largest remainders, with this sum, each `least` or more."""
    counts = np.full(len(shares), least)
    free = np.ones(len(shares), bool)
    while True:
        left = total - least * int((~free).sum())
        quotas = shares * (left / math.fsum(shares[free]))
        small = free & (quotas < least)
        if not small.any():
            break
        free &= ~small
    counts[free] = np.floor(quotas[free])
    order = np.argsort(-(quotas[free] - counts[free]), kind="stable")
    counts[np.flatnonzero(free)[order[: total - counts.sum()]]] += 1
    return counts

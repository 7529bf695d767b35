"""Partitions in which sites have different labels. Each parameter is a setting."""

import numpy as np

MAX_SAMPLES = 100
BOUNDS = 1e-300, 1e300  # of the parameters of a gamma distribution whose logarithms are finite


def by_label(labels: np.ndarray, num_sites: int, random: np.random.Generator) -> list[np.ndarray]:
    """Split indices sorted by label into parts whose sizes differ by one at most: few labels a site."""
    return np.array_split(_sort(labels, random), num_sites)


def shards(
    labels: np.ndarray, num_sites: int, random: np.random.Generator, *, shards_per_site: int = 2
) -> list[np.ndarray]:
    """Give each site the same number of random shards of the sorted labels (McMahan et al. 2017, arXiv 1602.05629).

    The sizes of shards differ by one at most.

    Raises:
        ValueError: there are more shards than examples.
    """
    if num_sites * shards_per_site > len(labels):
        raise ValueError(
            f"shards_per_site: expected at most {len(labels) // num_sites}, as {num_sites} sites share {len(labels)} "
            f"training examples, got {shards_per_site}"
        )
    cut = np.array_split(_sort(labels, random), num_sites * shards_per_site)
    order = random.permutation(len(cut)).reshape(num_sites, shards_per_site)
    return [np.concatenate([cut[shard] for shard in of_site]) for of_site in order]


def dirichlet(
    labels: np.ndarray,
    num_sites: int,
    random: np.random.Generator,
    *,
    dirichlet_alpha: float = 0.5,
    min_examples: int = 1,
) -> list[np.ndarray]:
    """Split each label's examples in proportions from Dirichlet(alpha) (Yurochkin et al. 2019, arXiv 1905.12022).

    Proportions that leave a site with fewer than `min_examples` are sampled again, at most 100 times.

    Raises:
        ValueError: all proportions left some site with fewer.
    """
    groups = group_indices(labels)
    best = site = 0
    for _ in range(MAX_SAMPLES):
        shuffled, cuts, sizes = [], [], np.zeros(num_sites, np.int64)
        for of_label in groups:
            shuffled.append(random.permutation(of_label))
            proportions = random.dirichlet(np.full(num_sites, dirichlet_alpha))
            cuts.append(np.round(np.cumsum(proportions)[:-1] * len(of_label)).astype(int))
            sizes += np.diff(cuts[-1], prepend=0, append=len(of_label))
        if sizes.min() >= min_examples:
            parts = map(np.split, shuffled, cuts)
            return [np.concatenate(of_site) for of_site in zip(*parts, strict=True)]
        if sizes.min() >= best:
            best, site = int(sizes.min()), int(sizes.argmin())
    raise ValueError(
        f"dirichlet_alpha: expected a number that gives each of {num_sites} sites {min_examples} or more of "
        f"{len(labels)} training examples, got {dirichlet_alpha}, which did not in {MAX_SAMPLES} samples: in the best "
        f"one site {site} had {best}. Use a larger dirichlet_alpha, fewer sites, or partition=dirichlet_sites"
    )


def dirichlet_sites(
    labels: np.ndarray, num_sites: int, random: np.random.Generator, *, dirichlet_alpha: float = 0.5
) -> list[np.ndarray]:
    """Give each site examples by a mix of labels of its own, as Hsu et al. do (2019, arXiv 1909.06335).

    A site's mix is a sample from Dirichlet(alpha * prior); the prior is the mix of all labels. Sizes differ by one at
    most. Examples are sampled without replacement, in the order of the sites; among the labels that are not used up,
    a mix keeps its ratios.
    """
    pools = [random.permutation(of_label) for of_label in group_indices(labels)]
    counts = np.array(list(map(len, pools)))
    concentration = np.clip(dirichlet_alpha * (counts / len(labels)), *BOUNDS)
    used = np.zeros_like(counts)
    parts = []
    for size in map(len, np.array_split(labels, num_sites)):
        taken = _sample_counts(size, _log_gamma(concentration, random), counts - used, random)
        ends = used + taken
        parts.append(np.concatenate([pools[at][used[at] : ends[at]] for at in np.flatnonzero(taken)]))
        used = ends
    return parts


def few_labels(
    labels: np.ndarray, num_sites: int, random: np.random.Generator, *, labels_per_site: int = 2
) -> list[np.ndarray]:
    """Give each site examples of exactly so many labels (Li et al. 2021, arXiv 2102.02079).

    Each label is at about the same number of sites, or at fewer if it has fewer examples. These sites have equal parts
    of its examples, up to one.

    Raises:
        ValueError: there are too few labels, or too few sites for all labels, or too few examples.
    """
    groups = group_indices(labels)
    left = _count_owners(np.array(list(map(len, groups))), num_sites, labels_per_site, random)
    owners: list[list[int]] = [[] for _ in groups]
    for site in range(num_sites):
        # A label that needs all sites that are left is taken; then each site can have labels that differ.
        taken = np.flatnonzero(left == num_sites - site)
        chances = np.where(left == num_sites - site, 0, left)
        others = labels_per_site - len(taken)
        if others:
            sampled = random.choice(len(groups), others, replace=False, p=chances / chances.sum())
            taken = np.concatenate([taken, sampled])
        left[taken] -= 1
        for label in taken:
            owners[label].append(site)
    parts: list[list[np.ndarray]] = [[] for _ in range(num_sites)]
    for of_label, sites in zip(groups, owners, strict=True):
        pieces = np.array_split(random.permutation(of_label), len(sites))
        for site, piece in zip(random.permutation(sites), pieces, strict=True):
            parts[site].append(piece)
    return [np.concatenate(of_site) for of_site in parts]


def group_indices(values: np.ndarray) -> list[np.ndarray]:
    """Return the indices of each value, in the order of the values."""
    counts = np.unique(values, return_counts=True)[1]
    return np.split(np.argsort(values, kind="stable"), np.cumsum(counts)[:-1])


def _sort(labels: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """Return all indices by label, shuffled among those of a label."""
    shuffled = random.permutation(len(labels))
    return shuffled[np.argsort(labels[shuffled], kind="stable")]


def _log_gamma(concentration: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """Return logarithms of gamma samples, finite where the samples themselves would be 0.

    A sample for a is one for a + 1 times U ** (1 / a) with U uniform (Marsaglia and Tsang 2000).
    """
    return (
        np.log(random.standard_gamma(concentration + 1))
        - random.standard_exponential(len(concentration)) / concentration
    )


def _sample_counts(
    size: int, log_weights: np.ndarray, available: np.ndarray, random: np.random.Generator
) -> np.ndarray:
    """Return how many of each label a site takes: as if one by one, without those that are used up."""
    taken = np.zeros_like(available)
    while (missing := size - taken.sum()) > 0:
        logs = np.where(taken < available, log_weights, -np.inf)
        weights = np.exp(logs - logs.max())
        taken = np.minimum(taken + random.multinomial(missing, weights / weights.sum()), available)
    return taken


def _count_owners(counts: np.ndarray, num_sites: int, labels_per_site: int, random: np.random.Generator) -> np.ndarray:
    """Return how many sites have each label: about as many, but no more than it has examples."""
    most = np.minimum(counts, num_sites)
    total = num_sites * labels_per_site
    wrong = f"labels_per_site: expected {{}}, got {labels_per_site}"
    if labels_per_site > len(counts):
        raise ValueError(wrong.format(f"at most {len(counts)}, the number of labels in the training data"))
    if total < len(counts):
        least = -(-len(counts) // num_sites)
        raise ValueError(wrong.format(f"at least {least}, so that {num_sites} sites have all {len(counts)} labels"))
    if total > most.sum():
        raise ValueError(
            wrong.format(
                f"at most {most.sum() // num_sites}, as {num_sites} sites share {counts.sum()} training examples"
            )
            + f". The rarest label has {counts.min()}. Use fewer sites"
        )
    owners = np.ones_like(counts)
    while (missing := total - owners.sum()) > 0:
        owners[random.permutation(np.flatnonzero(owners < most))[:missing]] += 1
    return owners


BY_LABELS = (by_label, shards, few_labels, dirichlet, dirichlet_sites)

"""Partition the indices of a training set over sites. Every index goes to exactly one site."""

from collections.abc import Callable

import numpy as np

Partitioner = Callable[[np.ndarray, int, np.random.Generator], list[np.ndarray]]

MAX_SAMPLES = 100


def iid(labels: np.ndarray, num_sites: int, random: np.random.Generator) -> list[np.ndarray]:
    """Split shuffled indices into parts whose sizes differ by one at most."""
    return np.array_split(random.permutation(len(labels)), num_sites)


def by_label(labels: np.ndarray, num_sites: int, random: np.random.Generator) -> list[np.ndarray]:
    """Split indices sorted by label into parts whose sizes differ by one at most: few labels a site."""
    shuffled = random.permutation(len(labels))
    return np.array_split(shuffled[np.argsort(labels[shuffled], kind="stable")], num_sites)


def dirichlet(
    labels: np.ndarray, num_sites: int, random: np.random.Generator, *, dirichlet_alpha: float = 0.5
) -> list[np.ndarray]:
    """Split each label's examples in proportions sampled from Dirichlet(alpha) (Hsu et al. 2019, arXiv 1909.06335).

    Proportions that leave a site without an example are sampled again, at most 100 times.

    Raises:
        ValueError: all proportions left some site without an example.
    """
    for _ in range(MAX_SAMPLES):
        parts: list[list[np.ndarray]] = [[] for _ in range(num_sites)]
        for label in np.unique(labels):
            indices = random.permutation(np.flatnonzero(labels == label))
            proportions = random.dirichlet(np.full(num_sites, dirichlet_alpha))
            cuts = np.round(np.cumsum(proportions)[:-1] * len(indices)).astype(int)
            for part, run in zip(parts, np.split(indices, cuts), strict=True):
                part.append(run)
        by_site = [np.concatenate(part) for part in parts]
        if all(map(len, by_site)):
            return by_site
    raise ValueError(
        f"dirichlet_alpha: expected a number that gives each of {num_sites} sites an example, got {dirichlet_alpha}, "
        f"which did not in {MAX_SAMPLES} samples. Use a larger dirichlet_alpha or fewer sites"
    )


PARTITIONERS: dict[str, Callable[..., list[np.ndarray]]] = {
    "iid": iid,
    "by_label": by_label,
    "dirichlet": dirichlet,
}


def partition_indices(labels: np.ndarray, num_sites: int, partitioner: Partitioner, seed: int) -> list[np.ndarray]:
    """Return each site's indices into `labels`.

    Raises:
        ValueError: there are more sites than examples, or an index is not at one site alone, or a site gets none.
    """
    if len(labels) < num_sites:
        raise ValueError(
            f"site_ids, num_sites: expected at most {len(labels)} sites for {len(labels)} training examples, got "
            f"{num_sites}"
        )
    parts = partitioner(labels, num_sites, np.random.default_rng(seed))
    if len(parts) != num_sites or not all(map(len, parts)):
        least = min(map(len, parts), default=0)
        raise ValueError(
            f"partition: expected {num_sites} parts with an example or more, got {len(parts)} with {least} or more"
        )
    if not np.array_equal(np.sort(np.concatenate(parts)), np.arange(len(labels))):
        raise ValueError(f"partition: expected each index from 0 to {len(labels) - 1} in one part, got others")
    return parts

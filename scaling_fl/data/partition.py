"""Deal the indices of a training set to sites. Every index is dealt exactly once."""

from collections.abc import Callable

import numpy as np

Partitioner = Callable[[np.ndarray, int, np.random.Generator], list[np.ndarray]]

MAX_DRAWS = 100


def iid(labels: np.ndarray, num_sites: int, random: np.random.Generator) -> list[np.ndarray]:
    """Deal a shuffled deck into parts whose sizes differ by one at most."""
    return np.array_split(random.permutation(len(labels)), num_sites)


def by_label(labels: np.ndarray, num_sites: int, random: np.random.Generator) -> list[np.ndarray]:
    """Deal a deck sorted by label into runs whose sizes differ by one at most: few labels a site."""
    shuffled = random.permutation(len(labels))
    return np.array_split(shuffled[np.argsort(labels[shuffled], kind="stable")], num_sites)


def dirichlet(labels: np.ndarray, num_sites: int, random: np.random.Generator, *, alpha: float) -> list[np.ndarray]:
    """Deal each label's examples in proportions drawn from Dirichlet(alpha) (Hsu et al. 2019, arXiv 1909.06335).

    A draw that leaves a site without an example is drawn again, at most 100 times.

    Raises:
        ValueError: every draw left some site without an example.
    """
    for _ in range(MAX_DRAWS):
        parts: list[list[np.ndarray]] = [[] for _ in range(num_sites)]
        for label in np.unique(labels):
            indices = random.permutation(np.flatnonzero(labels == label))
            proportions = random.dirichlet(np.full(num_sites, alpha))
            cuts = np.round(np.cumsum(proportions)[:-1] * len(indices)).astype(int)
            for part, run in zip(parts, np.split(indices, cuts), strict=True):
                part.append(run)
        dealt = [np.concatenate(part) for part in parts]
        if all(map(len, dealt)):
            return dealt
    empty = next(site for site, indices in enumerate(dealt) if len(indices) == 0)
    raise ValueError(
        f"dirichlet_alpha={alpha} leaves sites without an example (site {empty} in the last of "
        f"{MAX_DRAWS} draws over {num_sites} sites): a larger dirichlet_alpha or fewer sites would do"
    )


PARTITIONERS: dict[str, Callable[..., list[np.ndarray]]] = {
    "iid": iid,
    "by_label": by_label,
    "dirichlet": dirichlet,
}


def partition_indices(labels: np.ndarray, num_sites: int, partitioner: Partitioner, seed: int) -> list[np.ndarray]:
    """Return each site's indices into `labels`.

    Raises:
        ValueError: there are more sites than examples, or a site would get none.
    """
    if len(labels) < num_sites:
        raise ValueError(
            f"{num_sites} sites cannot share {len(labels)} training examples: "
            f"at most {len(labels)} sites (site_ids, num_sites) or more examples would do"
        )
    return partitioner(labels, num_sites, np.random.default_rng(seed))

"""Cohorts: which sites take part in a round, and where they train.

Both are functions of what every rank knows, so that they are the same on any number of ranks and after a stop, and no
rank has to tell another. Sites are sampled by hashes, as no library promises the same random numbers in all versions.
"""

import heapq
import logging
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction

from scaling_fl.distributed.collectives import all_gather, all_gather_items, rank
from scaling_fl.federation.site import Site
from scaling_fl.training.metrics import Metrics
from scaling_fl.training.seeds import derive_seed

log = logging.getLogger(__name__)
WEIGHTS = ("examples", "tokens", "sites")  # what the weight of a site in the mean counts


def count_sites(sites_per_round: float | None, num_eligible: int, min_sites: int) -> int:
    """Return how many sites take part in a round.

    Args:
        sites_per_round: a whole number; or a float, the fraction of the eligible sites, rounded down, but at least
            `min_sites` and one; None: all.
        num_eligible: how many sites may take part.
        min_sites: how many sites a round needs.

    Raises:
        ValueError: there are too few sites.
    """
    if min_sites > num_eligible:
        raise ValueError(f"min_sites: expected at most {num_eligible}, the number of eligible sites, got {min_sites}")
    if sites_per_round is None:
        return num_eligible
    if isinstance(sites_per_round, float):  # 0.29 of 100 sites are 29, though the float is below 0.29
        return max(int(Fraction(repr(sites_per_round)) * num_eligible), min_sites, 1)
    if sites_per_round > num_eligible:
        raise ValueError(
            f"sites_per_round: expected at most {num_eligible}, the number of eligible sites, got {sites_per_round}"
        )
    if sites_per_round < min_sites:
        raise ValueError(f"min_sites: expected at most sites_per_round={sites_per_round}, got {min_sites}")
    return sites_per_round


class Cohorts:
    """Samples the sites of each round, uniformly and without replacement.

    Args:
        eligible: numbers of the sites that may take part.
        num_sites: how many of them take part in a round.
        seed: of the samples.

    Raises:
        ValueError: a site is named twice, or there are not so many.
    """

    def __init__(self, eligible: Sequence[int], num_sites: int, seed: int) -> None:
        if len(set(eligible)) < len(eligible):
            raise ValueError(f"eligible: expected each site once, got {list(eligible)}")
        if not 1 <= num_sites <= len(eligible):
            raise ValueError(f"num_sites: expected 1 to {len(eligible)}, the number of eligible sites, got {num_sites}")
        self.eligible, self.num_sites = sorted(eligible), num_sites
        self._seed = seed
        self._counts: Counter[int] = Counter()  # how often each site took part until the round below
        self._counted = 0
        self._last: tuple[int | None, list[int]] = None, []  # the round that was asked for, and its sites

    @property
    def are_sampled(self) -> bool:
        """Whether some eligible sites are left out of a round."""
        return self.num_sites < len(self.eligible)

    def of(self, round_: int) -> list[int]:
        """Return the sites of a round, in increasing order."""
        if self._last[0] != round_:
            self._last = round_, self._sample(round_)
        return self._last[1]

    def count_rounds_before(self, site: int, round_: int) -> int:
        """Return in how many of the rounds from 1 to before `round_` an eligible site was in the cohort."""
        if not self.are_sampled:
            return round_ - 1
        if self._counted >= round_:
            self._counts, self._counted = Counter(), 0
        while self._counted < round_ - 1:
            self._counted += 1
            self._counts.update(self._sample(self._counted))
        return self._counts[site]

    def _sample(self, round_: int) -> list[int]:
        if not self.are_sampled:
            return self.eligible
        # 63 bits of a hash: two sites with the same are sampled in the order of their numbers.
        order = sorted(self.eligible, key=lambda site: derive_seed(self._seed, "cohort", round_, site))
        return sorted(order[: self.num_sites])


def share_out(work: Mapping[int, int], num_places: int) -> dict[int, int]:
    """Assign sites to places so that these have about the same work: the largest first, where there is least so far.

    The place with the most work has at most 4/3 of what it has at best (Graham 1969, longest processing time first).

    Args:
        work: of each site, such as a number of examples.
        num_places: from 0.
    """
    loads = [(0, place) for place in range(num_places)]
    places = {}
    for site in sorted(work, key=lambda site: (-work[site], site)):
        load, place = loads[0]
        heapq.heapreplace(loads, (load + work[site], place))
        places[site] = place
    return places


class Cohort:
    """The sites of a round on all ranks, which make it together.

    Args:
        sites: of this rank.
        weight_by: the weight of a site: "examples" that it trained on, "tokens" that its model learned to predict in
            them, or "sites" for the same weight each.

    Raises:
        ValueError: `weight_by` is something else, or no site has tokens.
    """

    def __init__(self, sites: Sequence[Site], weight_by: str) -> None:
        if weight_by not in WEIGHTS:
            raise ValueError(f"weight_by: expected one of {', '.join(WEIGHTS)}, got {weight_by!r}")
        self.sites, self._weight_by = sites, weight_by
        gathered = all_gather([(site.number, site.name, self._plan(site)) for site in sites])
        self._ranks = {site: number for number, of_rank in enumerate(gathered) for site, _, _ in of_rank}
        numbers = [site for of_rank in gathered for site, _, _ in of_rank]
        if len(self._ranks) < len(numbers):
            twice = next(site for site in numbers if numbers.count(site) > 1)
            raise ValueError(f"sites: expected another number for each on all ranks, got two of number {twice}")
        self._names = {site: name for of_rank in gathered for site, name, _ in of_rank if name}
        self._total = sum(planned for of_rank in gathered for _, _, planned in of_rank)
        self.num_sites = len(self._ranks)
        if weight_by == "tokens" and self.num_sites and not self._total:
            raise ValueError("weight_by: expected sites with tokens that their model learns to predict, got none")

    def weigh(self, site: Site, num_examples: int) -> Fraction:
        """Return the weight of a site that trained on so many of its examples; those of all add up to 1 at most."""
        if self._weight_by == "sites":
            return Fraction(1, self._total)
        return Fraction(num_examples, site.num_examples) * Fraction(self._plan(site), self._total)

    def _plan(self, site: Site) -> int:
        """Return the weight of a site that trains on all of its examples, before it is divided by the total."""
        return {"examples": site.num_examples, "tokens": site.num_tokens, "sites": 1}[self._weight_by]

    def count_failures(self, failures: Mapping[int, str], min_sites: int, round_: int) -> Metrics:
        """Return how many sites failed on all ranks, and log which.

        Args:
            failures: of this rank: a sentence by site.
            min_sites: how many sites the round needs.
            round_: its number.

        Raises:
            ValueError: fewer are left.
        """
        sentences = [sentence for _, sentence in sorted(all_gather_items(dict(failures)).items())]
        num_left = self.num_sites - len(sentences)
        if num_left < min_sites:
            more = f" (and {len(sentences) - 1} more)" if sentences[1:] else ""
            raise ValueError(
                f"min_sites: expected at least {min_sites} sites left in round {round_}, got {num_left} of "
                f"{self.num_sites}: {sentences[0]}{more}"
            )
        for sentence in sentences if rank() == 0 else ():
            log.warning("%s; the round goes on without it", sentence)
        return {"sites.failed": len(sentences)}

    def describe(self, busy: float) -> Metrics:
        """Return who was asked to train, and how long each rank waited for the last.

        Args:
            busy: the seconds that this rank trained its sites.
        """
        seconds = all_gather(busy)
        metrics: Metrics = {"rank.idle_s": {number: max(seconds) - of_rank for number, of_rank in enumerate(seconds)}}
        metrics |= {"sites.cohort": self.num_sites, "site.rank": dict(sorted(self._ranks.items()))}
        return metrics | ({"site.name": dict(sorted(self._names.items()))} if self._names else {})


def by_round(sites: Sequence[Site] | Callable[[int], Sequence[Site]]) -> Callable[[int], Sequence[Site]]:
    """Return a function from a round to its sites; those of a list take part in all rounds."""
    return sites if callable(sites) else lambda round_: sites

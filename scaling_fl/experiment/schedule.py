"""Which sites train and are evaluated in a round, on which devices, and on how many examples."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch

from scaling_fl.data.examples import Examples
from scaling_fl.data.reader import name_site
from scaling_fl.data.sites import SiteData
from scaling_fl.distributed.placement import Topology
from scaling_fl.experiment.settings import Settings, of_site
from scaling_fl.federation.cohorts import Cohorts, count_sites, share_out
from scaling_fl.federation.local_training import order_seed
from scaling_fl.federation.site import Site

MANY_SITES = 100  # of more, only the sampled ones are evaluated by default


@dataclass(frozen=True)
class Schedule:
    """The sites of each round.

    Args:
        settings: of the run.
        data: of the sites.
        topology: where they run, unless they are shared out in each round.
        cohorts: which of them train in a round.
        evaluated: which of them are evaluated after a round, of those with test or validation examples.
    """

    settings: Settings
    data: SiteData
    topology: Topology
    cohorts: Cohorts
    evaluated: Callable[[int], Sequence[int]]

    def train(self, round_: int) -> list[Site]:
        """Return the sites of this rank that train in a round."""
        return [self._site(number, device, round_) for number, device in self._places(round_).items()]

    def evaluate(self, round_: int) -> list[Site]:
        """Return the sites of this rank that are evaluated after a round, which is 1 or more."""
        numbers, sites = self.evaluated(round_), self.topology.sites
        names = self.data.names
        return [
            Site(number, sites[number], 0, name=names[number] if names else "") for number in numbers if number in sites
        ]

    def count_examples(self, site: int) -> int:
        """Return about how many examples pass through the model while a site trains in a round."""
        own = of_site(self.settings, site)
        if own["local_steps"] is not None:
            return own["local_steps"] * min(step_size(own), self.data.sizes[site].num_examples)
        return own["num_local_epochs"] * self.data.sizes[site].num_examples

    def most_steps(self, round_: int) -> int:
        """Return the most steps of its optimiser that a site is to take in a round."""
        sites = self.cohorts.of(round_)
        return max(count_steps(self.data.sizes[site].num_examples, of_site(self.settings, site)) for site in sites)

    def count_tests(self, round_: int) -> int:
        """Return how many examples this rank evaluates after a round, or before the first."""
        sites = [site.number for site in self.evaluate(max(round_, 1))]
        of_sites = sum(held.counts.get(site, 0) for held in (self.data.test, self.data.validation) for site in sites)
        return of_sites + sum(len(batch) for of_device in self.data.common.values() for batch in of_device)

    def _places(self, round_: int) -> dict[int, torch.device]:
        """Return the sites of this rank in a round, and their devices."""
        cohort = self.cohorts.of(round_)
        if self.topology.is_fixed:
            return {site: self.topology.sites[site] for site in cohort if site in self.topology.sites}
        places = share_out({site: self.count_examples(site) for site in cohort}, self.topology.num_devices)
        devices = {site: self.topology.find_device(places[site]) for site in cohort}
        return {site: device for site, device in devices.items() if device is not None}

    def _site(self, number: int, device: torch.device, round_: int) -> Site:
        own = of_site(self.settings, number)
        size, start = self.data.sizes[number], (0, 0)
        num_examples, num_tokens = size.num_examples, size.num_trained_tokens
        if own["local_steps"] is not None:
            first = own["local_steps"] * self.cohorts.count_rounds_before(number, round_)
            epoch, step = divmod(first, steps_of_epoch(num_examples, own))
            start = epoch, step * own["gradient_accumulation"]
            end = count_until(first + own["local_steps"], num_examples, own)
            num_seen = end - count_until(first, num_examples, own)
            if num_tokens and num_seen < num_examples:
                num_tokens = min(num_tokens, self._count_tokens(number, start, own))
            num_examples = min(num_examples, num_seen)
        data, name = self.data.train[number], self.data.name_of(number)
        return Site(
            number, device, num_examples, data, name, own, start, num_tokens, count_steps(size.num_examples, own)
        )

    def _count_tokens(self, number: int, start: tuple[int, int], own: dict[str, Any]) -> int:
        """Return how many tokens a site learns to predict in the steps from a batch of an epoch on."""
        examples = self.data.train[number]
        epoch, batch = start
        step = batch // own["gradient_accumulation"]
        steps: list[Examples] = []
        while len(steps) < own["local_steps"]:
            seed = order_seed(self.settings.seed, number, epoch)
            left = own["local_steps"] - len(steps)
            steps += islice(examples.shuffled(step_size(own), seed, step), left)
            epoch, step = epoch + 1, 0
        return sum(of.size(0).num_trained_tokens for of in steps)


def make_schedule(settings: Settings, data: SiteData, topology: Topology) -> Schedule:
    """Return the schedule of a run.

    Raises:
        ValueError: a setting names a site that does not exist, or asks for more sites than there are.
    """
    eligible = find_sites("eligible_sites", settings.eligible_sites, data)
    num_sites = count_sites(settings.sites_per_round, len(eligible), settings.min_sites)
    cohorts = Cohorts(eligible, num_sites, settings.seed)
    return Schedule(settings, data, topology, cohorts, choose_evaluated(settings, data, cohorts))


def choose_evaluated(settings: Settings, data: SiteData, cohorts: Cohorts) -> Callable[[int], Sequence[int]]:
    """Return a function of the round that returns the sites that are evaluated after it.

    Raises:
        ValueError: a site that is named has no test or validation examples, or there are none of those by which the
            best round is chosen.
    """
    tested = sorted({**data.test.counts, **data.validation.counts})
    judged = set() if data.common and not data.validation.counts else set(data.validation.counts or data.test.counts)
    if settings.evaluation_sites is not None:
        named = find_sites("evaluation_sites", settings.evaluation_sites, data)
        if without := [site for site in named if site not in tested]:
            raise ValueError(
                f"evaluation_sites: expected sites with test or validation examples, got {without}, which have none"
            )
        if judged and judged.isdisjoint(named):
            raise ValueError(f"evaluation_sites: expected a site with validation examples, got {named}")
        return lambda round_: named
    if not tested or not cohorts.are_sampled or len(data.sizes) <= MANY_SITES:
        return lambda round_: tested
    known = judged or set(tested)
    others = Cohorts(sorted(known), min(cohorts.num_sites, len(known)), settings.seed)  # if a cohort has none of them

    def choose(round_: int) -> Sequence[int]:
        cohort = cohorts.of(round_)
        return others.of(round_) if known.isdisjoint(cohort) else [site for site in cohort if site in tested]

    return choose


def find_sites(setting: str, given: Sequence[int | str] | None, data: SiteData) -> Sequence[int]:
    """Return the numbers of sites that a setting names by number or name, in increasing order; None names all.

    Raises:
        ValueError: there is no such site.
    """
    if given is None:
        return range(len(data.sizes))
    numbers = {name: number for number, name in enumerate(data.names)}
    found = set()
    for site in given:
        number = numbers.get(name_site(site)) if isinstance(site, str) else site
        if number is None or number >= len(data.sizes):
            last, names = len(data.sizes) - 1, f", or names such as {data.names[0]!r}" if data.names else ""
            raise ValueError(f"{setting}: expected numbers of sites from 0 to {last}{names}, got {site!r}")
        found.add(number)
    return sorted(found)


def check_warmup(settings: Settings, data: SiteData) -> None:
    """Check that the learning rate of a site reaches its peak before the end of its schedule.

    Raises:
        ValueError: that of none does.
    """
    if settings.warmup_steps and settings.lr_schedule_rounds is not None:
        steps = [count_steps(size.num_examples, of_site(settings, site)) for site, size in enumerate(data.sizes)]
        if settings.warmup_steps >= (most := max(steps) * settings.lr_schedule_rounds):
            raise ValueError(
                f"warmup_steps: expected fewer than {most:,}, the most steps of a site in lr_schedule_rounds="
                f"{settings.lr_schedule_rounds}, got {settings.warmup_steps:,}"
            )


def step_size(own: dict[str, Any]) -> int:
    """Return how many examples a step of a site has, given its settings; the last of an epoch may have fewer."""
    return own["batch_size"] * own["gradient_accumulation"]


def steps_of_epoch(num_examples: int, own: dict[str, Any]) -> int:
    """Return how many steps of its optimiser a site takes in an epoch."""
    return -(-num_examples // step_size(own))


def count_steps(num_examples: int, own: dict[str, Any]) -> int:
    """Return how many steps of its optimiser a site takes in a round."""
    if own["local_steps"] is not None:
        return own["local_steps"]
    return own["num_local_epochs"] * steps_of_epoch(num_examples, own)


def count_until(step: int, num_examples: int, own: dict[str, Any]) -> int:
    """Return how many examples the steps before `step` train on, if a site trains epoch after epoch."""
    epochs, steps = divmod(step, steps_of_epoch(num_examples, own))
    return epochs * num_examples + steps * step_size(own)

"""The centralised twin of a federated run: the same data and settings, trained on as one site."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from scaling_fl.data.examples import join
from scaling_fl.data.sites import SiteData
from scaling_fl.distributed.collectives import world_size
from scaling_fl.distributed.launch import num_ranks
from scaling_fl.experiment.optimiser_states import keeps_state
from scaling_fl.experiment.parameters import PARAMETERS
from scaling_fl.experiment.schedule import Schedule
from scaling_fl.experiment.settings import Settings
from scaling_fl.federation.cohorts import Cohorts

# What a federation alone has, and the value with which it does nothing to a single site.
OF_FEDERATION: dict[str, Any] = {
    "strategy": "fedavg",
    **dict.fromkeys(PARAMETERS["strategy"]),
    "sites_per_round": None,
    "weight_by": "examples",
    "proximal_mu": 0.0,
    "comm_dtype": "exact",
    "site_settings": None,
    "on_site_failure": "abort",
    "min_sites": 1,
    "evaluate_local": False,
    "lora_mean": None,
}


def count_ranks(settings: Settings) -> int:
    """Return how many ranks this node starts: as RANKS says, but one of a centralised run.

    Raises:
        ValueError: RANKS is not a whole number from 1.
    """
    ranks = num_ranks(settings.num_sites or len(settings.site_ids))
    return 1 if settings.centralised else ranks


def check_ranks(settings: Settings) -> None:
    """Refuse a centralised run of several ranks, none of which has all data."""
    if settings.centralised and world_size() > 1:
        raise ValueError(f"centralised: expected one rank, which trains on all data, got {world_size()}")


def without_federation(settings: Settings) -> Settings:
    """Return the settings with which a centralised run trains its only site; those of others are returned unchanged."""
    if not settings.centralised:
        return settings
    keeps = settings.trainer == "default" and keeps_state(settings)
    return replace(settings, **OF_FEDERATION, optimiser_state="keep" if keeps else "reset")


def find_unused(settings: Settings) -> list[str]:
    """Return the names of the settings that do nothing in a centralised run, though they have been changed."""
    others = without_federation(settings)
    names = [name for name in OF_FEDERATION if getattr(settings, name) != getattr(others, name)]
    names += ["optimiser_state"] * (settings.optimiser_state == "keep" != others.optimiser_state)
    return [name for name in names if "strategy" not in names or name not in PARAMETERS["strategy"]]


def pool(data: SiteData, schedule: Schedule) -> tuple[SiteData, Schedule]:
    """Return the data with the examples of all sites as those of site 0, and the schedule that trains it.

    What is evaluated stays as it is: the common test set, and what each site holds out.
    """
    sites: Sequence[int] = schedule.cohorts.eligible
    examples = join([data.train[site] for site in sites])
    pooled = replace(data, train={0: examples}, sizes=[examples.size(len(data.label_names))], is_pooled=True)
    return pooled, replace(schedule, data=pooled, cohorts=Cohorts([0], 1, schedule.settings.seed))

"""What the global weights score, on a common test set and at the sites."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from scaling_fl.distributed.collectives import all_gather_items
from scaling_fl.federation.devices import Devices
from scaling_fl.federation.site import Site, SiteFunction, leaves_nothing, read_scores
from scaling_fl.training.metrics import Means, Metrics, spread

EvaluateDevice = Callable[[nn.Module, torch.device], Mapping[str, Any]]


@dataclass(frozen=True)
class Scores:
    """What the global weights score in a round, of all ranks.

    Args:
        common: on the common test set.
        of_sites: on all that the sites evaluate on.
        by_site: `examples` and the means of each site that was evaluated, by increasing site.
    """

    common: Means
    of_sites: Means
    by_site: dict[int, dict[str, float]]


def score(
    devices: Devices,
    evaluate_device: EvaluateDevice | None,
    evaluate_site: SiteFunction | None,
    sites: Sequence[Site],
    round_: int,
) -> Scores:
    """Return what the global weights score: see `Federation`, of which these are the arguments.

    Raises:
        ValueError: a score is not finite.
    """
    by_site: dict[int, dict[str, float]] = {}

    def score_part(evaluate: EvaluateDevice, device: torch.device) -> Means:
        return devices.evaluate(device, lambda model: Means.of(evaluate(model, device)), has_weights=False)

    def score_site(evaluate: SiteFunction, site: Site, model: nn.Module) -> Means:
        try:
            num_examples, means = read_scores(devices.call(evaluate, model, site, round_))
        except (ValueError, FloatingPointError) as error:
            raise ValueError(f"{site} was not evaluated in round {round_}: {error}") from error
        by_site[site.number] = {"examples": num_examples, **means.result()}
        return means

    def score_sites(evaluate: SiteFunction, device: torch.device) -> Means:
        of_device = [site for site in sites if site.device == device]
        keeps = leaves_nothing(evaluate)
        return Means().merge(
            devices.evaluate(device, partial(score_site, evaluate, site), has_weights=keeps and number > 0)
            for number, site in enumerate(of_device)
        )

    common = Means() if evaluate_device is None else devices.pool(partial(score_part, evaluate_device))
    if evaluate_site is None:
        return Scores(common, Means(), {})
    of_sites = devices.pool(partial(score_sites, evaluate_site))
    by_site = all_gather_items(by_site)
    return Scores(common, of_sites, {site: by_site[site] for site in sorted(by_site)})


def name_scores(prefix: str, means: Mapping[str, Any]) -> Metrics:
    """Return means under the names `<prefix>.<score>`."""
    return {f"{prefix}.{name}": value for name, value in means.items()}


def describe_sites(by_site: Mapping[int, Mapping[str, float]]) -> Metrics:
    """Return `site.test_examples`, `site.test_<score>` and its spread over the sites: see `metrics.spread`."""
    if not by_site:
        return {}
    of_scores = {
        site: {f"test_{name}": value for name, value in of_site.items() if name != "examples"}
        for site, of_site in by_site.items()
    }
    return {"site.test_examples": {site: of_site["examples"] for site, of_site in by_site.items()}} | spread(of_scores)

"""What is evaluated, by whom, and what its scores are called."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import nn

from scaling_fl.data.examples import Examples
from scaling_fl.data.sites import Held, SiteData
from scaling_fl.experiment.objectives import Objective
from scaling_fl.experiment.settings import Settings
from scaling_fl.federation.evaluation import Scores, describe_sites, name_scores
from scaling_fl.federation.site import Site
from scaling_fl.records.console import Progress
from scaling_fl.training.metrics import Means, Metrics, spread
from scaling_fl.training.scores import Totals

ScoreAnswers = Callable[[nn.Module, Examples], Totals]
ScoreParts = Callable[[nn.Module, Sequence[Examples]], Totals]


@dataclass(frozen=True)
class SiteEvaluation:
    """Evaluates the model on examples that a site holds out, as a `SiteFunction`.

    Args:
        held: examples of all sites, by the prefix of their scores. The first are what the site evaluates on.
        score: returns the scores of a model on parts of these.
    """

    held: Mapping[str, Held]
    score: ScoreParts
    leaves_nothing: ClassVar[bool] = True

    def __call__(self, model: nn.Module, site: Site, round_: int) -> dict[str, Any]:
        """Return the scores."""
        totals = {
            f"{prefix}{score}": total
            for prefix, of in self.held.items()
            for score, total in self.score(model, of.batches.get(site.number, ())).items()
        }
        return {"num_examples": next(iter(self.held.values())).counts.get(site.number, 0), **totals}


class Evaluation:
    """The functions that evaluate a model on the data of a run, and name its scores.

    Args:
        data: of the run.
        objective: how a model is scored.
        testing: is shown how far the evaluation of the global weights is.
        score_answers: scores what a model generates, if that is asked for.
    """

    def __init__(
        self, data: SiteData, objective: Objective, testing: Progress, score_answers: ScoreAnswers | None = None
    ) -> None:
        self.data, self._objective, self._score_answers = data, objective, score_answers
        self._score_shown = partial(self._score, testing)
        self.evaluate_site = SiteEvaluation({"test.": data.test, "validation.": data.validation}, self._score_shown)

    def evaluate_local(self, sites: Iterable[int]) -> SiteEvaluation:
        """Return what evaluates the models that sites have trained, of the sites that are evaluated."""
        batches = {site: self.data.test.batches[site] for site in sites if site in self.data.test.batches}
        score = partial(self._score, Progress())  # without a bar, as other sites train meanwhile
        return SiteEvaluation({"": Held(batches, self.data.test.counts)}, score)

    def evaluate_device(self, model: nn.Module, device: torch.device) -> Totals:
        """Return the scores of a device's part of the common test set."""
        return self._score_shown(model, self.data.common[device])

    def name(self, scores: Scores) -> Metrics:
        """Return the metrics of a round: docs/metrics.md has their table."""
        summarise = self._objective.summarise
        test = scores.common.totals() if self.data.common else _select(scores, "test")
        if not self.data.validation.counts:
            metrics = name_scores("validation", summarise(test))
        else:
            metrics = name_scores("validation", summarise(_select(scores, "validation")))
            metrics |= name_scores("test", summarise(test))
        by_site = {
            site: {name.removeprefix("test."): value for name, value in of_site.items() if "validation." not in name}
            for site, of_site in scores.by_site.items()
            if of_site["examples"]
        }
        counts = {site: self.data.validation.counts.get(site, 0) for site in scores.by_site}
        if any(counts.values()):
            metrics["site.validation_examples"] = counts
        weighted = Means.of(_select(scores, "test")).result()
        metrics |= describe_sites(by_site)
        return metrics | {f"sites.test_{name}.weighted": value for name, value in weighted.items()}

    def _score(self, progress: Progress, model: nn.Module, parts: Sequence[Examples]) -> Totals:
        """Return the scores of a model on parts of the data, and show how far it is."""
        totals = self._objective.evaluate(model, progress.watch(part.batch() for part in parts))
        if self._score_answers is None:
            return totals
        of_answers = (Means.of(self._score_answers(model, part)) for part in parts)
        return Means.of(totals).merge(of_answers).totals()


def _select(scores: Scores, prefix: str) -> Totals:
    """Return the scores of the sites with a prefix, without it."""
    totals = scores.of_sites.totals()
    return {name.removeprefix(f"{prefix}."): of for name, of in totals.items() if name.startswith(f"{prefix}.")}


def find_gains(metrics: Mapping[str, Any]) -> Metrics:
    """Return by how much the global model is better at each site than the model that the site has trained itself."""
    own, after = metrics.get("site.local_accuracy", {}), metrics.get("site.test_accuracy", {})
    return spread({site: {"gain": after[site] - accuracy} for site, accuracy in own.items() if site in after})


def check_held_out(settings: Settings, data: SiteData) -> None:
    """Check that there are examples for all that is to be evaluated.

    Raises:
        ValueError: there are none.
    """
    for name, held in (("site_test_fraction", data.test), ("validation_fraction", data.validation)):
        if getattr(settings, name) is not None and not held.counts:
            raise ValueError(f"{name}: expected a site with at least two different texts or groups of rows, got none")
    if settings.evaluate_local and not data.test.counts:
        raise ValueError(
            "evaluate_local: expected sites with test examples, got none. Set site_test_fraction or "
            "max_test_examples_per_site, or give test files in site_paths"
        )


def is_evaluated(settings: Settings, round_: int) -> bool:
    """Tell whether the global model is evaluated after a round."""
    return round_ % settings.evaluate_every == 0 or round_ == settings.num_rounds


def describe_evaluation(settings: Settings, data: SiteData) -> str:
    """Return in words when and on what the model is evaluated."""
    when = "after each round" if settings.evaluate_every == 1 else f"after every {settings.evaluate_every} rounds"
    places = [f"{data.num_common:,} examples of a common test set"] * bool(data.common)
    for name, held in (("test", data.test), ("validation", data.validation)):
        if held.counts:
            sites = f"{len(held.counts):,} site{'s' * (len(held.counts) > 1)}"
            places.append(f"{sum(held.counts.values()):,} {name} examples of {sites}")
    return f"{when}, on {' and '.join(places)}; validation.* is that of {find_judged(data)[0]}"


def find_judged(data: SiteData) -> tuple[str, str | None]:
    """Return the examples of `validation.*` in words, and the metric that has their sites, if they are of sites."""
    if data.validation.counts:
        return "the sites' validation examples", "site.validation_examples"
    return ("the common test set", None) if data.common else ("the sites' test examples", "site.test_examples")

"""The loss and the learning rate of sites by steps: collected while they train, and averaged at the end of a round."""

from collections.abc import Collection, Iterable, Iterator
from fractions import Fraction
from typing import Any, TypeVar

from torch.optim import Optimizer

from scaling_fl.distributed.collectives import all_gather
from scaling_fl.training.loop import Batch, Score
from scaling_fl.training.metrics import Means, Metrics

T = TypeVar("T")
Point = tuple[tuple[Fraction, int], float]  # the loss of some steps, sum and count, and the rate of the last of them
NAMES = ("loss", "learning_rate")


class StepLog:
    """Collects the loss and the learning rate of the sites of this rank by the steps of their optimisers.

    Args:
        every: how many steps make a point. The last point of a round may have fewer, so that each step is in a point,
            and no point has steps of two rounds.
        with_sites: `gather` also returns those of single sites.
    """

    def __init__(self, every: int, *, with_sites: bool = False) -> None:
        self._every, self._with_sites = every, with_sites
        self._of_sites: dict[int, tuple[int, list[Point]]] = {}  # how many steps of a site, and its points

    def watch(self, site: int, optimiser: Optimizer, score: Score, steps: Iterable[T]) -> tuple[Score, Iterator[T]]:
        """Return what scores and yields as `score` and `steps` do, and collects what a site trains on in a round.

        Losses are read after the last step, so that no step waits for an accelerator.
        """
        means: list[Means] = []
        rates: list[float] = []

        def score_point(output: Any, batch: Batch, of_round: Means) -> None:
            of_batch = Means()
            score(output, batch, of_batch)
            of_round.extend(of_batch)
            means[-1].extend(of_batch)

        def collect() -> Iterator[T]:
            num_steps = 0
            for step in steps:
                if num_steps % self._every == 0:
                    means.append(Means())
                    rates.append(0.0)
                rates[-1] = float(optimiser.param_groups[0]["lr"])
                num_steps += 1
                yield step
            losses = [of_point.totals().get("loss", (Fraction(0), 0)) for of_point in means]
            self._of_sites[site] = num_steps, list(zip(losses, rates, strict=True))

        return score_point, collect()

    def gather(self, sites: Collection[int], done: int) -> Metrics:
        """Return the metrics by step of the sites of all ranks in a round, and forget them. All ranks call it.

        Args:
            sites: those that count, which did not fail.
            done: the steps before the round.

        Returns:
            `train.steps`, `done` and the most steps that a site took in the round; `step.number`, the last step of each
            point; `step.loss` and `step.learning_rate`, the mean over all targets of all sites that took a step of the
            point, and that over these sites; and with sites, `step.site_loss` and so on, lists by site.
        """
        own = {site: of_site for site, of_site in self._of_sites.items() if site in sites}
        self._of_sites.clear()
        of_points = Means().merge(
            Means.of({f"loss {place}": loss, f"learning_rate {place}": (rate, 1)})
            for _, points in own.values()
            for place, (loss, rate) in enumerate(points)
        )
        single = {
            site: [  # without a loss, if there is nothing to learn in these steps
                {"loss": float(total / count) if count else None, "learning_rate": rate}
                for (total, count), rate in points
            ]
            for site, (_, points) in own.items()
            if self._with_sites
        }
        ranks = all_gather((max((num_steps for num_steps, _ in own.values()), default=0), of_points.as_texts(), single))
        num_steps = max(of_rank[0] for of_rank in ranks)
        ends = [min(end, num_steps) for end in range(self._every, num_steps + self._every, self._every)]
        means = Means().merge(Means.of(of_rank[1]) for of_rank in ranks).result()
        metrics: Metrics = {"train.steps": done + num_steps, "step.number": [done + end for end in ends]}
        metrics |= {f"step.{name}": [means.get(f"{name} {place}") for place in range(len(ends))] for name in NAMES}
        if self._with_sites:
            by_site = sorted(pair for of_rank in ranks for pair in of_rank[2].items())
            metrics |= {
                f"step.site_{name}": {site: [of[name] for of in points] for site, points in by_site} for name in NAMES
            }
        return metrics

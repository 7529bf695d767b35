"""Learning rates that change over the whole of training, as functions of how far it is."""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from typing import TypeVar

from torch.optim import Optimizer

T = TypeVar("T")


@dataclass(frozen=True)
class RateSchedule:
    """A learning rate over rounds.

    It depends on the round and on how far a site is in it, and on nothing that happened before: sites of any size, and
    those that were left out of some rounds, are at the same place of it, and so is a run that is resumed.

    Args:
        shape: takes how far training is, from 0 to 1, and returns how far the rate is from `minimum` to its peak.
        num_rounds: after which it has its last rate.
        minimum: the rate below which it does not fall after the warm-up.
        warmup_steps: in which it rises from 0 to its peak; a round has as many of them as the site takes steps in it.
        per_round: keep the rate of the first step of a round in all of it.
    """

    shape: Callable[[float], float]
    num_rounds: int
    minimum: float = 0.0
    warmup_steps: int = 0
    per_round: bool = False

    def rate(self, peak: float, round_: int, step: int, num_steps: int) -> float:
        """Return the rate of a step, from 0, of the `num_steps` that a site takes in a round, from 1."""
        done = round_ - 1 + Fraction(0 if self.per_round else step, num_steps)  # in rounds
        warm = Fraction(self.warmup_steps, num_steps)
        if done < warm:
            return peak * float(done / warm)
        progress = float((done - warm) / (self.num_rounds - warm)) if self.num_rounds > warm else 1.0
        return self.minimum + (peak - self.minimum) * self.shape(min(progress, 1.0))


def constant(warmup_steps: int = 0) -> RateSchedule:
    """Return one that stays at its peak."""
    return RateSchedule(lambda progress: 1.0, num_rounds=1, warmup_steps=warmup_steps)


# The rate falls by the same amount in each round.
linear = partial(RateSchedule, lambda progress: 1 - progress)

# The rate falls as half a cosine (Loshchilov and Hutter 2017, arXiv 1608.03983, eq. 5).
cosine = partial(RateSchedule, lambda progress: (1 + math.cos(math.pi * progress)) / 2)

SCHEDULES: dict[str, Callable[..., RateSchedule]] = {"constant": constant, "linear": linear, "cosine": cosine}


def follow(
    schedule: RateSchedule, optimiser: Optimizer, round_: int, num_steps: int, steps: Iterable[T]
) -> Iterator[T]:
    """Yield the steps of a round, and give `optimiser`, whose rate is the peak, the rate of each step before it.

    Raises:
        ValueError: it is not known how many steps a round has.
    """
    if num_steps < 1:
        raise ValueError(
            f"num_steps: expected the steps of a round, on which the learning rate depends, got {num_steps}"
        )
    peaks = [group["lr"] for group in optimiser.param_groups]
    for number, step in enumerate(steps):
        for group, peak in zip(optimiser.param_groups, peaks, strict=True):
            group["lr"] = schedule.rate(peak, round_, number, num_steps)
        yield step

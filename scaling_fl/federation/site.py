"""A site, and the functions that train or evaluate it."""

import math
import operator
import resource
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from scaling_fl.errors import printable
from scaling_fl.training.metrics import Means


@dataclass(frozen=True)
class Site:
    """A holder of data.

    Args:
        number: of the site in the federation.
        device: where it trains.
        num_examples: that it trains on.
        data: what the functions that train and evaluate it get; the federation does not look at it.
        name: for logs and people.
        settings: in which it differs from the others. `LocalTraining` reads `learning_rate`, `num_local_epochs`,
            `local_steps` and `gradient_accumulation`.
        start: the epoch and the batch in it where it goes on, if it trains for a number of steps.
        num_tokens: that its model learns to predict in these examples, if it is a language model.
        num_steps: of its optimiser in a round, which a `RateSchedule` needs.
    """

    number: int
    device: torch.device
    num_examples: int
    data: Any = None
    name: str = ""
    settings: Mapping[str, Any] = field(default_factory=dict)
    start: tuple[int, int] = (0, 0)
    num_tokens: int = 0
    num_steps: int = 0

    def __str__(self) -> str:
        return f"site {self.number}" + (f" ({printable(self.name)})" if self.name else "")


# Trains (or evaluates) the model, which holds the global weights, on the data of a site in a round, and returns
# `num_examples`, how many it used, and scores by name: (sum, count), or a mean over `num_examples`. So that neither the
# number of ranks nor a stop changes a bit, the function
# * seeds what it draws at random, by the round and the site's number. The global generators of Python, NumPy and torch
#   are seeded so already, unless the rank has several devices;
# * keeps no state from one call to the next, such as an optimiser's;
# * trains the weights in place. All else that it leaves in the attributes of the model's modules (numbers, tensors,
#   dicts, hooks), or in the process, is undone; what it appends to a list in there is not.
SiteFunction = Callable[[nn.Module, Site, int], Mapping[str, Any]]

# Those of plugins, by the name that the setting `trainer` has. A run calls them with a model of transformers, to which
# `model(**batch)` gives a loss, and with a site that has
#   data: `len(data)` is the number of its examples, and `data.shuffled_batches(batch_size, seed)` yields one epoch;
#   settings: `learning_rate`, `num_local_epochs`, `batch_size`, `optimiser`, `proximal_mu` and the run's `seed`, those
#     of `site_settings` included. `derive_seed(seed, "order", round_, site.number, epoch)` is another for each epoch.
TRAINERS: dict[str, SiteFunction] = {}

OWN_SCORES = {"examples", "seconds", "memory_mb", "gain"}  # which the federation measures itself, by site
OWN_PREFIXES = ("local_", "test_")


def leaves_nothing(function: SiteFunction) -> bool:
    """Tell whether a function changes nothing of the process, and no more of the model than it is asked to.

    Such a function has an attribute of this name. Others are isolated, which takes time.
    """
    return getattr(function, "leaves_nothing", False)


def read_scores(returned: Any, most: int | None = None) -> tuple[int, Means]:
    """Return how many examples a `SiteFunction` used, and its scores.

    Args:
        returned: what the function returned.
        most: how many examples it has at most.

    Raises:
        ValueError: it is not of the form of a `SiteFunction`, or there are too many examples.
        FloatingPointError: a score is not finite.
    """
    if not isinstance(returned, Mapping) or "num_examples" not in returned:
        raise ValueError(f"num_examples: expected a whole number from the site's function, got {returned!r:.100}")
    num_examples = _whole_number("num_examples", returned["num_examples"])
    if own := [name for name in returned if name in OWN_SCORES or name.startswith(OWN_PREFIXES)]:
        raise ValueError(f"{min(own)}: expected another name of a score, got one that the federation measures itself")
    if num_examples < 0 or (most is not None and num_examples > most):
        bound = "at least 0" if most is None else f"0 to {most}, the number of the site's examples"
        raise ValueError(f"num_examples: expected {bound}, got {num_examples}")
    scores = {name: _total(name, value, num_examples) for name, value in returned.items() if name != "num_examples"}
    return num_examples, Means.of(scores)


def _total(name: str, value: Any, num_examples: int) -> tuple[Fraction, int]:
    """Return the sum and the count of a score."""
    total, count = value if isinstance(value, tuple) and len(value) == 2 else (value, None)
    if not isinstance(total, Fraction):
        if not isinstance(total, float | int | np.number | Tensor):
            raise ValueError(f"{name}: expected a mean, or (sum, count), from the site's function, got {value!r}")
        if not math.isfinite(number := float(total)):
            raise FloatingPointError(f"{name}: expected a finite number, got {number}")
        total = Fraction(number)
    if count is None:
        return total * num_examples, num_examples
    if (number := _whole_number(f"{name}, its count", count)) < 0:
        raise ValueError(f"{name}, its count: expected at least 0, got {number}")
    return total, number


def _whole_number(name: str, value: Any) -> int:
    try:
        return operator.index(value)
    except TypeError:
        raise ValueError(f"{name}: expected a whole number from the site's function, got {value!r:.100}") from None


def describe_failure(site: Site, round_: int, error: Exception) -> str:
    """Return in a sentence why a site failed."""
    place = f"{site} failed in round {round_}"
    if isinstance(error, FloatingPointError):
        return f"{site} diverged in round {round_}: {error}. Use a lower learning_rate"
    return f"{place}: {error}" if isinstance(error, ValueError) else f"{place} with {type(error).__name__}: {error}"


class Cost:
    """The time and memory that a device takes from now on."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._start = device, time.perf_counter()
        if device.type != "cpu":
            torch.accelerator.reset_peak_memory_stats(device)

    def metrics(self) -> dict[str, float]:
        """Return the seconds, and the most memory (MB) on an accelerator; on the CPU, the process's most ever."""
        if self._device.type != "cpu":
            peak = torch.accelerator.max_memory_allocated(self._device)
        else:
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        return {"seconds": time.perf_counter() - self._start, "memory_mb": peak / 1e6}

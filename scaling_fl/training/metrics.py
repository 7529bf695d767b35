"""Weighted means that do not depend on the order of adding: sums and counts, divided once, last."""

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from fractions import Fraction
from statistics import fmean, pstdev
from typing import Any

from torch import Tensor

Metrics = dict[str, Any]  # name -> a number, or {site: number}


class Means:
    """Means of named quantities, each the exact sum of what was added, and its count.

    Sums are fractions, so they are the same bit for bit however the terms are grouped.
    """

    def __init__(self) -> None:
        self._sums: defaultdict[str, Fraction] = defaultdict(Fraction)
        self._counts: defaultdict[str, int] = defaultdict(int)
        self._pending: list[tuple[str, Tensor, int | Tensor]] = []

    def add(self, name: str, total: Tensor, count: int | Tensor) -> None:
        """Add `total`, a scalar tensor that is a sum over `count` things.

        Tensors are read by `settle`, so that not every batch waits for an accelerator.
        """
        self._pending.append((name, total.detach(), count))

    def extend(self, other: "Means") -> None:
        """Add what was added to `other` and not read yet, without reading it."""
        self._pending += other._pending

    def settle(self) -> "Means":
        """Read the tensors added so far.

        Raises:
            FloatingPointError: one of them is not finite.
        """
        for name, tensor, count in self._pending:
            total = tensor.item()
            if not math.isfinite(total):
                raise FloatingPointError(f"{name}: expected a finite number, got {total}")
            self._sums[name] += Fraction(total)
            self._counts[name] += int(count)
        self._pending.clear()
        return self

    def totals(self) -> dict[str, tuple[Fraction, int]]:
        """Return each sum and its count."""
        self.settle()
        return {name: (total, self._counts[name]) for name, total in self._sums.items()}

    def as_texts(self) -> dict[str, tuple[str, int]]:
        """Return each sum as a text such as 1/3, and its count, from which `of` makes the means on another rank."""
        return {name: (str(total), count) for name, (total, count) in self.totals().items()}

    @classmethod
    def of(cls, totals: Mapping[str, tuple[Fraction | float | str, int]]) -> "Means":
        """Return the means that have these sums, which may be texts such as 1/3, and counts."""
        means = cls()
        for name, (total, count) in totals.items():
            means._sums[name] = Fraction(total)
            means._counts[name] = count
        return means

    def merge(self, others: Iterable["Means"]) -> "Means":
        """Add all that `others` have."""
        for other in others:
            other.settle()
            for name, total in other._sums.items():
                self._sums[name] += total
                self._counts[name] += other._counts[name]
        return self

    def result(self) -> dict[str, float]:
        """Return each mean of something, correctly rounded."""
        self.settle()
        return {name: float(total / count) for name, total in self._sums.items() if (count := self._counts[name])}


def spread(by_site: Mapping[int, Mapping[str, float]]) -> Metrics:
    """Return each quantity of the sites that took part, and how it spreads over them.

    Args:
        by_site: site -> quantity -> value.

    Returns:
        `site.<quantity>`, {site: value} by increasing site, and `sites.<quantity>.worst`, `.mean` and `.std` (of the
        population). The worst accuracy, gain or exact match is the least, of all else the worst is the most.
    """
    metrics: Metrics = {}
    for name in dict.fromkeys(name for values in by_site.values() for name in values):
        column = {site: values[name] for site, values in sorted(by_site.items()) if name in values}
        worst = min if name.endswith(("accuracy", "gain", "exact_match")) else max
        metrics |= {f"site.{name}": column, f"sites.{name}.worst": worst(column.values())}
        metrics |= {f"sites.{name}.mean": fmean(column.values()), f"sites.{name}.std": pstdev(column.values())}
    return metrics


def by_step(metrics: Mapping[str, Any], *, with_sites: bool) -> Iterator[tuple[int, dict[str, float]]]:
    """Yield the number of each step that a round has metrics of, and these by name, of site 3 as `step.site_loss/3`."""
    columns = {name: values for name, values in metrics.items() if name.startswith("step.")}
    of_sites = {name: columns.pop(name) for name in list(columns) if isinstance(columns[name], Mapping)}
    if with_sites:
        columns |= {f"{name}/{site}": values for name, of in of_sites.items() for site, values in of.items()}
    for place, step in enumerate(columns.pop("step.number", ())):
        values = {name: of[place] for name, of in columns.items() if place < len(of)}
        yield step, {name: value for name, value in values.items() if value is not None}

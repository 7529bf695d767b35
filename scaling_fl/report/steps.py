"""Draw what the record has by the steps of the sites' optimisers."""

from typing import TYPE_CHECKING, Any

import numpy as np

from scaling_fl.report.canvas import DOTTED, GREY, LIGHT_BAND, SOLID, Legend, label_axes, line, run_style
from scaling_fl.report.runs import Run, as_list, numbers, of_each_site

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MANY_ROUNDS = 40  # of more, the ends are not drawn


def by_step(run: Run, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Return the steps of which the record has a metric, and its values."""
    pairs = [
        pair
        for round_ in run.rounds
        for pair in zip(as_list(round_.get("step.number")), as_list(round_.get(f"step.{name}")), strict=False)
    ]
    return numbers(step for step, _ in pairs), numbers(value for _, value in pairs)


def bounds(run: Run, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Return the least and the most over the sites at each step that `by_step` returns, NaN where no site is known."""
    least, most = [], []
    for round_ in run.rounds:
        known = [numbers(as_list(values)) for values in of_each_site(round_.get(f"step.site_{name}")).values()]
        for place in range(len(as_list(round_.get(f"step.{name}")))):
            here = [values[place] for values in known if place < len(values) and not np.isnan(values[place])]
            least.append(min(here, default=np.nan))
            most.append(max(here, default=np.nan))
    return np.array(least), np.array(most)


def draw_by_step(axes: "Axes", runs: list[Run], *, name: str, y: str) -> Legend:
    """Draw the mean of a metric over the sites by step, and of a single run its bounds and the ends of rounds."""
    legend: Legend = [(GREY, SOLID, "mean of the sites")]
    for index, run in enumerate(runs):
        steps, values = by_step(run, name)
        line(axes, index, steps, values, marker="" if len(runs) == 1 else run_style(index)[1])
        if len(runs) > 1 or not len(steps):
            continue
        least, most = bounds(run, name)
        if not np.isnan(least).all():
            axes.fill_between(steps, least, most, color=run_style(index)[0].light, alpha=0.12, linewidth=0)
            legend.append((GREY, LIGHT_BAND, "all sites"))
        if len(ends := np.unique(run.metric("train.steps")[run.has("train.steps")])) <= MANY_ROUNDS:
            style: Any = {"color": GREY.light, "linestyle": ":", "linewidth": 0.8}
            for end in ends:
                axes.axvline(end, **style)
            legend.append((GREY, DOTTED, "end of a round"))
    label_axes(axes, "step of the sites' optimisers", y, whole=True)
    return legend

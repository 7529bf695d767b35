"""Draw the data of runs into the axes of charts."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from scaling_fl.report.canvas import (
    BAND,
    DASHED,
    DOTTED,
    GLYPHS,
    GREY,
    LIGHT_BAND,
    MANY_POINTS,
    PHASE_COLOURS,
    RING,
    SOLID,
    Legend,
    label_axes,
    line,
    run_style,
)
from scaling_fl.report.runs import Run, cut, time_unit

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MANY_RUNS, MANY_SITES = 3, 40
CELL = "#2f86c8"  # of the heat map; the opacity is the fraction

SiteValues = Callable[[Run, str], np.ndarray]  # run, metric -> a value for each site


def curve(axes: "Axes", index: int, run: Run, x: np.ndarray, name: str, **style: Any) -> None:
    """Draw a metric of the rounds that have it."""
    has = run.has(name)
    line(axes, index, x[has], run.metric(name)[has], **style)


def draw_learning(axes: "Axes", runs: list[Run], *, name: str) -> Legend:
    """Draw a metric of validation and of training by round, with a ring at the best round."""
    for index, run in enumerate(runs):
        values, peak = run.metric(f"validation.{name}"), run.best_round
        curve(axes, index, run, run.steps, f"train.{name}", linestyle=":", marker="", linewidth=1.5)
        curve(axes, index, run, run.steps, f"validation.{name}")
        if peak is not None and not np.isnan(values[peak]):
            axes.plot(run.steps[peak], values[peak], "o", ms=11, mfc="none", mec=run_style(index)[0].light, mew=1.6)
    label_axes(axes, "round", name)
    training, validation = (GREY, DOTTED, "training"), (GREY, SOLID, "validation")
    if not any(run.has(f"validation.{name}").any() for run in runs):
        return [training]
    return [validation, training, (GREY, RING, "best round")]


def draw_bytes(axes: "Axes", runs: list[Run]) -> Legend:
    """Draw the bytes of each round, and the expected bytes."""
    for index, run in enumerate(runs):
        expected = run.metric("comm.expected_bytes") * 1e-6
        line(axes, index, run.steps, expected, linestyle="--", marker="", linewidth=1.4, color=GREY.light)
        line(axes, index, run.steps, run.metric("comm.bytes") * 1e-6)
    label_axes(axes, "round", "MB a round", from_zero=True)
    return [(GREY, SOLID, "sent"), (GREY, DASHED, "expected")]


def draw_speed(axes: "Axes", runs: list[Run]) -> Legend:
    """Draw the examples a second of each round."""
    for index, run in enumerate(runs):
        curve(axes, index, run, run.steps, "speed.examples_per_s")
    label_axes(axes, "round", "examples a second", from_zero=True)
    return []


def draw_by_time(axes: "Axes", runs: list[Run]) -> Legend:
    """Draw the validation accuracy by the time since the start."""
    scale, unit = time_unit(max(run.elapsed[-1] for run in runs))
    for index, run in enumerate(runs):
        curve(axes, index, run, run.elapsed / scale, "validation.accuracy")
    label_axes(axes, f"{unit} since the start", "accuracy")
    return []


def draw_by_bytes(axes: "Axes", runs: list[Run]) -> Legend:
    """Draw the validation accuracy by the bytes sent since the start."""
    for index, run in enumerate(runs):
        curve(axes, index, run, run.sent * 1e-6, "validation.accuracy")
    label_axes(axes, "MB sent since the start", "accuracy")
    return []


def spread(run: Run, name: str) -> np.ndarray | None:
    """Return the minimum, the quartiles and the maximum over the sites in each round, None if unknown.

    If only the statistics of all sites are known, return the mean, a standard deviation around it, and the worst.
    """
    table = run.of_sites(name)
    if not np.isnan(table).all():
        bands = np.full((5, len(table)), np.nan)
        known = ~np.isnan(table).all(axis=1)
        bands[:, known] = np.nanquantile(table[known], (0, 0.25, 0.5, 0.75, 1), axis=1)
        return bands
    worst, mean, std = (run.metric(f"sites.{name}.{statistic}") for statistic in ("worst", "mean", "std"))
    if np.isnan(mean).all():
        return None
    return np.array([np.fmin(worst, mean - std), mean - std, mean, mean + std, np.fmax(worst, mean + std)])


def draw_spread(axes: "Axes", runs: list[Run], *, name: str, y: str, low_is_worst: bool = False) -> Legend:
    """Draw the distribution of a metric over the sites in each round."""
    for index, run in enumerate(runs):
        bands = spread(run, name)
        if bands is None:
            continue
        known = ~np.isnan(bands[2])
        steps, (least, lower, middle, upper, most) = run.steps[known], bands[:, known]
        colour = run_style(index)[0].light
        if len(runs) <= MANY_RUNS:
            axes.fill_between(steps, lower, upper, color=colour, alpha=0.2, linewidth=0)
        if len(runs) == 1:
            axes.fill_between(steps, least, most, color=colour, alpha=0.12, linewidth=0)
        worst = least if low_is_worst else most
        line(axes, index, steps, worst, linestyle="--", marker="", linewidth=1.2)
        line(axes, index, steps, middle)
    label_axes(axes, "round", y, from_zero=name == "seconds")
    legend = [(GREY, SOLID, "median site"), (GREY, DASHED, "worst site")]
    if len(runs) <= MANY_RUNS:
        legend.append((GREY, BAND, "middle half"))
    return [*legend, (GREY, LIGHT_BAND, "all sites")] if len(runs) == 1 else legend


def draw_sorted(
    axes: "Axes", runs: list[Run], *, name: str, y: str, sign: int, of: SiteValues = Run.last_of_sites
) -> Legend:
    """Draw a value of each site, the worst first, and name the worst site of a single run."""
    same = len({run.num_sites for run in runs}) == 1
    for index, run in enumerate(runs):
        sites = of(run, name)
        order = np.argsort(sign * sites)[: int((~np.isnan(sites)).sum())]
        if not len(order):
            continue
        x = np.arange(1, len(order) + 1) if same else 100 * (np.arange(len(order)) + 0.5) / len(order)
        line(axes, index, x, sites[order])
        if len(runs) == 1 and len(order) > 1:
            beside: Any = {
                "xytext": (7, -3 * sign),
                "va": "top" if sign > 0 else "bottom",
                "textcoords": "offset points",
            }
            axes.annotate(f"site {order[0]}", (x[0], sites[order[0]]), **beside)
    words = "sites, from the worst" if same else "% of the sites, from the worst"
    label_axes(axes, words, y, from_zero=sign < 0, whole=same)
    if axes.has_data() and axes.dataLim.ymin < 0:
        axes.axhline(0, color=GREY.light, linewidth=1)
    return []


def draw_phases(axes: "Axes", runs: list[Run]) -> Legend:
    """Draw the seconds of each phase: of each round of one run, or in total of several runs."""
    names = [name for name in PHASE_COLOURS if any(name in run.phases and run.phases[name].any() for run in runs)]
    if len(runs) == 1:
        (run,) = runs
        base, edges = np.zeros(len(run.steps)), np.append(run.steps - 0.5, run.steps[-1] + 0.5)
        for name in names:
            axes.stairs(
                base + run.phases[name], edges, baseline=base, fill=True, linewidth=0, color=PHASE_COLOURS[name].light
            )
            base = base + run.phases[name]
        label_axes(axes, "round", "seconds")
    else:
        scale, unit = time_unit(max(run.elapsed[-1] for run in runs))
        left = np.zeros(len(runs))
        for name in names:
            width = np.array([run.phases[name].sum() / scale if name in run.phases else 0 for run in runs])
            axes.barh(range(len(runs)), width, left=left, color=PHASE_COLOURS[name].light, height=0.7)
            left += width
        label_axes(axes, f"{unit}, all rounds", "")
        axes.set_yticks(range(len(runs)), [GLYPHS[index % len(GLYPHS)] for index in range(len(runs))])
        for index, tick in enumerate(axes.get_yticklabels()):
            tick.set_color(run_style(index)[0].light)
        axes.invert_yaxis()
        axes.grid(visible=False, axis="y")
    return [(PHASE_COLOURS[name], "■", name) for name in names]


def draw_labels(axes: "Axes", _: list[Run], *, run: Run) -> None:
    """Draw the fraction of each class in each site's examples."""
    counts = run.label_counts
    fractions = counts / counts.sum(axis=1, keepdims=True).clip(min=1)
    num_sites, num_classes = fractions.shape
    many = num_sites > MANY_SITES
    if many:
        fractions = fractions[np.lexsort((-fractions.max(axis=1), fractions.argmax(axis=1)))]
    cells = np.ones((num_classes, num_sites, 4))
    cells[..., :3] = [int(CELL[place : place + 2], 16) / 255 for place in (1, 3, 5)]
    cells[..., 3] = fractions.T
    axes.imshow(cells, aspect="auto", interpolation="none")
    if num_sites * num_classes <= MANY_SITES:
        for (row, column), fraction in np.ndenumerate(fractions.T):
            if fraction > 0:
                axes.text(column, row, f"{100 * fraction:.0f}", ha="center", va="center", fontsize=9)
    label_axes(axes, "sites, by their most common label" if many else "site", "% of a site's examples")
    axes.grid(visible=False)
    axes.spines[:].set_visible(False)
    every = -(-num_classes // 16)
    names = [cut(name, 14) for name in run.labels[::every]]
    axes.set_yticks(range(0, num_classes, every), names, fontsize=10 if num_classes <= 8 else 8)
    if many:
        axes.set_xticks([0, num_sites - 1], ["1", f"{num_sites:,}"])
    elif num_sites <= MANY_POINTS:
        axes.set_xticks(range(num_sites))

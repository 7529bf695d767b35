"""The charts of runs, side by side: each is drawn once, for the page and for papers."""

import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from scaling_fl.report.canvas import (
    GLYPHS,
    MANY_POINTS,
    PHASE_COLOURS,
    QUIET,
    STYLE,
    Key,
    as_png,
    as_svg,
    dress,
    line,
    look,
    run_key,
)
from scaling_fl.report.runs import Run, best, last_known, over_rounds, time_unit

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MANY_RUNS, MANY_SITES = 3, 40
CELL = "#2f86c8"  # of the heat map, the more opaque the more


@dataclass(frozen=True)
class Chart:
    """A chart, drawn.

    Args:
        name: of its PNG.
        section: where it stands.
        title: says what it shows.
        look: says what to look for.
        key: what colours mean: a colour, a glyph, and words.
        svg: for the page.
        png: for papers.
    """

    name: str
    section: str
    title: str
    look: str
    key: Key
    svg: str
    png: bytes


Draw = Callable[["Axes", list[Run]], Key | None]  # returns what colours mean, None where they are of the runs


@dataclass(frozen=True)
class Plot:
    """A chart to draw, if the runs have what it shows."""

    name: str
    section: str
    title: str
    look: str
    draw: Draw
    for_one: bool = True  # or for several runs only


def draw(runs: list[Run]) -> list[Chart]:
    """Draw what there is to be seen of runs."""
    plots = [plot for plot in (*PLOTS, *label_plots(runs)) if plot.for_one or len(runs) > 1]
    return [chart for plot in plots if (chart := draw_plot(plot, runs)) is not None]


def draw_plot(plot: Plot, runs: list[Run]) -> Chart | None:
    """Draw a chart, if there is anything to be seen in it."""
    import matplotlib
    from matplotlib.figure import Figure

    style: Any = STYLE | {"svg.hashsalt": plot.name}
    with matplotlib.rc_context(style), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from")  # the page has the browser's fonts
        figure = Figure(figsize=(5, 3.1), layout="constrained")
        axes = figure.add_subplot()
        key = plot.draw(axes, runs)
        if not axes.has_data():
            return None
        svg = as_svg(figure, plot.title)
        png = as_png(figure, plot.title, [] if key == [] else [*run_key(runs), *(key or [])])
        return Chart(plot.name, plot.section, plot.title, plot.look, key or [], svg, png)


def draw_learning(axes: "Axes", runs: list[Run], *, name: str, ring: bool = False) -> None:
    """Draw a metric of validation and of training by round, with a ring at the best."""
    for index, run in enumerate(runs):
        values = run.metric(f"validation.{name}")
        line(axes, index, run.steps, run.metric(f"train.{name}"), linestyle=":", marker="", linewidth=1.5)
        line(axes, index, run.steps, values)
        peak = best(values)
        if ring and peak is not None:
            axes.plot(run.steps[peak], values[peak], "o", ms=11, mfc="none", mec=look(index)[0].light, mew=1.6)
    dress(axes, "round", name)


def draw_bytes(axes: "Axes", runs: list[Run]) -> None:
    """Draw the bytes of each round, and those to be expected."""
    for index, run in enumerate(runs):
        expected = run.metric("comm.expected_bytes") * 1e-6
        line(axes, index, run.steps, expected, linestyle="--", marker="", linewidth=1.4, color=QUIET.light)
        line(axes, index, run.steps, run.metric("comm.bytes") * 1e-6)
    dress(axes, "round", "MB a round", from_zero=True)


def draw_speed(axes: "Axes", runs: list[Run]) -> None:
    """Draw the examples a second of each round."""
    for index, run in enumerate(runs):
        line(axes, index, run.steps, run.metric("speed.examples_per_s"))
    dress(axes, "round", "examples a second", from_zero=True)


def draw_by_time(axes: "Axes", runs: list[Run]) -> None:
    """Draw the validation accuracy by the time since the start."""
    scale, unit = time_unit(max(run.elapsed[-1] for run in runs))
    for index, run in enumerate(runs):
        line(axes, index, run.elapsed / scale, run.metric("validation.accuracy"))
    dress(axes, f"{unit} since the start", "accuracy")


def draw_by_bytes(axes: "Axes", runs: list[Run]) -> None:
    """Draw the validation accuracy by the bytes sent since the start."""
    for index, run in enumerate(runs):
        line(axes, index, run.sent * 1e-6, run.metric("validation.accuracy"))
    dress(axes, "MB sent since the start", "accuracy")


def spread(run: Run, name: str) -> np.ndarray | None:
    """Return the least, the quartiles with the median, and the most of the sites in each round, if known.

    Where only sums over the sites are known, these are the mean, a standard deviation around it, and the worst.
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


def draw_spread(axes: "Axes", runs: list[Run], *, name: str, y: str, low_is_worst: bool = False) -> None:
    """Draw how far the sites are apart in each round."""
    for index, run in enumerate(runs):
        bands = spread(run, name)
        if bands is None:
            continue
        least, lower, middle, upper, most = bands
        colour = look(index)[0].light
        if len(runs) <= MANY_RUNS:
            axes.fill_between(run.steps, lower, upper, color=colour, alpha=0.2, linewidth=0)
        if len(runs) == 1:
            axes.fill_between(run.steps, least, most, color=colour, alpha=0.12, linewidth=0)
        worst = least if low_is_worst else most
        line(axes, index, run.steps, worst, linestyle="--", marker="", linewidth=1.2)
        line(axes, index, run.steps, middle)
    dress(axes, "round", y, from_zero=name == "seconds")


def draw_sorted(axes: "Axes", runs: list[Run], *, values: Callable[[Run], np.ndarray], y: str, sign: int) -> None:
    """Draw a value of each site, the worst first, and name the worst."""
    same = len({run.num_sites for run in runs}) == 1
    for index, run in enumerate(runs):
        sites = values(run)
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
    dress(axes, words, y, from_zero=sign < 0, whole=same)


def draw_phases(axes: "Axes", runs: list[Run]) -> Key:
    """Draw where the seconds go: round by round of one run, in all of each of several."""
    names = [name for name in PHASE_COLOURS if any(name in run.phases and run.phases[name].any() for run in runs)]
    if len(runs) == 1:
        (run,) = runs
        base, edges = np.zeros(len(run.steps)), np.append(run.steps - 0.5, run.steps[-1] + 0.5)
        for name in names:
            axes.stairs(
                base + run.phases[name], edges, baseline=base, fill=True, linewidth=0, color=PHASE_COLOURS[name].light
            )
            base = base + run.phases[name]
        dress(axes, "round", "seconds")
    else:
        scale, unit = time_unit(max(run.elapsed[-1] for run in runs))
        left = np.zeros(len(runs))
        for name in names:
            width = np.array([run.phases[name].sum() / scale if name in run.phases else 0 for run in runs])
            axes.barh(range(len(runs)), width, left=left, color=PHASE_COLOURS[name].light, height=0.7)
            left += width
        dress(axes, f"{unit}, all rounds", "")
        axes.set_yticks(range(len(runs)), [GLYPHS[index % len(GLYPHS)] for index in range(len(runs))])
        for index, tick in enumerate(axes.get_yticklabels()):
            tick.set_color(look(index)[0].light)
        axes.invert_yaxis()
        axes.grid(visible=False, axis="y")
    return [(PHASE_COLOURS[name], "■", name) for name in names]


def label_plots(runs: list[Run]) -> Iterator[Plot]:
    """Return a heat map of each dealing of labels to sites that some of the runs have."""
    dealings: dict[bytes, list[Run]] = {}
    for run in runs:
        if run.label_counts.any():
            dealings.setdefault(run.label_counts.tobytes() + repr(run.labels).encode(), []).append(run)
    for number, users in enumerate(dealings.values(), start=1):
        whose = "" if len(dealings) == 1 else ": " + ", ".join(run.name for run in users)
        yield Plot(
            f"labels-{number}" if len(dealings) > 1 else "labels",
            "Sites",
            f"Labels of the sites{whose}",
            "A column is a site, and dark is a class that most of its examples have; columns that differ much are "
            "what makes averaging hard.",
            partial(draw_labels, run=users[0]),
        )


def draw_labels(axes: "Axes", _: list[Run], *, run: Run) -> Key:
    """Draw the share of each class in each site's examples."""
    counts = run.label_counts
    shares = counts / counts.sum(axis=1, keepdims=True).clip(min=1)
    num_sites, num_classes = shares.shape
    many = num_sites > MANY_SITES
    if many:
        shares = shares[np.lexsort((-shares.max(axis=1), shares.argmax(axis=1)))]
    cells = np.ones((num_classes, num_sites, 4))
    cells[..., :3] = [int(CELL[place : place + 2], 16) / 255 for place in (1, 3, 5)]
    cells[..., 3] = shares.T
    axes.imshow(cells, aspect="auto", interpolation="none")
    if num_sites * num_classes <= MANY_SITES:
        for (row, column), share in np.ndenumerate(shares.T):
            if share > 0:
                axes.text(column, row, f"{100 * share:.0f}", ha="center", va="center", fontsize=9)
    dress(axes, "sites, by their most common label" if many else "site", "% of a site's examples")
    axes.grid(visible=False)
    axes.spines[:].set_visible(False)
    every = -(-num_classes // 16)
    names = [name if len(name) <= 14 else f"{name[:13]}…" for name in run.labels[::every]]
    axes.set_yticks(range(0, num_classes, every), names, fontsize=10 if num_classes <= 8 else 8)
    if many:
        axes.set_xticks([0, num_sites - 1], ["1", f"{num_sites:,}"])
    elif num_sites <= MANY_POINTS:
        axes.set_xticks(range(num_sites))
    return []


def seconds_of_sites(run: Run) -> np.ndarray:
    """Return the seconds that each site usually takes for a round."""
    return over_rounds(run.of_sites("seconds"))


def accuracies_of_sites(run: Run) -> np.ndarray:
    """Return each site's accuracy in the last round."""
    return last_known(run.of_sites("accuracy"))


BANDS = "Solid is the median site, dashed the worst; the dark band holds the middle half, the light one all"
PLOTS = [
    Plot(
        "accuracy",
        "Learning",
        "Accuracy",
        "Solid is validation with a ring at its best, dotted the sites' own training data: dotted that climbs while "
        "solid falls is overfitting.",
        partial(draw_learning, name="accuracy", ring=True),
    ),
    Plot(
        "loss",
        "Learning",
        "Loss",
        "Solid is validation, dotted is training: both should fall and level off, and jumps ask for a smaller "
        "learning rate.",
        partial(draw_learning, name="loss"),
    ),
    Plot(
        "accuracy-by-time",
        "Learning",
        "Accuracy for the time",
        "How long it takes until the model is good enough; of several runs, the line that is above the others at the "
        "time you can spare is the one to take.",
        draw_by_time,
    ),
    Plot(
        "accuracy-by-bytes",
        "Learning",
        "Accuracy for the bytes",
        "Where the network is slow or costs money, the line that rises first is the run to take.",
        draw_by_bytes,
        for_one=False,
    ),
    Plot(
        "site-accuracy",
        "Sites",
        "Accuracy of the sites",
        f"{BANDS}: a dashed line that stays far below is a model that fails some sites.",
        partial(draw_spread, name="accuracy", y="training accuracy", low_is_worst=True),
    ),
    Plot(
        "site-loss",
        "Sites",
        "Loss of the sites",
        f"{BANDS}: a dashed line that leaves the others is a site with other data, or one that diverges.",
        partial(draw_spread, name="loss", y="training loss"),
    ),
    Plot(
        "site-accuracy-sorted",
        "Sites",
        "Accuracy, site by site",
        "The last round, the least accurate site first: a steep start is a few sites that the model fails.",
        partial(draw_sorted, values=accuracies_of_sites, y="training accuracy, last round", sign=1),
    ),
    Plot(
        "site-seconds",
        "Sites",
        "Seconds of the sites",
        f"{BANDS}: a dashed line far above is a straggler, and a spike a site that was slow once.",
        partial(draw_spread, name="seconds", y="seconds a round"),
    ),
    Plot(
        "site-seconds-sorted",
        "Sites",
        "Seconds, site by site",
        "The median over the rounds, the slowest site first: a steep start is a few stragglers that the rest "
        "may wait for.",
        partial(draw_sorted, values=seconds_of_sites, y="seconds a round, median", sign=-1),
    ),
    Plot(
        "time",
        "Time and bytes",
        "Time of each phase",
        "Training should fill most of it: a thick aggregate is the network.",
        draw_phases,
    ),
    Plot(
        "bytes",
        "Time and bytes",
        "Bytes sent",
        "All ranks together; dashed is what the model's size lets expect, and the solid line should lie on it.",
        draw_bytes,
    ),
    Plot(
        "speed",
        "Time and bytes",
        "Speed",
        "It should be level: a fall is a machine that gets busy, hot or short of memory.",
        draw_speed,
    ),
]

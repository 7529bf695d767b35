"""The charts of one or several runs."""

import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from scaling_fl.report.canvas import STYLE, Legend, as_png, as_svg, run_legend
from scaling_fl.report.drawings import (
    draw_by_bytes,
    draw_by_time,
    draw_bytes,
    draw_labels,
    draw_learning,
    draw_phases,
    draw_sorted,
    draw_speed,
    draw_spread,
)
from scaling_fl.report.runs import Run
from scaling_fl.report.steps import draw_by_step

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@dataclass(frozen=True)
class Chart:
    """A chart as images.

    Args:
        name: of its PNG.
        section: of the page.
        title: of the chart.
        hint: how to read it.
        legend: of its lines and colours, without the runs.
        svg: for the page.
        png: for papers, if it is wanted.
    """

    name: str
    section: str
    title: str
    hint: str
    legend: Legend
    svg: str
    png: bytes | None


Draw = Callable[["Axes", list[Run]], Legend | None]  # returns the legend of the lines; None: no colours of runs


@dataclass(frozen=True)
class Plot:
    """A chart to draw, if the runs have its data."""

    name: str
    section: str
    title: str
    hint: str
    draw: Draw
    for_one: bool = True  # False: for several runs only


def draw(runs: list[Run], *, with_png: bool) -> list[Chart]:
    """Draw all charts for which the runs have data, as SVG, and as PNG if that is wanted."""
    plots = [plot for plot in (*PLOTS, *label_plots(runs)) if plot.for_one or len(runs) > 1]
    return [chart for plot in plots if (chart := draw_plot(plot, runs, with_png=with_png)) is not None]


def draw_plot(plot: Plot, runs: list[Run], *, with_png: bool) -> Chart | None:
    """Draw a chart; return None if the runs have no data for it."""
    import matplotlib
    from matplotlib.figure import Figure

    style: Any = STYLE | {"svg.hashsalt": plot.name}
    with matplotlib.rc_context(style), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from")  # the page uses the browser's fonts
        figure = Figure(figsize=(5, 3.1), layout="constrained")
        axes = figure.add_subplot()
        legend = plot.draw(axes, runs)
        if not axes.has_data():
            return None
        svg = as_svg(figure, plot.title)
        colours = [] if legend is None else [*run_legend(runs), *legend]
        png = as_png(figure, plot.title, colours) if with_png else None
        return Chart(plot.name, plot.section, plot.title, plot.hint, legend or [], svg, png)


def label_plots(runs: list[Run]) -> Iterator[Plot]:
    """Return a heat map for each different partition of the labels."""
    partitions: dict[bytes, list[Run]] = {}
    for run in runs:
        if run.label_counts.any():
            partitions.setdefault(run.label_counts.tobytes() + repr(run.labels).encode(), []).append(run)
    for number, users in enumerate(partitions.values(), start=1):
        names = "" if len(partitions) == 1 else ": " + ", ".join(run.name for run in users)
        yield Plot(
            f"labels-{number}" if len(partitions) > 1 else "labels",
            "Sites",
            f"Labels of the sites{names}",
            "Each column is a site; the darker a cell, the more of the site's examples have this label. The more the "
            "columns differ, the harder the federation is to train.",
            partial(draw_labels, run=users[0]),
        )


PLOTS = [
    Plot(
        "accuracy",
        "Learning",
        "Accuracy",
        "Training accuracy that rises while validation accuracy falls shows overfitting.",
        partial(draw_learning, name="accuracy"),
    ),
    Plot(
        "loss",
        "Learning",
        "Loss",
        "Both should fall and then level off. If the loss jumps, try a smaller learning rate.",
        partial(draw_learning, name="loss"),
    ),
    Plot(
        "loss-by-step",
        "Learning",
        "Training loss by step",
        "A small rise at the start of a round is usual, as the mean of the weights is new to each site. If the loss "
        "starts each round at the same height, the sites do not train the global weights.",
        partial(draw_by_step, name="loss", y="training loss"),
    ),
    Plot(
        "learning-rate-by-step",
        "Learning",
        "Learning rate by step",
        "It should go on from round to round, and not start again.",
        partial(draw_by_step, name="learning_rate", y="learning rate"),
    ),
    Plot(
        "accuracy-by-time",
        "Learning",
        "Accuracy by time",
        "The time until the model reaches an accuracy. Of several runs, the highest line at a given time is the best.",
        draw_by_time,
    ),
    Plot(
        "accuracy-by-bytes",
        "Learning",
        "Accuracy by bytes",
        "On a slow or expensive network, the run whose line rises first is the best.",
        draw_by_bytes,
        for_one=False,
    ),
    Plot(
        "site-gain-sorted",
        "Sites",
        "Gain, site by site",
        "What a site gains by federating: the test accuracy of the global model minus that of the site's own model, "
        "before averaging, on the site's test examples.",
        partial(draw_sorted, name="gain", y="gain of test accuracy, last round", sign=1),
    ),
    Plot(
        "site-test-accuracy-sorted",
        "Sites",
        "Test accuracy, site by site",
        "The global model on each site's own test examples, by increasing accuracy, in the last round. A steep start "
        "shows a few sites that it does not serve.",
        partial(draw_sorted, name="test_accuracy", y="test accuracy, last round", sign=1),
    ),
    Plot(
        "site-test-accuracy",
        "Sites",
        "Test accuracy of the sites",
        "If the worst site does not rise with the median site, the federation leaves it behind.",
        partial(draw_spread, name="test_accuracy", y="test accuracy", low_is_worst=True),
    ),
    Plot(
        "site-accuracy",
        "Sites",
        "Training accuracy of the sites",
        "If the worst site stays far below the median site, the model does not fit some sites.",
        partial(draw_spread, name="accuracy", y="training accuracy", low_is_worst=True),
    ),
    Plot(
        "site-loss",
        "Sites",
        "Training loss of the sites",
        "If the worst site moves away from the median site, a site has different data, or diverges.",
        partial(draw_spread, name="loss", y="training loss"),
    ),
    Plot(
        "site-accuracy-sorted",
        "Sites",
        "Training accuracy, site by site",
        "The sites of the last round, by increasing accuracy. A steep start shows a few sites that the model does not "
        "fit.",
        partial(draw_sorted, name="accuracy", y="training accuracy, last round", sign=1),
    ),
    Plot(
        "site-seconds",
        "Sites",
        "Seconds of the sites",
        "If the worst site is far above the median site, it is a straggler; a single peak is one slow round.",
        partial(draw_spread, name="seconds", y="seconds a round"),
    ),
    Plot(
        "site-seconds-sorted",
        "Sites",
        "Seconds, site by site",
        "The median over the rounds, by decreasing seconds. A steep start shows a few stragglers for which the others "
        "may wait.",
        partial(draw_sorted, name="seconds", of=Run.median_of_sites, y="seconds a round, median", sign=-1),
    ),
    Plot(
        "time",
        "Time and bytes",
        "Time of each phase",
        "Most of the time should be training. A large part of aggregation points to a slow network.",
        draw_phases,
    ),
    Plot(
        "bytes",
        "Time and bytes",
        "Bytes sent",
        "The sum over all ranks. It should be close to the bytes expected from the size of the model.",
        draw_bytes,
    ),
    Plot(
        "speed",
        "Time and bytes",
        "Speed",
        "The speed should be constant. If it falls, a machine is busy, hot or short of memory.",
        draw_speed,
    ),
]

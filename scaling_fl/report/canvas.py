"""The style of charts, and figures as SVG for the page and as PNG for papers."""

import io
import re
from html import escape
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from scaling_fl.report.runs import Run, cut

if TYPE_CHECKING:  # it takes a second to import
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


class Colour(NamedTuple):
    """A colour on white, and its replacement on black."""

    light: str
    dark: str


# Distinct with any kind of colour vision: the first six are those of Okabe and Ito (2008).
RUNS = [
    Colour("#0072b2", "#4ba6e8"),
    Colour("#d55e00", "#f58b4c"),
    Colour("#009e73", "#3fcba2"),
    Colour("#cc79a7", "#e5a5c9"),
    Colour("#d99600", "#f2bc3e"),
    Colour("#56b4e9", "#9bd6f7"),
    Colour("#6a3d9a", "#b79be4"),
    Colour("#4d525c", "#c3c8d0"),
    Colour("#8c564b", "#cb9f93"),
    Colour("#8a8f2a", "#c7cb68"),
]
MARKERS = ["o", "s", "^", "D", "v", "P", "X", "<", ">", "*"]
GLYPHS = ["●", "■", "▲", "◆", "▼", "✚", "✖", "◀", "▶", "★"]  # the markers as characters
INK, GREY, GRID = Colour("#1c2026", "#e8eaee"), Colour("#666d79", "#9aa2af"), Colour("#e3e6ea", "#333a44")
PHASE_COLOURS = dict(zip(("train", "aggregate", "evaluate", "checkpoint"), RUNS, strict=False)) | {"setup": RUNS[5]}
VARIABLES = {f"run{index}": colour for index, colour in enumerate(RUNS)}
VARIABLES |= {"ink": INK, "quiet": GREY, "grid": GRID}

SOLID, DASHED, DOTTED, RING, BAND, LIGHT_BAND = "—", "– –", "· · ·", "○", "▓", "░"  # in legends
LEGEND_STYLES: dict[str, dict[str, Any]] = dict(
    zip(GLYPHS, ({"marker": marker} for marker in MARKERS), strict=True)
) | {
    SOLID: {"linestyle": "-"},
    DASHED: {"linestyle": "--"},
    DOTTED: {"linestyle": ":"},
    RING: {"linestyle": "", "marker": "o", "markersize": 8, "markerfacecolor": "none"},
    BAND: {"linewidth": 8, "alpha": 0.35},
    LIGHT_BAND: {"linewidth": 8, "alpha": 0.15},
}

STYLE: dict[str, Any] = {
    "svg.fonttype": "none",  # keep text as text
    "text.parse_math": False,  # labels may contain a dollar
    "font.size": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "axes.edgecolor": GREY.light,
    "axes.labelcolor": GREY.light,
    "axes.labelsize": 10.5,
    "xtick.color": GREY.light,
    "ytick.color": GREY.light,
    "text.color": INK.light,
    "ytick.left": False,
    "axes.grid": True,
    "grid.color": GRID.light,
    "axes.axisbelow": True,
    "lines.linewidth": 1.8,
    "lines.markersize": 5,
    "axes.xmargin": 0.03,
    "axes.ymargin": 0.08,
}
MANY_POINTS = 10  # most markers on a line
MAX_NAME = 28  # most characters of a name in a PNG's legend

Legend = list[tuple[Colour, str, str]]  # colour, glyph, meaning


def run_legend(runs: list[Run]) -> Legend:
    """Return the legend of several runs; it is empty for one run."""
    names = [run.name for run in runs] if len(runs) > 1 else []
    return [(run_style(index)[0], GLYPHS[index % len(GLYPHS)], name) for index, name in enumerate(names)]


def run_style(index: int) -> tuple[Colour, str]:
    """Return the colour and the marker of a run."""
    return RUNS[index % len(RUNS)], MARKERS[index % len(MARKERS)]


def as_svg(figure: "Figure", title: str) -> str:
    """Return a figure as an SVG element, in the page's colours and width."""
    file = io.StringIO()
    figure.savefig(file, format="svg", transparent=True, metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    svg = file.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<defs>\s*<style.*?</style>\s*</defs>", "", svg, count=1, flags=re.DOTALL)
    svg = re.sub(r'<g id="[\w.]+_\d+"', "<g", svg)  # ids would occur in several figures
    head = re.search('viewBox="[^"]*"', svg)
    assert head is not None
    svg = f'<svg {head[0]} role="img" aria-label="{escape(title)}">{svg[svg.index(">") + 1 :]}'
    for name, colour in VARIABLES.items():
        svg = svg.replace(f": {colour.light}", f": var(--{name})")
    return svg


def as_png(figure: "Figure", title: str, legend: Legend) -> bytes:
    """Return a figure with its title and legend."""
    from matplotlib.lines import Line2D

    figure.suptitle(title, x=0.02, ha="left", fontsize=12, fontweight="bold")
    if legend:
        handles = [Line2D([], [], color=colour.light, **LEGEND_STYLES[glyph]) for colour, glyph, _ in legend]
        texts = [cut(text, MAX_NAME) for _, _, text in legend]
        num_columns = 1 if max(map(len, texts)) > MAX_NAME // 2 else 3
        figure.set_figheight(figure.get_figheight() + 0.22 * -(-len(legend) // num_columns))
        figure.legend(handles, texts, loc="outside lower left", ncols=num_columns, frameon=False, fontsize=9)
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=160, metadata={"Software": None})
    return file.getvalue()


def label_axes(axes: "Axes", x: str, y: str, *, from_zero: bool = False, whole: bool = False) -> None:
    """Label the axes, with plain numbers."""
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    plain = FuncFormatter(lambda value, _: f"{value:,.10g}")
    axes.set_xlabel(x)
    axes.set_title(y, loc="left", fontsize=10.5, color=GREY.light)  # above the y axis, so that it is horizontal
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=whole or x == "round", min_n_ticks=1))
    axes.yaxis.set_major_locator(MaxNLocator(nbins=5))
    axes.xaxis.set_major_formatter(plain)
    axes.yaxis.set_major_formatter(plain)
    if x == "round" and axes.has_data() and axes.dataLim.width == 0:
        axes.set_xlim(axes.dataLim.x0 - 0.5, axes.dataLim.x0 + 0.5)
    if from_zero and axes.has_data():
        axes.set_ylim(0, 1.08 * max(axes.dataLim.ymax, 1e-9))


def line(axes: "Axes", index: int, x: np.ndarray, y: np.ndarray, **style: Any) -> None:
    """Draw the known points of a run's line."""
    colour, marker = run_style(index)
    known = ~(np.isnan(x) | np.isnan(y))
    if known.any():
        every = max(1, len(x) // MANY_POINTS)
        y = np.where(np.isnan(x), np.nan, y)
        whole: dict[str, Any] = {"color": colour.light, "marker": marker, "markevery": every} | style
        if known.sum() == 1 and not whole["marker"]:
            whole |= {"marker": marker, "markerfacecolor": "none"}  # one point without a marker is invisible
        axes.plot(x, y, **whole)

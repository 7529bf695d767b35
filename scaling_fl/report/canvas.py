"""How charts look: their colours, and a figure as SVG for the page and as PNG for papers."""

import io
import re
from html import escape
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from scaling_fl.report.runs import Run

if TYPE_CHECKING:  # it takes a second to import
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


class Colour(NamedTuple):
    """A colour on white, and what the page shows in its place on black."""

    light: str
    dark: str


# Told apart with any kind of colour vision: after Okabe and Ito (2008), who have the first six.
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
GLYPHS = ["●", "■", "▲", "◆", "▼", "✚", "✖", "◀", "▶", "★"]  # the same, in text
INK, QUIET, GRID = Colour("#1c2026", "#e8eaee"), Colour("#666d79", "#9aa2af"), Colour("#e3e6ea", "#333a44")
PHASE_COLOURS = dict(zip(("train", "aggregate", "evaluate", "checkpoint"), RUNS, strict=False)) | {"setup": RUNS[5]}
VARIABLES = {f"run{index}": colour for index, colour in enumerate(RUNS)}
VARIABLES |= {"ink": INK, "quiet": QUIET, "grid": GRID}

STYLE: dict[str, Any] = {
    "svg.fonttype": "none",  # text stays text
    "text.parse_math": False,  # a label may hold a dollar
    "font.size": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "axes.edgecolor": QUIET.light,
    "axes.labelcolor": QUIET.light,
    "axes.labelsize": 10.5,
    "xtick.color": QUIET.light,
    "ytick.color": QUIET.light,
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
MANY_POINTS = 10  # markers on a line
MAX_NAME = 28  # characters of a name in a PNG's legend

Key = list[tuple[Colour, str, str]]  # what colours mean: a colour, a glyph, and words


def run_key(runs: list[Run]) -> Key:
    """Return the colours and glyphs of runs, where there are several."""
    names = [run.name for run in runs] if len(runs) > 1 else []
    return [(look(index)[0], GLYPHS[index % len(GLYPHS)], name) for index, name in enumerate(names)]


def look(index: int) -> tuple[Colour, str]:
    """Return the colour and the marker of a run."""
    return RUNS[index % len(RUNS)], MARKERS[index % len(MARKERS)]


def as_svg(figure: "Figure", title: str) -> str:
    """Return a figure as an element of a page, in the page's colours and width."""
    file = io.StringIO()
    figure.savefig(file, format="svg", transparent=True, metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    svg = file.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<defs>\s*<style.*?</style>\s*</defs>", "", svg, count=1, flags=re.DOTALL)
    svg = re.sub(r'<g id="[\w.]+_\d+"', "<g", svg)  # the same in each
    head = re.search('viewBox="[^"]*"', svg)
    assert head is not None
    svg = f'<svg {head[0]} role="img" aria-label="{escape(title)}">{svg[svg.index(">") + 1 :]}'
    for name, colour in VARIABLES.items():
        svg = svg.replace(f": {colour.light}", f": var(--{name})")
    return svg


def as_png(figure: "Figure", title: str, key: Key) -> bytes:
    """Return a figure with its title and key."""
    from matplotlib.lines import Line2D

    figure.suptitle(title, x=0.02, ha="left", fontsize=12, fontweight="bold")
    if key:
        markers = dict(zip(GLYPHS, MARKERS, strict=True))
        handles = [Line2D([], [], color=colour.light, marker=markers[glyph]) for colour, glyph, _ in key]
        texts = [text if len(text) <= MAX_NAME else f"{text[: MAX_NAME - 1]}…" for _, _, text in key]
        num_columns = 1 if max(map(len, texts)) > MAX_NAME // 2 else 3
        figure.set_figheight(figure.get_figheight() + 0.22 * -(-len(key) // num_columns))
        figure.legend(handles, texts, loc="outside lower left", ncols=num_columns, frameon=False, fontsize=9)
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=160, metadata={"Software": None})
    return file.getvalue()


def dress(axes: "Axes", x: str, y: str, *, from_zero: bool = False, whole: bool = False) -> None:
    """Label the axes, in plain numbers."""
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    plain = FuncFormatter(lambda value, _: f"{value:,.10g}")
    axes.set_xlabel(x)
    axes.set_title(y, loc="left", fontsize=10.5, color=QUIET.light)  # of the y axis, to be read without turning
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=whole or x == "round", min_n_ticks=1))
    axes.yaxis.set_major_locator(MaxNLocator(nbins=5))
    axes.xaxis.set_major_formatter(plain)
    axes.yaxis.set_major_formatter(plain)
    if x == "round" and axes.has_data() and axes.dataLim.width == 0:
        axes.set_xlim(axes.dataLim.x0 - 0.5, axes.dataLim.x0 + 0.5)
    if from_zero and axes.has_data():
        axes.set_ylim(0, 1.08 * max(axes.dataLim.ymax, 1e-9))


def line(axes: "Axes", index: int, x: np.ndarray, y: np.ndarray, **style: Any) -> None:
    """Draw what there is of a run's line."""
    colour, marker = look(index)
    known = ~(np.isnan(x) | np.isnan(y))
    if known.any():
        every = max(1, len(x) // MANY_POINTS)
        y = np.where(np.isnan(x), np.nan, y)
        whole: dict[str, Any] = {"color": colour.light, "marker": marker, "markevery": every} | style
        if known.sum() == 1 and not whole["marker"]:
            whole |= {"marker": marker, "markerfacecolor": "none"}  # a line of one point would not be seen
        axes.plot(x, y, **whole)

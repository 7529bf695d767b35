"""Draw the report of one or several runs: a page without external resources, and its charts as PNG."""

import os
from collections.abc import Sequence

from scaling_fl.report.charts import draw
from scaling_fl.report.page import page
from scaling_fl.report.runs import read


def write(folders: Sequence[str], output: str, *, with_png: bool = True) -> list[str]:
    """Write the report of runs.

    Args:
        folders: of the runs, as Sacred wrote them.
        output: path of the page, such as report.html; its charts are report-loss.png and so on in the same folder.
        with_png: also write the charts, which takes longer than the page.

    Returns:
        The paths of the written files, the page first.

    Raises:
        ValueError: a folder is not that of a run, or the run has no finished round.
        OSError: the files cannot be written.
    """
    runs = read(folders)
    charts = draw(runs, with_png=with_png)
    stem = os.path.splitext(output)[0]
    files = {output: page(runs, charts).encode()}
    files |= {f"{stem}-{chart.name}.png": chart.png for chart in charts if chart.png is not None}
    for path, content in files.items():
        with open(path, "wb") as file:
            file.write(content)
    return [*files]

"""Draw the report of one or several runs: a page without external resources, and its charts as PNG."""

import os
from collections.abc import Sequence

from scaling_fl.report.charts import draw
from scaling_fl.report.page import page
from scaling_fl.report.runs import read


def write(folders: Sequence[str], output: str) -> list[str]:
    """Write the report of runs.

    Args:
        folders: of the runs, as Sacred wrote them.
        output: path of the page, such as report.html; its charts are report-loss.png and so on in the same folder.

    Returns:
        The paths of the written files, the page first.

    Raises:
        ValueError: a folder is not that of a run, or the run has no finished round.
        OSError: the files cannot be written.
    """
    runs = read(folders)
    charts = draw(runs)
    stem = os.path.splitext(output)[0]
    paths = [output, *(f"{stem}-{chart.name}.png" for chart in charts)]
    for path, content in zip(paths, [page(runs, charts).encode(), *(chart.png for chart in charts)], strict=True):
        with open(path, "wb") as file:
            file.write(content)
    return paths

"""Write the report of one or several runs side by side: a page that opens offline, and its charts as PNG."""

import argparse
import os
from collections.abc import Sequence

from scaling_fl import report
from scaling_fl.command.results import one_sentence


def main(arguments: Sequence[str]) -> None:
    """Read the runs and write their report."""
    parser = argparse.ArgumentParser(prog="scaling-fl report", description=__doc__)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="the folder of a run, such as runs/1")
    parser.add_argument("--output", help="the page to write (default: report.html, of one run in its folder)")
    parsed = parser.parse_args(arguments)
    folder = parsed.runs[0] if len(parsed.runs) == 1 else ""  # whose own page several would write over
    output = parsed.output or os.path.join(folder, "report.html")
    with one_sentence():
        if not output.endswith(".html"):
            raise ValueError(f"--output: expected a file such as report.html, got {output!r}")
        written = report.write(parsed.runs, output)
        print(f"{written[0]}, and {len(written) - 1} charts beside it")

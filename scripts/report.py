"""Write the report of one or several runs side by side: a page that opens offline, and its charts as PNG."""

import argparse
import os
import sys

from scaling_fl import report
from scaling_fl.records.console import escape_unprintable


def main() -> None:
    """Read the runs and write their report."""
    escape_unprintable()
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="the folder of a run, such as runs/1")
    parser.add_argument("--output", help="the page to write (default: report.html, of one run in its folder)")
    arguments = parser.parse_args()
    folder = arguments.runs[0] if len(arguments.runs) == 1 else ""  # whose own page several would write over
    output = arguments.output or os.path.join(folder, "report.html")
    if not output.endswith(".html"):
        sys.exit(f"error: --output: expected a file such as report.html, got {output!r}")
    try:
        written = report.write(arguments.runs, output)
    except ValueError as error:
        sys.exit(f"error: {error}")
    except OSError as error:
        sys.exit(f"error: {error.filename!r} cannot be read or written: {error.strerror}")
    print(f"{written[0]}, and {len(written) - 1} charts beside it")


if __name__ == "__main__":
    main()

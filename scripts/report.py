"""Write the report of one or several runs side by side: a page that opens offline, and its charts as PNG."""

import argparse
import os
import sys

from scaling_fl import report


def main() -> None:
    """Read the runs and write their report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="the folder of a run, such as runs/1")
    parser.add_argument("--output", help="the page to write (default: report.html in the first run's folder)")
    arguments = parser.parse_args()
    output = arguments.output or os.path.join(arguments.runs[0], "report.html")
    if not output.endswith(".html"):
        sys.exit(f"error: --output={output!r} was given: a file such as report.html would do")
    try:
        written = report.write(arguments.runs, output)
    except ValueError as error:
        sys.exit(f"error: {error}")
    except OSError as error:
        sys.exit(f"error: {error.filename!r} cannot be read or written: {error.strerror}")
    print(f"{written[0]}, and {len(written) - 1} charts beside it")


if __name__ == "__main__":
    main()

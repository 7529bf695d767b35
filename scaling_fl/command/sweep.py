"""Train a run for each combination of the values that settings have, and compare them in a table and a report.

Commas outside brackets and quotes separate values. The same command again skips the runs that are done.
"""

import math
import os
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path

from scaling_fl import report
from scaling_fl.command.arguments import check_updates, insert_files
from scaling_fl.command.results import Parser
from scaling_fl.distributed.ending import run_program
from scaling_fl.distributed.launch import num_ranks
from scaling_fl.distributed.world import launched, lost_after, num_threads
from scaling_fl.errors import escape_unprintable, one_line
from scaling_fl.experiment.checks import find_problems
from scaling_fl.experiment.grid import Point, find_grid_problems, make_grid, name_sweep
from scaling_fl.experiment.run import REPORT
from scaling_fl.experiment.sweep import Outcome, say, train_all
from scaling_fl.records.observers import runs_dir
from scaling_fl.report.runs import Run, read

# Titles of columns, the metrics of the best round that they show, and whether more (1) or less (-1) is better.
SCORES = {
    "test accuracy": ("test.accuracy", 1),
    "test loss": ("test.loss", -1),
    "validation accuracy": ("validation.accuracy", 1),
    "validation loss": ("validation.loss", -1),
    "exact match": ("validation.exact_match", 1),
}


def main(arguments: Sequence[str]) -> None:
    """Train the runs that the arguments ask for, and exit with status 1 if one has failed."""
    escape_unprintable()
    usage = "%(prog)s [options] with model=a,b learning_rate=1e-4,3e-4"
    parser = Parser(prog="scaling-fl sweep", description=__doc__, usage=usage)
    parser.add_argument("words", nargs="*", metavar="with ...", help="settings and files of settings, as for a run")
    parser.add_argument("--parallel", type=int, default=1, metavar="N", help="train so many runs at a time (1)")
    parser.add_argument("--folder", help="of the sweep (default: named after the settings, in runs)")
    parsed = parser.parse_intermixed_args(arguments)

    def program() -> None:
        try:
            sweep(parsed.words, parsed.parallel, parsed.folder)
        except ValueError as error:  # the standard output was closed, or a record cannot be read
            raise SystemExit(f"error: {error}") from error

    run_program(program)


def sweep(words: Sequence[str], parallel: int, folder: str | None) -> None:
    """Train the runs of a grid, print their table, and write their report."""
    points = read_points(words, parallel)
    place = Path(folder or os.path.join(runs_dir(), name_sweep(points)))
    try:
        place.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SystemExit(
            f"error: --folder: expected one that can be made, got {str(place)!r} ({one_line(error)})"
        ) from error
    say(f"sweep     {len(points)} run{'s' * (len(points) != 1)} in {place}")
    outcomes = train_all(points, place, parallel)
    failures = [f"{outcome.point.name}: {outcome.problem}" for outcome in outcomes if outcome.record is None]
    folders = [str(outcome.record) for outcome in outcomes if outcome.record]
    if folders:
        say(*make_table(outcomes, dict(zip(folders, read(folders), strict=True))))
    if folders and any(point.given.get("report", True) for point in points):
        try:
            say(f"report    {report.write(folders, str(place / REPORT))[0]}")
        except (OSError, ValueError) as error:
            failures.append(f"the report was not written: {one_line(error)}")
    if failures:
        raise SystemExit("\n".join(f"error: {line}" for failure in failures for line in failure.splitlines()))


def read_points(words: Sequence[str], parallel: int) -> list[Point]:
    """Return the runs of the grid, all of whose settings are right.

    Raises:
        ValueError: with a line for each thing that is wrong.
    """
    if not words:
        raise SystemExit("error: sweep: expected settings, as in sweep with learning_rate=1e-4,3e-4, got none")
    check_updates(["sweep", *words])
    if words[0] != "with":
        raise SystemExit(f"error: sweep: expected `with` and settings, got {shlex.join(words)!r:.100}")
    given = (word.partition("=") for word in insert_files(["sweep", *words])[2:])
    points: list[Point] = []

    def read_grid() -> None:
        points.extend(make_grid({name.strip(): value for name, _, value in given}))

    checks = (
        read_grid,
        lambda: check_parallel(parallel),
        check_launcher,
        lambda: num_ranks(1),
        num_threads,
        lost_after,
    )
    if problems := find_problems(checks) or find_grid_problems(points):
        raise SystemExit("\n".join(f"error: {problem}" for problem in problems))
    return points


def check_parallel(parallel: int) -> None:
    """Check the number of runs at a time."""
    if parallel < 1:
        raise ValueError(f"--parallel: expected a whole number >= 1, got {parallel}")


def check_launcher() -> None:
    """Check that no launcher has started this process, which starts the ranks itself."""
    if launched():
        raise ValueError("sweep: expected a process without RANK in its environment, got a rank of a launcher")


def make_table(outcomes: Sequence[Outcome], runs: Mapping[str, Run]) -> list[str]:
    """Return the lines of a table with a line for each run. The best of a column has a star."""
    swept = list(outcomes[0].point.swept)
    columns = {name: [outcome.point.word(name) for outcome in outcomes] for name in swept}
    of = [runs.get(str(outcome.record)) for outcome in outcomes]
    for title, (metric, sign) in SCORES.items():
        values = [score(run, metric) if run else math.nan for run in of]
        known = [sign * value for value in values if not math.isnan(value)]
        if known:
            best = {max(known)} if len(set(known)) > 1 else set()
            columns[title] = [
                "-" if math.isnan(value) else f"{value:.4f}{'*' if sign * value in best else ' '}" for value in values
            ]
    columns["seconds"] = [f"{run.elapsed[-1]:.1f}" if run else "-" for run in of]
    columns["record"] = ["failed" if outcome.record is None else str(outcome.record) for outcome in outcomes]
    widths = {title: max(map(len, (title, *cells))) for title, cells in columns.items()}
    lines = [" | ".join(title.ljust(widths[title]) for title in columns).rstrip()]
    for row in zip(*columns.values(), strict=True):
        cells = (
            cell.rjust(width) if title in (*SCORES, "seconds") else cell.ljust(width)
            for (title, width), cell in zip(widths.items(), row, strict=True)
        )
        lines.append(" | ".join(cells).rstrip())
    return lines


def score(run: Run, metric: str) -> float:
    """Return a metric of the best round, or of the last one if none is chosen; NaN if it is not known."""
    return run.last(metric) if run.best_round is None else float(run.metric(metric)[run.best_round])

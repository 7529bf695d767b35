"""What a run prints: tables, a line a round, a progress bar."""

import io
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from threading import Lock
from typing import Any

from tqdm import tqdm

from scaling_fl.distributed.collectives import rank
from scaling_fl.distributed.signals import check_interrupt
from scaling_fl.errors import printable
from scaling_fl.records.checkpoint import History
from scaling_fl.records.rounds import METRICS
from scaling_fl.storage import naming_place
from scaling_fl.training.loop import Batch
from scaling_fl.training.metrics import Metrics


def escape_unprintable() -> None:
    """Print escapes in place of letters that the terminal or file has no code for: any name may hold an emoji."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def print_once(*lines: str) -> None:
    """Print from rank 0.

    Raises:
        WriteError: standard output cannot be written to.
    """
    if rank() == 0:
        with naming_place("the standard output"):
            print(*lines, sep="\n", flush=True)


class Table:
    """A table with a line a round, whose head is printed at once."""

    def __init__(self, with_failures: bool) -> None:
        self._columns = {
            name: metric
            for name, metric in METRICS.items()
            if metric.title and (with_failures or name != "sites.failed")
        }
        print_once(" | ".join(["round", *(str(metric.title) for metric in self._columns.values())]))

    def print_round(self, round_: int, metrics: Metrics) -> None:
        """Print a round's line."""
        cells = [f"{round_:>5}"]
        for name, metric in self._columns.items():
            cell = metric.form.format(metrics[name] * metric.scale) if name in metrics else "-"
            cells.append(cell.rjust(len(str(metric.title))))
        print_once(" | ".join(cells))


def site_table(sites: list[dict[str, Any]], label_names: Sequence[str]) -> list[str]:
    """Return the lines of a table with where each site runs and what it trains on in a round.

    Args:
        sites: as `SiteData.describe_sites` returns them, with the `steps` of a round.
        label_names: of the classes.
    """
    lines = ["site | rank | device | examples |     tokens | steps a round | labels"]
    for number, site in enumerate(sites):
        labels = ", ".join(
            f"{printable(name)} {count:,}" for name, count in zip(label_names, site["labels"], strict=True)
        )
        lines.append(
            f"{number:>4} | {site['rank']:>4} | {site['device']:>6} | {site['examples']:>8,} | {site['tokens']:>10,} | "
            f"{site['steps']:>13,} | {labels}"
        )
    return lines


def device_table(num_bytes: list[dict[str, int | None]]) -> list[str]:
    """Return the lines of a table with the memory that the tensors of each device take.

    Args:
        num_bytes: for each rank, device -> bytes, or None where they are not known.
    """
    lines = ["rank | device | memory of tensors, estimated"]
    for number, of_rank in enumerate(num_bytes):
        for device, size in of_rank.items():
            lines.append(f"{number:>4} | {device:>6} | {'unknown' if size is None else f'{size / 1e6:,.0f} MB'}")
    return lines


def summarise(history: History) -> list[str]:
    """Return lines on the best and the last round."""
    last = history[-1]
    best = max(range(len(history)), key=lambda round_: history[round_]["validation.accuracy"])  # the first of equals
    failed = sum(metrics.get("sites.failed", 0) for metrics in history)
    return [
        f"best      validation accuracy {history[best]['validation.accuracy']:.4f}, after round {best}",
        f"final     validation accuracy {last['validation.accuracy']:.4f}, loss {last['validation.loss']:.4f}, "
        f"after {len(history) - 1} rounds in {sum(metrics['time.round_s'] for metrics in history):.1f} s"
        + (f", in which sites failed {failed} times" if failed else ""),
    ]


class Progress:
    """A bar over the examples of this rank with their speed and the time that is left, from rank 0 on a terminal."""

    def __init__(self, num_examples: int) -> None:
        self._num_examples = num_examples
        self._bar: tqdm | None = None
        self._lock = Lock()  # of the threads of a rank's devices

    @contextmanager
    def display(self, name: str) -> Iterator[None]:
        """Show an empty bar, and take it away at the end."""
        with tqdm(
            total=self._num_examples,
            desc=name,
            unit=" examples",
            leave=False,
            file=sys.__stderr__,  # not sys.stderr, which Sacred writes down
            disable=None if rank() == 0 else True,
        ) as self._bar:
            yield

    def watch(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """Yield the batches and move the bar, until a signal asks this process to end."""
        for batch in batches:
            check_interrupt()
            yield batch
            if self._bar is not None:
                with self._lock:
                    self._bar.update(len(batch["labels"]))

"""What is seen of a run: a table with a line a round, a progress bar, and the saved model at the end."""

import io
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from threading import Lock
from typing import Any

from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from scaling_fl.distributed.collectives import rank
from scaling_fl.distributed.signals import check_interrupt
from scaling_fl.errors import printable
from scaling_fl.records.checkpoint import History
from scaling_fl.records.export import save_model
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
        WriteError: what is printed goes to a disk that cannot be written to, or to nobody.
    """
    if rank() == 0:
        with naming_place("the standard output"):
            print(*lines, sep="\n", flush=True)


# Title -> metric, its scale, and how it is shown.
COLUMNS = {
    "train loss": ("train.loss", 1, "{:.4f}"),
    "accuracy": ("train.accuracy", 1, "{:.4f}"),
    "validation loss": ("validation.loss", 1, "{:.4f}"),
    "accuracy ": ("validation.accuracy", 1, "{:.4f}"),
    "seconds": ("time.round_s", 1, "{:.1f}"),
    "training": ("time.train_s", 1, "{:.1f}"),
    "averaging": ("time.aggregate_s", 1, "{:.2f}"),
    "evaluating": ("time.evaluate_s", 1, "{:.1f}"),
    "MB sent": ("comm.bytes", 1e-6, "{:.1f}"),
}
FAILURES = {"failed sites": ("sites.failed", 1, "{:.0f}")}


class Table:
    """A table with a line a round, whose head is printed at once."""

    def __init__(self, with_failures: bool) -> None:
        self._columns = COLUMNS | (FAILURES if with_failures else {})
        print_once(" | ".join(["round", *self._columns]))

    def record(self, log_scalar: Callable[[str, float, int], None], round_: int, metrics: Metrics) -> None:
        """Log a round's metrics, but those of single sites, by `log_scalar(name, value, round)`; print its line."""
        for name, value in metrics.items():
            if not isinstance(value, dict):
                log_scalar(name, value, round_)
        cells = [f"{round_:>5}"]
        for title, (name, scale, form) in self._columns.items():
            cells.append((form.format(metrics[name] * scale) if name in metrics else "-").rjust(len(title)))
        print_once(" | ".join(cells))


def site_table(sites: list[dict[str, Any]], label_names: Sequence[str], batch_size: int, num_epochs: int) -> list[str]:
    """Return the lines of a table with where each site runs and what it trains on in a round.

    Args:
        sites: as `Holdings.describe_sites` returns them.
        label_names: of the classes.
        batch_size: examples in a step.
        num_epochs: of a round.
    """
    lines = ["site | rank | device | examples |     tokens | steps a round | labels"]
    for number, site in enumerate(sites):
        num_steps = num_epochs * -(-site["examples"] // batch_size)
        labels = ", ".join(
            f"{printable(name)} {count:,}" for name, count in zip(label_names, site["labels"], strict=True)
        )
        lines.append(
            f"{number:>4} | {site['rank']:>4} | {site['device']:>6} | {site['examples']:>8,} | {site['tokens']:>10,} | "
            f"{num_steps:>13,} | {labels}"
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


def finish(
    folder: str | None,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    sha256: str,
    history: History,
    report: str | None,
) -> None:
    """Save the model beside the run's files, from rank 0, and print where it is and what it can do.

    Args:
        folder: of the run's files; None saves nothing.
        model: with the final weights.
        tokenizer: of the model.
        sha256: of the final weights.
        history: the metrics of all rounds.
        report: where the run is about to be drawn, beside its files; None if it is not.

    Raises:
        WriteError: the model cannot be saved.
    """
    if rank() != 0:
        return
    if folder is not None:
        print_once(f"model     {save_model(folder, model, tokenizer)}")
        if report is not None:
            print_once(f"report    {os.path.join(folder, report)}")
    print_once(f"weights   SHA-256 {sha256}")
    last = history[-1]
    best = max(range(len(history)), key=lambda round_: history[round_]["validation.accuracy"])  # the first of equals
    failed = sum(metrics.get("sites.failed", 0) for metrics in history)
    print_once(
        f"best      validation accuracy {history[best]['validation.accuracy']:.4f}, after round {best}",
        f"final     validation accuracy {last['validation.accuracy']:.4f}, loss {last['validation.loss']:.4f}, "
        f"after {len(history) - 1} rounds in {sum(metrics['time.round_s'] for metrics in history):.1f} s"
        + (f", in which sites failed {failed} times" if failed else ""),
    )


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

"""What is seen of a run: a table with a line a round, a progress bar, and the saved model at the end."""

import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from threading import Lock
from typing import TypeVar

from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from scaling_fl.checkpoint import History
from scaling_fl.distributed import bytes_sent, gather, rank

T = TypeVar("T")


def say(*lines: str) -> None:
    """Print from rank 0."""
    if rank() == 0:
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


def table_head() -> str:
    """Return the head of the table that has a line a round."""
    return " | ".join(["round", *COLUMNS])


def record(log_scalar: Callable[[str, float, int], None], round_: int, metrics: dict[str, float]) -> None:
    """Log a round's metrics by `log_scalar(name, value, round)`, and print its line of the table."""
    for name, value in metrics.items():
        log_scalar(name, value, round_)
    cells = [f"{round_:>5}"]
    for title, (name, scale, form) in COLUMNS.items():
        cells.append((form.format(metrics[name] * scale) if name in metrics else "-").rjust(len(title)))
    say(" | ".join(cells))


def finish(
    folder: str | None, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, sha256: str, history: History
) -> None:
    """Save the model beside the run's files, from rank 0, and print where it is and what it can do.

    Args:
        folder: of the run's files; None saves nothing.
        model: with the final weights.
        tokenizer: of the model.
        sha256: of the final weights.
        history: the metrics of all rounds.
    """
    if rank() != 0:
        return
    if folder is not None:
        path = os.path.join(folder, "model")
        model.save_pretrained(path)
        tokenizer.save_pretrained(path)
        say(f"model     {path}")
    say(f"weights   SHA-256 {sha256}")
    last = history[-1]
    say(
        f"final     validation accuracy {last['validation.accuracy']:.4f}, loss {last['validation.loss']:.4f}, "
        f"after {len(history) - 1} rounds in {sum(metrics['time.round_s'] for metrics in history):.1f} s"
    )


class Ledger:
    """The seconds and bytes of a round."""

    def __init__(self) -> None:
        self._lap = self._start = time.perf_counter()
        self._sent = bytes_sent()

    def lap(self, name: str) -> dict[str, float]:
        """Return the seconds since the last lap, as a metric."""
        last, self._lap = self._lap, time.perf_counter()
        return {f"time.{name}_s": self._lap - last}

    def total(self, name: str) -> dict[str, float]:
        """Return the seconds since the last total and the bytes that all ranks sent since, as metrics."""
        sent, self._sent = bytes_sent() - self._sent, bytes_sent()
        all_sent = sum(gather(sent))
        last, self._start = self._start, time.perf_counter()
        self._lap = self._start
        return {f"time.{name}_s": self._start - last, "comm.bytes": all_sent}


class Progress:
    """A bar over batches on a terminal, from rank 0; nothing elsewhere."""

    def __init__(self, name: str, num_batches: int) -> None:
        self._name = name
        self._num_batches = num_batches
        self._num_done = 0
        self._bar: tqdm | None = None
        self._lock = Lock()  # of the threads of a rank's devices

    def watch(self, batches: Iterable[T]) -> Iterator[T]:
        """Yield the batches and move the bar, which goes away when it is full."""
        for batch in batches:
            with self._lock:
                if self._bar is None:
                    # Not sys.stderr, which Sacred writes down.
                    self._bar = tqdm(
                        total=self._num_batches,
                        desc=self._name,
                        unit="batch",
                        leave=False,
                        file=sys.__stderr__,
                        disable=None if rank() == 0 else True,
                    )
            yield batch
            with self._lock:
                self._num_done += 1
                self._bar.update()
                if self._num_done == self._num_batches:
                    self._bar.close()
                    self._bar, self._num_done = None, 0

"""What a run prints: tables, a line a round, a progress bar."""

import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from threading import Lock
from typing import Any

import numpy as np
from tqdm import tqdm

from scaling_fl.distributed.caller import is_called, tell
from scaling_fl.distributed.collectives import rank
from scaling_fl.distributed.signals import check_interrupt
from scaling_fl.errors import preview, printable
from scaling_fl.records.best import Choice, find_best, is_over
from scaling_fl.records.checkpoint import History
from scaling_fl.records.rounds import METRICS
from scaling_fl.storage import naming_place
from scaling_fl.training.loop import Batch, count_texts
from scaling_fl.training.metrics import Metrics


def print_once(*lines: str) -> None:
    """Print from rank 0.

    Raises:
        WriteError: standard output cannot be written to.
    """
    if rank() == 0 and lines:
        with naming_place("the standard output"):
            print(*lines, sep="\n", flush=True)


class Table:
    """A table with a line a round, whose head is printed at once.

    Args:
        num_sites: from which those of a round are sampled; None if all take part.
        with_failures: show how many sites failed.
        with_answers: show how many generated answers match.
    """

    def __init__(self, num_sites: int | None, *, with_failures: bool, with_answers: bool = False) -> None:
        shows = {"sites.cohort": num_sites is not None, "sites.failed": with_failures}
        shows["validation.exact_match"] = with_answers
        self._columns = {name: metric for name, metric in METRICS.items() if metric.title and shows.get(name, True)}
        if num_sites is not None:
            title = f"sites of {num_sites:,}"
            self._columns["sites.cohort"] = replace(METRICS["sites.cohort"], title=title)
        print_once(" | ".join(["round", *(metric.title for metric in self._columns.values())]))

    def print_round(self, round_: int, metrics: Metrics) -> None:
        """Print a round's line."""
        cells = [f"{round_:>5}"]
        for name, metric in self._columns.items():
            cell = metric.form.format(metrics[name] * metric.scale) if name in metrics else "-"
            cells.append(cell.rjust(len(metric.title)))
        print_once(" | ".join(cells))


def describe_answers(questions: Sequence[str] | None, metrics: Metrics) -> list[str]:
    """Return the lines of what the model of a round answers to the sample questions."""
    pairs = zip(questions or (), metrics.get("sample.answers", ()), strict=False)
    return [f"      {printable(question)}\n        {printable(answer)}" for question, answer in pairs]


def site_table(sites: list[dict[str, Any]]) -> list[str]:
    """Return the lines of a table with where each site runs and what it trains on in a round.

    Args:
        sites: as `experiment.plan.plan` returns them.
    """
    names = [preview([site.get("name", "")]) for site in sites]
    width = max(map(len, ("name", *names))) if any(names) else 0
    of_names = [f"{name:<{width}} | " * bool(width) for name in ("name", *names)]
    lines = [f"site | {of_names[0]}rank | device | examples |     tokens | steps a round | labels"]
    for number, site in enumerate(sites):
        rank, device = ("any" if site[key] is None else site[key] for key in ("rank", "device"))
        labels = ", ".join(f"{printable(name)} {count:,}" for name, count in site["labels"].items())
        labels += f"{site['trained_tokens']:,} tokens to predict" if "trained_tokens" in site else ""
        lines.append(
            f"{number:>4} | {of_names[number + 1]}{rank:>4} | {device:>6} | {site['examples']:>8,} | "
            f"{site['tokens']:>10,} | {site['steps']:>13,} | {labels}"
        )
    return lines


def device_table(devices: list[dict[str, Any]]) -> list[str]:
    """Return the lines of a table with the memory that the tensors of each device take, as `plan` returns them."""
    lines = ["rank | device | memory of tensors, estimated"]
    for of in devices:
        size = "unknown" if of["bytes"] is None else f"{of['bytes'] / 1e6:,.0f} MB"
        lines.append(f"{of['rank']:>4} | {of['device']:>6} | {size}")
    return lines


def summarise(history: History, choice: Choice, judged_on: str, judged: str | None) -> list[str]:
    """Return lines on the best round, on an early end, and on the last round.

    Args:
        history: the metrics of all rounds.
        choice: how the best round is chosen.
        judged_on: the examples of `validation.*`, in words.
        judged: the metric that has the sites whose examples these are, if they are those of sites.
    """
    best, lines = find_best(history, choice), []
    last = next((metrics for metrics in reversed(history) if "validation.loss" in metrics), {})
    if best is not None:
        sites = {tuple(map(int, metrics.get(str(judged), ()))) for metrics in history} - {()}
        others = ", of rounds that were evaluated on different sites" * (len(sites) > 1)
        by = f"{choice.metric} ({history[best][str(choice.metric)]:.4f})"
        how = f"after round {best}, by {by} on {judged_on}{others}"
        lines.append(f"best      {_describe_scores(history[best])}, {how}")
    if is_over(history, choice):
        lines.append(
            f"stopped   after round {len(history) - 1}: {choice.metric} was best in round {best}, and "
            f"early_stopping_rounds={choice.patience}. More rounds need another value"
        )
    failed = sum(metrics.get("sites.failed", 0) for metrics in history)
    seconds, sent = (sum(metrics[name] for metrics in history) for name in ("time.round_s", "comm.bytes"))
    rounds = f"{len(history) - 1} round{'s' * (len(history) != 2)}"
    lines.append(
        f"final     {_describe_scores(last)}, after {rounds} in {seconds:.1f} s, {sent * 1e-6:.1f} MB "
        "sent" + (f", in which sites failed {failed} times" if failed else "")
    )
    return lines


def _describe_scores(metrics: Metrics) -> str:
    """Return the scores of a round in words."""
    return ", ".join(
        f"{kind} accuracy {metrics[f'{kind}.accuracy']:.4f}, loss {metrics[f'{kind}.loss']:.4f}"
        + (f", exact match {metrics[f'{kind}.exact_match']:.4f}" if f"{kind}.exact_match" in metrics else "")
        for kind in ("validation", "test")
        if f"{kind}.loss" in metrics
    )


class CallerBar:
    """The bar that the caller in Python shows, which is told at most ten times a second how far it is."""

    def __init__(self) -> None:
        self._count, self._told = 0, time.monotonic()

    def update(self, count: int) -> None:
        """Move the bar."""
        self._count += count
        if time.monotonic() - self._told > 0.1:
            self._told = time.monotonic()
            tell(done=self._count)


class Progress:
    """A bar over the examples of this rank with their speed and the time that is left, from rank 0 on a terminal."""

    def __init__(self) -> None:
        self._bar: tqdm | CallerBar | None = None
        self._seen = np.zeros(2, np.int64)  # examples, tokens
        self._lock = Lock()  # of the threads of a rank's devices

    @contextmanager
    def display(self, name: str, num_examples: int) -> Iterator[None]:
        """Show an empty bar for so many examples of this rank, and take it away at the end."""
        if rank() == 0 and is_called():
            tell(bar=name, total=num_examples)
            self._bar = CallerBar()
            yield
            return
        with tqdm(
            total=num_examples,
            desc=name,
            unit=" examples",
            leave=False,
            file=sys.__stderr__,  # not sys.stderr, which Sacred writes down
            disable=None if rank() == 0 else True,
        ) as self._bar:
            yield

    def watch(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """Yield the batches, count them and move the bar, until a signal asks this process to end."""
        for batch in batches:
            check_interrupt()
            num_texts = count_texts(batch)
            num_tokens = int(batch["attention_mask"].sum()) if "attention_mask" in batch else batch["input_ids"].numel()
            with self._lock:  # before the batch is yielded: who takes the last may not ask for another
                self._seen += np.array([num_texts, num_tokens])
            yield batch
            if self._bar is not None:
                with self._lock:
                    self._bar.update(num_texts)

    def take_counts(self) -> tuple[int, int]:
        """Return how many examples and tokens were seen since this was called before."""
        num_examples, num_tokens = self._seen.tolist()
        self._seen[:] = 0
        return num_examples, num_tokens

"""What is measured in a round: the table of all metrics, a clock, and a line a round in a file."""

import json
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

from scaling_fl.distributed.collectives import all_gather, bytes_sent
from scaling_fl.storage import naming_place
from scaling_fl.training.metrics import Metrics, by_step

ROUNDS = "rounds.jsonl"


@dataclass(frozen=True)
class Metric:
    """A line in the table of metrics.

    Args:
        unit: as users read it.
        meaning: in one sentence.
        title: of its column on the console; empty if it has none.
        form: how a number is printed there.
        scale: of the number printed there.
    """

    unit: str
    meaning: str
    title: str = ""
    form: str = "{:.4f}"
    scale: float = 1


METRICS: dict[str, Metric] = {
    "round": Metric("", "0 is the model before training, and has no `train.*`, `step.*`, `site*` and `speed.*`"),
    "train.loss": Metric(
        "nats",
        "mean over all examples (of `instruct`: the tokens of all answers) that the sites trained on, while the "
        "weights change, with dropout",
        "train loss",
    ),
    "train.accuracy": Metric("fraction", "the same, of right answers (of `instruct`: of right tokens)", "accuracy"),
    "train.steps": Metric(
        "steps", "of the sites' optimisers so far, of each round the most that a site took (`log_every_steps`)"
    ),
    "step.number": Metric(
        "steps", "a list: the last step of each point ([Loss by step](loss_by_step.md)) of the round"
    ),
    "step.loss": Metric("nats", "a list: `train.loss` of the steps of each point; null without any target"),
    "step.learning_rate": Metric("", "a list: the rate of the last step of each point, mean over its sites"),
    "step.site_loss": Metric("nats", "by site, the list of its own losses (`log_sites_by_step`)"),
    "step.site_learning_rate": Metric("", "by site, the list of its own rates"),
    "validation.loss": Metric(
        "nats",
        "of the global model, mean over the examples by which the best round is chosen ([Evaluation](evaluation.md)), "
        "in evaluated rounds only",
        "validation loss",
    ),
    "validation.accuracy": Metric("fraction", "the same, of right answers", "accuracy "),
    "validation.perplexity": Metric("", "of `instruct`: the exponential of `validation.loss`"),
    "validation.exact_match": Metric(
        "fraction",
        "the same, of generated answers that are those of the data (`score_by=exact_match`)",
        "exact match",
    ),
    "validation.macro_f1": Metric("fraction", "the mean F1 of the labels that occur, as answers too"),
    "validation.balanced_accuracy": Metric("fraction", "the mean recall of the labels that occur"),
    "validation.confusion": Metric(
        "examples", "a list of [label, answer, number of examples], labels by their index in `info.json`"
    ),
    "test.loss": Metric("nats", "of the test examples, with `validation_fraction`"),
    "test.accuracy": Metric("fraction", "likewise"),
    "test.perplexity": Metric("", "likewise"),
    "test.exact_match": Metric("fraction", "likewise"),
    "test.macro_f1": Metric("fraction", "likewise"),
    "test.balanced_accuracy": Metric("fraction", "likewise"),
    "test.confusion": Metric("examples", "likewise"),
    "sample.answers": Metric("", "a list of what the global model answers to `sample_questions`"),
    "time.round_s": Metric("s", "setup, training, averaging and evaluation together", "seconds", "{:.1f}"),
    "time.setup_s": Metric("s", "reading, tokenising and loading; in the first round after each start only"),
    "time.train_s": Metric(
        "s", "training, with what `evaluate_local` takes, until the last rank is ready", "training", "{:.1f}"
    ),
    "time.aggregate_s": Metric("s", "the all-reduce and the step of the outer optimiser", "averaging", "{:.2f}"),
    "time.evaluate_s": Metric("s", "the evaluation", "evaluating", "{:.1f}"),
    "time.checkpoint_s": Metric("s", "writing the checkpoint, which does not contain its own seconds"),
    "comm.bytes": Metric(
        "bytes",
        "what all ranks sent since the previous round, by collectives or through shared memory",
        "MB sent",
        "{:.1f}",
        1e-6,
    ),
    "comm.expected_bytes": Metric(
        "bytes",
        "of the weights alone: ranks times weights times 8 (`exact`), 4, 2 or 1.02 (`int8`) bytes; 0 with one rank; "
        "of a single site by FedAvg and `exact` its weights once, 4 bytes each. The rest is buffers, metrics and "
        "counts, and in the first round after each start the initial weights or the checkpoint",
    ),
    "speed.examples_per_s": Metric("1/s", "examples that all sites together trained on, over `time.train_s`"),
    "speed.tokens_per_s": Metric("1/s", "the same, of tokens without padding"),
    "sites.cohort": Metric("sites", "that were asked to train in this round", "sites", "{:.0f}"),
    "sites.failed": Metric("sites", "left out of this round, with `on_site_failure=skip`", "failed sites", "{:.0f}"),
    "site.rank": Metric("", "by site, the rank that trained it, of the sites of this round"),
    "site.name": Metric("", "by site, its name, likewise, where sites have names"),
    "site.test_examples": Metric("examples", "by site, its test examples, of the sites that were evaluated"),
    "site.validation_examples": Metric("examples", "by site, its validation examples, likewise"),
    "site.test_loss": Metric("nats", "by site, of the global model on its test examples"),
    "site.test_accuracy": Metric("fraction", "the same, of right answers"),
    "site.test_exact_match": Metric("fraction", "the same, of generated answers (`score_by=exact_match`)"),
    "site.local_loss": Metric(
        "nats", "by site, of its own model before averaging, on its test examples (`evaluate_local`)"
    ),
    "site.local_accuracy": Metric("fraction", "the same, of right answers"),
    "site.local_exact_match": Metric("fraction", "likewise"),
    "site.gain": Metric("fraction", "`site.test_accuracy` minus `site.local_accuracy`"),
    "site.loss": Metric(
        "nats", '`train.loss` by site, as in `{"0": 0.7, "2": 0.4}`, of the sites that took part and did not fail'
    ),
    "site.accuracy": Metric("fraction", "`train.accuracy` by site"),
    "site.examples": Metric("examples", "by site, the examples that it trained on, each counted once for all epochs"),
    "rank.idle_s": Metric("s", "by rank, how long it waited for the last rank after it had trained its sites"),
    "site.seconds": Metric("s", "the training time by site"),
    "site.memory_mb": Metric(
        "MB",
        "by site, the peak memory of its accelerator while it trained; on a CPU, the peak memory of its rank so far",
    ),
    "sites.test_loss.weighted": Metric("nats", "the mean over all test examples of the sites"),
    "sites.test_accuracy.weighted": Metric("fraction", "the same, of right answers"),
    "sites.test_exact_match.weighted": Metric("fraction", "the same, of generated answers"),
}
OVER_SITES: tuple[str, ...] = (  # metrics of single sites whose spread is measured
    *("loss", "accuracy", "test_loss", "test_accuracy", "test_exact_match", "local_loss", "local_accuracy"),
    *("gain", "seconds", "local_exact_match", "memory_mb"),
)
SPREAD = {
    "worst": "the lowest of `site.{0}`, if that is an accuracy, a gain or an exact match, else the highest",
    "mean": "the mean of `site.{0}`, each site counting once",
    "std": "the population's standard deviation of `site.{0}`, likewise",
}
SPREAD_METRICS = {
    f"sites.{name}.{of}": Metric(METRICS[f"site.{name}"].unit, meaning.format(name))
    for name in OVER_SITES
    for of, meaning in SPREAD.items()
}
METRICS |= SPREAD_METRICS


def table() -> str:
    """Return the table of metrics in Markdown, as docs/metrics.md has it."""
    rows = [f"| `{name}` | {of.unit} | {of.meaning} |" for name, of in METRICS.items() if name not in SPREAD_METRICS]
    rows += [f"| `sites.<name>.{of}` | | {meaning.format('<name>')} |" for of, meaning in SPREAD.items()]
    return "\n".join(["| column | unit | meaning |", "|---|---|---|", *rows])


def describe_metrics() -> dict[str, dict[str, str]]:
    """Return the unit and the meaning of each metric, for the record of a run, whose report shows them."""
    return {name: {"unit": metric.unit, "meaning": metric.meaning} for name, metric in METRICS.items()}


class Clock:
    """The seconds and bytes of a round."""

    def __init__(self) -> None:
        self._seconds: dict[str, float] = {}
        self._sent = bytes_sent()

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Add what the body takes to `time.<name>_s`."""
        start = time.perf_counter()
        yield
        metric = f"time.{name}_s"
        self._seconds[metric] = self._seconds.get(metric, 0.0) + time.perf_counter() - start

    def read(self) -> Metrics:
        """Return the seconds that were measured since the last reading."""
        seconds, self._seconds = self._seconds, {}
        return seconds

    def read_round(self) -> Metrics:
        """Return these, their sum, and the bytes that all ranks sent since this was called before."""
        seconds = self.read()
        sent, self._sent = bytes_sent() - self._sent, bytes_sent()
        return {**seconds, "time.round_s": sum(seconds.values()), "comm.bytes": sum(all_gather(sent))}


@dataclass(frozen=True)
class Record:
    """Where a run leaves its results; by default nowhere.

    Args:
        folder: of the run's files.
        log_scalar: keeps a metric's value of a round.
        add_info: keeps facts about the run.
        check: raises a WriteError if something of the record could not be written.
        places: where the record is, in words without credentials.
        log_round: keeps all metrics of a round, and raises no error.
        goes_on: is given the metrics of each new round and tells whether another one may follow; asked on rank 0.
    """

    folder: str | None = None
    log_scalar: Callable[[str, float, int], object] = lambda name, value, round_: None
    add_info: Callable[[Mapping[str, Any]], object] = lambda info: None
    check: Callable[[], object] = lambda: None
    places: tuple[str, ...] = ()
    log_round: Callable[[int, Metrics], object] = lambda round_, metrics: None
    goes_on: Callable[[Metrics], bool] = lambda metrics: True

    def add_round(self, round_: int, metrics: Metrics) -> None:
        """Keep a round's metrics: those of the whole by `log_scalar`, all by `log_round` and in `rounds.jsonl`.

        `log_scalar` gets those by step with the number of the step in place of that of the round.

        Raises:
            WriteError: a disk cannot be written to.
        """
        for name, value in metrics.items():
            if isinstance(value, int | float):
                self.log_scalar(name, value, round_)
        for step, values in by_step(metrics, with_sites=False):
            for name, value in values.items():
                self.log_scalar(name, value, step)
        if self.folder is not None:
            _append_line(os.path.join(self.folder, ROUNDS), {"round": round_, **metrics})
        self.check()
        self.log_round(round_, metrics)


def _append_line(path: str, values: Mapping[str, Any]) -> None:
    """Append a line of JSON to a file, or no part of it."""
    before = os.path.getsize(path) if os.path.exists(path) else 0
    with naming_place(path):
        try:
            with open(path, "a", encoding="utf-8") as file:
                file.write(json.dumps(values, allow_nan=False) + "\n")
        except OSError:
            with suppress(OSError):
                os.truncate(path, before)
            raise

"""The tables of a report: results, settings, metrics, machines, and the answers to sample questions."""

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from scaling_fl.report.runs import Run, as_list, cut

NONE = "–"
ANSWERS = "sample.answers"  # of the metrics
MAX_VALUE = 160  # most characters of a setting, or of an answer
MAX_ANSWERED = 4  # rounds: the first and the last ones with answers


@dataclass(frozen=True)
class Row:
    """A row of a table: its name, its texts, which of them are bold, and how dark their cells are, from 0 to 1."""

    name: str
    texts: Sequence[str]
    bold: Sequence[bool] = ()
    shades: Sequence[float] = ()


@dataclass(frozen=True)
class Table:
    """The title, the columns and the rows of a table."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Row]


def summary(runs: list[Run]) -> list[Row]:
    """Return the results of runs; the best of several is bold."""
    rows = []
    for name, value, form, sign in MEASURES:
        values = np.array([value(run) for run in runs])
        if np.isnan(values).all():
            continue
        is_best = np.zeros(len(runs), dtype=bool)
        if len(runs) > 1 and sign and np.nanmax(values) > np.nanmin(values):
            is_best = values == (np.nanmax(values) if sign > 0 else np.nanmin(values))
        rows.append(Row(name, [NONE if np.isnan(x) else form.format(x) for x in values], is_best.tolist()))
    return rows


def last(name: str) -> Callable[[Run], float]:
    """Return a function that returns a metric of the last round that has it."""
    return lambda run: run.last(name)


def at_best(name: str) -> Callable[[Run], float]:
    """Return a function that returns a metric of the best round."""
    return lambda run: np.nan if run.best_round is None else run.metric(name)[run.best_round]


def of_known(statistic: Callable[[np.ndarray], float], values: np.ndarray) -> float:
    """Return a statistic that leaves out NaN, such as np.nanmax; NaN if no value is known."""
    return np.nan if np.isnan(values).all() else float(statistic(values))


def of_last_sites(name: str, statistic: Callable[[np.ndarray], float]) -> Callable[[Run], float]:
    """Return a function that returns a statistic over the sites of the last round."""
    return lambda run: of_known(statistic, run.last_of_sites(name))


def slowest_over_median(run: Run) -> float:
    """Return the seconds of the slowest site, divided by those of the median site."""
    return of_known(lambda seconds: np.nanmax(seconds) / np.nanmedian(seconds), run.median_of_sites("seconds"))


def training_percentage(run: Run) -> float:
    """Return the training time in percent of the time after set-up."""
    spent = sum(values.sum() for phase, values in run.phases.items() if phase != "setup")
    return 100 * run.phases["train"].sum() / spent if "train" in run.phases and spent else np.nan


SCORES = {"accuracy": ("accuracy", 1), "macro_f1": ("macro-F1", 1), "balanced_accuracy": ("balanced accuracy", 1)}
SCORES |= {"loss": ("loss", -1), "perplexity": ("perplexity", -1), "exact_match": ("exact match", 1)}

# Name, function, format, and whether more (1) or less (-1) is better.
MEASURES: list[tuple[str, Callable[[Run], float], str, int]] = [
    *(
        (f"{which} {data} {title}", value(f"{data}.{name}"), "{:.4f}", sign)
        for which, data, value in (
            ("best round's", "test", at_best),
            ("best round's", "validation", at_best),
            ("last", "validation", last),
        )
        for name, (title, sign) in SCORES.items()
    ),
    ("least gain of a site", of_last_sites("gain", np.nanmin), "{:+.4f}", 1),
    ("mean gain of the sites", of_last_sites("gain", np.nanmean), "{:+.4f}", 1),
    ("worst site's test accuracy", of_last_sites("test_accuracy", np.nanmin), "{:.4f}", 1),
    ("worst site's training accuracy", of_last_sites("accuracy", np.nanmin), "{:.4f}", 1),
    ("sites' deviation of training accuracy", of_last_sites("accuracy", np.nanstd), "{:.4f}", -1),
    ("seconds in all", lambda run: of_known(np.nansum, run.metric("time.round_s")), "{:,.1f}", -1),
    ("seconds a round", lambda run: of_known(np.nanmedian, run.metric("time.round_s")[run.steps > 0]), "{:,.2f}", -1),
    ("training, of the time after set-up", training_percentage, "{:.0f} %", 1),
    ("slowest site, over the median", slowest_over_median, "{:.2f} ×", -1),
    ("MB sent in all", lambda run: of_known(np.nansum, run.metric("comm.bytes") * 1e-6), "{:,.1f}", -1),
    ("examples a second", lambda run: of_known(np.nanmedian, run.metric("speed.examples_per_s")), "{:,.1f}", 1),
    ("tokens a second", lambda run: of_known(np.nanmedian, run.metric("speed.tokens_per_s")), "{:,.0f}", 1),
    ("most memory of a site, MB", lambda run: of_known(np.nanmax, run.of_sites("memory_mb")), "{:,.0f}", -1),
    ("examples to train on", lambda run: of_known(np.nansum, run.examples), "{:,.0f}", 0),
]


def as_text(value: Any) -> str:
    """Return a setting's value as a text, cut if it is long."""
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    if len(text) <= MAX_VALUE:
        return text
    count = f" ({len(value):,} in all)" if isinstance(value, list) else ""
    return f"{text[:MAX_VALUE]}…{count}"


def by_key(dicts: Sequence[dict[str, Any]], strong: Sequence[set[str]] | None = None) -> list[Row]:
    """Return a row for each key of the dicts."""
    strong = strong or [set()] * len(dicts)
    return [
        Row(
            str(key),
            [as_text(each[key]) if key in each else NONE for each in dicts],
            [key in keys for keys in strong],
        )
        for key in dict.fromkeys(key for each in dicts for key in each)
    ]


def settings(runs: list[Run]) -> list[Row]:
    """Return the settings of runs; those given on the command line are bold."""
    given = [run.record.get("meta", {}).get("config_updates", {}) for run in runs]
    return by_key([run.config for run in runs], [set(each) for each in given])


def metrics(runs: list[Run]) -> list[Row]:
    """Return all metrics of the last rounds, but those by site, with the unit and the meaning that the record gives."""
    rows = []
    for name in dict.fromkeys(name for run in runs for name in run.rounds[-1]):
        of = next((run.metrics[name] for run in runs if name in run.metrics), {})
        values = [run.metric(name)[-1] for run in runs]
        if not np.isnan(values).all():
            rows.append(
                Row(
                    name,
                    [
                        *(number(value, "{:,.6g}") for value in values),
                        str(of.get("unit", "")),
                        re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", str(of.get("meaning", ""))),  # a link of the pages
                    ],
                )
            )
    return rows


def different(rows: Sequence[Row]) -> list[Row]:
    """Return the rows in which runs differ."""
    return [Row(row.name, row.texts) for row in rows if len(set(row.texts)) > 1]


def machine(run: Run) -> dict[str, Any]:
    """Return the known properties of a run's machine."""
    host = {key: value for key, value in run.record.get("host", {}).items() if isinstance(value, str)}
    described = run.info.get("machine")
    times = {
        name: f"{str(run.record[key])[:19].replace('T', ' ')} UTC"
        for name, key in (("started", "start_time"), ("ended", "stop_time"))
        if run.record.get(key)
    }
    return {"folder": run.folder, **times, **host, **(described if isinstance(described, dict) else {})}


def answers(run: Run) -> Table | None:
    """Return a language model's answers to each sample question, before training and after the last rounds.

    Without questions or answers, return None.
    """
    questions = as_list(run.config.get("sample_questions"))
    found = [
        (step, texts) for step, of in zip(run.steps, run.rounds, strict=True) if (texts := as_list(of.get(ANSWERS)))
    ]
    if not questions or not found:
        return None
    shown = found if len(found) <= MAX_ANSWERED else [found[0], *found[1 - MAX_ANSWERED :]]
    rows = [
        Row(cut(question, MAX_VALUE), [cut(texts[at], MAX_VALUE) if at < len(texts) else NONE for _, texts in shown])
        for at, question in enumerate(questions)
    ]
    return Table(f"Answers of {run.name}", [f"after round {step:.0f}" for step, _ in shown], rows)


def number(value: Any, form: str) -> str:
    """Return a formatted number, a dash for a missing one."""
    return form.format(value) if isinstance(value, int | float) and np.isfinite(value) else NONE

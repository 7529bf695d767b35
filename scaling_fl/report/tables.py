"""What the tables of a report say: runs in numbers, their settings and machines, and sites to look at."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from scaling_fl.report.findings import failed_rounds, main_label
from scaling_fl.report.runs import Run, best, last_known, over_rounds

NONE = "–"
ALL_SITES, WORST_SITES = 10, 5  # so many are all listed; of more, so many of the worst of each kind
MAX_VALUE = 160  # characters of a setting


@dataclass(frozen=True)
class Row:
    """A line of a table: its name, its texts, and which of them are bold."""

    name: str
    texts: Sequence[str]
    bold: Sequence[bool] = ()


def summary(runs: list[Run]) -> list[Row]:
    """Return what runs are compared by; of several, the best is bold."""
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
    """Return a function that gives a metric after the last round."""
    return lambda run: run.metric(name)[-1]


def median(values: np.ndarray) -> float:
    """Return the median of what is known, without round 0 where there is more."""
    known = values[~np.isnan(values)]
    return float(np.median(known)) if len(known) else np.nan


def total(values: np.ndarray) -> float:
    """Return the sum of what is known, NaN of nothing."""
    return np.nan if np.isnan(values).all() else float(np.nansum(values))


def of_last_sites(name: str, pick: Callable[[np.ndarray], float]) -> Callable[[Run], float]:
    """Return a function that picks from what the sites reached in the last round."""

    def value(run: Run) -> float:
        values = last_known(run.of_sites(name))
        return np.nan if np.isnan(values).all() else float(pick(values))

    return value


def lag(run: Run) -> float:
    """Return how many times as long as the median site the slowest takes."""
    seconds = over_rounds(run.of_sites("seconds"))
    return np.nan if np.isnan(seconds).all() else float(np.nanmax(seconds) / np.nanmedian(seconds))


def share_of_training(run: Run) -> float:
    """Return the part of the time after set-up that is training, in percent."""
    spent = sum(values.sum() for phase, values in run.phases.items() if phase != "setup")
    return 100 * run.phases["train"].sum() / spent if "train" in run.phases and spent else np.nan


def best_accuracy(run: Run) -> float:
    """Return the best validation accuracy."""
    peak = best(run.metric("validation.accuracy"))
    return np.nan if peak is None else run.metric("validation.accuracy")[peak]


def most_memory(run: Run) -> float:
    """Return the most memory that a site ever took, in MB."""
    memory = run.of_sites("memory_mb")
    return np.nan if np.isnan(memory).all() else float(np.nanmax(memory))


# What is compared, how it is got and shown, and whether more (1) or less (-1) of it is better.
MEASURES: list[tuple[str, Callable[[Run], float], str, int]] = [
    ("best validation accuracy", best_accuracy, "{:.4f}", 1),
    ("last validation accuracy", last("validation.accuracy"), "{:.4f}", 1),
    ("last validation loss", last("validation.loss"), "{:.4f}", -1),
    ("worst site's accuracy", of_last_sites("accuracy", np.nanmin), "{:.4f}", 1),
    ("sites' deviation of accuracy", of_last_sites("accuracy", np.nanstd), "{:.4f}", -1),
    ("seconds in all", lambda run: total(run.metric("time.round_s")), "{:,.1f}", -1),
    ("seconds a round", lambda run: median(run.metric("time.round_s")[run.steps > 0]), "{:,.2f}", -1),
    ("training, of the time after set-up", share_of_training, "{:.0f} %", 1),
    ("slowest site, over the median", lag, "{:.2f} ×", -1),
    ("MB sent in all", lambda run: total(run.metric("comm.bytes") * 1e-6), "{:,.1f}", -1),
    ("examples a second", lambda run: median(run.metric("speed.examples_per_s")), "{:,.1f}", 1),
    ("tokens a second", lambda run: median(run.metric("speed.tokens_per_s")), "{:,.0f}", 1),
    ("most memory of a site, MB", most_memory, "{:,.0f}", -1),
    ("examples to train on", lambda run: total(run.examples), "{:,.0f}", 0),
]


def as_text(value: Any) -> str:
    """Return a setting's value, cut where it is long."""
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    if len(text) <= MAX_VALUE:
        return text
    count = f" ({len(value):,} in all)" if isinstance(value, list) else ""
    return f"{text[:MAX_VALUE]}…{count}"


def by_key(dicts: Sequence[dict[str, Any]], strong: Sequence[set[str]] | None = None) -> list[Row]:
    """Return a row for each key of some dicts."""
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
    """Return the settings of runs, in bold what was asked for."""
    asked = [run.record.get("meta", {}).get("config_updates", {}) for run in runs]
    return by_key([run.config for run in runs], [set(each) for each in asked])


def different(rows: Sequence[Row]) -> list[Row]:
    """Return the rows in which runs differ."""
    return [Row(row.name, row.texts) for row in rows if len(set(row.texts)) > 1]


def machine(run: Run) -> dict[str, Any]:
    """Return what is known of where a run ran."""
    host = {key: value for key, value in run.record.get("host", {}).items() if isinstance(value, str)}
    told = run.info.get("machine")
    times = {
        name: f"{str(run.record[key])[:19].replace('T', ' ')} UTC"
        for name, key in (("started", "start_time"), ("ended", "stop_time"))
        if run.record.get(key)
    }
    return {"folder": run.folder, **times, **host, **(told if isinstance(told, dict) else {})}


def sites(run: Run) -> tuple[str, list[str], list[Row]]:
    """Return a title, the columns and a row a site of the sites of a run that a reader should look at."""
    seconds, accuracy = over_rounds(run.of_sites("seconds")), last_known(run.of_sites("accuracy"))
    loss, memory = last_known(run.of_sites("loss")), over_rounds(run.of_sites("memory_mb"))
    failed = failed_rounds(run)
    chosen: dict[int, list[str]] = {site: [] for site in range(run.num_sites)}
    words = f"All sites of {run.name}"
    if run.num_sites > ALL_SITES:
        chosen = {}
        words = f"Sites of {run.name} to look at"
        for why, badness in (("failed", failed * 1.0), ("least accurate", -accuracy), ("slowest", seconds)):
            for site in np.argsort(-badness)[:WORST_SITES]:  # NaN is last
                if not np.isnan(badness[site]) and badness[site] != 0:
                    chosen.setdefault(int(site), []).append(why)
    columns: list[tuple[str, Callable[[int], str]]] = [
        ("why", lambda site: ", ".join(chosen[site]) or NONE),
        ("rank", lambda site: str(of_site(run, site).get("rank", NONE))),
        ("device", lambda site: str(of_site(run, site).get("device", NONE))),
        ("examples", lambda site: number(run.examples[site], "{:,.0f}")),
        ("tokens", lambda site: number(of_site(run, site).get("tokens"), "{:,.0f}")),
        ("mostly", lambda site: main_label(run, site) or NONE),
        ("accuracy", lambda site: number(accuracy[site], "{:.4f}")),
        ("loss", lambda site: number(loss[site], "{:.4f}")),
        ("seconds", lambda site: number(seconds[site], "{:,.2f}")),
        ("s per 1,000 examples", lambda site: number(1000 * seconds[site] / run.examples[site], "{:,.2f}")),
        ("MB", lambda site: number(memory[site], "{:,.0f}")),
        ("rounds failed", lambda site: str(failed[site] or NONE)),
    ]
    filled = [(name, texts) for name, text in columns if set(texts := [text(site) for site in chosen]) - {NONE}]
    rows = [Row(f"site {site}", [texts[row] for _, texts in filled]) for row, site in enumerate(chosen)]
    return words, [name for name, _ in filled], rows


def of_site(run: Run, site: int) -> dict[str, Any]:
    """Return what is known of a site."""
    return run.sites[site] if site < len(run.sites) else {}


def number(value: Any, form: str) -> str:
    """Return a number in its form, a dash for none."""
    return form.format(value) if isinstance(value, int | float) and np.isfinite(value) else NONE

"""Read the folder of a run: Sacred's files, the rounds, and the data of the sites."""

import json
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np

PHASES = ("setup", "train", "aggregate", "evaluate", "checkpoint")


@dataclass(frozen=True)
class Run:
    """The record of a run. A missing number is NaN.

    Args:
        folder: of the run.
        name: different for each run of a report.
        config: its settings.
        record: Sacred's `run.json`.
        info: about the sites' data and the machine.
        rounds: the metrics of each round, by increasing `round`.
    """

    folder: str
    name: str
    config: dict[str, Any]
    record: dict[str, Any]
    info: dict[str, Any]
    rounds: list[dict[str, Any]]

    @cached_property
    def steps(self) -> np.ndarray:
        """The numbers of the rounds."""
        return self.metric("round")

    def metric(self, name: str) -> np.ndarray:
        """Return a metric's value in each round."""
        return numbers(round_.get(name) for round_ in self.rounds)

    def has(self, name: str) -> np.ndarray:
        """Tell of each round whether it has a metric: not all rounds are evaluated."""
        return np.array([name in round_ for round_ in self.rounds])

    def last(self, name: str) -> float:
        """Return a metric's value in the last round that has it, NaN if none has."""
        return float(self.metric(name)[self.has(name)][-1]) if self.has(name).any() else np.nan

    @cached_property
    def best_round(self) -> int | None:
        """The index of the best round: by the record, otherwise the most accurate in validation."""
        recorded = self.info.get("best")
        number = recorded.get("round") if isinstance(recorded, dict) else None
        found = np.flatnonzero(self.steps == numbers([number]))
        return int(found[0]) if len(found) else best(self.metric("validation.accuracy"))

    def of_sites(self, name: str) -> np.ndarray:
        """Return `site.{name}` as a table with a row for each round and a column for each site."""
        table = np.full((len(self.rounds), self.num_sites), np.nan)
        for row, round_ in zip(table, self.rounds, strict=True):
            by_site = of_each_site(round_.get(f"site.{name}"))
            row[list(by_site)] = numbers(by_site.values())
        return table

    def median_of_sites(self, name: str) -> np.ndarray:
        """Return the median of `site.{name}` over the rounds, NaN for sites without a value."""
        table = self.of_sites(name)
        medians = np.full(self.num_sites, np.nan)
        known = ~np.isnan(table).all(axis=0)
        if known.any():
            medians[known] = np.nanmedian(table[:, known], axis=0)
        return medians

    def last_of_sites(self, name: str) -> np.ndarray:
        """Return `site.{name}` in the last round in which a site has it, NaN for the other sites."""
        table = self.of_sites(name)
        known = table[~np.isnan(table).all(axis=1)]
        return known[-1] if len(known) else np.full(self.num_sites, np.nan)

    @cached_property
    def sites(self) -> list[dict[str, Any]]:
        """The known properties of each site; sites that have no fixed place have no rank."""
        sites = [site if isinstance(site, dict) else {} for site in as_list(self.info.get("sites"))]
        return [{key: value for key, value in site.items() if value is not None} for site in sites]

    @cached_property
    def metrics(self) -> dict[str, dict[str, str]]:
        """The unit and the meaning of each metric; runs of old versions do not have them."""
        found = self.info.get("meanings")
        found = found.items() if isinstance(found, dict) else ()
        return {name: of for name, of in found if isinstance(of, dict)}

    @cached_property
    def num_sites(self) -> int:
        """The number of sites in the record."""
        values = (value for round_ in self.rounds for key, value in round_.items() if key.startswith("site."))
        return max([len(self.sites), *(site + 1 for value in values for site in of_each_site(value))])

    @cached_property
    def labels(self) -> list[str]:
        """The names of the classes."""
        names = [" ".join(str(name).split()) for name in as_list(self.info.get("labels"))]
        return names + [f"class {index}" for index in range(len(names), self.label_counts.shape[1])]

    @cached_property
    def label_counts(self) -> np.ndarray:
        """How many examples of each class a site has: a row a site, a column a class."""
        rows = [numbers(as_list(site.get("labels"))) for site in self.sites]
        table = np.zeros((len(rows), max(map(len, rows), default=0)))
        for row, counts in zip(table, rows, strict=True):
            row[: len(counts)] = np.nan_to_num(counts)
        return table

    @cached_property
    def examples(self) -> np.ndarray:
        """How many examples each site trains on."""
        counts = np.full(self.num_sites, np.nan)
        counts[: len(self.sites)] = numbers(site.get("examples") for site in self.sites)
        return np.where(np.isnan(counts), self.median_of_sites("examples"), counts)

    @cached_property
    def phases(self) -> dict[str, np.ndarray]:
        """The seconds of each phase in each round."""
        seconds = {phase: self.metric(f"time.{phase}_s") for phase in PHASES}
        return {phase: np.nan_to_num(values) for phase, values in seconds.items() if not np.isnan(values).all()}

    @cached_property
    def elapsed(self) -> np.ndarray:
        """The seconds from the start to the end of each round."""
        return np.cumsum(np.nan_to_num(self.metric("time.round_s")))

    @cached_property
    def sent(self) -> np.ndarray:
        """The bytes sent from the start to the end of each round."""
        return np.cumsum(np.nan_to_num(self.metric("comm.bytes")))


def numbers(values: Iterable[Any]) -> np.ndarray:
    """Return values as an array, with NaN for all others than finite numbers."""
    floats = [float(value) if isinstance(value, int | float) and abs(value) < 1e300 else np.nan for value in values]
    return np.array(floats, dtype=float)


def as_list(value: Any) -> list:
    """Return a list unchanged, and an empty list for other values."""
    return value if isinstance(value, list) else []


def cut(value: object, most: int) -> str:
    """Return a value as a text of at most so many characters."""
    text = str(value)
    return text if len(text) <= most else f"{text[: most - 1]}…"


def of_each_site(value: Any) -> dict[int, Any]:
    """Return a metric that has a value for each site, by site; older runs have a list."""
    if isinstance(value, dict):
        return {int(site): number for site, number in value.items() if site.isdecimal()}
    return dict(enumerate(as_list(value)))


def best(values: np.ndarray) -> int | None:
    """Return the index of the largest value, None if all are NaN."""
    return None if np.isnan(values).all() else int(np.nanargmax(values))


def time_unit(seconds: float) -> tuple[float, str]:
    """Return the seconds of a suitable unit of time, and its name."""
    return (3600, "hours") if seconds > 7200 else (60, "minutes") if seconds > 300 else (1, "seconds")


def read(folders: Sequence[str]) -> list[Run]:
    """Read the folders of runs, and add the folder to names that are not different.

    Raises:
        ValueError: a folder is not that of a run, has no finished round, or has an invalid file.
    """
    runs = [read_run(folder) for folder in folders]
    names = Counter(run.name for run in runs)
    return [run if names[run.name] == 1 else replace(run, name=f"{run.name} ({run.folder})") for run in runs]


def read_run(folder: str) -> Run:
    """Read the folder of a run, and name it after its job or its folder."""
    if not os.path.isfile(os.path.join(folder, "run.json")):
        raise ValueError(f"{folder!r}: expected the folder of a run, such as runs/1, got one without a run.json")
    config, record = (read_object(os.path.join(folder, name)) for name in ("config.json", "run.json"))
    rounds = read_rounds(os.path.join(folder, "rounds.jsonl")) or read_metrics(os.path.join(folder, "metrics.json"))
    if not rounds:
        raise ValueError(f"{folder!r}: expected a run with a finished round, got none")
    name = str(config.get("job_name") or f"run {os.path.basename(os.path.abspath(folder))}")
    name += ", centralised" * (config.get("centralised") is True)
    settings = {key: value for key, value in config.items() if not key.startswith("__")}
    return Run(folder, name, settings, record, read_object(os.path.join(folder, "info.json")), rounds)


def read_object(path: str) -> dict[str, Any]:
    """Return the JSON object of a file, an empty one if the file does not exist."""
    if not os.path.exists(path):
        return {}
    with open(path, encoding="utf-8") as file:
        try:
            value = json.load(file)
        except ValueError as error:
            raise ValueError(f"{path!r}: expected JSON, got other text ({error})") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path!r}: expected a JSON object, got a {type(value).__name__}")
    return value


def read_rounds(path: str) -> list[dict[str, Any]]:
    """Return the rounds of a file with a JSON object on each line; of a repeated round, the last.

    An incomplete last line is skipped, as the run may be writing it, or was stopped.
    """
    if not os.path.exists(path):
        return []
    with open(path, encoding="utf-8", errors="replace") as file:
        lines = file.read().split("\n")
    rounds = {}
    for number, line in enumerate(lines, start=1):
        try:
            round_ = json.loads(line) if line.strip() else None
        except ValueError as error:
            if number == len(lines):
                break
            raise ValueError(f"{path!r}, line {number}: expected JSON, got other text ({error})") from None
        if round_ is not None:
            if not isinstance(round_, dict) or not isinstance(round_.get("round"), int):
                raise ValueError(f"{path!r}, line {number}: expected an object with the number of a round, got none")
            rounds[round_["round"]] = round_
    return [rounds[number] for number in sorted(rounds)]


def read_metrics(path: str) -> list[dict[str, Any]]:
    """Return the rounds of Sacred's metrics.json, which has steps and values for each metric."""
    rounds: dict[int, dict[str, Any]] = {}
    for name, metric in read_object(path).items():
        if name.startswith("step."):
            continue  # its steps are no rounds
        for step, value in zip(metric["steps"], metric["values"], strict=True):
            rounds.setdefault(step, {"round": step})[name] = value
    return [rounds[step] for step in sorted(rounds)]

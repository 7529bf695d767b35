"""The grid of a sweep: the values of each setting, the runs that they make, and which of these are done."""

import hashlib
import json
import re
from ast import literal_eval
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

from scaling_fl.experiment.checks import check, find_problems, quote_text
from scaling_fl.experiment.contradictions import find_contradictions
from scaling_fl.experiment.result import CONFIG, RECORD
from scaling_fl.experiment.settings import FIELDS, Settings

OPENING, CLOSING = "([{", ")]}"
# Settings that say where results go. A run is done whatever they were.
OF_RESULTS = {"job_name", "checkpoints_dir", "keep_checkpoints", "report", "trackers", "track_sites", "author"}
LONGEST_NAME = 80  # characters of the name and the folder of a run, and the folder of a sweep, without the digest


@dataclass(frozen=True)
class Point:
    """A run of the grid.

    Args:
        swept: its values of the settings that have several.
        given: all settings that are given, with these.
    """

    swept: Mapping[str, Any]
    given: Mapping[str, Any]

    @property
    def name(self) -> str:
        """What distinguishes it from the others of the grid."""
        return " ".join(f"{name}={_as_word(value)}" for name, value in self.swept.items()) or "the only run"

    def word(self, name: str) -> str:
        """Return the value of a setting as it can be typed."""
        return _as_word(self.given[name])

    @property
    def folder(self) -> str:
        """The name of its folder, which does not depend on what a resumed run may change."""
        words = [f"{name}={_as_word(self.swept[name])}" for name in sorted(self.swept)]
        return f"{_as_file_name(words)}{_digest({**_unchangeable(self.given), **self.swept})}"

    def settings(self) -> dict[str, Any]:
        """Return the settings of its run: those given, and a name and a place for checkpoints that no other run has."""
        found = dict(self.given)
        job, name, digest = found.get("job_name"), self.name, f" ({self.folder[-8:]})"
        if len(name) > LONGEST_NAME:  # trackers refuse long ones
            name = f"{name[:LONGEST_NAME]}...{digest if job else ''}"
        found["job_name"] = f"{job}: {name}" if job else f"{name}{digest}"
        if directory := found.get("checkpoints_dir"):
            found["checkpoints_dir"] = f"{directory.rstrip('/')}/{self.folder}"
        return found


def make_grid(words: Mapping[str, str]) -> list[Point]:
    """Return the runs of all combinations of values, those of the last setting changing first.

    Args:
        words: what is typed for each setting: a value, or several with commas between them.

    Raises:
        ValueError: with a line for each setting whose values cannot be told apart.
    """
    values: dict[str, list[Any]] = {}

    def read(name: str) -> None:
        values[name] = read_values(name, words[name])

    if problems := find_problems([partial(read, name) for name in words]):
        raise ValueError("\n".join(problems))
    swept = [name for name in words if len(values[name]) > 1]
    combinations = [dict(zip(words, each, strict=True)) for each in product(*values.values())]
    return [Point({name: given[name] for name in swept}, given) for given in combinations]


def read_values(name: str, text: str) -> list[Any]:
    """Return the values of a setting.

    Raises:
        ValueError: a value is empty or comes twice, or they are the items of a list without its brackets.
    """
    texts = split_values(name, text)
    values = [_read_value(name, each) for each in texts]
    if len(texts) == 1:
        return values
    if "" in texts:
        raise ValueError(f"{name}: expected a value before and after each comma, got {text!r}")
    if name in FIELDS:
        accepts = FIELDS[name]["kind"].accepts
        if accepts(values) and not all(map(accepts, values)):
            raise ValueError(f"{name}: expected a list in brackets, got {text}. Write {name}={_as_word(values)}")
    for index, value in enumerate(values):
        if repr(value) in map(repr, values[:index]):
            raise ValueError(f"{name}: expected different values, got {_as_word(value)} twice")
    return values


def split_values(name: str, text: str) -> list[str]:
    """Split a text at its commas outside brackets and quotes. A quote opens where a value or an item begins.

    Raises:
        ValueError: a bracket or quote is not closed.
    """
    parts, depth, quote, before = [""], 0, "", ""
    is_escaped = False
    for letter in text:
        if quote:
            quote = "" if letter == quote and not is_escaped else quote
            is_escaped = letter == "\\" and not is_escaped
        elif letter in "'\"" and before in ("", ",", ":", *OPENING):
            quote = letter
        elif letter in OPENING:
            depth += 1
        elif letter in CLOSING:
            depth -= 1
        elif letter == "," and depth == 0:
            parts.append("")
            before = ","
            continue
        parts[-1] += letter
        before = letter if letter.strip() else before
    if len(parts) == 1 and "," not in text:
        return [text]
    if depth or quote:
        raise ValueError(
            f"{name}: expected a closing bracket and quote for each, got {text!r}. Commas outside of them separate "
            f"values; a text with a comma needs quotes, as in {name}=\"'a,b'\""
        )
    return [part.strip() for part in parts]


def find_grid_problems(points: Sequence[Point]) -> list[str]:
    """Return a line for each wrong setting, and for each combination that makes no sense, with a run that has it."""
    found: dict[str, list[Point]] = {}
    for point in points:
        for problem in dict.fromkeys(_find_problems(point)):
            found.setdefault(problem, []).append(point)
    return [problem if len(of) == len(points) else f"{problem} ({_name_runs(of)})" for problem, of in found.items()]


def _find_problems(point: Point) -> list[str]:
    known = {name: value for name, value in point.given.items() if name in FIELDS}
    try:
        settings = Settings(**known)  # which imports the plugins, which add names
    except ValueError as error:
        return str(error).splitlines()
    return find_problems([lambda: check({**vars(settings), **point.given})]) or find_contradictions(settings)


def _name_runs(points: Sequence[Point]) -> str:
    others = f", and {len(points) - 1} more" if len(points) > 1 else ""
    return f"of the run {points[0].name}{others}"


def name_sweep(points: Sequence[Point]) -> str:
    """Return the name of a sweep's folder, which does not depend on the values."""
    point = points[0]
    fixed = {name: value for name, value in point.given.items() if name not in point.swept}
    names = sorted(point.swept)
    return f"sweep-{_as_file_name(names)}{_digest({**_unchangeable(fixed), **dict.fromkeys(names)})}"


def find_done(folder: Path, given: Mapping[str, Any]) -> Path | None:
    """Return the last run among those of a folder that has completed with these settings; None if there is none."""
    settings = json.loads(json.dumps(vars(Settings(**given))))
    runs = [path for path in folder.glob("*") if path.name.isdecimal()]
    for run in sorted(runs, key=lambda path: int(path.name), reverse=True):
        config = _read_object(run / CONFIG)
        names = settings.keys() & config.keys() - OF_RESULTS
        is_same = all(settings[name] == config[name] for name in names)
        if _read_object(run / RECORD).get("status") == "COMPLETED" and names and is_same:
            return run
    return None


def _read_object(path: Path) -> dict[str, Any]:
    """Return the object of a file, an empty one if it was not written."""
    try:
        found = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _read_value(name: str, text: str) -> Any:
    """Return the value that Sacred reads from what is typed for a setting."""
    _, _, text = quote_text(f"{name}={text}").partition("=")
    try:
        return literal_eval(text.strip())
    except (ValueError, SyntaxError):
        return text.strip()


def _unchangeable(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings that a resumed run may not change."""
    return {name: value for name, value in given.items() if not FIELDS[name]["may_change"]}


def _digest(settings: Mapping[str, Any]) -> str:
    return hashlib.sha256(repr(sorted(settings.items())).encode()).hexdigest()[:8]


def _as_word(value: Any) -> str:
    """Return a value as it can be typed."""
    return value if isinstance(value, str) else _as_item(value)


def _as_item(value: Any) -> str:
    if isinstance(value, dict):
        return f"{{{','.join(f'{_as_item(key)}:{_as_item(item)}' for key, item in value.items())}}}"
    return f"[{','.join(map(_as_item, value))}]" if isinstance(value, list) else repr(value)


def _as_file_name(words: Sequence[str]) -> str:
    text = re.sub(r"[^\w.=-]+", "_", "-".join(words), flags=re.ASCII)
    return f"{text[:LONGEST_NAME]}-" if text else ""

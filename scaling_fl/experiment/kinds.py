"""The kinds of values that a setting takes."""

import math
import os
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Kind:
    """A test of a value, and what it accepts in words, or a function that returns these."""

    accepts: Callable[[Any], bool]
    words: str | Callable[[], str]

    @property
    def wanted(self) -> str:
        """What it accepts, in words."""
        return self.words if isinstance(self.words, str) else self.words()


def _is_list(value: Any, least: int, accepts: Callable[[Any], bool]) -> bool:
    return isinstance(value, list | tuple) and len(value) >= least and all(map(accepts, value))


def _is_module(value: Any) -> bool:
    return isinstance(value, str) and all(part.isidentifier() for part in value.split("."))


def _are_of_sites(value: Any) -> bool:
    return (
        isinstance(value, Mapping)
        and len(set(map(str, value))) == len(value)
        and all(re.fullmatch("0|[1-9][0-9]*", str(site)) and type(site) in (int, str) for site in value)
        and all(isinstance(of_site, Mapping) for of_site in value.values())
    )


def _is_site_path(value: Any) -> bool:
    return TEXT.accepts(value) or (_is_list(value, 1, TEXT.accepts) and len(value) <= 2)


TEXT = Kind(lambda value: isinstance(value, str) and value != "", "a text")
NAME = Kind(lambda value: isinstance(value, str), "a text")  # may be empty, as "${USER}" of a shell is in a container
FLAG = Kind(lambda value: isinstance(value, bool), "True or False")
DEVICE_IDS = Kind(
    lambda value: _is_list(value, 1, lambda item: type(item) is int and item >= 0),
    "a list of GPU ids such as [0,0,1,1]",
)
SITE_PATHS = Kind(
    lambda value: _is_list(value, 1, _is_site_path),
    "a list of paths, or of [training file, test file], such as ['/data/a.csv',['/data/b.csv','/data/c.csv']]",
)
SITES = Kind(
    lambda value: _is_list(value, 1, lambda item: TEXT.accepts(item) or (type(item) is int and item >= 0)),
    "a list of numbers or names of sites such as [0,3]",
)
COUNT_OR_FRACTION = Kind(
    lambda value: value >= 1 if type(value) is int else type(value) is float and 0 < value <= 1,
    "a whole number >= 1, or a fraction > 0 and <= 1.0",
)
MODULES = Kind(lambda value: _is_list(value, 0, _is_module), "a list of names of modules such as ['my_module']")
SITE_SETTINGS = Kind(
    _are_of_sites, "settings by the number of a site, such as {3:{'learning_rate':1e-5,'num_local_epochs':1}}"
)
LABELS = Kind(
    lambda value: _is_list(value, 2, lambda item: type(item) in (str, int, float)),
    "a list of two or more labels such as ['no','yes']",
)
TRACKERS = Kind(
    lambda value: _is_list(value, 0, TEXT.accepts) and len(set(value)) == len(value),
    "a list of different names of trackers such as ['tensorboard']",
)
TARGETS = Kind(
    lambda value: value == "all-linear" or _is_list(value, 1, TEXT.accepts),
    "all-linear, or a list of names of modules such as ['query','value']",
)
NAMES = Kind(lambda value: _is_list(value, 1, TEXT.accepts), "a list of names of modules such as ['pooler']")
QUESTIONS = Kind(lambda value: _is_list(value, 1, TEXT.accepts), "a list of texts such as ['What is a dog?']")
PEFT_CONFIG = Kind(
    lambda value: TEXT.accepts(value) or (isinstance(value, Mapping) and "peft_type" in value),
    "the path of an adapter_config.json, or its contents such as {'peft_type':'IA3'}",
)
SIZES = Kind(
    lambda value: value in ("linear", "exponential") or _is_list(value, 1, number(above=0).accepts),
    "linear, exponential, or a list with a number > 0 for each site, such as [3,1,1]",
)
BITS = Kind(lambda value: type(value) is int and value in (8, 4), "8 or 4")
FRACTION = Kind(lambda value: type(value) is float and 0 < value < 1, "a fraction > 0 and < 1, such as 0.2")


def whole_number(least: int, below: float = math.inf) -> Kind:
    """Accept whole numbers from `least`."""
    wanted = f"a whole number >= {least}" + (f" and < {below}" if below < math.inf else "")
    return Kind(lambda value: type(value) is int and least <= value < below, wanted)


def number(*, above: float = -math.inf, least: float = -math.inf, below: float = math.inf) -> Kind:
    """Accept finite numbers within bounds."""
    bounds = [
        f"{sign} {bound:g}" for sign, bound in ((">", above), (">=", least), ("<", below)) if abs(bound) < math.inf
    ]
    return Kind(
        # An int may be larger than any float, which math.isfinite does not survive.
        lambda value: (
            type(value) in (int, float)
            and abs(value) <= sys.float_info.max
            and least <= value > above
            and value < below
        ),
        " ".join(["a number", " and ".join(bounds)]).rstrip(),
    )


def one_of(names: Iterable[str], *first: str) -> Kind:
    """Accept some names: `first` and `names`, to which plugins may add."""
    return Kind(
        lambda value: isinstance(value, str) and value in (*first, *names),
        lambda: f"one of {', '.join([*first, *names])}",
    )


def optional(kind: Kind) -> Kind:
    """Accept None too."""
    return Kind(lambda value: value is None or kind.accepts(value), lambda: f"{kind.wanted} or None")


def plain(value: Any) -> Any:
    """Return a value with lists and dicts of Python's own classes in it, and texts in place of paths."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return os.fspath(value) if isinstance(value, os.PathLike) else value


def sort_sites(by_site: Any) -> Any:
    """Return `site_settings` in one form: YAML and the command line have numbers as keys, JSON and MongoDB texts."""
    if not by_site or not SITE_SETTINGS.accepts(by_site):
        return by_site or None  # is refused later
    found = {int(site): dict(sorted(of_site.items())) for site, of_site in by_site.items()}
    return {site: found[site] for site in sorted(found) if found[site]} or None

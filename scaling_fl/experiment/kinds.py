"""The kinds of values that a setting takes."""

import math
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Kind:
    """A test of a value, and what it accepts in words."""

    accepts: Callable[[Any], bool]
    wanted: str


def _is_list(value: Any, least: int, accepts: Callable[[Any], bool]) -> bool:
    return isinstance(value, list | tuple) and len(value) >= least and all(map(accepts, value))


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
LABELS = Kind(
    lambda value: _is_list(value, 2, lambda item: type(item) in (str, int, float)),
    "a list of two or more labels such as ['no','yes']",
)


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


def one_of(names: Iterable[str]) -> Kind:
    """Accept some names."""
    names = tuple(names)
    return Kind(lambda value: isinstance(value, str) and value in names, f"one of {', '.join(names)}")


def optional(kind: Kind) -> Kind:
    """Accept None too."""
    return Kind(lambda value: value is None or kind.accepts(value), f"{kind.wanted} or None")

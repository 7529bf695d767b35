"""The kinds of values that a setting takes, and the sentence for one that it does not."""

import math
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any


@dataclass(frozen=True)
class Kind:
    """A test of a value, and in words what passes it."""

    accepts: Callable[[Any], bool]
    wanted: str


TEXT = Kind(lambda value: isinstance(value, str) and value != "", "a text")
FLAG = Kind(lambda value: isinstance(value, bool), "True or False")
DEVICE_IDS = Kind(
    lambda value: isinstance(value, list | tuple) and len(value) > 0 and all(type(i) is int and i >= 0 for i in value),
    "a list of GPU ids such as [0,0,1,1]",
)
SITE_PATHS = Kind(
    lambda value: isinstance(value, list | tuple) and len(value) > 0 and all(map(_is_site_path, value)),
    "a list of paths, or of [training file, test file], such as ['/data/a.csv',['/data/b.csv','/data/c.csv']]",
)

LABELS = Kind(
    lambda value: (
        isinstance(value, list | tuple) and len(value) > 1 and all(type(i) in (str, int, float) for i in value)
    ),
    "a list of two or more labels such as ['no','yes']",
)


def _is_site_path(value: Any) -> bool:
    files = value if isinstance(value, list | tuple) else [value]
    return 1 <= len(files) <= 2 and all(map(TEXT.accepts, files))


def whole_number(least: int, below: float = math.inf) -> Kind:
    """Accept whole numbers from `least`."""
    wanted = f"a whole number from {least}" + (f" below {below}" if below < math.inf else "")
    return Kind(lambda value: type(value) is int and least <= value < below, wanted)


def number(*, above: float = -math.inf, least: float = -math.inf, below: float = math.inf) -> Kind:
    """Accept finite numbers within bounds."""
    bounds = [f"{word} {bound:g}" for word, bound in (("above", above), ("from", least), ("below", below))]
    wanted = " ".join(["a number", *(bound for bound in bounds if "inf" not in bound)])
    return Kind(
        # An int may be larger than any float, which math.isfinite does not survive.
        lambda value: (
            type(value) in (int, float)
            and abs(value) <= sys.float_info.max
            and least <= value > above
            and value < below
        ),
        wanted,
    )


def one_of(names: Iterable[str]) -> Kind:
    """Accept some names."""
    names = tuple(names)
    return Kind(lambda value: isinstance(value, str) and value in names, ", ".join(names))


def optional(kind: Kind) -> Kind:
    """Accept None too."""
    return Kind(lambda value: value is None or kind.accepts(value), f"{kind.wanted} or None")


def check(settings: Mapping[str, Any], kinds: Mapping[str, Kind]) -> None:
    """Compare settings with their kinds.

    Raises:
        ValueError: keys are unknown, or values are not of their kinds, a line for each.
    """
    problems = []
    for key, value in settings.items():
        if key not in kinds:
            problems.append(unknown(key, kinds))
        elif not kinds[key].accepts(value):
            problems.append(f"{key}={value!r} was given: {kinds[key].wanted} would do")
    if problems:
        raise ValueError("\n".join(problems))


def unknown(key: object, kinds: Iterable[str]) -> str:
    """Return the sentence for a setting that there is not. None has a part of its own, so `model.name` is one."""
    kinds = list(kinds)
    whole = [kind for kind in kinds if re.match(rf"{kind}\W", str(key))]
    near = whole or get_close_matches(str(key), kinds, n=1)
    hint = f"did you mean {near[0]}?" if near else f"{', '.join(kinds)} would do"
    return f"there is no setting {key!r}: {hint}"


def literal(argument: str, text_keys: Iterable[str]) -> str:
    """Quote the value of a `key=value` that is a text: Sacred would take 20261121_0900 for a number."""
    key, equals, value = argument.partition("=")
    is_bare_text = equals and key in text_keys and value not in ("", "None") and value[0] not in "'\""
    return f"{key}={value!r}" if is_bare_text else argument

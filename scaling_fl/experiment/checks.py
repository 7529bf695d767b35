"""Check settings that are given by name, and write their table."""

import re
from collections.abc import Callable, Mapping, Sequence
from difflib import get_close_matches
from typing import Any

from scaling_fl.experiment.parameters import OPTIONS
from scaling_fl.experiment.settings import EXTENSIBLE, FIELDS, RESOLVED_FIRST, Settings


def find_changed(given: Mapping[str, Any]) -> set[str]:
    """Return the settings whose values are not the defaults, some of which the task, model and options bring."""
    known: dict[str, Any] = {}
    defaults: dict[str, Any] = {}
    for names in (RESOLVED_FIRST, OPTIONS, FIELDS):  # the values of each bring defaults of the next
        found = vars(Settings(**known))
        defaults |= {name: found[name] for name in names if name not in defaults}
        known |= {name: given[name] for name in names if name in given}
    return {name for name, value in given.items() if value != defaults[name]}


def check(values: Mapping[str, Any]) -> None:
    """Check names and values of settings.

    Raises:
        ValueError: with a line for each that is unknown or wrong.
    """
    problems = []
    for name, value in values.items():
        if name not in FIELDS:
            problems.append(unknown(name))
        elif not FIELDS[name]["kind"].accepts(value):
            problems.append(f"{name}: expected {FIELDS[name]['kind'].wanted}, got {describe_value(name, value)}")
    if problems:
        raise ValueError("\n".join(problems))


def describe_value(name: str, value: Any) -> str:
    """Return a wrong value, and what to do about it if that is known."""
    if callable(value) and name in EXTENSIBLE:
        return f"a function. Add it to {EXTENSIBLE[name]} in a module of plugins, and give its name"
    is_of_yaml = isinstance(value, str) and re.fullmatch(r"[-+]?[0-9]+e[-+]?[0-9]+", value, re.IGNORECASE)
    hint = f". To YAML this is a text: write {value.lower().replace('e', '.0e')}" if is_of_yaml else ""
    return f"{value!r}{hint}"


def find_problems(checks: Sequence[Callable[[], object]]) -> list[str]:
    """Return the lines of what all failing checks raise."""
    problems = []
    for check_ in checks:
        try:
            check_()
        except ValueError as error:
            problems += str(error).splitlines()
    return problems


def expect(settings: Settings, reason: str, hint: str = "", **values: Any) -> None:
    """Refuse settings whose values are not these.

    Args:
        settings: to check.
        reason: follows "as" in the sentence.
        hint: ends the sentence.
        values: that are expected, by setting.

    Raises:
        ValueError: a setting has another value.
    """
    for name, value in values.items():
        if (given := getattr(settings, name)) != value:
            raise ValueError(f"{name}: expected {value!r}, as {reason}, got {given!r}{hint}")


def unknown(name: object) -> str:
    """Return the sentence for an unknown setting. None has a part of its own, so `model.name` means `model`."""
    whole = [known for known in FIELDS if re.match(rf"{known}\W", str(name))]
    near = whole or get_close_matches(str(name), FIELDS, n=1)
    hint = f"Did you mean {near[0]}?" if near else "print_config lists all settings"
    return f"{name!r}: expected the name of a setting, got an unknown one. {hint}"


def quote_text(argument: str) -> str:
    """Quote the value of a `name=value` that is a text: Sacred would take 20261121_0900 for a number."""
    name, equals, value = argument.partition("=")
    is_text = name == "task_name" or (name in FIELDS and FIELDS[name]["kind"].accepts("20261121_0900"))
    is_bare = equals and is_text and value not in ("", "None") and value[0] not in "'\"{"
    return f"{name}={value!r}" if is_bare else argument


def table(page: str = "settings") -> str:
    """Return the table of the settings of a page of docs/ in Markdown."""
    rows = ["| setting | default | meaning |", "|---|---|---|"]
    for name, of in FIELDS.items():
        if of["page"] != page:
            continue
        default = "$USER" if name == "author" else str(of["default"]).replace(" ", "")
        rows.append(f"| `{name}` | `{default}` | {of['help']} |")
    return "\n".join(rows)

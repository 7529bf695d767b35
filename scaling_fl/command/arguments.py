"""What is typed after `with`: settings by name, and files of settings."""

import json
import os
from collections.abc import Callable
from functools import partial
from typing import Any

import yaml

from scaling_fl.errors import one_line
from scaling_fl.experiment.checks import find_problems, unknown
from scaling_fl.experiment.settings import FIELDS


class YamlLoader(yaml.SafeLoader):
    """Reads YAML without dates: 2026-11-21 is the name of a job."""


YamlLoader.yaml_implicit_resolvers = {
    first: [(tag, form) for tag, form in resolvers if tag != "tag:yaml.org,2002:timestamp"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
read_yaml = partial(yaml.load, Loader=YamlLoader)
LOADERS: dict[str, Callable[..., Any]] = {".json": json.load, ".yaml": read_yaml, ".yml": read_yaml}


def check_updates(argv: list[str]) -> None:
    """Refuse what follows `with` and is neither a setting nor a file of settings, such as half a list."""
    end = argv.index("with") if "with" in argv else len(argv)
    problems = [
        f"{word!r}: expected `with` before the first setting, got none: ... with {word}"
        for word in argv[1:end]
        if word.partition("=")[0] in FIELDS and "=" in word
    ]
    problems += find_problems([partial(check_update, word) for word in argv[end + 1 :] if not word.startswith("-")])
    if problems:
        raise SystemExit("\n".join(f"error: {problem}" for problem in dict.fromkeys(problems)))


def check_update(word: str) -> None:
    """Refuse what Sacred would take apart at a dot, or stumble over."""
    name, equals, _ = word.partition("=")
    if equals and name.strip():
        if not name.strip().isidentifier():  # others are checked with all settings
            raise ValueError(unknown(name.strip()))
    elif os.path.isfile(word):
        # Values are checked with all settings: those of `plugins`, which add names, may come from elsewhere.
        if problems := [unknown(name) for name in read_file(word) if name not in FIELDS]:
            raise ValueError("\n".join(problems))
    else:
        raise ValueError(
            f"{word!r}: expected name=value or a file of settings, got neither. A value with a space needs quotes"
        )


def insert_files(argv: list[str]) -> list[str]:
    """Return the arguments with the settings of files before those given by name, which replace them.

    Sacred would merge two values that are dicts, and does not take numbers as their keys.
    """
    end = argv.index("with") + 1 if "with" in argv else len(argv)
    paths = [word for word in argv[end:] if "=" not in word and os.path.isfile(word)]
    values = {name: value for path in paths for name, value in read_file(path).items()}
    given = [word for word in argv[end:] if word not in paths]
    return [*argv[:end], *(f"{name}={value!r}" for name, value in values.items()), *given]


def read_file(path: str) -> dict[str, Any]:
    """Return the settings of a file."""
    got = "a file of another kind"
    if load := LOADERS.get(os.path.splitext(path)[1]):
        try:
            with open(path, encoding="utf-8") as file:
                found = load(file)
        except Exception as error:
            got = f"one that cannot be read: {one_line(error)}"
        else:
            if isinstance(found, dict):
                return found
            got = "an empty one" if found is None else f"a {type(found).__name__}"
    raise ValueError(f'{path}: expected settings such as {{"seed": 2}} in JSON (.json) or YAML (.yaml), got {got}')

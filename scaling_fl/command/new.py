"""The subcommand `new`, which writes a small project: settings, and a task, a model and a trainer in Python."""

import re
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path

from scaling_fl.command.results import one_sentence
from scaling_fl.errors import one_line

FILES = ("README.md", "pyproject.toml", "settings.yaml", "task.py", "data/train.csv", "data/test.csv")
NAME = "my_project"  # in these files, in place of the name of the folder
USAGE = """usage: scaling-fl new DIR

Write a small project into the folder DIR, which is new or empty: settings.yaml, and task.py with a task, a model and
a trainer of its own."""


def main(arguments: Sequence[str]) -> None:
    """Write the project that the arguments ask for, and print what to do next."""
    if {"-h", "--help"}.intersection(arguments):
        print(USAGE)
        return
    with one_sentence():
        if len(arguments) != 1:
            raise ValueError(f"new: expected the name of a folder, got {' '.join(arguments) or 'none'}")
        write_project(Path(arguments[0]))
    print(f"{arguments[0]} has {', '.join(FILES)}\n\ncd {arguments[0]}")
    print("scaling-fl plan with settings.yaml\nscaling-fl with settings.yaml")


def write_project(folder: Path) -> None:
    """Write the project into a folder, whose name it gets.

    Raises:
        ValueError: the folder is not empty, cannot be written, or has a name that no project may have.
    """
    name = folder.resolve().name
    if not re.fullmatch(r"[A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9])?", name):
        raise ValueError(f"new: expected a name of letters, digits, - and _, such as {NAME}, got {name!r}")
    if folder.exists() and not (folder.is_dir() and next(folder.iterdir(), None) is None):
        raise ValueError(f"new: expected a folder that is new or empty, got {str(folder)!r}")
    source = files("scaling_fl.command") / "project"
    try:
        for file in FILES:
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
            (folder / file).write_text(source.joinpath(file).read_text("utf-8").replace(NAME, name), "utf-8")
    except OSError as error:
        raise ValueError(
            f"new: expected a folder that can be written, got {str(folder)!r} ({one_line(error)})"
        ) from error

"""Modules of users, which add tasks, models, partitions, strategies, optimisers and trainers by name."""

import hashlib
import os
import sys
import traceback
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

from scaling_fl.errors import one_line


def import_plugins(names: Sequence[str]) -> None:
    """Import modules by name, which lie in the current folder or are installed.

    As for a script of Python, the folder comes before what is installed.

    Raises:
        ValueError: a module is missing, or raises an error.
    """
    folder = os.getcwd()
    if names and folder not in sys.path:
        sys.path.insert(0, folder)
    for name in names:
        try:
            import_module(name)
        except Exception as error:
            raise ValueError(
                f"plugins: expected a module that can be imported, got {name!r} ({one_line(error)}{_place(error)})"
            ) from error


def hash_plugins(names: Sequence[str]) -> dict[str, str]:
    """Return the SHA-256 of the source of modules: of a module's file, or of all Python files in a package.

    Raises:
        ValueError: a module has no file.
    """
    return {f"plugin {name} (SHA-256)": _hash_source(name) for name in names}


def _hash_source(name: str) -> str:
    file = getattr(sys.modules[name], "__file__", None)
    if file is None:
        raise ValueError(f"plugins: expected a module with a file, got {name!r}, which has none")
    path = Path(file)
    is_package = path.name == "__init__.py"
    digest = hashlib.sha256()
    for source in sorted(path.parent.rglob("*.py")) if is_package else [path]:
        data = source.read_bytes()
        name = source.relative_to(path.parent).as_posix()
        digest.update(f"{name} {len(data)} ".encode())
        digest.update(data)
    return digest.hexdigest()


def _place(error: Exception) -> str:
    """Return the line of the user's file that raised an error, in words; nothing if it is not known."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if not frame.filename.startswith("<frozen")]
    last = frames[-1]
    is_known = last.filename not in (__file__, import_module.__code__.co_filename)
    return f", line {last.lineno} of {last.filename}" if is_known else ""

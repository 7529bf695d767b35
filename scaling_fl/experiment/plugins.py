"""Modules of users, which add tasks, models, partitions, strategies, optimisers and trainers by name."""

import hashlib
import os
import sys
import traceback
from collections.abc import Sequence
from importlib import import_module, invalidate_caches
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path

from scaling_fl.errors import one_line

_hashes: dict[str, str] = {}  # of each module's source when it was imported


def import_plugins(names: Sequence[str]) -> None:
    """Import modules by name, which lie in the current folder or are installed.

    As for a script of Python, the folder comes before what is installed.

    Raises:
        ValueError: a module is missing, or raises an error.
    """
    folder = os.getcwd()
    if names and sys.path[:1] != [folder]:
        sys.path[:] = [folder, *(entry for entry in sys.path if entry != folder)]
        invalidate_caches()
    for name in names:
        try:
            if name in sys.modules and _hashes.get(name) != _hash_source(_find(name)):
                del sys.modules[name]  # it was edited, or another project has one of this name
            _hashes[name] = _hash_source(import_module(name).__spec__)
        except (Exception, SystemExit) as error:
            raise ValueError(
                f"plugins: expected a module that can be imported, got {name!r} ({one_line(error)}{_place(error)})"
            ) from error


def hash_plugins(names: Sequence[str]) -> dict[str, str]:
    """Return the SHA-256 of the source of modules: of a module's file, or of all Python files in a package.

    Raises:
        ValueError: a module has no file.
    """
    hashes = {name: _hash_source(sys.modules[name].__spec__) for name in names}
    for name, digest in hashes.items():
        if not digest:
            raise ValueError(f"plugins: expected a module with a file, got {name!r}, which has none")
    return {f"plugin {name} (SHA-256)": digest for name, digest in hashes.items()}


def _find(name: str) -> ModuleSpec | None:
    """Return where a module would be imported from now; one inside a package stays where it is."""
    return sys.modules[name].__spec__ if "." in name else PathFinder.find_spec(name)


def _hash_source(spec: ModuleSpec | None) -> str:
    """Return the SHA-256 of a module's source; nothing if it has no file."""
    if spec is None or not spec.has_location or spec.origin is None:
        return ""
    path = Path(spec.origin)
    is_package = path.name == "__init__.py"
    digest = hashlib.sha256()
    for source in sorted(path.parent.rglob("*.py")) if is_package else [path]:
        data = source.read_bytes()
        digest.update(f"{source.relative_to(path.parent).as_posix()} {len(data)} ".encode())
        digest.update(data)
    return digest.hexdigest()


def _place(error: BaseException) -> str:
    """Return the line of the user's file that raised an error, in words; nothing if it is not known."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if not frame.filename.startswith("<frozen")]
    last = frames[-1]
    is_known = last.filename not in (__file__, import_module.__code__.co_filename)
    return f", line {last.lineno} of {last.filename}" if is_known else ""

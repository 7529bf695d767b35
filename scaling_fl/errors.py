"""What went wrong in one sentence, letters that do not print, and numbers from the environment."""

import io
import os
import sys
from collections.abc import Iterable

LONGEST_LINE = 200  # characters


def whole_number_from_environment(name: str, default: str, least: int = 1) -> int:
    """Return a variable of the environment that is a whole number.

    Raises:
        ValueError: it is not.
    """
    value = os.environ.get(name) or default
    if not value.isdecimal() or int(value) < least:
        raise ValueError(f"{name}: expected a whole number from {least}, got {value!r}")
    return int(value)


def one_line(error: BaseException) -> str:
    """Return the message of an exception, cut to 200 characters, or its name if it has none or only a key."""
    message = " ".join(str(error).split())
    if len(message) > LONGEST_LINE:
        message = f"{message[: LONGEST_LINE - 4]} ..."
    return f"KeyError: {message}" if isinstance(error, KeyError) else message or type(error).__name__


def printable(name: str) -> str:
    """Return a name in one line, with escapes for what does not print."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in name)


def escape_unprintable() -> None:
    """Print escapes in place of letters that the terminal or file has no code for: any name may hold an emoji."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def preview(names: Iterable[object]) -> str:
    """Return the first names, for people."""
    names = list(names)
    words = [" ".join(str(name).split()) for name in names[:8]]
    words = [printable(word if len(word) <= 24 else f"{word[:21]}...") for word in words]
    return ", ".join(words + ["..."] * (len(names) > len(words)))

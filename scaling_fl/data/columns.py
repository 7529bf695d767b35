"""The columns that are read of a file, and the check that they hold texts. Other columns are ignored."""

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import fsspec

from scaling_fl.errors import preview

Columns = tuple[str, ...]  # of the texts, of the labels, and perhaps of the names of sites
NOT_UTF8 = "expected UTF-8, got an {}. Save the file as UTF-8"
KEYS = ("text_column", "label_column", "site_column")  # the settings that name them
NAMES = ("text", "label", "site")  # of the columns of rows as they are used
LISTS = ("messages", "prompt", "completion")  # fields that may be lists of the turns of a conversation
ROOT = ("prompt", "message_id")  # a field that may be a tree of messages, and what tells that it is one


class ColumnError(ValueError):
    """A file lacks a column that is to be read."""


def find_columns(columns: Columns | None, names: Sequence[str], place: str) -> tuple[str, ...]:
    """Return the columns to read: those given, or all that the file at a place has.

    Raises:
        ColumnError: one is not in the file.
        ValueError: the file has one several times.
    """
    counts = Counter(names)
    for key, column in zip(KEYS, columns or (), strict=False):
        if not counts[column]:
            raise ColumnError(f"{key}: expected a column of {place!r} ({preview(map(repr, names))}), got {column!r}")
    found = columns or tuple(names)
    twice = sorted({column for column in found if counts[column] > 1})
    if twice:
        raise ValueError(f"expected each column once, got several called {', '.join(twice)}. Rename them")
    return found


def key_of(column: str, columns: Columns | None) -> str:
    """Return the setting that names a column; if none does, that of the labels."""
    return dict(zip(columns or (), KEYS, strict=False)).get(column, KEYS[1])


def open_text(path: str) -> Any:
    """Open a file of text, packed or not. Bytes that are not UTF-8 are left for `check_characters` to find."""
    return fsspec.open(path, "rt", encoding="utf-8-sig", errors="surrogateescape", newline="", compression="infer")


def check_text(value: Any, name: str) -> str:
    """Return the value of a field, which must be a text.

    Raises:
        ValueError: it is none, or is not UTF-8.
    """
    if type(value) is not str:
        raise ValueError(f"{name!r}: expected a text, got {'none' if value is None else 'another value'}")
    check_characters([value], repr(name))
    return value


def check_characters(fields: Iterable[str | None], place: str, around: str = "") -> None:
    """Check that fields have whole characters.

    Args:
        fields: of a row.
        place: of the row, in words.
        around: more of the row, which helps to explain a wrong byte.

    Raises:
        ValueError: bytes of the file were not UTF-8, or JSON has an escape for one half of a pair.
    """
    text = "".join(field for field in fields if field)
    if text.isascii():
        return
    try:
        text.encode()
    except UnicodeEncodeError:
        try:
            (around or text).encode(errors="surrogateescape").decode()
        except UnicodeDecodeError as error:
            raise ValueError(f"{place}: {NOT_UTF8.format(error.reason)}") from None
        except UnicodeEncodeError:
            raise ValueError(f"{place}: expected whole characters, got a surrogate without its partner") from None

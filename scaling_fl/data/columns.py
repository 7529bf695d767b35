"""The columns of a file that are read, and what is no text in them. The other columns are nobody's business."""

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import fsspec

from scaling_fl.errors import preview

Columns = tuple[str, str]  # of the texts, of the labels
KEYS = ("text_column", "label_column")  # the settings that name them


class ColumnError(Exception):
    """A file does not have a column that is to be read, but others."""

    def __init__(self, column: str, names: Iterable[str]) -> None:
        super().__init__(column)
        self.column, self.names = column, tuple(names)

    def sentence(self, path: str, columns: Sequence[str]) -> str:
        """Return what is wrong with a file, given its path and the columns that are asked for."""
        key = KEYS[columns.index(self.column)]
        return f"{key}={self.column!r} is not in {path!r}: {preview(map(repr, self.names))} would do"


def find_columns(columns: Columns | None, names: Sequence[str]) -> tuple[str, ...]:
    """Return the columns to read: those that are asked for, or all.

    Raises:
        ColumnError: one is not in the file.
        ValueError: one is there several times.
    """
    found = tuple(dict.fromkeys(columns)) if columns else tuple(names)
    counts = Counter(names)
    for column in found:
        if not counts[column]:
            raise ColumnError(column, names)
    twice = sorted({column for column in found if counts[column] > 1})
    if twice:
        raise ValueError(f"it has several columns called {', '.join(twice)}: rename them")
    return found


def open_text(path: str) -> Any:
    """Open a file of text, packed or not. Bytes that are not UTF-8 are left for `check_characters` to find."""
    return fsspec.open(path, "rt", encoding="utf-8-sig", errors="surrogateescape", newline="", compression="infer")


def check_characters(fields: Iterable[str | None], around: str = "") -> None:
    """Look for halves of characters.

    Args:
        fields: of a row.
        around: more of the row, which tells better what is wrong with a byte.

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
            raise ValueError(f"it is not UTF-8 ({error.reason}): save it as that") from None
        except UnicodeEncodeError:
            raise ValueError("it has half a character, a surrogate without its partner") from None

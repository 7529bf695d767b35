"""Rows of files whose fields are separated by commas, tabs, semicolons or bars."""

import csv
import re
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from scaling_fl.data.cache import Row
from scaling_fl.data.columns import NOT_UTF8, Columns, check_characters, find_columns, open_text

SEPARATORS = (",", ";", "\t", "|")
TABS = re.compile(r"\.(tsv|tab)(\.\w+)?$", re.IGNORECASE)  # a name that promises tabs
QUOTED = re.compile(r'"(?:[^"]|"")*"')


class Head(NamedTuple):
    """The separator of a file, the names of its columns, and whether its first row has these names."""

    separator: str
    names: Sequence[str]
    is_first_row: bool


def read_csv(path: str, columns: Columns | None, names: Sequence[str]) -> Iterator[Row]:
    """Yield the names of the columns to read, then each row's fields as they stand: none is a number, none is missing.

    Args:
        path: a local path or fsspec URL.
        columns: to read; None reads all.
        names: of the columns where there is no header. A header with the columns to read is used where there is one.
    """
    head = _find_head(path, columns, names)
    used = find_columns(columns, head.names, path)
    yield used
    places = [head.names.index(column) for column in used]
    number = 0
    rows = _rows(path, head.separator, is_plain=_is_plain(path, head.separator))
    for number, (line, row) in enumerate(rows, start=0 if head.is_first_row else 1):
        if number > 0:
            fields = _fit(row, number, head.names)
            picked = tuple(fields[place] for place in places)
            _check(picked, line, row)
            yield picked
    if number == 0:
        raise ValueError("expected a row below the header, got none")


def _find_head(path: str, columns: Columns | None, names: Sequence[str]) -> Head:
    """Read the header: by the separator that the file's name promises, or by another one that finds the columns."""
    wanted = set(columns or names)
    promised = "\t" if TABS.search(path) else ","
    separators = sorted(SEPARATORS, key=promised.__ne__) if wanted else [promised]
    heads: list[tuple[int, list[str]]] = []
    problem: ValueError | None = None  # of the promised separator; an error of others only means that they do not fit
    for separator in separators:
        try:
            line, row = next(_rows(path, separator), (0, []))
        except ValueError as error:
            problem = error if separator == promised else problem
            continue
        if not row:
            raise ValueError("expected rows, got an empty file")
        if not wanted:
            _check_separator(row, line)
        if wanted <= set(row):
            return Head(separator, row, True)
        if separator == promised and len(row) >= len(names) > 0 and _is_blank(row[len(names) :]):
            return Head(separator, names, False)
        heads.append((line, row))
    if problem:
        raise problem
    line, row = heads[0]
    _check(row, line, row)
    if names:
        raise ValueError(f"expected the {len(names)} columns {', '.join(names)}, got {len(row)} columns")
    return Head(promised, max((row for _, row in heads), key=len), True)


def _check_separator(row: list[str], line: int) -> None:
    _check(row, line, row)
    separator = re.search(r"[;\t|]", row[0])
    if len(row) == 1 and separator:
        raise ValueError(f"expected columns separated by commas, got {separator[0]!r}")


def _fit(row: list[str], number: int, names: Sequence[str]) -> list[str]:
    """Make a row as long as the header.

    Spreadsheets write empty fields at the end of some rows, and leave out those of columns without a name in others.
    A row without a field that has a name is refused: it may be half of one with a line break in it.
    """
    width = len(names)
    if len(row) > width and _is_blank(row[width:]):
        return row[:width]
    if len(row) < width and _is_blank(names[len(row) :]):
        return [*row, *[""] * (width - len(row))]
    if len(row) != width:
        raise ValueError(f"row {number}: expected {width} fields, got {len(row)}")
    return row


def _is_blank(fields: Sequence[str]) -> bool:
    return not any(field.strip() for field in fields)


def _check(fields: Sequence[str], line: int, row: Sequence[str]) -> None:
    """Refuse bytes that are not UTF-8, and UTF-16 without a byte order mark."""
    check_characters(fields, f"line {line}", "".join(row))
    if any("\0" in field for field in fields):
        raise ValueError(f"line {line}: {NOT_UTF8.format('unexpected NUL byte')}")


def _rows(path: str, separator: str, *, is_plain: bool = False) -> Iterator[tuple[int, list[str]]]:
    """Yield each row that is not blank, and the number of its last line."""
    csv.field_size_limit(sys.maxsize)
    with open_text(path) as file:
        if is_plain:
            lines = enumerate((line.rstrip("\r\n") for line in file), start=1)
            yield from ((number, list(map(_unquote, line.split(separator)))) for number, line in lines if line)
            return
        reader = csv.reader(file, delimiter=separator, strict=True)
        try:
            for row in reader:
                if row:
                    yield reader.line_num, row
        except csv.Error as error:
            raise ValueError(f"line {reader.line_num}: {error}") from None


def _is_plain(path: str, separator: str) -> bool:
    """Tell whether a row is a line, and a quote any character but where a pair encloses a field.

    Some programs write quotes in tables of tabs as those of CSV, others as any character.

    Raises:
        ValueError: the file may be both.
    """
    if separator != "\t":
        return False
    with open_text(path) as file:
        tabs = Counter(line.count(separator) for line in file if line.strip())
    if len(tabs) > 1:
        return False
    try:
        widths = Counter(len(row) - 1 for _, row in _rows(path, separator))
    except ValueError:
        return True
    if widths.total() < tabs.total() and widths.keys() == tabs.keys():
        raise ValueError(
            "expected quotes of one kind, got some that stand for themselves or enclose several rows. Save it as CSV"
        )
    return True


def _unquote(field: str) -> str:
    return field[1:-1].replace('""', '"') if QUOTED.fullmatch(field) else field

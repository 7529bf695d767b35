"""Rows of JSON Lines, or of a list in JSON, one at a time: a string stays that string, a number all its digits."""

import json
from collections.abc import Iterator
from typing import Any, TextIO

from scaling_fl.data.cache import Row
from scaling_fl.data.columns import KEYS, LISTS, ROOT, Columns, check_characters, find_columns, key_of, open_text
from scaling_fl.data.labels import as_number, as_text

CHUNK = 2**20  # characters that are read at once
NEAR = 16  # characters before the end of a chunk where an error may be a cut
SPACE = " \t\r\n"
NO_OBJECT = 'row {}: expected an object such as {{"text": "...", "label": "..."}} in UTF-8, got another value'
TWICE = object()  # the value of a field that a row has twice
KINDS = {bool: "True or False", list: "a list", dict: "a record"}


class Number(str):
    """A number as it is written: no type of Python holds all of them."""


def _record(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    record = dict(pairs)
    if len(record) < len(pairs):
        names = [name for name, _ in pairs]
        record |= {name: TWICE for name in names if names.count(name) > 1}
    return record


DECODER = json.JSONDecoder(object_pairs_hook=_record, parse_int=Number, parse_float=Number, parse_constant=float)


def read_json(path: str, columns: Columns | None, known: Columns | None = None) -> Iterator[Row]:
    """Yield the names of the columns to read, then the fields of each row, all as texts.

    Args:
        path: a local path or fsspec URL.
        columns: of the texts, which must be strings, and of the labels. None reads all fields of the first row.
        known: the fields to read in place of these, None where a row lacks one, lists of turns and trees as JSON.
    """
    used: tuple[str, ...] = ()
    seen: dict[str, None] = {}
    number = 0
    with open_text(path) as file:
        for number, row in enumerate(read_values(file), start=1):
            if row is None and number > 1:
                row = {}
            if not isinstance(row, dict):
                raise ValueError(NO_OBJECT.format(number))
            if number == 1:
                used = known or columns or tuple(row)
                yield used
            seen |= dict.fromkeys(row)
            values = ((_as_json(row.get(name), name, number) if known else row.get(name), name) for name in used)
            fields = tuple(_field(value, name, number, columns) for value, name in values)
            check_characters(fields, f"row {number}")
            yield fields
    if not seen:
        raise ValueError("expected a row, got none")
    find_columns(columns, tuple(seen), path)


def _field(value: Any, name: str, number: int, columns: Columns | None) -> str | None:
    """Return a value as a text. The column of texts may not have numbers."""
    if value is None or type(value) is str:
        return value
    if value is TWICE:
        raise ValueError(f"row {number}: expected {name!r} once, got it twice")
    is_text = columns is not None and name == columns[0]
    if is_text and value == value:
        raise ValueError(f"row {number}: {KEYS[0]}={name!r}: expected texts, got {KINDS.get(type(value), 'a number')}")
    try:
        return as_number(value) if isinstance(value, Number) else as_text(value)
    except TypeError:
        key = key_of(name, columns)
        raise ValueError(f"row {number}: {key}={name!r}: expected texts or numbers, got lists or records") from None


def _as_json(value: Any, name: str, number: int) -> Any:
    """Return a list of turns or a tree of messages as JSON, any other value as it is."""
    if not isinstance(value, list | dict):
        return value
    is_known = name in LISTS if isinstance(value, list) else name == ROOT[0] and ROOT[1] in value
    if not is_known:
        raise ValueError(f"row {number}: {name!r}: expected a text, got {KINDS[type(value)]}")
    return json.dumps(_plain(value, name, number), ensure_ascii=False)


def _plain(value: Any, name: str, number: int) -> Any:
    if value is TWICE:
        raise ValueError(f"row {number}: expected each field of {name!r} once, got one twice")
    if isinstance(value, dict):
        return {key: _plain(item, name, number) for key, item in value.items()}
    if isinstance(value, list):
        return [_plain(item, name, number) for item in value]
    return json.loads(value) if isinstance(value, Number) else value


def read_values(file: TextIO) -> Iterator[Any]:
    """Yield the values of a list, or those that follow one another, with no more than a piece of the file in memory."""
    text, at, number = "", 0, 0

    def peek() -> str:
        """Move to the next character that is no space and return it, "" at the end."""
        nonlocal text, at
        while True:
            if at == len(text):
                text, at = file.read(CHUNK), 0
            if not text or text[at] not in SPACE:
                return text[at : at + 1]
            at += 1

    def value() -> Any:
        nonlocal text, at, number
        number += 1
        peek()
        while True:
            try:
                found, at = DECODER.raw_decode(text, at)
                return found
            except json.JSONDecodeError as error:
                is_cut = error.pos > len(text) - NEAR or error.msg.startswith("Unterminated string")
                more = file.read(max(CHUNK, len(text) - at)) if is_cut else ""
                if not more:
                    raise ValueError(f"row {number}: expected JSON, got an error: {error.msg}") from None
                text, at = text[at:] + more, 0

    is_list = peek() == "["
    at += is_list
    mark, end = peek(), "]" if is_list else ""
    if mark not in ("{", end):
        raise ValueError(NO_OBJECT.format(1))
    while mark != end:
        yield value()
        mark = peek()
        if is_list and mark not in (",", "]"):
            raise ValueError(f"row {number}: expected , or ] after it, got {mark!r}")
        at += is_list and mark == ","
    if is_list:
        at += 1
        if peek():
            raise ValueError("expected one list, got more after it")

"""Rows of instructions, prompts or messages, read as conversations."""

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

from datasets import Dataset
from fsspec.utils import tokenize

from scaling_fl.data import oasst
from scaling_fl.data.cache import Row, mapped, store
from scaling_fl.data.conversation import Conversation, Turn, as_turns, check_turns
from scaling_fl.data.labels import as_text, name_site
from scaling_fl.data.nicknames import read_named
from scaling_fl.errors import preview

VERSION = 2  # of the conversations: another one ignores those in the cache
NAMES = ("conversation", "group", "site")  # of the columns of rows as they are used
# The columns of the prompt and of the answer, by kind of file. A list of messages has both.
FORMATS: tuple[tuple[str, ...], ...] = (("messages",), ("prompt", "completion"), ("prompt", "response"))
FORMATS += (("instruction", "output"), ("instruction", "response"))
OASST = (oasst.MESSAGE, oasst.TREE)
CONTEXTS = ("input", "context")  # columns of what an instruction is about
GROUPS = ("message_tree_id", "conversation_id", "document_id", "group")  # columns of what rows have in common
FIELDS = tuple(dict.fromkeys([*(name for names in FORMATS for name in names), *CONTEXTS, *GROUPS, *oasst.MESSAGE]))


def read_conversations(path: str, split: str = "train", site_column: str | None = None) -> Dataset:
    """Read conversations from a file or a data set of the hub.

    Args:
        path: a local path or fsspec URL, an id of the hub, or a key of DATASETS.
        split: of a data set of the hub.
        site_column: of the names of sites; None if there is none.

    Returns:
        Rows of `conversation` (`Conversation.to_json`), `group` (what rows of one tree or document have in common; ""
        is nothing) and, if there is a column of it, `site`. As many as were read, in the same order; of OASST1 one a
        tree that has a prompt and a reply.

    Raises:
        ValueError: the file is missing or has other columns, or a row is not a conversation.
    """
    wanted = FIELDS if site_column is None else tuple(dict.fromkeys([*FIELDS, site_column]))
    table = read_named(path, split, wanted)
    if len(table) == 0:
        raise ValueError(f"{path!r}: expected one row or more, got none")
    names = _filled(table)
    columns = find_format(path, names)
    if site_column not in (None, *names) and columns != oasst.TREE:
        raise ValueError(
            f"site_column: expected a column of {path!r} ({preview(map(repr, names))}), got {site_column!r}"
        )
    if columns in OASST:
        return _read_oasst(path, split, columns, site_column)
    return mapped(
        table,
        partial(_convert, path=path, columns=columns, site_column=site_column),
        batched=True,
        with_indices=True,
        remove_columns=table.column_names,
        new_fingerprint=tokenize(VERSION, table._fingerprint, site_column),
        desc=None,
    )


def _convert(
    rows: dict[str, list[Any]], indices: Sequence[int], path: str, columns: tuple[str, ...], site_column: str | None
) -> dict[str, list[str]]:
    """Return a batch of rows in the columns of `read_conversations`."""
    groups = [name for name in GROUPS if name in rows]
    found: dict[str, list[str]] = {name: [] for name in NAMES[: 3 if site_column else 2]}
    for position, index in enumerate(indices):
        row = {name: values[position] for name, values in rows.items()}
        try:
            conversation = read_row(row, columns)
            found["conversation"].append(conversation.to_json())
            if site_column:
                found["site"].append(_check_site(row[site_column], site_column))
        except ValueError as error:
            raise ValueError(f"{path!r}: row {index + 1}: {error}") from None
        found["group"].append(_name_group(row, groups, conversation.context))
    return found


def _read_oasst(path: str, split: str, columns: tuple[str, ...], site_column: str | None) -> Dataset:
    """Read the opening prompt of each tree of OASST1 and the reply to it that people ranked best."""
    fields = oasst.FIELDS if columns == oasst.MESSAGE else columns
    table = read_named(path, split, fields if site_column is None else tuple(dict.fromkeys([*fields, site_column])))

    def rows() -> Iterator[Row]:
        yield NAMES[: 3 if site_column else 2]
        for prompt, reply, site in oasst.pairs_of(table, columns, site_column):
            turns = Turn("user", prompt.text), Turn("assistant", reply.text)
            row = Conversation(turns).to_json(), f"{GROUPS[0]} {prompt.tree}"
            try:
                yield (*row, _check_site(site, site_column)) if site_column else row
            except ValueError as error:
                raise ValueError(f"row {prompt.number}: {error}") from None

    try:
        return store(tokenize(VERSION, table._fingerprint, columns, site_column), rows)
    except ValueError as error:
        raise ValueError(f"{path!r}: {error}") from None


def find_format(path: str, names: Sequence[str]) -> tuple[str, ...]:
    """Return the columns of the prompt and of the answer, of the messages, or those that tell OASST1.

    Raises:
        ValueError: there are none, or several.
    """
    found = [columns for columns in FORMATS if set(columns) <= set(names)]
    found = found or [columns for columns in OASST if set(columns) <= set(names)]
    if len(found) != 1:
        formats = ", or ".join(" and ".join(columns) for columns in [*FORMATS, *OASST])
        got = preview(map(repr, names)) or "none of them"
        raise ValueError(f"{path!r}: expected the columns of one kind: {formats}, got {got}")
    return found[0]


def read_row(row: Mapping[str, Any], columns: tuple[str, ...]) -> Conversation:
    """Return the conversation of a row.

    Args:
        row: its fields: texts, numbers, None, or lists of turns (as JSON too).
        columns: one of FORMATS.

    Raises:
        ValueError: it is none.
    """
    if columns == ("messages",):
        messages = as_turns(row["messages"])
        if messages is None:
            raise ValueError("'messages': expected a list of turns with a role and a content, got another value")
        return Conversation(check_turns(messages))
    is_instruction = columns[0] == "instruction"
    prompt, answer = (None if is_instruction else as_turns(row[name]) for name in columns)
    if prompt is not None and answer is not None:
        return Conversation(check_turns(prompt + answer))
    if prompt is not None or answer is not None:
        raise ValueError(f"expected a text in both {' and '.join(columns)} or turns in both, got a text and turns")
    texts = {name: _as_text(row[name], name) for name in columns}
    contexts = {name: _as_text(row[name], name) for name in CONTEXTS if row.get(name)}
    contexts = {name: context for name, context in contexts.items() if context.strip()}
    if len(contexts) > is_instruction:
        expected = "one of them" if is_instruction else "a prompt alone"
        raise ValueError(f"{' and '.join(contexts)}: expected {expected}, got more. Join them in {columns[0]}")
    turns = Turn("user", texts[columns[0]]), Turn("assistant", texts[columns[1]])
    context = next(iter(contexts.values()), "")
    return Conversation(check_turns(turns), context, is_continued=columns[1] == "completion")


def _as_text(value: Any, name: str) -> str:
    try:
        text = as_text(value)
    except TypeError:
        raise ValueError(f"{name!r}: expected a text, got a list or record") from None
    if text is None:
        raise ValueError(f"{name!r}: expected a text, got none. Leave the row out")
    return text


def _name_group(row: Mapping[str, Any], columns: Sequence[str], context: str) -> str:
    """Return the name of what a row has in common with others, "" if it stands alone."""
    return next((f"{name} {row[name]}" for name in columns if row[name]), f"context {context}" if context else "")


def _check_site(value: Any, column: str) -> str:
    try:
        site = name_site(as_text(value))
    except TypeError:
        raise ValueError(f"{column!r}: expected a text, got a list or record") from None
    if not site:
        raise ValueError(f"expected a value in {column!r}, got none. Leave the row out")
    return site


def _filled(table: Dataset) -> list[str]:
    """Return the columns that have a value: fields that a file of JSON lacks are columns without one."""
    return [name for name in table.column_names if table.data.column(name).null_count < len(table)]

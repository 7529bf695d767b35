"""The conversation trees of OASST1 (Köpf et al. 2023, arXiv 2304.07327), as trees and as the flat rows of the hub."""

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any, NamedTuple

from datasets import Dataset

from scaling_fl.data.cache import NUM_ROWS
from scaling_fl.data.columns import check_text
from scaling_fl.data.labels import as_text
from scaling_fl.data.parquet_rows import as_texts

ROLES = ("prompter", "assistant")
MESSAGE = ("message_id", "parent_id")  # the columns that tell rows of messages
TREE = ("message_tree_id", "prompt")  # those that tell rows of trees
FIELDS = (*MESSAGE, "role", "text", "lang", "rank", "message_tree_id", "deleted", "review_result")  # of a message
FLAGS = {"true": True, "1": True, "1.0": True, "false": False, "0": False, "0.0": False}


class Message(NamedTuple):
    """A message of a tree.

    Args:
        number: of its row in the file.
        rank: among the replies to its parent, 0 is the best; None if people have not ranked it.
    """

    number: int
    tree: str
    name: str
    parent: str | None
    role: str
    text: str
    language: str
    rank: float | None
    is_removed: bool


def from_row(row: Mapping[str, Any], number: int, tree: str | None = None) -> Message:
    """Return the message of a flat row, or of a tree.

    Raises:
        ValueError: a field is missing or of another type.
    """
    message_id, role, text = (check_text(row.get(name), name) for name in ("message_id", "role", "text"))
    tree = check_text(tree or row.get("message_tree_id"), "message_tree_id")
    if not isinstance(row.get("parent_id"), str | None):
        raise ValueError("'parent_id': expected a text or null, got another value")
    if role not in ROLES:
        raise ValueError(f"'role': expected {' or '.join(ROLES)}, got {role[:40]!r}")
    try:
        rank = None if row.get("rank") in (None, "") else float(row["rank"])
    except (TypeError, ValueError):
        raise ValueError("'rank': expected a number or null, got another value") from None
    return Message(
        number,
        tree,
        message_id,
        row.get("parent_id") or None,  # a CSV has no null
        role,
        text.strip(),
        str(row.get("lang") or ""),
        None if rank is None or rank != rank else rank,  # pandas writes NaN for none
        _as_flag(row, "deleted") is True or _as_flag(row, "review_result") is False,
    )


def _as_flag(row: Mapping[str, Any], name: str) -> bool | None:
    """Return a field that is true or false, or is written so; None if there is none."""
    try:
        text = (as_text(row.get(name)) or "").lower()
        return FLAGS[text] if text else None
    except (TypeError, KeyError):
        raise ValueError(f"{name!r}: expected true or false, got another value") from None


def messages_of(row: Mapping[str, Any], number: int) -> Iterator[Message]:
    """Yield the message of a row, or those of its tree.

    Raises:
        ValueError: a field is missing or of another type.
    """
    if isinstance(row.get("prompt"), dict):
        yield from from_tree(row, number)
    else:
        yield from_row(row, number)


def from_tree(row: Mapping[str, Any], number: int) -> Iterator[Message]:
    """Yield the messages of a tree, parents first.

    Raises:
        ValueError: a field is missing or of another type.
    """
    tree = row.get("message_tree_id")
    left: list[tuple[Any, str | None]] = [(row["prompt"], None)]
    while left:
        node, parent = left.pop()
        if not isinstance(node, dict):
            raise ValueError("'replies': expected a list of messages, got another value")
        message = from_row({**node, "parent_id": parent}, number, tree)
        yield message
        replies = node.get("replies") or []
        if not isinstance(replies, list):
            raise ValueError("'replies': expected a list of messages, got another value")
        left += [(reply, message.name) for reply in reversed(replies)]


def find_pairs(
    messages: Sequence[Message], language: str | None, left_out: Counter[str]
) -> Iterator[tuple[Message, Message]]:
    """Yield the prompt that opens each tree, and the best-ranked reply to it.

    Prompts later in a tree make no sense without what was said before, and are left out.

    Args:
        messages: of whole trees, in any order.
        language: of the prompt and the reply; None takes all.
        left_out: reason -> number of prompts, to be added to.

    Raises:
        ValueError: two messages have one name, or a parent is missing.
    """
    by_name = {message.name: message for message in messages}
    for message in messages:
        if by_name[message.name] is not message:
            raise ValueError(f"row {message.number}: 'message_id': expected another one in each message, got one twice")
    replies: dict[str, list[Message]] = {}
    for message in messages:
        if message.parent is not None and message.parent not in by_name:
            raise ValueError(
                f"row {message.number}: 'parent_id': expected the message_id of another row, got "
                f"{message.parent[:40]!r}. Give the file with all messages of the trees"
            )
        if message.parent is not None:
            replies.setdefault(message.parent, []).append(message)
    for prompt in messages:
        if prompt.role != "prompter" or prompt.is_removed or not prompt.text:
            continue
        if prompt.parent is not None:
            left_out["not the first prompt of its tree"] += 1
            continue
        if language not in (None, prompt.language):
            left_out["another language"] += 1
            continue
        answers = [reply for reply in replies.get(prompt.name, ()) if _is_answer(reply, language)]
        if not answers:
            left_out["no reply"] += 1
            continue
        # The first of several that are ranked alike, or not at all.
        best = min(answers, key=lambda reply: (reply.rank is None, reply.rank or 0))
        yield prompt, best


def _is_answer(reply: Message, language: str | None) -> bool:
    is_there = reply.role == "assistant" and not reply.is_removed and bool(reply.text)
    return is_there and language in (None, reply.language)


def pairs_of(table: Dataset, columns: Sequence[str], site_column: str | None) -> Iterator[tuple[Message, Message, Any]]:
    """Yield the opening prompt of each tree, the best-ranked reply to it, and the site of the prompt.

    Args:
        table: rows with fields of any type. The prompt of a tree is a record, or one in JSON.
        columns: MESSAGE or TREE, the kind of rows.
        site_column: of the rows, or a field of the prompts of trees; None if there is none.

    Raises:
        ValueError: a row is no message or tree, or no tree has a prompt and a reply.
    """
    messages: list[Message] = []
    sites: dict[int, Any] = {}
    for number, row in enumerate(_rows(table, columns, site_column), start=1):
        try:
            if columns == TREE:
                row = row | {"prompt": _as_record(row["prompt"])}
            messages += messages_of(row, number)
            if site_column:
                of_prompt = row["prompt"].get(site_column) if columns == TREE else None
                sites[number] = row.get(site_column) or of_prompt
        except ValueError as error:
            raise ValueError(f"row {number}: {error}") from None
    if site_column and not any(sites.values()):
        raise ValueError(f"site_column: expected a field of rows or of their prompts, got {site_column!r}")
    left_out: Counter[str] = Counter()
    prompt = None
    for prompt, reply in find_pairs(messages, None, left_out):
        yield prompt, reply, sites.get(prompt.number)
    if prompt is None:
        raise ValueError(f"expected a pair of a prompt and a reply, got none ({dict(left_out)})")


def _rows(table: Dataset, columns: Sequence[str], site_column: str | None) -> Iterator[dict[str, Any]]:
    """Yield the fields of rows as texts, but for the prompts of trees."""
    known = [*(TREE if columns == TREE else FIELDS), site_column]
    used = [name for name in dict.fromkeys(known) if name in table.column_names]
    for batch in table.select_columns(used).with_format("arrow").iter(NUM_ROWS):
        yield from (
            dict(zip(used, row, strict=True))
            for row in zip(*(_values(batch[name], name, table.features[name]) for name in used), strict=True)
        )


def _values(column: Any, name: str, feature: Any) -> list[Any]:
    return column.to_pylist() if name == "prompt" else as_texts(column, repr(name), getattr(feature, "names", None))


def _as_record(value: Any) -> dict[str, Any]:
    with suppress(json.JSONDecodeError):
        value = json.loads(value) if isinstance(value, str) else value
    if not isinstance(value, dict):
        raise ValueError("'prompt': expected the first message of a tree, got another value")
    return value

"""The conversation trees of OASST1 (Köpf et al. 2023, arXiv 2304.07327), as trees and as the flat rows of the hub."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from scaling_fl.data.columns import check_characters

ROLES = ("prompter", "assistant")


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
    texts = {name: row.get(name) for name in ("message_id", "role", "text")}
    texts["message_tree_id"] = tree or row.get("message_tree_id")
    for name, value in texts.items():
        if type(value) is not str:
            raise ValueError(f"{name!r}: expected a text, got {'none' if value is None else 'another value'}")
        check_characters([value], repr(name))
    if not isinstance(row.get("parent_id"), str | None):
        raise ValueError("'parent_id': expected a text or null, got another value")
    if texts["role"] not in ROLES:
        raise ValueError(f"'role': expected {' or '.join(ROLES)}, got {str(texts['role'])[:40]!r}")
    try:
        rank = None if row.get("rank") is None else float(row["rank"])
    except (TypeError, ValueError):
        raise ValueError("'rank': expected a number or null, got another value") from None
    return Message(
        number,
        str(texts["message_tree_id"]),
        str(texts["message_id"]),
        row.get("parent_id"),
        str(texts["role"]),
        str(texts["text"]).strip(),
        str(row.get("lang") or ""),
        None if rank is None or rank != rank else rank,  # pandas writes NaN for none
        bool(row.get("deleted")) or row.get("review_result") is False,
    )


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


def find_pairs(messages: Sequence[Message], language: str | None, left_out: Counter[str]) -> Iterator[dict[str, Any]]:
    """Yield the prompt that opens each tree with the best-ranked reply to it.

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
                f"{str(message.parent)[:40]!r}. Give the file with all messages of the trees"
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
        yield {
            "prompt": prompt.text,
            "response": best.text,
            "message_tree_id": prompt.tree,
            "lang": prompt.language,
        }


def _is_answer(reply: Message, language: str | None) -> bool:
    is_there = reply.role == "assistant" and not reply.is_removed and bool(reply.text)
    return is_there and language in (None, reply.language)

"""A conversation: turns of a person and a model, and what is refused in them."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

from scaling_fl.errors import printable

ROLES = ("system", "user", "assistant")
CALLS = ("tool_calls", "function_call", "reasoning_content", "thinking")  # parts of a turn that no template here writes


class Turn(NamedTuple):
    """What one of the two said, or the system."""

    role: str  # one of ROLES
    content: str


@dataclass(frozen=True)
class Conversation:
    """Turns in their order.

    Args:
        turns: one or more, among them one of the assistant.
        context: what the instruction, which is the first turn, is about; "" if it stands alone.
        is_continued: the answer continues the prompt as it stands, without a line between them.
    """

    turns: tuple[Turn, ...]
    context: str = ""
    is_continued: bool = False

    def to_json(self) -> str:
        """Return it as it is kept in a column."""
        return json.dumps(asdict(self), ensure_ascii=False)

    @classmethod
    def from_json(cls, text: str) -> "Conversation":
        """Return what `to_json` wrote."""
        fields = json.loads(text)
        return cls(**fields | {"turns": tuple(Turn(*turn) for turn in fields["turns"])})


def as_turns(value: Any) -> tuple[Turn, ...] | None:
    """Return the turns of a list, or of a text that is one in JSON; None if it is something else.

    Raises:
        ValueError: a turn has no text as its content, or has other parts too, such as calls of tools.
    """
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            value = json.loads(value)
        except json.JSONDecodeError:
            return None
    if not isinstance(value, list) or not value or not all(isinstance(turn, dict) and "role" in turn for turn in value):
        return None
    return tuple(_as_turn(turn, number) for number, turn in enumerate(value, start=1))


def _as_turn(turn: Mapping[str, Any], number: int) -> Turn:
    if not isinstance(turn.get("content"), str) or not isinstance(turn["role"], str):
        raise ValueError(f"turn {number}: expected a role and a content that are texts, got another value")
    calls = [name for name in CALLS if turn.get(name)]
    if calls:
        raise ValueError(f"turn {number}: expected a text alone, got also {', '.join(calls)}")
    return Turn(turn["role"], turn["content"])


def check_turns(turns: tuple[Turn, ...]) -> tuple[Turn, ...]:
    """Return turns, or refuse those of which no template makes sense.

    Answers are looked at when they are tokenised.

    Raises:
        ValueError: no template makes sense of them.
    """
    for number, turn in enumerate(turns, start=1):
        if turn.role not in ROLES:
            raise ValueError(
                f"turn {number}: expected a role out of {', '.join(ROLES)}, got {printable(turn.role)[:40]!r}"
            )
        if turn.role == "system" and number > 1:
            raise ValueError(f"turn {number}: expected the system's turn first, got it later")
        if turn.role == "user" and not turn.content.strip():
            raise ValueError(f"turn {number}: expected a text, got none. Leave the row out")
    if all(turn.role != "assistant" for turn in turns):
        raise ValueError("expected a turn of the assistant, got none. Leave the row out")
    return turns

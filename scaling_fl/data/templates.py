"""How a conversation is written as one text, and which parts of it a model is to learn."""

import re
from collections.abc import Callable, Sequence
from itertools import chain, combinations, pairwise
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase

from scaling_fl.data.conversation import ROLES, Conversation, Turn
from scaling_fl.errors import one_line

# Characters that Unicode reserves for private use, around contents while a chat template is rendered.
FIRST, LAST = "\U0010fff0", "\U0010fff1"
RESERVED = re.compile("[\U0010fff0-\U0010fffd]")
ALPACA = "Below is an instruction that describes a task{}. Write a response that appropriately completes the request."
ALPACA_INPUT = ", paired with an input that provides further context"
VICUNA = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)


class Piece(NamedTuple):
    """A part of a text: of the template or of the data, and whether it is an answer, its end token included."""

    text: str
    is_content: bool = False
    is_answer: bool = False


Template = Callable[[Conversation, PreTrainedTokenizerBase], list[Piece]]


def alpaca(conversation: Conversation, tokenizer: PreTrainedTokenizerBase) -> list[Piece]:
    """Write an instruction as the file of Stanford Alpaca does."""
    instruction, answer = _one_answer(conversation, "alpaca")
    context = [Piece("\n\n### Input:\n"), Piece(conversation.context, True)] if conversation.context else []
    return [
        Piece(ALPACA.format(ALPACA_INPUT if context else "") + "\n\n### Instruction:\n"),
        Piece(instruction, True),
        *context,
        Piece("\n\n### Response:\n"),
        Piece(answer, True, True),
        _end(tokenizer),
    ]


def flowertune(conversation: Conversation, tokenizer: PreTrainedTokenizerBase) -> list[Piece]:
    """Write an instruction as Flower's FlowerTune does: its context after a space, and without an end token."""
    instruction, answer = _one_answer(conversation, "flowertune")
    context = [Piece(" "), Piece(conversation.context, True)] if conversation.context else []
    return [
        Piece(ALPACA.format("") + "\n### Instruction:\n"),
        Piece(instruction, True),
        *context,
        Piece("\n### Response:"),
        Piece(" ", is_answer=True),  # of which most tokenizers make one token with the first word
        Piece(answer, True, True),
    ]


def vicuna(conversation: Conversation, tokenizer: PreTrainedTokenizerBase) -> list[Piece]:
    """Write turns as Vicuna 1.1 does; a turn of the system takes the place of Vicuna's own."""
    turns = _merge_context(conversation)
    has_system = turns[0].role == "system"
    pieces = [Piece(turns[0].content, True) if has_system else Piece(VICUNA), Piece(" ")]
    for turn in turns[has_system:]:
        if turn.role == "user":
            pieces += [Piece("USER: "), Piece(turn.content, True), Piece(" ")]
        else:
            pieces += [Piece("ASSISTANT:"), Piece(" ", is_answer=True), Piece(turn.content, True, True)]
            pieces += [_end(tokenizer)]
    return pieces


def plain(conversation: Conversation, tokenizer: PreTrainedTokenizerBase) -> list[Piece]:
    """Write a completion right after its prompt; an instruction, its context and the answer on lines of their own."""
    prompt, answer = _one_answer(conversation, "plain")
    context = [Piece(conversation.context, True), Piece("\n")] if conversation.context else []
    line = [] if conversation.is_continued else [Piece("\n")]
    return [Piece(prompt, True), *line, *context, Piece(answer, True, True), _end(tokenizer)]


def chat(conversation: Conversation, tokenizer: PreTrainedTokenizerBase) -> list[Piece]:
    """Write turns by the tokenizer's own chat template.

    An answer begins where the text ends with which the template asks for it, and ends with the token that the template
    writes after it.
    """
    turns = _merge_context(conversation)
    text = _apply(tokenizer, turns)
    contents = _find_contents(tokenizer, turns, text)
    controls = "|".join(re.escape(token) for token in control_tokens(tokenizer))
    answers = []
    for number, (turn, (start, end)) in enumerate(zip(turns, contents, strict=True)):
        if turn.role != "assistant":
            continue
        asked = _apply(tokenizer, turns[:number], asks=True)
        if not text.startswith(asked) or len(asked) > start:
            raise ValueError(
                f"turn {number + 1}: expected a chat template that writes the turns before it as it does when it asks "
                "for it, got one that changes them"
            )
        if text[len(asked) : start].strip() and asked == _apply(tokenizer, turns[:number]):
            raise ValueError(
                "expected a chat template that asks for an answer (add_generation_prompt), got one without"
            )
        ending = re.compile(rf"\s*(?:{controls})").match(text, end)
        if ending is None:
            raise ValueError(f"turn {number + 1}: expected a chat template that ends answers with a control token")
        answers.append((len(asked), ending.end()))
    cuts = sorted({0, len(text), *chain(*contents), *chain(*answers)})
    return [
        Piece(text[start:end], _is_within(start, contents), _is_within(start, answers)) for start, end in pairwise(cuts)
    ]


TEMPLATES: dict[str, Template] = {
    "alpaca": alpaca,
    "vicuna": vicuna,
    "flowertune": flowertune,
    "plain": plain,
    "chat": chat,
}


def control_tokens(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Return the tokens that structure texts and are none of their words, the longest first."""
    special = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    tokens = (special - {tokenizer.unk_token}) | ({tokenizer.bos_token, tokenizer.eos_token} - {None})
    return sorted(tokens, key=lambda token: (-len(token), token))


def _end(tokenizer: PreTrainedTokenizerBase) -> Piece:
    if tokenizer.eos_token is None:
        raise ValueError("expected a tokenizer with an end token, got none. Set eos_token in its tokenizer_config.json")
    return Piece(tokenizer.eos_token, is_answer=True)


def _one_answer(conversation: Conversation, name: str) -> tuple[str, str]:
    roles = [turn.role for turn in conversation.turns]
    if roles != ["user", "assistant"]:
        raise ValueError(
            f"expected a turn of the user and one of the assistant for template={name!r}, got {', '.join(roles[:8])}. "
            "The templates vicuna and chat take more"
        )
    return conversation.turns[0].content, conversation.turns[1].content


def _merge_context(conversation: Conversation) -> tuple[Turn, ...]:
    """Return the turns, with the context of the instruction below it."""
    if not conversation.context:
        return conversation.turns
    first, *others = conversation.turns
    return Turn(first.role, f"{first.content}\n\n{conversation.context}"), *others


def _apply(tokenizer: PreTrainedTokenizerBase, turns: Sequence[Turn], *, asks: bool = False) -> str:
    """Render the tokenizer's chat template, and ask for an answer."""
    if not tokenizer.chat_template:
        raise ValueError("expected a tokenizer with a chat template, got none")
    messages = [turn._asdict() for turn in turns]
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=asks))
    except Exception as error:  # of the template, which is a program
        roles = ", ".join(turn.role for turn in turns[:8])
        raise ValueError(
            f"expected turns that the chat template takes, got {roles or 'none'}: {one_line(error)}"
        ) from error


def _find_contents(tokenizer: PreTrainedTokenizerBase, turns: Sequence[Turn], text: str) -> list[tuple[int, int]]:
    """Return where in the text of a chat template the content of each turn is.

    Raises:
        ValueError: the template leaves out, repeats or changes one, but for space around it.
    """
    # Templates strip the turns of some roles.
    for stripped in chain.from_iterable(combinations(ROLES, size) for size in range(len(ROLES) + 1)):
        contents = [turn.content.strip() if turn.role in stripped else turn.content for turn in turns]
        marked = [
            turn._replace(content=f"{FIRST}{content}{LAST}") for turn, content in zip(turns, contents, strict=True)
        ]
        parts = re.split(f"[{FIRST}{LAST}]", _apply(tokenizer, marked))
        if "".join(parts) == text and parts[1::2] == contents:
            ends = [0]
            for part in parts:
                ends.append(ends[-1] + len(part))
            return list(zip(ends[1::2], ends[2::2], strict=False))
    raise ValueError("expected a chat template that writes each turn once as it is, got one that changes or omits some")


def _is_within(place: int, spans: Sequence[tuple[int, int]]) -> bool:
    return any(start <= place < end for start, end in spans)

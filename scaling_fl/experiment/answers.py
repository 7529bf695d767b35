"""Answers that a causal language model gives, and how many of them are right."""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from numbers import Real
from typing import Any

from transformers import PreTrainedTokenizerBase

from scaling_fl.data.columns import check_characters
from scaling_fl.data.conversation import Conversation, Turn
from scaling_fl.data.examples import Examples
from scaling_fl.data.exercises import is_right
from scaling_fl.data.tokens import ConversationEncoder
from scaling_fl.models.generate import Sampling, find_end_ids, find_room, generate
from scaling_fl.training.scores import Totals
from scaling_fl.training.seeds import derive_seed

BATCH_SIZE = 8  # questions that are answered together
MIN_TEMPERATURE, MAX_TEMPERATURE = 1e-6, 1e6  # the most probable token is certain; all tokens are equally probable
INCOMPLETE = "\ufffd"  # stands for a character of which some bytes are still to come
MARGIN = 8  # tokens that a right answer may have more than the expected one, as of spaces and separators of thousands


def count_right(
    model: Any, examples: Examples, tokenizer: PreTrainedTokenizerBase, end_id: int | None, margin: int = MARGIN
) -> Totals:
    """Let a model answer the questions of a batch, and return how many answers are right, and how many there are.

    Examples whose answer was cut are left out. An answer is right if it ends, and its text is the expected one but for
    what `is_right` ignores. One that goes on for more than `margin` tokens after the length of the expected one is
    wrong, whatever follows. Each example has a limit of its own, so that its score does not depend on the others of the
    batch.

    Args:
        model: is left as it was.
        examples: not trained on prompts.
        tokenizer: of the examples.
        end_id: of the token that ends the answers of the template, if there is one.
        margin: in tokens.

    Returns:
        `exact_match`, a sum and its count, to be merged with the totals of `evaluate`.

    Raises:
        ValueError: no token ends an answer.
    """
    end_ids = find_end_ids(model, end_id)
    if not end_ids:
        raise ValueError(
            "exact_match: expected a template or a model with an end token, got none. Use another template"
        )
    questions = [(prompt, answer) for prompt, answer in examples.questions() if answer[-1] in end_ids]
    if not questions:
        return {}
    limits = [len(expected) + margin for _, expected in questions]
    answers = generate(
        model,
        [prompt for prompt, _ in questions],
        max_new_tokens=max(limits),
        end_ids=end_ids,
        pad_id=examples.padding["input_ids"],
    )
    num_right = sum(
        len(answer) < limit and is_right(_decode(tokenizer, answer), _decode(tokenizer, expected))
        for answer, limit, (_, expected) in zip(answers, limits, questions, strict=True)
    )
    return {"exact_match": (Fraction(num_right), len(questions))}


def answer_questions(
    model: Any, encoder: ConversationEncoder, questions: Sequence[str], max_new_tokens: int
) -> list[str]:
    """Return what a model answers to questions, without space around it. The model is left as it was.

    Raises:
        ValueError: the template does not take a question, or it is longer than the model takes.
    """
    prompts = tokenise_questions(model, encoder, [Question(text) for text in questions])
    end_ids = find_end_ids(model, encoder.end_id)
    answers = generate(model, prompts, max_new_tokens=max_new_tokens, end_ids=end_ids, pad_id=0)
    return [_decode(encoder.tokenizer, ids).strip() for ids in answers]


@dataclass(frozen=True)
class Question:
    """What a model is asked, and what that is about."""

    text: str
    context: str = ""


@dataclass(frozen=True)
class Answering:
    """How a model answers.

    Args:
        max_new_tokens: longer answers are cut to so many tokens.
        temperature: 0 takes the most probable token; above it tokens are drawn, the more evenly the higher it is.
        top_p: out of the most probable tokens whose probabilities add up to so much; 1: of all.
        seed: of what is drawn.

    Raises:
        ValueError: a value is out of its range.
    """

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if type(self.max_new_tokens) is not int or self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens: expected a whole number >= 1, got {self.max_new_tokens!r}")
        for name in ("temperature", "top_p"):
            if not isinstance(value := getattr(self, name), Real):
                raise ValueError(f"{name}: expected a number, got {value!r}")
        if self.temperature and not MIN_TEMPERATURE <= self.temperature < MAX_TEMPERATURE:
            raise ValueError(
                f"temperature: expected 0 or a number >= {MIN_TEMPERATURE} and < {MAX_TEMPERATURE:g}, got "
                f"{self.temperature!r}"
            )
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p: expected a number > 0 and <= 1, got {self.top_p!r}")
        if type(self.seed) is not int:
            raise ValueError(f"seed: expected a whole number, got {self.seed!r}")


def answer(
    model: Any,
    encoder: ConversationEncoder,
    questions: Sequence[Question],
    how: Answering,
    write: Callable[[str], object] | None = None,
) -> Iterator[str]:
    """Yield the answers to questions in their order, without space around them. The model is left as it was.

    An answer does not depend on the other questions, but for one that is asked again, which draws other tokens. All
    questions are checked before the first one is answered.

    Args:
        model: a causal language model.
        encoder: of the template with which it was trained.
        questions: each stands alone.
        how: it answers.
        write: is given each answer in pieces, while it is generated. Then questions are answered one by one.

    Raises:
        ValueError: the template does not take a question, or it is longer than the model takes.
    """
    prompts = tokenise_questions(model, encoder, questions, "questions")
    end_ids = find_end_ids(model, encoder.end_id)
    asked = Counter[tuple[int, ...]]()
    seeds = []
    for prompt in map(tuple, prompts):
        seeds.append(derive_seed(how.seed, "answer", asked[prompt], *prompt))
        asked[prompt] += 1
    size = BATCH_SIZE if write is None else 1
    for first in range(0, len(prompts), size):
        some = slice(first, first + size)
        stream = None if write is None else _Stream(encoder.tokenizer, write)
        found = generate(
            model,
            prompts[some],
            max_new_tokens=how.max_new_tokens,
            end_ids=end_ids,
            pad_id=0,
            sampling=Sampling(how.temperature, how.top_p, seeds[some]) if how.temperature else None,
            on_token=None if stream is None else stream.add,
        )
        texts = [_decode(encoder.tokenizer, ids).strip() for ids in found]
        if stream is not None:
            stream.finish(texts[0])
        yield from texts


class _Stream:
    """Writes a text in pieces: what later tokens may still change waits for them."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, write: Callable[[str], object]) -> None:
        self.tokenizer, self.write, self.written = tokenizer, write, ""

    def add(self, ids: list[int]) -> None:
        """Write what has come."""
        text = _decode(self.tokenizer, ids).strip()
        if text.startswith(self.written) and not text.endswith(INCOMPLETE):
            self.write(text[len(self.written) :])
            self.written = text

    def finish(self, text: str) -> None:
        """Write the rest of the whole text."""
        if text != self.written:
            self.write(text.removeprefix(self.written) if text.startswith(self.written) else f"\n{text}")


def tokenise_questions(
    model: Any, encoder: ConversationEncoder, questions: Sequence[Question], place: str = "sample_questions"
) -> list[list[int]]:
    """Return the tokens of questions, after which a model is to answer. `place` is where they are from, for errors.

    Raises:
        ValueError: the template does not take a question, or it is longer than the model takes.
    """
    prompts = []
    for number, asked in enumerate(questions, start=1):
        try:
            if not isinstance(asked.text, str):
                raise ValueError(f"expected a text, got {type(asked.text).__name__}")
            if not asked.text.strip():
                raise ValueError("expected a text, got none")
            check_characters([asked.text, asked.context], "its text")
            prompts.append(encoder.tokenise_prompt(Conversation((Turn("user", asked.text),), asked.context)))
            find_room(model, len(prompts[-1]), 1)
        except ValueError as error:
            raise ValueError(f"{place}: question {number}: {error}") from None
    return prompts


def _decode(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    return str(tokenizer.decode(ids, skip_special_tokens=True))

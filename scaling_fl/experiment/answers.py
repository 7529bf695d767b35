"""Answers that a causal language model gives, and how many of them are right."""

from collections.abc import Sequence
from fractions import Fraction
from typing import Any

from transformers import PreTrainedTokenizerBase

from scaling_fl.data.answers import is_right
from scaling_fl.data.conversations import Conversation, Turn
from scaling_fl.data.examples import Examples
from scaling_fl.data.tokens import ConversationEncoder
from scaling_fl.models.generate import find_end_ids, find_room, generate
from scaling_fl.training.scores import Totals

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
    prompts = tokenise_questions(model, encoder, questions)
    end_ids = find_end_ids(model, encoder.end_id)
    answers = generate(model, prompts, max_new_tokens=max_new_tokens, end_ids=end_ids, pad_id=0)
    return [_decode(encoder.tokenizer, answer).strip() for answer in answers]


def tokenise_questions(model: Any, encoder: ConversationEncoder, questions: Sequence[str]) -> list[list[int]]:
    """Return the tokens of questions, after which a model is to answer.

    Raises:
        ValueError: the template does not take a question, or it is longer than the model takes.
    """
    prompts = []
    for number, question in enumerate(questions, start=1):
        try:
            prompts.append(encoder.tokenise_prompt(Conversation((Turn("user", question),))))
            find_room(model, len(prompts[-1]), 1)
        except ValueError as error:
            raise ValueError(f"sample_questions: question {number}: {error}") from None
    return prompts


def _decode(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    return str(tokenizer.decode(ids, skip_special_tokens=True))

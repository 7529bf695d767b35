"""Right answers are counted: those that end, with the expected text, whatever else is in the batch."""

from collections.abc import Sequence
from fractions import Fraction
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from helpers import refusal
from tiny_llm import make_llama, make_tokenizer, rows_of, say

from scaling_fl.data.conversation import Conversation
from scaling_fl.data.examples import Examples
from scaling_fl.data.exercises import is_right as is_right_of_exercises
from scaling_fl.data.tokens import ConversationEncoder
from scaling_fl.experiment.answers import MARGIN, answer_questions, count_right, is_right
from scaling_fl.training.loop import evaluate, train
from scaling_fl.training.metrics import Means
from scaling_fl.training.scores import score_tokens

LEARNED = (  # what the model answers
    say("Name a colour.", "Red."),
    say("Which?", "Red and blue"),
    say("Q", "A dog"),
    say("Count all of the animals.", "A dog and a dog and a dog and a red dog and a blue dog"),
    say("Wait.", f"Blue{' ' * 15}"),
)
EXPECTED = (  # and whether that is right
    (say("Name a colour.", "red"), True),
    (say("Which?", "Red"), False),  # the answer goes on
    (say("Q", "A dog ran."), False),  # it ends too early
    (say("Count all of the animals.", "A dog and a dog and a dog and a red dog and a blue dog"), True),
    (say("Wait.", "Blue"), False),  # it does not end in time, but would in a batch with the one above
)


@cache
def encoder(template: str = "plain") -> ConversationEncoder:
    return ConversationEncoder(make_tokenizer(), template, 200)


def examples_of(rows: Sequence[Conversation], template: str = "plain") -> Examples:
    return encoder(template).encode(rows_of(*rows)).examples


@cache
def learned(template: str = "plain") -> Any:
    """A model that has the answers by heart, and lists another end token than the template's."""
    model, batch = make_llama(), examples_of(LEARNED, template).batch()
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-2)
    loss = train(model, [batch] * 200, optimiser, score_tokens)
    assert loss
    model.generation_config.eos_token_id = 2
    assert encoder(template).end_id not in (2, None)
    return model


def count(rows: Sequence[Conversation], **options: int) -> tuple[Fraction, int]:
    totals = count_right(learned(), examples_of(rows), encoder().tokenizer, encoder().end_id, **options)
    assert totals.keys() == {"exact_match"}
    return totals["exact_match"]


def test_a_model_that_knows_the_answers_is_right() -> None:
    assert count(LEARNED[:4]) == (4, 4)


@pytest.mark.parametrize("row", range(len(EXPECTED)))
def test_an_answer_is_right_if_it_ends_with_the_expected_text(row: int) -> None:
    conversation, is_right = EXPECTED[row]
    assert count([conversation]) == (is_right, 1)


@pytest.mark.parametrize("size", [2, 5])
def test_batches_of_any_size_score_alike(size: int) -> None:
    rows = [conversation for conversation, _ in EXPECTED]
    parts = [rows[start : start + size] for start in range(0, len(rows), size)]
    assert Means().merge(Means.of({"is right": count(part)}) for part in parts).totals() == {"is right": (2, 5)}
    assert count(rows[::-1]) == (2, 5)


def test_an_answer_may_be_longer_than_the_expected_one_by_the_margin() -> None:
    wait = EXPECTED[-1][0]
    asked, answered = (encode_answer(of[-1]) for of in ([wait], LEARNED))
    longer = len(answered) - len(asked)
    assert longer > MARGIN
    assert [count([wait], margin=margin)[0] for margin in (longer - 1, longer)] == [0, 1]


def encode_answer(row: Conversation) -> list[int]:
    return examples_of([row]).questions()[0][1]


def test_the_template_may_end_an_answer_with_a_token_that_the_model_does_not_list() -> None:
    listed = learned().generation_config.eos_token_id
    assert count_right(learned(), examples_of(LEARNED[:2]), encoder().tokenizer, listed) == {}, "all are cut"
    assert count(LEARNED[:2]) == (2, 2)


def test_answers_that_nothing_ends_are_refused() -> None:
    model = make_llama()
    model.generation_config.eos_token_id = None
    says = refusal(lambda: count_right(model, examples_of(LEARNED), encoder().tokenizer, None))
    assert says.startswith("exact_match: expected a template or a model with an end token")


def test_the_score_is_merged_with_those_of_tokens_and_nothing_of_the_model_changes() -> None:
    model, batch = learned().train(), examples_of([conversation for conversation, _ in EXPECTED])
    before = evaluate(model, [batch.batch()], score_tokens).totals()
    model.train()
    right = count_right(model, batch, encoder().tokenizer, encoder().end_id)
    assert model.training
    assert evaluate(model, [batch.batch()], score_tokens).totals() == before
    means = Means.of(before | right).merge([Means.of(before | right)]).result()
    assert means.keys() == {"loss", "accuracy", "exact_match"}
    assert means["exact_match"] == 0.4


def test_a_question_is_what_comes_before_the_last_answer_of_a_conversation() -> None:
    rows = (
        say("Which?", "Red", "And?", "Blue dog", system="A"),
        say("Q", "A"),
        say("One", "Two", "Three", "Red", "Q", "A"),
    )
    for template in ("chat", "vicuna"):
        examples = examples_of(rows, template)
        asked = [encoder(template).tokenise_prompt(Conversation(row.turns[:-1])) for row in rows]
        whole = [encoder(template).tokenise(row) for row in rows]
        found = examples.questions()
        assert [prompt for prompt, _ in found] == asked
        for (prompt, answer), (ids, labels, _) in zip(found, whole, strict=True):
            assert ids[: len(prompt) + len(answer)] == prompt + answer
            assert answer == labels[len(prompt) : len(prompt) + len(answer)]
            assert set(labels[len(prompt) + len(answer) :]) <= {-100}
        texts = [encoder(template).tokenizer.decode(answer).strip() for _, answer in found]
        assert texts == ["Blue dog<|im_end|>", "A<|im_end|>", "A<|im_end|>"]
        assert examples.select(np.array([2, 0])).questions() == [found[2], found[0]]


def test_a_last_answer_without_a_template_after_it_is_found_too() -> None:
    for template in ("alpaca", "plain"):
        (prompt, answer), *_ = examples_of(LEARNED, template).questions()
        ids, _, num_before = encoder(template).tokenise(LEARNED[0])
        assert (prompt, answer) == (ids[:num_before], ids[num_before:])


def test_questions_are_answered_as_alone_to_the_end_token_and_without_space_around() -> None:
    texts = [row.turns[0].content for row in LEARNED]
    answers = answer_questions(learned(), encoder(), texts, 40)
    assert answers == [row.turns[1].content.strip() for row in LEARNED]
    assert [answer_questions(learned(), encoder(), [text], 40)[0] for text in texts] == answers
    assert answer_questions(learned(), encoder(), texts[:2], 1) == ["Red", "Red"]


def test_the_check_of_an_answer_is_found_beside_the_exercises() -> None:
    assert is_right_of_exercises is is_right

"""A causal language model is trained on answers alone, and its scores are means over tokens, however one batches."""

import math
from dataclasses import replace
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from datasets import Dataset
from helpers import refusal
from tiny_llm import make_llama, make_tokenizer, rows_of, say
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
)

from scaling_fl.data.conversation_rows import read_conversations
from scaling_fl.data.examples import Examples
from scaling_fl.data.tokens import ConversationEncoder
from scaling_fl.training.loop import evaluate, train, try_step
from scaling_fl.training.metrics import Means
from scaling_fl.training.optimisers import OPTIMISERS
from scaling_fl.training.scores import check_packing, score_tokens, summarise_tokens

ROWS = (
    say("Name a colour.", "Red."),
    say("Which?", "Red and blue and red and blue dog."),
    say("Q", "A"),
    say("Which colours are there in a very long question?", "Blue"),
    say("Count.", "One two three four five six"),
)


@cache
def rows() -> Dataset:
    return rows_of(*ROWS)


def make_examples(template: str = "plain", **options: bool) -> Examples:
    return replace(ConversationEncoder(make_tokenizer(), template, 64).encode(rows()).examples, **options)


def sums_by_hand(model: nn.Module, examples: Examples) -> tuple[Tensor, int, int]:
    """The sum of the losses of the trained tokens, how many are right and how many there are, a row at a time."""
    total, right, count = torch.zeros((), dtype=torch.float64), 0, 0
    for start, length in zip(examples.starts, examples.lengths, strict=True):
        part = slice(start, start + length)
        ids = torch.from_numpy(examples.columns["input_ids"][part].astype(np.int64))[None]
        labels = examples.columns["labels"][part]
        scores = model(input_ids=ids).logits[0].double().log_softmax(-1)
        for place in range(1, length):
            if labels[place] != -100:
                assert labels[place] == ids[0, place]
                total = total - scores[place - 1, labels[place]]
                right += int(scores[place - 1].argmax() == labels[place])
                count += 1
    return total, right, count


@pytest.mark.parametrize("pad_left", [False, True])
@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_scores_depend_neither_on_the_batches_nor_on_the_side_of_the_padding(size: int, pad_left: bool) -> None:
    model, examples = make_llama(), make_examples(pad_left=pad_left)
    total, right, count = sums_by_hand(model.eval(), examples)
    batches = [of.batch() for of in examples.fixed_batches(size)]
    found = summarise_tokens(evaluate(model, batches, score_tokens).totals())
    assert found["loss"] == pytest.approx(total.item() / count, abs=1e-6)
    assert found["perplexity"] == pytest.approx(math.exp(total.item() / count), rel=1e-5)
    assert found["accuracy"] == right / count
    halves = [evaluate(model, [batch], score_tokens) for batch in batches]  # as two ranks have them
    assert summarise_tokens(Means().merge(halves).totals()) == found
    assert count == examples.size(1).num_trained_tokens


@pytest.mark.parametrize("optimiser", ["sgd", "adamw"])
def test_training_equals_a_loop_written_out(optimiser: str) -> None:
    examples = make_examples()
    ours, plain = make_llama(), make_llama()
    means = train(
        ours, examples.shuffled_batches(2, seed=3), OPTIMISERS[optimiser](ours.parameters(), lr=0.05), score_tokens
    )
    reference = {"sgd": torch.optim.SGD, "adamw": torch.optim.AdamW}[optimiser](plain.parameters(), lr=0.05)
    order, losses, counts = np.random.default_rng(3).permutation(5), 0.0, 0
    for first in (0, 2, 4):
        reference.zero_grad()
        total, _, count = sums_by_hand(plain, examples.select(order[first : first + 2]))
        (total / count).backward()
        reference.step()
        losses, counts = losses + total.item(), counts + count
    assert means.result()["loss"] == pytest.approx(losses / counts, abs=1e-5)
    for a, b in zip(ours.parameters(), plain.parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-4)


def test_only_the_predictions_of_answers_have_gradients() -> None:
    batch = make_examples().batch()
    output = make_llama()(**batch)
    output.logits.retain_grad()
    output.loss.backward()
    has_gradient = output.logits.grad.abs().sum(-1) > 0
    assert torch.equal(has_gradient[:, :-1], batch["labels"][:, 1:] != -100)
    assert not has_gradient[:, -1].any()


def test_a_weight_by_trained_tokens_is_the_centralised_step() -> None:
    examples = make_examples()
    parts = examples.select(np.array([0, 2])), examples.select(np.array([1, 3, 4]))

    def gradient(of: Examples) -> Tensor:
        model = make_llama().double()
        model(**of.batch()).loss.backward()
        return torch.cat([weight.grad.flatten() for weight in model.parameters()])

    central, by_site = gradient(examples), [gradient(part) for part in parts]

    def error(weights: list[int]) -> float:
        mean = sum(weight * grad for weight, grad in zip(weights, by_site, strict=True)) / sum(weights)
        return float((mean - central).norm() / central.norm())

    assert error([part.size(1).num_trained_tokens for part in parts]) < 1e-6
    assert error([len(part) for part in parts]) > 0.01


def test_packed_texts_have_the_losses_and_gradients_of_padded_ones() -> None:
    examples = make_examples()
    packed = replace(examples, is_packed=True).batch()
    assert set(packed) == {"input_ids", "labels", "position_ids"}
    assert packed["input_ids"].shape == (1, examples.lengths.sum())
    assert (packed["labels"] != -100).sum() == examples.num_trained.sum()
    gradients = []
    for batch in (examples.batch(), packed):
        model = make_llama()
        loss = model(**batch).loss
        loss.backward()
        gradients.append((loss.item(), torch.cat([weight.grad.flatten() for weight in model.parameters()])))
    assert gradients[0][0] == pytest.approx(gradients[1][0], abs=1e-5)
    assert torch.allclose(gradients[0][1], gradients[1][1], atol=1e-5)
    check_packing(model, examples.batch(), packed)
    assert model.training


def test_the_first_token_of_a_packed_text_is_not_predicted_from_the_text_before() -> None:
    examples = ConversationEncoder(make_tokenizer(), "plain", 64, train_on_prompt=True).encode(rows()).examples
    packed = replace(examples, is_packed=True).batch()
    firsts = packed["position_ids"] == 0
    assert (packed["labels"][firsts] == -100).all()
    assert (packed["labels"][~firsts] != -100).all()
    check_packing(make_llama(), examples.batch(), packed)


def test_a_model_that_mixes_packed_texts_is_refused() -> None:
    examples = make_examples()
    packed = replace(examples, is_packed=True).batch()
    cached = make_llama()
    cached.config.use_cache = True
    assert "pack: expected a model that tells texts in a row apart" in refusal(
        lambda: check_packing(cached, examples.batch(), packed)
    )

    class Ignores(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = make_llama()

        def forward(self, position_ids: Tensor | None = None, **batch: Tensor) -> SimpleNamespace:
            return self.model(**batch)

    model = Ignores().eval()
    assert "Use pack=False" in refusal(lambda: check_packing(model, examples.batch(), packed))
    assert not model.training


def test_a_batch_without_a_trained_token_adds_nothing() -> None:
    model, examples = make_llama(), make_examples()
    batch = examples.batch()
    empty = batch | {"labels": torch.full_like(batch["labels"], -100)}
    both = evaluate(model, [batch, empty], score_tokens).totals()
    assert both == evaluate(model, [batch], score_tokens).totals()
    assert summarise_tokens(evaluate(model, [empty], score_tokens).totals()) == {}


def test_the_perplexity_of_a_hopeless_model_is_infinite() -> None:
    assert summarise_tokens(Means.of({"loss": (2000.0, 2)}).totals()) == {"loss": 1000.0, "perplexity": math.inf}


def test_absolute_positions_need_padding_on_the_right() -> None:
    examples = make_examples()
    assert not examples.pad_left
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=400, n_embd=16, n_layer=1, n_head=2, n_positions=64, use_cache=False)
    model = GPT2LMHeadModel(config).eval()
    total, _, count = sums_by_hand(model, examples)
    assert model(**examples.batch()).loss.item() == pytest.approx(total.item() / count, abs=1e-5)


def test_a_real_model_learns_from_real_rows_packed_or_not(shared: Path) -> None:
    folder = str(shared / "models" / "stories260K")
    encoder = ConversationEncoder(AutoTokenizer.from_pretrained(folder), "alpaca", 128)
    given = read_conversations(str(shared / "data" / "instruct" / "alpaca_original_100.json")).select(range(6))
    examples, losses = encoder.encode(given).examples, []
    for is_packed in (False, True):
        model = AutoModelForCausalLM.from_pretrained(folder, use_cache=False)
        of = replace(examples, is_packed=is_packed)
        check_packing(model, examples.batch(), replace(of, is_packed=True).batch())
        optimiser = OPTIMISERS["adamw"](model.parameters(), lr=1e-3)
        losses.append(
            [train(model, of.shuffled_batches(3, seed), optimiser, score_tokens).result()["loss"] for seed in range(2)]
        )
    assert losses[0] == pytest.approx(losses[1], abs=1e-3)
    assert losses[0][1] < losses[0][0] - 0.1


def test_the_longest_batch_can_be_tried() -> None:
    examples = make_examples("alpaca")
    for is_packed in (False, True):
        assert math.isfinite(try_step(make_llama(), replace(examples, is_packed=is_packed).longest_batch(2)))

"""Drawn answers: those that transformers draws for a prompt alone, in any batch, by generators of their own."""

import random
from typing import Any

import numpy as np
import pytest
import torch
from test_generate import MODELS, answer_by_hand, make_prompts, state_of
from tiny_llm import make_llama
from transformers import GenerationConfig

from scaling_fl.models.generate import Sampling, generate

SEEDS = (5, 6, 7, 8, 9, 10)


def draw(model: Any, prompts: list[list[int]], seeds: Any = SEEDS, temperature: float = 1.5, **options: Any) -> Any:
    sampling = Sampling(temperature, options.pop("top_p", 0.9), seeds)
    given = {"max_new_tokens": 8, "end_ids": [], "pad_id": 0} | options
    return generate(model, prompts, sampling=sampling, **given)


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (2.0, 0.8), (0.3, 1.0), (1.0, 1e-9)])
def test_an_answer_is_the_one_that_transformers_draws_with_the_same_seed(temperature: float, top_p: float) -> None:
    model, prompts = make_llama(), make_prompts()
    found = draw(model, prompts, temperature=temperature, top_p=top_p)
    config = GenerationConfig(do_sample=True, temperature=temperature, top_p=top_p, top_k=0, max_new_tokens=8)
    for prompt, seed, answer in zip(prompts, SEEDS, found, strict=True):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            theirs = model.generate(
                torch.tensor([prompt]), generation_config=config, attention_mask=torch.ones(1, len(prompt))
            )
        assert answer == theirs[0, len(prompt) :].tolist()
    greedy = [answer_by_hand(model, prompt, 8) for prompt in prompts]
    assert (found == greedy) == (top_p < 0.1), "of the most probable token alone nothing is drawn"


@pytest.mark.filterwarnings("ignore:Position ids are not supported")
@pytest.mark.parametrize("name", ["llama", "gpt2", "lora", "prompt tuning"])
def test_drawn_answers_of_a_batch_are_those_to_each_prompt_alone_and_change_nothing(name: str) -> None:
    model, prompts = MODELS[name]().train(), make_prompts()
    before = state_of(model), random.getstate(), repr(np.random.get_state()), torch.get_rng_state().tolist()
    found = draw(model, prompts)
    assert found == [draw(model, [prompt], [seed])[0] for prompt, seed in zip(prompts, SEEDS, strict=True)]
    assert (state_of(model), random.getstate(), repr(np.random.get_state()), torch.get_rng_state().tolist()) == before
    assert draw(model, prompts, SEEDS[::-1]) != found
    assert len({tuple(answer) for answer in draw(model, prompts[:1] * 6)}) > 1


def test_a_drawn_answer_ends_before_its_end_token() -> None:
    model, prompts = make_llama(), make_prompts()
    whole = draw(model, prompts)
    end = whole[0][3]
    expected = [answer[: answer.index(end)] if end in answer else answer for answer in whole]
    assert draw(model, prompts, end_ids=[end]) == expected
    assert len(expected[0]) == 3


@pytest.mark.parametrize("temperature", [None, 1.5])
def test_each_token_is_handed_on_when_it_comes_but_not_the_end_token(temperature: float | None) -> None:
    model, prompts = make_llama(), make_prompts()[:1]
    sampling = temperature and Sampling(temperature, 1.0, SEEDS[:1])
    given: dict[str, Any] = {"max_new_tokens": 8, "pad_id": 0, "sampling": sampling}
    (whole,) = generate(model, prompts, end_ids=[], **given)
    seen: list[list[int]] = []
    end = whole[5]
    assert end not in whole[:5]
    (cut,) = generate(model, prompts, end_ids=[end], on_token=lambda ids: seen.append(list(ids)), **given)
    assert cut == whole[:5]
    assert seen == [*(whole[:length] for length in range(1, 6)), cut]

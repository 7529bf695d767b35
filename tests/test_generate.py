"""Answers are greedy, do not depend on their neighbours in a batch, and leave the model as it was."""

import logging
import random
import warnings
from collections.abc import Callable, Sequence
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import refusal
from tiny_llm import make_llama
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, GPT2Config, GPT2LMHeadModel

from scaling_fl.models.adapters import add_adapter
from scaling_fl.models.generate import find_end_ids, generate

LENGTHS = (3, 9, 1, 5, 12, 9)
POSITIONS = 64


def make_gpt2() -> GPT2LMHeadModel:
    """A random GPT-2 of two layers, with positions that are absolute."""
    torch.manual_seed(0)
    sizes = {
        "n_embd": 16,
        "n_layer": 2,
        "n_head": 2,
        "n_positions": POSITIONS,
        "vocab_size": 400,
        "tie_word_embeddings": False,
    }
    return GPT2LMHeadModel(GPT2Config(**sizes, initializer_range=0.5, bos_token_id=0, eos_token_id=0, use_cache=False))


def make_prompts(lengths: Sequence[int] = LENGTHS) -> list[list[int]]:
    numbers = np.random.default_rng(1)
    return [numbers.integers(0, 400, length).tolist() for length in lengths]


@torch.inference_mode()
def answer_by_hand(model: nn.Module, prompt: list[int], num_tokens: int, end_ids: Sequence[int] = ()) -> list[int]:
    """The most probable token after all before it, again and again, without padding, cache or dropout."""
    ids, evaluated = list(prompt), deepcopy(model).eval()
    for _ in range(num_tokens):
        logits = evaluated(input_ids=torch.tensor([ids]), use_cache=False).logits
        if (token := int(logits[0, -1].argmax())) in end_ids:
            break
        ids.append(token)
    return ids[len(prompt) :]


def adapted(model: nn.Module, kind: str, **options: Any) -> Any:
    """Put an adapter beside a model, with random weights."""
    found = add_adapter(model, {"peft_type": kind, "task_type": "CAUSAL_LM", **options})
    torch.manual_seed(1)
    with torch.no_grad():
        for weight in found.parameters():
            if weight.requires_grad:
                weight.normal_(std=0.3)
    return found


MODELS: dict[str, Callable[[], Any]] = {
    "llama": make_llama,
    "gpt2": make_gpt2,
    "lora": lambda: adapted(make_llama(), "LORA", r=2),
    "lora of gpt2": lambda: adapted(make_gpt2(), "LORA", r=2, target_modules=["c_attn"], fan_in_fan_out=True),
    "prompt tuning": lambda: adapted(make_llama(), "PROMPT_TUNING", num_virtual_tokens=4),
    "prompt tuning of gpt2": lambda: adapted(make_gpt2(), "PROMPT_TUNING", num_virtual_tokens=4),
    "prefix tuning": lambda: adapted(make_llama(), "PREFIX_TUNING", num_virtual_tokens=4),
}


@pytest.mark.filterwarnings("ignore:Position ids are not supported")
@pytest.mark.parametrize("name", MODELS)
def test_answers_of_a_batch_are_those_to_each_prompt_alone(name: str) -> None:
    model, prompts = MODELS[name](), make_prompts()
    expected = [answer_by_hand(model, prompt, 8) for prompt in prompts]
    assert len({tuple(answer) for answer in expected}) == len(prompts), "the answers must differ"
    for pad_id in (0, 7):
        assert generate(model, prompts, max_new_tokens=8, end_ids=[], pad_id=pad_id) == expected
    alone = [generate(model, [prompt], max_new_tokens=8, end_ids=[], pad_id=0) for prompt in prompts]
    assert alone == [[answer] for answer in expected]


def test_answers_of_a_real_model_are_those_to_each_prompt_alone(shared: Path) -> None:
    folder = str(shared / "models" / "stories260K")
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    texts = [
        "Once",
        "Lily and her dog went to the park. They saw a",
        "Tom was sad. The end.",
        "One day, a big red ball",
    ]
    prompts = [tokenizer(text)["input_ids"] for text in texts]
    found = generate(model, prompts, max_new_tokens=24, end_ids=[2], pad_id=0)
    assert found == [answer_by_hand(model, prompt, 24, [2]) for prompt in prompts]
    assert "upon a time" in tokenizer.decode(found[0])


@pytest.mark.parametrize("make", [make_llama, make_gpt2])
def test_an_answer_stops_before_its_end_token_whether_the_model_lists_it_or_not(make: Callable[[], Any]) -> None:
    model, prompts = make(), make_prompts()
    whole = [answer_by_hand(model, prompt, 8) for prompt in prompts]
    ends = [whole[0][3], whole[1][0]]
    model.generation_config.eos_token_id = [whole[2][1]]
    lengths = [min([place for place, id_ in enumerate(answer) if id_ in ends], default=8) for answer in whole]
    expected = [answer[:length] for answer, length in zip(whole, lengths, strict=True)]
    assert lengths[:2] == [3, 0]
    assert lengths[2] > 1, "which the model lists and is not asked for"
    assert generate(model, prompts, max_new_tokens=8, end_ids=ends, pad_id=0) == expected


def test_tokens_that_end_an_answer_are_those_of_the_model_and_that_of_the_template() -> None:
    model = make_llama()
    for listed, end_id, expected in [(2, 4, [2, 4]), ([9, 2], 2, [2, 9]), (None, 4, [4]), (2, None, [2])]:
        model.generation_config.eos_token_id = listed
        assert find_end_ids(model, end_id) == expected
        assert find_end_ids(adapted(deepcopy(model), "LORA"), end_id) == expected
    model.generation_config.eos_token_id = None
    assert find_end_ids(model, None) == []


HOSTILE = {
    **{"do_sample": True, "temperature": 5.0, "top_k": 3, "num_beams": 3, "min_length": 40, "max_length": 50},
    **{
        "repetition_penalty": 3.0,
        "no_repeat_ngram_size": 1,
        "num_return_sequences": 2,
        "cache_implementation": "static",
    },
    **{"output_logits": True, "return_dict_in_generate": True},
}


@pytest.mark.parametrize("name", ["llama", "gpt2", "lora", "prompt tuning"])
def test_settings_of_the_models_generation_have_no_effect_and_nothing_warns(name: str) -> None:
    model, prompts = MODELS[name](), make_prompts()
    expected = generate(model, prompts, max_new_tokens=8, end_ids=[], pad_id=0)
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    suppressed = sorted({token for answer in expected for token in answer})
    inner.generation_config = GenerationConfig(**HOSTILE, suppress_tokens=suppressed, eos_token_id=suppressed)
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    logger = logging.getLogger("transformers")
    logger.addHandler(handler)
    try:
        with warnings.catch_warnings(action="error"):
            assert generate(model, prompts, max_new_tokens=8, end_ids=[], pad_id=0) == expected
    finally:
        logger.removeHandler(handler)
    assert lines == []


def state_of(model: nn.Module) -> dict[str, Any]:
    """All attributes of all modules, and what is in the configurations."""
    found: dict[str, Any] = {}
    for name, module in model.named_modules():
        found |= {f"{name}.{key}": id(value) for key, value in vars(module).items() if key != "training"}
        found[f"{name}.training"] = module.training
        for part in ("config", "generation_config"):
            if hasattr(getattr(module, part, None), "to_dict"):
                found[f"{name}.{part}."] = deepcopy(getattr(module, part).to_dict())
        found |= {f"{name}.{key}.data": value.clone() for key, value in module._parameters.items() if value is not None}
    return {key: value.tolist() if isinstance(value, torch.Tensor) else value for key, value in found.items()}


@pytest.mark.parametrize("name", ["llama", "gpt2", "lora", "prompt tuning", "prompt tuning of gpt2"])
def test_the_model_is_left_as_it_was(name: str) -> None:
    model = MODELS[name]().train()
    next(module for module in model.modules() if isinstance(module, nn.Embedding)).eval()
    before = state_of(model)
    generate(model, make_prompts(), max_new_tokens=8, end_ids=[3], pad_id=0)
    assert state_of(model) == before
    with pytest.raises(IndexError):
        generate(model, [[1_000_000]], max_new_tokens=8, end_ids=[3], pad_id=0)
    assert state_of(model) == before
    generate(model.eval(), make_prompts(), max_new_tokens=1, end_ids=[3], pad_id=0)
    assert not model.training


def test_a_model_in_training_answers_without_dropout_and_can_be_trained_afterwards() -> None:
    model, prompts = make_llama(dropout=0.9).train(), make_prompts()
    expected = [answer_by_hand(model, prompt, 8) for prompt in prompts]
    assert generate(model, prompts, max_new_tokens=8, end_ids=[], pad_id=0) == expected
    ids = torch.tensor([prompts[1]])
    model(input_ids=ids, labels=ids).loss.backward()
    assert all(weight.grad is not None and weight.grad.abs().sum() > 0 for weight in model.parameters())


def test_random_generators_are_neither_used_nor_changed() -> None:
    model, prompts, found = make_llama(), make_prompts(), []
    model.generation_config.do_sample = True
    for seed in (0, 1):
        random.seed(seed), np.random.seed(seed), torch.manual_seed(seed)
        before = random.getstate(), repr(np.random.get_state()), torch.get_rng_state().tolist()
        found.append(generate(model, prompts, max_new_tokens=8, end_ids=[], pad_id=0))
        assert before == (random.getstate(), repr(np.random.get_state()), torch.get_rng_state().tolist())
    assert found[0] == found[1]


def test_prompts_end_where_answers_begin_and_each_token_is_computed_once_until_all_answers_end() -> None:
    model, prompts = make_llama(), make_prompts((2, 5))
    assert model.config.use_cache is False, "as in training"
    seen: list[dict[str, Any]] = []

    def note(_: nn.Module, __: Any, given: dict[str, Any]) -> None:
        seen.append(given)
        assert torch.is_inference_mode_enabled()

    model.register_forward_pre_hook(note, with_kwargs=True)
    answers = generate(model, prompts, max_new_tokens=9, end_ids=[], pad_id=7)
    assert seen[0]["input_ids"].tolist() == [[7, 7, 7, *prompts[0]], prompts[1]]
    assert seen[0]["attention_mask"].tolist() == [[0, 0, 0, 1, 1], [1] * 5]
    assert [given["input_ids"].shape[1] for given in seen] == [5] + [1] * 8
    seen.clear()
    generate(model, prompts, max_new_tokens=9, end_ids=[answers[0][1], answers[1][3]], pad_id=7)
    assert [given["input_ids"].shape[1] for given in seen] == [5, 1, 1, 1]


@pytest.mark.filterwarnings("ignore:Position ids are not supported")
@pytest.mark.parametrize("name", ["gpt2", "prompt tuning of gpt2"])
def test_answers_end_with_the_positions_of_the_model_and_those_of_shorter_prompts_do_not(name: str) -> None:
    model = MODELS[name]()
    positions = POSITIONS - 4 * ("prompt" in name)
    prompts = make_prompts((positions, positions - 2, 5, positions - 20))
    found = generate(model, prompts, max_new_tokens=8, end_ids=[], pad_id=0)
    assert found == [answer_by_hand(model, prompt, count) for prompt, count in zip(prompts, (1, 3, 8, 8), strict=True)]
    for length in (0, positions + 1):
        given = make_prompts((3, length))
        says = refusal(partial(generate, model, given, max_new_tokens=8, end_ids=[], pad_id=0))
        assert says == f"expected a prompt of 1 to {positions} tokens, got {length}"


def test_no_prompts_have_no_answers() -> None:
    assert generate(make_llama(), [], max_new_tokens=8, end_ids=[], pad_id=0) == []

"""Answers of causal language models: each token is the most probable one, or drawn."""

import sys
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopPLogitsWarper,
)
from transformers.generation.streamers import BaseStreamer

CHANGED = ("training", "generation_config", "prepare_inputs_for_generation")  # by generation here, and by peft's


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn, in place of taking the most probable one.

    Args:
        temperature: divides the logits; above 0.
        top_p: draws out of the most probable tokens whose probabilities add up to so much; above 0, 1 takes all.
        seeds: one for each prompt, of a generator of its own.
    """

    temperature: float
    top_p: float
    seeds: Sequence[int]


@torch.inference_mode()
def generate(
    model: Any,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    end_ids: Sequence[int],
    pad_id: int,
    sampling: Sampling | None = None,
    on_token: Callable[[list[int]], None] | None = None,
) -> list[list[int]]:
    """Return the answers to prompts, without dropout and without the settings of the model's generation.

    An answer is the one to its prompt alone, but for rounding where two tokens are as probable as each other. The model
    and random generators stay as they were.

    Args:
        model: a causal language model of transformers, which may have an adapter.
        prompts: ids of tokens, of any lengths.
        max_new_tokens: an answer is cut to so many, or to fewer where the model has no more positions.
        end_ids: of the tokens that end an answer; without one, all answers are cut.
        pad_id: any id that the model takes.
        sampling: how tokens are drawn; None takes the most probable ones.
        on_token: of a single prompt, is called with the answer so far after each token.

    Returns:
        The ids of each answer, without the token that ended it.

    Raises:
        ValueError: a prompt is empty, or longer than the model takes.
    """
    groups = defaultdict[tuple[int, int], list[int]](list)
    for index, prompt in enumerate(prompts):
        groups[find_room(model, len(prompt), max_new_tokens)].append(index)
    answers: dict[int, list[int]] = {}
    with _evaluating(model):
        for (most, _), indices in groups.items():
            batch = _pad_left([prompts[index] for index in indices], pad_id, next(model.parameters()).device)
            ends = {"eos_token_id": list(end_ids) or None, "pad_token_id": pad_id}
            config = GenerationConfig(max_new_tokens=most, do_sample=False, num_beams=1, use_cache=True, **ends)
            found = model.generate(
                **batch,
                generation_config=config,
                logits_processor=LogitsProcessorList([] if sampling is None else [_Draw(sampling, indices)]),
                streamer=None if on_token is None else _Stream(on_token, end_ids),
            )
            rows = found[:, batch["input_ids"].shape[1] :].tolist()
            answers |= {index: _cut(row, end_ids) for index, row in zip(indices, rows, strict=True)}
    return [answers[index] for index in range(len(prompts))]


class _Draw(LogitsProcessor):
    """Leaves one token of each prompt possible, which a generator of the prompt's own draws.

    So a prompt draws the same tokens in any batch, and no generator of others is used.
    """

    def __init__(self, sampling: Sampling, indices: Sequence[int]) -> None:
        self.generators = [torch.Generator().manual_seed(sampling.seeds[index]) for index in indices]
        warpers: list[Any] = [TemperatureLogitsWarper(float(sampling.temperature))]
        warpers += [TopPLogitsWarper(float(sampling.top_p))] * (sampling.top_p < 1)
        self.warpers = LogitsProcessorList(warpers)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        probabilities = self.warpers(input_ids, scores).softmax(-1).cpu()
        drawn = [
            torch.multinomial(row, 1, generator=generator)
            for row, generator in zip(probabilities, self.generators, strict=True)
        ]
        return torch.full_like(scores, -torch.inf).scatter(1, torch.stack(drawn).to(scores.device), 0.0)


class _Stream(BaseStreamer):
    """Hands on the answer so far; of what transformers hands on, the first is the prompt."""

    def __init__(self, on_token: Callable[[list[int]], None], end_ids: Sequence[int]) -> None:
        self.on_token, self.end_ids = on_token, end_ids
        self.ids: list[int] | None = None

    def put(self, value: Tensor) -> None:
        if self.ids is None:
            self.ids = []
        else:
            self.ids += value.tolist()
            self.on_token(_cut(self.ids, self.end_ids))

    def end(self) -> None:
        pass


def find_end_ids(model: Any, end_id: int | None) -> list[int]:
    """Return the ids of the tokens that end an answer: those that the model lists, and that of a template, if any."""
    listed = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    found = {*(listed if isinstance(listed, list | tuple) else [listed]), end_id}
    return sorted(id_ for id_ in found if id_ is not None)


def find_room(model: Any, length: int, max_new_tokens: int) -> tuple[int, int]:
    """Return how many tokens can follow a prompt, and the length that prompts of its batch must have; 0: any.

    Raises:
        ValueError: the prompt is empty, or longer than the model takes.
    """
    adapter = getattr(model, "active_peft_config", None)
    # Trained vectors before the prompt take positions, too. peft counts those of padding, which training does not have.
    num_virtual = adapter.num_virtual_tokens if adapter is not None and adapter.is_prompt_learning else 0
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if not positions or positions < 0:
        positions = sys.maxsize
    positions -= num_virtual
    if not 1 <= length <= positions:
        raise ValueError(f"expected a prompt of 1 to {positions:,} tokens, got {length:,}")
    most = min(max_new_tokens, positions - length + 1)  # the last token needs none
    return most, length if num_virtual else 0


def _pad_left(prompts: Sequence[Sequence[int]], pad_id: int, device: torch.device) -> dict[str, Tensor]:
    """Return prompts that all end where their answers begin."""
    width = max(map(len, prompts))
    ids = [[pad_id] * (width - len(prompt)) + list(prompt) for prompt in prompts]
    mask = [[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    return {"input_ids": torch.tensor(ids, device=device), "attention_mask": torch.tensor(mask, device=device)}


def _cut(answer: list[int], end_ids: Sequence[int]) -> list[int]:
    return answer[: next((place for place, id_ in enumerate(answer) if id_ in end_ids), len(answer))]


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Put a model in evaluation mode, without settings of generation, and restore both at the end."""
    before = [
        (module, {name: vars(module)[name] for name in CHANGED if name in vars(module)}) for module in model.modules()
    ]
    try:
        model.eval()
        for module, had in before:
            if "generation_config" in had:  # what `generate` is not given it takes from there
                module.generation_config = GenerationConfig()
        with warnings.catch_warnings(action="ignore", category=UserWarning):  # peft: of positions that it counts itself
            yield
    finally:
        for module, had in before:
            for name in CHANGED:
                vars(module).pop(name, None)
            vars(module).update(had)

"""Train and evaluate one model on one device, in plain PyTorch; knows nothing of federations."""

import math
import random
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.optim import Optimizer

from scaling_fl.training.metrics import Means

T = TypeVar("T")
Batch = dict[str, Tensor]  # the model's keyword arguments, labels included
NOT_TRAINED = -100  # the label of a token that a language model is not to predict
Score = Callable[[Any, Batch, Means], None]  # adds a batch's output to the means


def train(model: nn.Module, batches: Iterable[Batch], optimiser: Optimizer, score: Score) -> Means:
    """Take one optimiser step a batch and return the scores of the batches as they were trained on."""
    return take_steps(model, ([batch] for batch in batches), optimiser, score)


def take_steps(
    model: nn.Module,
    steps: Iterable[Sequence[Batch]],
    optimiser: Optimizer,
    score: Score,
    autocast: torch.dtype | None = None,
    before_step: Callable[[], object] | None = None,
) -> Means:
    """Take optimiser steps, each as on one large batch but in the memory of its micro-batches, and return the scores.

    Args:
        model: to train.
        steps: the micro-batches of each step.
        optimiser: of the model's weights.
        score: adds the output of a micro-batch to the means.
        autocast: what matrix products are computed in; None: the type of the weights.
        before_step: changes the gradients.
    """
    model.train()
    means = Means()
    for batches in steps:
        optimiser.zero_grad()  # before the activations take memory
        for batch, fraction in zip(batches, _fractions(batches), strict=True):
            if fraction == 0:
                continue  # the loss is 0 / 0
            batch = _to_device(batch, model)
            with in_type(autocast, next(iter(batch.values())).device):
                output = model(**batch)
            (output.loss if fraction == 1 else output.loss * fraction).backward()
            score(output, batch, means)
        if before_step is not None:
            before_step()
        optimiser.step()
    return means.settle()


def in_type(autocast: torch.dtype | None, device: torch.device) -> AbstractContextManager[None]:
    """Return a context in which matrix products are computed in a type; None: in that of the weights."""
    return nullcontext() if autocast is None else torch.autocast(device.type, dtype=autocast)


def count_targets(batch: Batch) -> int:
    """Return over how many targets the loss of a batch is a mean: examples, or the tokens of texts to be predicted."""
    labels = batch["labels"]
    return len(labels) if labels.ndim == 1 else int((labels[:, 1:] != NOT_TRAINED).sum())


def _fractions(batches: Sequence[Batch]) -> list[float]:
    """Return the part of each micro-batch in the mean over the targets of all."""
    if len(batches) == 1:
        return [1.0]
    counts = [count_targets(batch) for batch in batches]
    return [count / max(sum(counts), 1) for count in counts]


@torch.inference_mode()
def evaluate(model: nn.Module, batches: Iterable[Batch], score: Score) -> Means:
    """Return the scores of the batches, without dropout."""
    model.eval()
    means = Means()
    for batch in batches:
        batch = _to_device(batch, model)
        score(model(**batch), batch, means)
    return means.settle()


def count_texts(batch: Batch) -> int:
    """Return how many texts a batch has, those in a packed row too."""
    is_packed = "position_ids" in batch and "attention_mask" not in batch
    return int((batch["position_ids"] == 0).sum()) if is_packed else len(next(iter(batch.values())))


def stop_after(seconds: float | None, device: torch.device, steps: Iterable[T]) -> Iterator[T]:
    """Yield steps until so many seconds have passed, and at least one; None: all."""
    end = math.inf if seconds is None else time.monotonic() + seconds
    for step in steps:
        yield step
        if end < math.inf and device.type != "cpu":
            torch.accelerator.synchronize(device)  # or the loop would queue more steps than there is time for
        if time.monotonic() >= end:
            return


def try_step(model: nn.Module, batch: Batch, autocast: torch.dtype | None = None) -> float:
    """Pass a batch forward and backward as in training, and return its loss.

    Restores buffers, gradients, modes and random generators; weights do not change.
    """
    device = next(model.parameters()).device
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    gradients = [(weight, weight.grad) for weight in model.parameters()]
    modes = [(module, module.training) for module in model.modules()]
    generators = random.getstate(), np.random.get_state()
    devices = [] if device.type == "cpu" else [device.index]
    try:
        with torch.random.fork_rng(devices, device_type=device.type):
            for weight, _ in gradients:
                weight.grad = None
            model.train()
            with in_type(autocast, device):
                loss = functional_call(model, buffers, (), _to_device(batch, model)).loss
            loss.backward()
            return loss.item()
    finally:
        random.setstate(generators[0])
        np.random.set_state(generators[1])
        for module, mode in modes:
            module.training = mode
        for weight, gradient in gradients:
            weight.grad = gradient


def with_fixed_kernels(work: Callable[[], T]) -> T:
    """Return what `work` returns, with kernels only that add in a fixed order, from now on and in this process.

    If there is none for one of its operators, torch warns of it, and uses such kernels where it has them.
    """
    torch.use_deterministic_algorithms(True)
    try:
        return work()
    except RuntimeError as error:
        if "deterministic" not in str(error):
            raise
        torch.use_deterministic_algorithms(True, warn_only=True)
        return work()


def _to_device(batch: Batch, model: nn.Module) -> Batch:
    device = next(model.parameters()).device
    return {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}

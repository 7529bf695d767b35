"""The estimated memory equals the measured memory."""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from helpers import LABELS, make_bert, make_examples
from torch import Tensor, nn
from torch.optim import Optimizer
from transformers import AutoModelForSequenceClassification, LlamaConfig

from scaling_fl.distributed.world import world
from scaling_fl.federation.global_model import GlobalModel
from scaling_fl.federation.strategies import make_strategy
from scaling_fl.models.memory import Meter, activation_bytes, estimate_bytes, state_bytes
from scaling_fl.training.loop import take_steps, train
from scaling_fl.training.optimisers import OPTIMISERS
from scaling_fl.training.scores import score_classes


def make_llama() -> nn.Module:
    return AutoModelForSequenceClassification.from_config(
        LlamaConfig(
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=24,
            vocab_size=50,
            num_labels=len(LABELS),
            pad_token_id=0,
        )
    )


@pytest.mark.parametrize("is_training", [True, False])
@pytest.mark.parametrize("make_model", [make_bert, make_llama])
def test_the_estimate_for_a_batch_is_its_memory(make_model: Callable[[], nn.Module], is_training: bool) -> None:
    model = make_model().train(is_training)
    batch = make_examples(7).batch()
    with Meter([*model.parameters(), *model.buffers(), *batch.values()]) as meter, torch.set_grad_enabled(is_training):
        output = model(**batch)
        if is_training:
            output.loss.backward()
    assert activation_bytes(model, batch, is_training) == pytest.approx(meter.peak, rel=0.02)


def test_a_meter_measures_the_peak() -> None:
    known = torch.zeros(100)
    with Meter([known]) as meter:
        known.view(10, 10)
        for _ in range(3):
            torch.zeros(1_000)
        both = torch.zeros(1_000), torch.zeros(500)
    assert meter.peak == sum(tensor.nbytes for tensor in both)


@pytest.mark.parametrize(
    ("make", "num_copies"),
    [(OPTIMISERS["sgd"], 0), (OPTIMISERS["adamw"], 2)]
    + [(make_strategy(name), copies) for name, copies in (("fedavg", 0), ("fedavgm", 1), ("fedyogi", 2))],
)
def test_the_state_of_an_optimiser_is_counted(make: Callable[[list[Tensor]], Optimizer], num_copies: int) -> None:
    weights = nn.Parameter(torch.ones(12_345))
    weights.grad = torch.ones_like(weights)
    optimiser = make([weights])
    optimiser.step()
    measured = sum(v.nbytes for v in optimiser.state[weights].values() if isinstance(v, Tensor) and v.numel() > 1)
    assert state_bytes(make, 12_345) == measured == num_copies * weights.nbytes


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_the_estimate_for_a_device_is_the_memory_of_training(name: str) -> None:
    model, batch = make_bert(), make_examples(7).batch()
    make_optimiser = partial(OPTIMISERS[name], lr=1e-3)
    estimate = estimate_bytes(model, batch, None, make_optimiser)
    weights = [*model.parameters(), *model.buffers()]
    with Meter([*weights, *batch.values()]) as meter:
        train(model, [batch, batch], make_optimiser(model.parameters()), score_classes)
    assert estimate == pytest.approx(meter.peak + sum(tensor.nbytes for tensor in weights), rel=0.1)


def test_the_size_of_a_global_model_is_that_of_its_tensors() -> None:
    with world():
        server = GlobalModel(make_bert(), make_strategy("fedavg"))
    held = {**vars(server), **vars(server._mean), **vars(server._mean._vector)}.values()
    storages = {
        tensor.data_ptr(): tensor.untyped_storage().nbytes()
        for tensor in held
        if isinstance(tensor, Tensor) and tensor.numel() > 1
    }
    assert server.nbytes == sum(storages.values())


def test_the_estimate_has_the_gradients_that_wait_for_the_next_batch_of_a_step() -> None:
    model, batch = make_bert(), make_examples(40).batch()
    make_optimiser = partial(OPTIMISERS["sgd"], lr=1e-3)
    alone, first = (estimate_bytes(model, batch, None, make_optimiser, accumulates=more) for more in (False, True))
    weights = [*model.parameters(), *model.buffers()]
    with Meter([*weights, *batch.values()]) as meter:
        take_steps(model, [[batch, batch]], make_optimiser(model.parameters()), score_classes)
    assert first == pytest.approx(meter.peak + sum(tensor.nbytes for tensor in weights), rel=0.05)
    assert first - alone == pytest.approx(sum(weight.nbytes for weight in model.parameters()), rel=0.2)

"""Training of one model equals a loop written out."""

import math
import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import make_bert, make_examples
from torch import nn

from scaling_fl.training.loop import evaluate, train, try_step, with_fixed_kernels
from scaling_fl.training.optimisers import OPTIMISERS, add_proximal_term
from scaling_fl.training.scores import score_classes


def one_batch() -> list[dict[str, torch.Tensor]]:
    return [make_examples(8).batch()]


def test_training_scores_its_batches_and_evaluation_turns_dropout_off() -> None:
    model = make_bert(dropout=0.5)
    scores = [train(model, one_batch(), OPTIMISERS["sgd"](model.parameters(), lr=0.0), score_classes) for _ in range(2)]
    assert scores[0].result()["loss"] != scores[1].result()["loss"], "dropout is on"
    quiet = [evaluate(model, one_batch(), score_classes).result() for _ in range(2)]
    assert quiet[0] == quiet[1]


def test_evaluation_changes_nothing() -> None:
    model = make_bert()
    before = [weight.clone() for weight in model.parameters()]
    evaluate(model, one_batch(), score_classes)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert all(weight.grad is None for weight in model.parameters())


@pytest.mark.parametrize("optimiser", ["sgd", "adamw"])
def test_an_optimiser_is_that_of_torch(optimiser: str) -> None:
    ours, plain = make_bert(dropout=0.0), make_bert(dropout=0.0)
    train(ours, one_batch() * 3, OPTIMISERS[optimiser](ours.parameters(), lr=1e-2), score_classes)
    reference = {"sgd": torch.optim.SGD, "adamw": torch.optim.AdamW}[optimiser](plain.parameters(), lr=1e-2)
    for batch in one_batch() * 3:
        reference.zero_grad()
        plain(**batch).loss.backward()
        reference.step()
    for a, b in zip(ours.parameters(), plain.parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-5)


def test_the_proximal_pull_is_the_gradient_of_the_proximal_term() -> None:
    torch.manual_seed(0)
    weight, anchor = torch.randn(5, requires_grad=True), torch.randn(5)
    expected = weight.detach().clone().requires_grad_()
    ((expected**3).sum() + 0.7 / 2 * (expected - anchor).square().sum()).backward()
    (weight**3).sum().backward()
    add_proximal_term([weight], [anchor], 0.7)
    assert torch.allclose(weight.grad, expected.grad, atol=1e-6)


class Noisy(nn.Module):
    """A model with state of every kind, which uses every generator."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.norm, self.dropout = nn.Linear(3, 2), nn.BatchNorm1d(2), nn.Dropout()

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> SimpleNamespace:
        noise = random.random() + np.random.rand() + torch.rand(())
        logits = self.dropout(self.norm(self.layer(x))) * noise
        return SimpleNamespace(loss=nn.functional.cross_entropy(logits, labels), logits=logits)


def test_a_trial_step_changes_nothing() -> None:
    model = Noisy().eval()
    model.dropout.train()
    batch = {"x": torch.randn(5, 3), "labels": torch.tensor([0, 1, 0, 1, 1])}
    model(**batch).loss.backward()

    def state() -> str:
        generators = random.getstate(), np.random.get_state(), torch.get_rng_state().tolist()
        gradients = [weight.grad.tolist() for weight in model.parameters()]
        modes = [module.training for module in model.modules()]
        return repr((list(model.state_dict().values()), gradients, modes, generators))

    before = state()
    gradients = [weight.grad for weight in model.parameters()]
    assert math.isfinite(try_step(model, batch))
    assert state() == before
    assert all(weight.grad is gradient for weight, gradient in zip(model.parameters(), gradients, strict=True))
    with pytest.raises(IndexError):
        try_step(model, batch | {"labels": torch.tensor([0, 1, 0, 1, 9])})
    assert state() == before


def test_kernels_in_a_fixed_order_are_required_where_they_exist() -> None:
    places, values = torch.tensor([1]), torch.ones(1)
    try:
        assert with_fixed_kernels(lambda: 3) == 3
        assert not torch.is_deterministic_algorithms_warn_only_enabled()
        with pytest.warns(UserWarning, match="deterministic"):
            with_fixed_kernels(lambda: torch.zeros(3).put_(places, values))  # which has none
        assert torch.is_deterministic_algorithms_warn_only_enabled()
        with pytest.raises(RuntimeError, match="size"):
            with_fixed_kernels(lambda: torch.zeros(3) + torch.zeros(4))
    finally:
        torch.use_deterministic_algorithms(False)

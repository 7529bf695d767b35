"""The optimisers of sites, their states, and what is added to their gradients."""

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, Protocol

from torch import Tensor
from torch.nn.utils import clip_grad_norm_
from torch.optim import SGD, AdamW, Optimizer


def adamw8bit(weights: Iterable[Tensor], lr: float, weight_decay: float = 0.01) -> Optimizer:
    """Return AdamW with a state of 8 bits (Dettmers et al. 2022, arXiv 2110.02861), of bitsandbytes.

    Tensors with less than 4,096 weights have one of 32 bits.
    """
    from bitsandbytes.optim import AdamW8bit

    return AdamW8bit(list(weights), lr=lr, weight_decay=weight_decay)


# `fused` updates a weight in one pass over memory instead of one a term: four times faster on a CPU.
OPTIMISERS: dict[str, Callable[..., Optimizer]] = {
    "sgd": partial(SGD, fused=True),
    "adamw": partial(AdamW, fused=True),
    "adamw8bit": adamw8bit,
}


class OptimiserStates(Protocol):
    """Keeps the states of the optimisers of sites from round to round."""

    def load(self, site: int) -> dict[str, Any] | None:
        """Return the state with which a site goes on; None: it starts."""

    def save(self, site: int, round_: int, state: dict[str, Any]) -> None:
        """Keep the state of a site after a round, with which it goes on if the round counts."""


def load_state_(optimiser: Optimizer, state: dict[str, Any]) -> None:
    """Load a whole state but its learning rates.

    Args:
        optimiser: a new one.
        state: what `state_dict` of one like it returned.
    """
    rates = [group["lr"] for group in optimiser.param_groups]
    optimiser.load_state_dict(state)
    for group, rate in zip(optimiser.param_groups, rates, strict=True):
        group["lr"] = rate
    if type(optimiser).load_state_dict is not Optimizer.load_state_dict:
        return
    keys = [key for group in state["param_groups"] for key in group["params"]]
    for key, weight in zip(keys, all_weights(optimiser), strict=True):
        loaded = optimiser.state.get(weight, {})
        for name, value in state["state"].get(key, {}).items():
            # torch gives all but `step` the type of the weight, whatever it had.
            if isinstance(value, Tensor) and name in loaded and loaded[name].dtype != value.dtype:
                loaded[name] = value.to(loaded[name].device)


def all_weights(optimiser: Optimizer) -> list[Tensor]:
    """Return the weights that an optimiser moves."""
    return [weight for group in optimiser.param_groups for weight in group["params"]]


def change_gradients(optimiser: Optimizer, proximal_mu: float, max_norm: float | None) -> Callable[[], None]:
    """Return a function to call before each step; a hook would run twice where an optimiser calls its parent's step.

    It adds the pull of FedProx towards the weights that the optimiser has now, then clips.

    Args:
        optimiser: of which the gradients are.
        proximal_mu: the strength of the pull.
        max_norm: to which the gradient of all its weights is scaled if it is longer; None: it is not.
    """
    weights = all_weights(optimiser)
    anchors = [weight.detach().clone() for weight in weights] if proximal_mu else []

    def change() -> None:
        if anchors:
            add_proximal_term(weights, anchors, proximal_mu)
        if max_norm is not None:
            clip_grad_norm_(weights, max_norm)

    return change


def add_proximal_term(weights: list[Tensor], anchors: list[Tensor], strength: float) -> None:
    """Add the gradient of `strength / 2 * |weights - anchors|**2`.

    With the global weights as anchors this is FedProx (Li et al. 2020, arXiv 1812.06127, eq. 2).
    """
    for weight, anchor in zip(weights, anchors, strict=True):
        if weight.grad is not None:
            weight.grad.add_(weight.detach() - anchor, alpha=strength)

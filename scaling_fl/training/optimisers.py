"""The optimisers of sites, and what is added to their gradients."""

from collections.abc import Callable
from functools import partial

from torch import Tensor
from torch.nn.utils import clip_grad_norm_
from torch.optim import SGD, AdamW, Optimizer

# `fused` updates a weight in one pass over memory instead of one a term: four times faster on a CPU.
OPTIMISERS: dict[str, Callable[..., Optimizer]] = {
    "sgd": partial(SGD, fused=True),
    "adamw": partial(AdamW, fused=True),
}


def add_proximal_term(anchors: list[Tensor], strength: float, optimiser: Optimizer) -> None:
    """Add the gradient of `strength / 2 * |weights - anchors|**2` at every step of `optimiser`.

    With the global weights as anchors this is FedProx (Li et al. 2020, arXiv 1812.06127, eq. 2).
    """
    weights = [weight for group in optimiser.param_groups for weight in group["params"]]

    def add_pull(*_: object) -> None:
        for weight, anchor in zip(weights, anchors, strict=True):
            if weight.grad is not None:
                weight.grad.add_(weight.detach() - anchor, alpha=strength)

    optimiser.register_step_pre_hook(add_pull)


def clip_gradients(max_norm: float, optimiser: Optimizer) -> None:
    """Scale the gradient of all weights of `optimiser` to the norm `max_norm` at every step at which it is longer."""
    weights = [weight for group in optimiser.param_groups for weight in group["params"]]

    def clip(*_: object) -> None:
        clip_grad_norm_(weights, max_norm)

    optimiser.register_step_pre_hook(clip)

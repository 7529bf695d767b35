"""Strategies: a strategy is an optimiser of the global weights, and the mean drift is their gradient."""

from collections.abc import Callable, Iterable
from functools import partial

import torch
from torch import Tensor
from torch.optim import SGD, Optimizer


def fedavg(weights: Iterable[Tensor], learning_rate: float = 1.0) -> Optimizer:
    """FedAvg (McMahan et al. 2017, arXiv 1602.05629): take the mean, or `learning_rate` of the way there."""
    return SGD(weights, lr=learning_rate)


def takes_mean(optimiser: Optimizer) -> bool:
    """Tell whether a step sets the weights to the mean of the sites and leaves no state, as FedAvg does at rate 1."""
    of_fedavg = fedavg([torch.zeros(1)]).defaults
    return type(optimiser) is SGD and all(of_fedavg.items() <= group.items() for group in optimiser.param_groups)


def fedavgm(weights: Iterable[Tensor], learning_rate: float = 1.0, momentum: float = 0.9) -> Optimizer:
    """FedAvg with server momentum (Hsu et al. 2019, arXiv 1909.06335)."""
    return SGD(weights, lr=learning_rate, momentum=momentum)


class Adaptive(Optimizer):
    """The server's optimiser of Reddi et al. 2021 (arXiv 2003.00295), Algorithm 2.

    It has no bias correction, and adds tau to the root. The gradient is the drift with the other sign, which only the
    step sees. The state is `m` and `v`, each of the size of the weights; a step needs one more such
    vector while it computes.

    Args:
        weights: the global weights.
        update_: changes v in place, out of v, the gradient and beta2.
        learning_rate, momentum, beta2, tau: the paper's eta, beta1, beta2 and tau. v starts at tau^2.
    """

    def __init__(
        self,
        weights: Iterable[Tensor],
        update_: Callable[[Tensor, Tensor, float], object],
        learning_rate: float,
        momentum: float,
        beta2: float,
        tau: float,
    ) -> None:
        super().__init__(weights, {"lr": learning_rate, "momentum": momentum, "beta2": beta2, "tau": tau})
        self._update_ = update_

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Move the weights against their gradients."""
        for group in self.param_groups:
            for weight in group["params"]:
                state, gradient, tau = self.state[weight], weight.grad, group["tau"]
                if not state:
                    state |= {"m": torch.zeros_like(weight), "v": torch.full_like(weight, tau**2)}
                state["m"].lerp_(gradient, 1 - group["momentum"])
                self._update_(state["v"], gradient, group["beta2"])
                weight.addcdiv_(state["m"], state["v"].sqrt().add_(tau), value=-group["lr"])


def fedadagrad(
    weights: Iterable[Tensor], learning_rate: float = 0.01, momentum: float = 0.0, tau: float = 1e-3
) -> Optimizer:
    """FedAdagrad (Reddi et al. 2021, arXiv 2003.00295)."""
    return Adaptive(weights, lambda v, gradient, _: v.addcmul_(gradient, gradient), learning_rate, momentum, 0.0, tau)


def fedadam(
    weights: Iterable[Tensor],
    learning_rate: float = 0.01,
    momentum: float = 0.9,
    beta2: float = 0.99,
    tau: float = 1e-3,
) -> Optimizer:
    """FedAdam (Reddi et al. 2021, arXiv 2003.00295)."""

    def update_(v: Tensor, gradient: Tensor, beta2: float) -> None:
        v.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)

    return Adaptive(weights, update_, learning_rate, momentum, beta2, tau)


def fedyogi(
    weights: Iterable[Tensor],
    learning_rate: float = 0.01,
    momentum: float = 0.9,
    beta2: float = 0.99,
    tau: float = 1e-3,
) -> Optimizer:
    """FedYogi (Reddi et al. 2021, arXiv 2003.00295)."""

    def update_(v: Tensor, gradient: Tensor, beta2: float) -> None:
        signed = torch.addcmul(v, gradient, gradient, value=-1).sign_().mul_(gradient)  # one vector, not two
        v.addcmul_(signed, gradient, value=beta2 - 1)

    return Adaptive(weights, update_, learning_rate, momentum, beta2, tau)


def diloco(weights: Iterable[Tensor], learning_rate: float = 0.7, momentum: float = 0.9) -> Optimizer:
    """DiLoCo's outer step: Nesterov momentum (Douillard et al. 2023, arXiv 2311.08105)."""
    return SGD(weights, lr=learning_rate, momentum=momentum, nesterov=momentum > 0)


STRATEGIES: dict[str, Callable[..., Optimizer]] = {
    "fedavg": fedavg,
    "fedavgm": fedavgm,
    "fedadagrad": fedadagrad,
    "fedadam": fedadam,
    "fedyogi": fedyogi,
    "diloco": diloco,
}


def make_strategy(name: str, **parameters: float) -> Callable[[Iterable[Tensor]], Optimizer]:
    """Return the strategy called `name` with some of its parameters, such as `learning_rate`.

    Raises:
        ValueError: there is no such strategy.
    """
    if name not in STRATEGIES:
        raise ValueError(f"strategy: expected one of {', '.join(STRATEGIES)}, got {name!r}")
    return partial(STRATEGIES[name], **parameters)

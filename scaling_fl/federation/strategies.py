"""Strategies: a strategy is an optimiser of the global weights, and the mean drift is their gradient."""

from collections.abc import Callable, Iterable
from functools import partial

from torch import Tensor
from torch.optim import SGD, Adagrad, Adam, Optimizer


def fedavg(weights: Iterable[Tensor], learning_rate: float = 1.0) -> Optimizer:
    """FedAvg (McMahan et al. 2017, arXiv 1602.05629): take the mean, or `learning_rate` of the way there."""
    return SGD(weights, lr=learning_rate)


def fedavgm(weights: Iterable[Tensor], learning_rate: float = 1.0, momentum: float = 0.9) -> Optimizer:
    """FedAvg with server momentum (Hsu et al. 2019, arXiv 1909.06335)."""
    return SGD(weights, lr=learning_rate, momentum=momentum)


def fedadam(weights: Iterable[Tensor], learning_rate: float = 1e-3, momentum: float = 0.9) -> Optimizer:
    """FedAdam (Reddi et al. 2021, arXiv 2003.00295), with Adam's bias correction; its tau is `eps`."""
    return Adam(weights, lr=learning_rate, betas=(momentum, 0.99), eps=1e-3)


def fedadagrad(weights: Iterable[Tensor], learning_rate: float = 1e-3) -> Optimizer:
    """FedAdagrad (Reddi et al. 2021, arXiv 2003.00295); its tau is `eps`."""
    return Adagrad(weights, lr=learning_rate, eps=1e-3)


def diloco(weights: Iterable[Tensor], learning_rate: float = 0.7, momentum: float = 0.9) -> Optimizer:
    """DiLoCo's outer step: Nesterov momentum (Douillard et al. 2023, arXiv 2311.08105)."""
    return SGD(weights, lr=learning_rate, momentum=momentum, nesterov=momentum > 0)


STRATEGIES: dict[str, Callable[..., Optimizer]] = {
    "fedavg": fedavg,
    "fedavgm": fedavgm,
    "fedadam": fedadam,
    "fedadagrad": fedadagrad,
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

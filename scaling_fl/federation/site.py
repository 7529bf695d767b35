"""A site: its data, and how it trains the model of a device, which the device's sites use one after another."""

import resource
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from threading import Event

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from scaling_fl.federation.global_model import GlobalModel
from scaling_fl.models.flat import flatten_, shared_tensors, trained_weights
from scaling_fl.training.loop import Batch, Score, train
from scaling_fl.training.metrics import Means
from scaling_fl.training.optimisers import add_proximal_term
from scaling_fl.training.seeds import derive_seed, seed_device


@dataclass(frozen=True)
class Site:
    """A holder of data.

    Args:
        index: the site's number in the federation.
        device: where it trains.
        num_examples: that it trains on.
        batches: returns one epoch of its batches, in an order that depends on the seed given.
    """

    index: int
    device: torch.device
    num_examples: int
    batches: Callable[[int], Iterable[Batch]]


@dataclass(frozen=True)
class LocalTraining:
    """How all sites train.

    Args:
        make_optimiser: takes the trained weights and returns a site's optimiser, a new one each round.
        score: adds a batch's output to the means.
        seed: of all randomness in training.
        proximal_mu: the strength of FedProx's pull towards the global weights.
        may_fail: the round goes on without a site that fails, so that no part of it may be in the mean.
        seeds_cpu: the CPU's generator is seeded, too, as no other device of the rank uses it.
        is_ending: set when a site of another device has ended the run.
    """

    make_optimiser: Callable[[Iterable[Tensor]], Optimizer]
    score: Score
    seed: int
    proximal_mu: float
    may_fail: bool
    seeds_cpu: bool
    is_ending: Event


class Replica:
    """The model of a device, which each site finds with the global weights, whatever the last site left in it.

    Args:
        model: its shared tensors become views of one flat vector.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.trained = list(trained_weights(model).values())
        self.vector = flatten_(model)
        self.is_reset = False  # in this round
        self._shared = {id(tensor): name for name, tensor in shared_tensors(model).items()}
        self._unshared = [(buffer, buffer.clone()) for buffer in model.buffers() if id(buffer) not in self._shared]
        # A model may put another tensor in the place of a buffer, and register more.
        self._places = [(module, dict(module._buffers)) for module in model.modules()]

    def reset(self, global_model: GlobalModel) -> None:
        """Load the global weights, and restore all else that a site may have changed in the model."""
        global_model.copy_to(self.vector)
        self._restore_buffers()

    def exchange(self, global_model: GlobalModel, weight: Fraction, *, check_first: bool) -> None:
        """Hand a site's weights to the global model, and be as after a reset.

        Args:
            global_model: whose weights the site trained.
            weight: the site's fraction of all examples.
            check_first: refuse the site before a part of it is in the mean.

        Raises:
            FloatingPointError, ValueError: as for `GlobalModel.check`; or a buffer has another shape or type.
        """
        self._collect_buffers()
        if check_first:
            global_model.check(self.vector)
        global_model.exchange(self.vector, weight)
        self._restore_buffers()
        self.is_reset = True

    def release(self) -> nn.Module:
        """Return the model, with copies of the shared buffers: torch saves no two types of numbers in one memory."""
        copies = {id(buffer): buffer.clone() for _, _, buffer in self._shared_places()}
        for module, key, buffer in self._shared_places():
            module._buffers[key] = copies[id(buffer)]
        return self.model

    def _collect_buffers(self) -> None:
        """Copy tensors that the model has put in the place of shared buffers into these."""
        for module, key, buffer in self._shared_places():
            found = module._buffers.get(key)
            if _form(found) != _form(buffer):
                name = self._shared[id(buffer)]
                raise ValueError(f"buffer {name}: expected {_form(buffer)} after training, got {_form(found)}")
            if found is not None and found is not buffer:
                buffer.copy_(found)

    def _shared_places(self) -> list[tuple[nn.Module, str, Tensor]]:
        return [
            (module, key, buffer)
            for module, buffers in self._places
            for key, buffer in buffers.items()
            if buffer is not None and id(buffer) in self._shared
        ]

    def _restore_buffers(self) -> None:
        for module, buffers in self._places:
            module._buffers.clear()
            module._buffers.update(buffers)
        for buffer, first in self._unshared:
            buffer.copy_(first)


def train_site(
    site: Site,
    replica: Replica,
    global_model: GlobalModel,
    how: LocalTraining,
    weight: Fraction,
    round_: int,
    num_epochs: int,
) -> Means:
    """Train the global weights on a site's data, and exchange them.

    Args:
        site: which trains.
        replica: of its device, whose model holds the global weights again after an exchange.
        global_model: gives the weights, and adds the trained ones to its mean.
        how: it trains.
        weight: the site's fraction of all examples.
        round_: the round's number.
        num_epochs: how often the site trains on its data.

    Raises:
        FloatingPointError, ValueError: as for `Replica.exchange`, or a loss is not finite.
        RuntimeError: the run is ending.
    """
    if not replica.is_reset:
        replica.reset(global_model)
    replica.is_reset = False  # until the exchange
    optimiser = how.make_optimiser(replica.trained)
    if how.proximal_mu:
        add_proximal_term(global_model.trained(site.device), how.proximal_mu, optimiser)
    if how.seeds_cpu:
        torch.default_generator.manual_seed(derive_seed(how.seed, "dropout on the CPU", round_, site.index))
    seed_device(site.device, derive_seed(how.seed, "dropout", round_, site.index))

    def batches() -> Iterator[Batch]:
        for epoch in range(num_epochs):
            for batch in site.batches(derive_seed(how.seed, "order", round_, site.index, epoch)):
                if how.is_ending.is_set():
                    raise RuntimeError("the run is ending")
                yield batch

    means = train(replica.model, batches(), optimiser, how.score)
    replica.exchange(global_model, weight, check_first=how.may_fail)
    return means


def describe_failure(site: Site, round_: int, error: Exception) -> str:
    """Return in a sentence why a site failed."""
    place = f"site {site.index} failed in round {round_}"
    if isinstance(error, FloatingPointError):
        return f"site {site.index} diverged in round {round_}: {error}. Use a lower learning_rate"
    return f"{place}: {error}" if isinstance(error, ValueError) else f"{place} with {type(error).__name__}: {error}"


class Cost:
    """The time and memory that a device takes from now on."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._start = device, time.perf_counter()
        if device.type != "cpu":
            torch.accelerator.reset_peak_memory_stats(device)

    def metrics(self) -> dict[str, float]:
        """Return the seconds, and the most memory (MB) on an accelerator; on the CPU, the process's most ever."""
        if self._device.type != "cpu":
            peak = torch.accelerator.max_memory_allocated(self._device)
        else:
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        return {"seconds": time.perf_counter() - self._start, "memory_mb": peak / 1e6}


def _form(tensor: Tensor | None) -> str:
    """Return the shape and type of a tensor in words."""
    return "none" if tensor is None else f"{list(tensor.shape)} of {tensor.dtype}"

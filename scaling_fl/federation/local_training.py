"""The default training of a site: steps of an optimiser over the site's batches."""

import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from scaling_fl.federation.site import Site
from scaling_fl.federation.step_log import StepLog
from scaling_fl.models.flat import trained_weights
from scaling_fl.training.loop import Batch, Score, count_texts, stop_after, take_steps
from scaling_fl.training.optimisers import OptimiserStates, change_gradients, load_state_
from scaling_fl.training.schedules import RateSchedule, follow
from scaling_fl.training.seeds import derive_seed


@dataclass(frozen=True)
class LocalTraining:
    """The default `SiteFunction` that trains: over the batches of a site.

    Args:
        make_optimiser: takes the trained weights and returns an optimiser.
        batches: takes a site, a seed and a number n, and returns an epoch of its batches in the order of the seed,
            without the first n.
        score: adds a batch's output to the means.
        seed: of all randomness in training.
        num_epochs: of a round.
        proximal_mu: the strength of FedProx's pull towards the global weights.
        deadline_s: the seconds after which a site stops at the end of a step. The weights then depend on the machine.
        gradient_accumulation: how many batches of an epoch make a step; the last step of an epoch may have fewer.
        max_grad_norm: the longest gradient of a step, with FedProx's pull.
        schedule: of the learning rate, of which the optimiser's is the peak; None: it stays.
        autocast: what matrix products are computed in; None: the type of the weights.
        step_log: collects losses and rates by steps.
        states: of the optimisers, which go on in the next round; None: a site starts each round with a new one.
    """

    make_optimiser: Callable[[Iterable[Tensor]], Optimizer]
    batches: Callable[[Site, int, int], Iterable[Batch]]
    score: Score
    seed: int
    num_epochs: int = 1
    proximal_mu: float = 0.0
    deadline_s: float | None = None
    gradient_accumulation: int = 1
    max_grad_norm: float | None = None
    schedule: RateSchedule | None = None
    autocast: torch.dtype | None = None
    step_log: StepLog | None = None
    states: OptimiserStates | None = None
    leaves_nothing: ClassVar[bool] = True

    def __call__(self, model: nn.Module, site: Site, round_: int) -> dict[str, Any]:
        """Train the model on the data of a site.

        Raises:
            FloatingPointError: a score is not finite.
        """
        optimiser = self.make_optimiser(list(trained_weights(model).values()))
        if self.states is not None and (state := self.states.load(site.number)) is not None:
            load_state_(optimiser, state)
        for group in optimiser.param_groups:
            group["lr"] = site.settings.get("learning_rate", group["lr"])
        change = change_gradients(optimiser, self.proximal_mu, self.max_grad_norm)
        steps = self._steps(site, round_)
        if self.schedule is not None:
            steps = follow(self.schedule, optimiser, round_, site.num_steps, steps)
        num_seen = 0

        def counted() -> Iterator[list[Batch]]:
            nonlocal num_seen
            for step in stop_after(self.deadline_s, site.device, steps):
                num_seen += sum(map(count_texts, step))
                yield step

        score, taken = self.score, counted()
        if self.step_log is not None:
            score, taken = self.step_log.watch(site.number, optimiser, score, taken)
        scores = take_steps(model, taken, optimiser, score, self.autocast, change).totals()
        if self.states is not None:
            self.states.save(site.number, round_, optimiser.state_dict())
        return {"num_examples": min(site.num_examples, num_seen), **scores}

    def _steps(self, site: Site, round_: int) -> Iterator[list[Batch]]:
        """Yield the batches of each step of a round: epochs in another order each round, or going on in an epoch."""
        size = site.settings.get("gradient_accumulation", self.gradient_accumulation)
        if (num_steps := site.settings.get("local_steps")) is None:
            for epoch in range(site.settings.get("num_local_epochs", self.num_epochs)):
                order = derive_seed(self.seed, "order", round_, site.number, epoch)
                yield from _in_groups(self.batches(site, order, 0), size)
            return
        first, batch = site.start
        epochs = (
            _in_groups(self.batches(site, order_seed(self.seed, site.number, epoch), batch * (epoch == first)), size)
            for epoch in itertools.count(first)
        )
        yield from itertools.islice(itertools.chain.from_iterable(epochs), num_steps)


def _in_groups(batches: Iterable[Batch], size: int) -> Iterator[list[Batch]]:
    iterator = iter(batches)
    while group := list(itertools.islice(iterator, size)):
        yield group


def order_seed(seed: int, site: int, epoch: int) -> int:
    """Return the seed of the order of batches of a site that trains for steps, which go on in the next round."""
    return derive_seed(seed, "order", site, epoch)

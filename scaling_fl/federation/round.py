"""A round over the sites of this rank: each trains the global model in turn on its own data."""

import logging
import math
import resource
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from copy import deepcopy
from dataclasses import dataclass
from fractions import Fraction
from threading import Event

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from scaling_fl.distributed.collectives import all_gather, rank
from scaling_fl.distributed.placement import Topology
from scaling_fl.errors import one_line
from scaling_fl.federation.global_model import GlobalModel
from scaling_fl.federation.site import Replica
from scaling_fl.training.loop import Batch, Score, evaluate, train, try_step
from scaling_fl.training.metrics import Means, Metrics, spread
from scaling_fl.training.optimisers import add_proximal_term
from scaling_fl.training.seeds import derive_seed, seed_device

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Site:
    """A holder of data.

    Args:
        index: the site's number in the federation.
        device: where it trains.
        num_examples: that it trains on.
        batches: one epoch of its batches, in an order drawn by the seed given.
    """

    index: int
    device: torch.device
    num_examples: int
    batches: Callable[[int], Iterable[Batch]]


class Federation:
    """The sites of this rank, the models of its devices, and the server that all ranks share.

    Args:
        topology: where this rank's sites run.
        sites: this rank's sites.
        model: the model to train; it is moved to this rank's first device.
        server: holds the global weights.
        make_optimiser: takes the trained weights and returns a site's optimiser, made anew each round.
        score: adds a batch's output to the means.
        test_batches: what a device evaluates on; over all devices, the whole test set.
        seed: of all randomness in training.
        proximal_mu: the strength of FedProx's pull towards the global weights.
        min_sites: go on without the sites that fail in a round while so many are left; None takes every failure
            for an error.
    """

    def __init__(
        self,
        topology: Topology,
        sites: Sequence[Site],
        model: nn.Module,
        server: GlobalModel,
        *,
        make_optimiser: Callable[[Iterable[Tensor]], Optimizer],
        score: Score,
        test_batches: Callable[[torch.device], Iterable[Batch]],
        seed: int,
        proximal_mu: float = 0.0,
        min_sites: int | None = None,
    ) -> None:
        self._topology = topology
        self._sites = sites
        self._server = server
        self._make_optimiser = make_optimiser
        self._score = score
        self._test_batches = test_batches
        self._seed = seed
        self._proximal_mu = proximal_mu
        self._min_sites = min_sites
        self._num_examples = sum(all_gather(sum(site.num_examples for site in sites)))
        self._failures: list[tuple[int, str]] = []  # of this round, on this rank
        self._turns: dict[int, Metrics] = {}  # scores and costs of each site that did not fail, likewise
        self._is_ending = Event()  # by an error: threads of other devices need not finish their sites
        copies = [model, *(deepcopy(model) for _ in topology.devices[1:])]
        self._replicas = {
            device: Replica(copy.to(device)) for device, copy in zip(topology.devices, copies, strict=True)
        }

    @property
    def model(self) -> nn.Module:
        """The model of this rank's first device, with the global weights."""
        replica = self._replicas[self._topology.devices[0]]
        replica.reset(self._server)
        return replica.release()

    def try_out(self, batches: Mapping[torch.device, Batch]) -> None:
        """Pass a batch forward and backward through the model of each device, and leave everything as it was.

        Raises:
            ValueError: the model does not take it, or its loss is not finite.
        """
        for device, batch in batches.items():
            replica = self._replicas[device]
            replica.reset(self._server)
            size = "{} texts of {} tokens".format(*batch["attention_mask"].shape)
            try:
                loss = try_step(replica.model, batch)
            except Exception as error:
                hint = ". A smaller batch_size or max_seq_len takes less" if "memory" in str(error) else ""
                raise ValueError(f"it cannot train on its longest batch ({size}): {one_line(error)}{hint}") from error
            if not math.isfinite(loss):
                raise ValueError(f"expected a finite loss of its longest batch ({size}), got {loss}")

    def train(self, round_: int, num_epochs: int) -> Metrics:
        """Let every site train the global weights, and collect the drifts.

        Returns:
            The means of the scores over all examples of all ranks, and with `min_sites` how many sites failed. Then
            the scores, seconds and peak memory (MB) of each site and their spread: see `metrics.spread`.

        Raises:
            ValueError: a site's loss or weights are not finite, or too few sites are left.
        """

        def train_sites(device: torch.device) -> Means:
            self._replicas[device].is_clean = False  # the server may have moved
            turns = [site for site in self._sites if site.device == device]
            return Means().merge(self._try_site(site, round_, num_epochs) for site in turns)

        self._failures, self._turns = [], {}
        means = self._on_devices("train", train_sites)
        means |= self._count_failures(round_)
        turns = {site: turn for of_rank in all_gather(self._turns) for site, turn in of_rank.items()}
        return means | spread(turns, self._topology.num_sites)

    def _try_site(self, site: Site, round_: int, num_epochs: int) -> Means:
        """Let a site train, or find out why it does not."""
        start = time.perf_counter()
        _reset_peak_memory(site.device)
        try:
            means = self._train_site(site, round_, num_epochs)
        except Exception as error:
            if isinstance(error, FloatingPointError):
                sentence = f"site {site.index} diverged in round {round_}: {error}; a lower learning_rate would do"
            elif isinstance(error, ValueError):
                sentence = f"site {site.index} failed in round {round_}: {error}"
            else:
                sentence = f"site {site.index} failed in round {round_} with {type(error).__name__}: {error}"
            if self._min_sites is not None:
                self._failures.append((site.index, sentence))
                return Means()
            if isinstance(error, FloatingPointError | ValueError):
                raise ValueError(sentence) from error
            error.add_note(f"(of site {site.index} in round {round_})")
            raise
        cost = {"seconds": time.perf_counter() - start, "memory_mb": _peak_memory_mb(site.device)}
        self._turns[site.index] = means.result() | cost
        return means

    def _count_failures(self, round_: int) -> Metrics:
        if self._min_sites is None:
            return {}
        failures = sorted(failure for of_rank in all_gather(self._failures) for failure in of_rank)
        num_left = self._topology.num_sites - len(failures)
        if num_left < self._min_sites:
            raise ValueError(
                f"{num_left} of {self._topology.num_sites} sites are left in round {round_}, and min_sites="
                f"{self._min_sites}: {failures[0][1]}" + (f" (and {len(failures) - 1} more)" if failures[1:] else "")
            )
        for _, sentence in failures if rank() == 0 else ():
            log.warning("%s; the round goes on without it", sentence)
        return {"sites.failed": len(failures)}

    def _train_site(self, site: Site, round_: int, num_epochs: int) -> Means:
        replica = self._replicas[site.device]
        if not replica.is_clean:
            replica.reset(self._server)
        replica.is_clean = False  # until it is handed over
        optimiser = self._make_optimiser(replica.trained)
        if self._proximal_mu:
            add_proximal_term(self._server.trained(site.device), self._proximal_mu, optimiser)
        if len(self._topology.devices) == 1:
            torch.default_generator.manual_seed(derive_seed(self._seed, "dropout on the CPU", round_, site.index))
        seed_device(site.device, derive_seed(self._seed, "dropout", round_, site.index))

        def batches() -> Iterator[Batch]:
            for epoch in range(num_epochs):
                for batch in site.batches(derive_seed(self._seed, "order", round_, site.index, epoch)):
                    if self._is_ending.is_set():
                        raise RuntimeError("the run is ending")
                    yield batch

        means = train(replica.model, batches(), optimiser, self._score)
        share = Fraction(site.num_examples, self._num_examples)
        may_be_skipped = self._min_sites is not None
        replica.hand_over(self._server, share, check_first=may_be_skipped)
        return means

    def evaluate(self) -> Metrics:
        """Return the means of the scores of the global weights over the whole test set.

        The batches are the same however many devices share them, and so are the means.
        """

        def evaluate_batches(device: torch.device) -> Means:
            replica = self._replicas[device]
            replica.reset(self._server)
            try:
                return evaluate(replica.model, self._test_batches(device), self._score)
            except FloatingPointError as error:
                sentence = f"the global model diverged: {error}; a lower server_learning_rate would do"
                raise ValueError(sentence) from error

        return self._on_devices("validation", evaluate_batches)

    def _on_devices(self, name: str, work: Callable[[torch.device], Means]) -> Metrics:
        """Do `work` on each device of each rank, a thread a device, and return the means of all."""
        if len(self._topology.devices) == 1:
            own = work(self._topology.devices[0])
        else:
            with ThreadPoolExecutor(len(self._topology.devices)) as pool:
                turns = [pool.submit(work, device) for device in self._topology.devices]
                try:
                    own = Means().merge(turn.result() for turn in as_completed(turns))
                except BaseException:
                    self._is_ending.set()
                    raise
        means = Means().merge(map(Means.of, all_gather(own.sums()))).result()
        return {f"{name}.{key}": value for key, value in means.items()}


def _reset_peak_memory(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.reset_peak_memory_stats(device)


def _peak_memory_mb(device: torch.device) -> float:
    """Return the most memory allocated on an accelerator since the reset; on the CPU, the process's most so far."""
    if device.type != "cpu":
        return torch.accelerator.max_memory_allocated(device) / 1e6
    kibibytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1024 if sys.platform == "darwin" else 1)
    return kibibytes * 1024 / 1e6

"""A round over the sites of this rank: each trains the global weights on its data."""

import logging
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from copy import deepcopy
from fractions import Fraction
from threading import Event

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from scaling_fl.distributed.collectives import all_gather, rank
from scaling_fl.distributed.placement import Topology
from scaling_fl.errors import one_line
from scaling_fl.federation.global_model import GlobalModel
from scaling_fl.federation.site import Cost, LocalTraining, Replica, Site, describe_failure, train_site
from scaling_fl.training.loop import Batch, Score, evaluate, try_step
from scaling_fl.training.metrics import Means, Metrics, spread

log = logging.getLogger(__name__)


class Federation:
    """The sites of this rank, the models of its devices, and the global model of all ranks.

    Args:
        topology: where this rank's sites run.
        sites: this rank's sites.
        model: the model to train; it is moved to this rank's first device.
        global_model: holds the global weights.
        make_optimiser: takes the trained weights and returns a site's optimiser, a new one each round.
        score: adds a batch's output to the means.
        test_batches: what a device evaluates on; over all devices, the whole test set.
        seed: of all randomness in training.
        proximal_mu: the strength of FedProx's pull towards the global weights.
        min_sites: a round goes on without sites that fail while at least so many are left; None: any failure is an
            error.
    """

    def __init__(
        self,
        topology: Topology,
        sites: Sequence[Site],
        model: nn.Module,
        global_model: GlobalModel,
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
        self._global_model = global_model
        self._test_batches = test_batches
        self._min_sites = min_sites
        self._num_examples = sum(all_gather(sum(site.num_examples for site in sites)))
        self._how = LocalTraining(
            make_optimiser,
            score,
            seed,
            proximal_mu,
            may_fail=min_sites is not None,
            seeds_cpu=len(topology.devices) == 1,
            is_ending=Event(),
        )
        self._failures: list[tuple[int, str]] = []  # of this round, on this rank
        self._by_site: dict[int, dict[str, float]] = {}  # scores and costs, likewise
        copies = [model, *(deepcopy(model) for _ in topology.devices[1:])]
        self._replicas = {
            device: Replica(copy.to(device)) for device, copy in zip(topology.devices, copies, strict=True)
        }

    @property
    def model(self) -> nn.Module:
        """The model of this rank's first device, with the global weights."""
        replica = self._replicas[self._topology.devices[0]]
        replica.reset(self._global_model)
        return replica.release()

    def try_out(self, batches: Mapping[torch.device, Batch]) -> None:
        """Pass a batch forward and backward through the model of each device, and leave everything as it was.

        Raises:
            ValueError: the model does not take it, or its loss is not finite.
        """
        for device, batch in batches.items():
            replica = self._replicas[device]
            replica.reset(self._global_model)
            size = "{} texts of {} tokens".format(*batch["attention_mask"].shape)
            try:
                loss = try_step(replica.model, batch)
            except Exception as error:
                hint = ". A smaller batch_size or max_seq_len takes less" if "memory" in str(error) else ""
                raise ValueError(f"it cannot train on its longest batch ({size}): {one_line(error)}{hint}") from error
            if not math.isfinite(loss):
                raise ValueError(f"expected a finite loss of its longest batch ({size}), got {loss}")

    def train(self, round_: int, num_epochs: int) -> Metrics:
        """Train the global weights on every site, and hand the sites' weights to the global model, which does not move.

        All ranks call it, then `GlobalModel.step`, which moves the global weights by the mean.

        Args:
            round_: the number of the round, from 1, on which the order of batches and dropout depend.
            num_epochs: how often a site trains on its data.

        Returns:
            `train.<score>`, the means over all examples of all ranks; with `min_sites`, how many sites failed; and
            the scores, seconds and peak memory (MB) of each site that did not, and their spread: see `metrics.spread`.

        Raises:
            ValueError: a site's loss or weights are not finite, too few sites are left, or the last round was not
                followed by a step.
        """
        self._global_model.start_round()
        self._failures, self._by_site = [], {}
        for replica in self._replicas.values():
            replica.is_reset = False  # as the global model may have moved

        def train_sites(device: torch.device) -> Means:
            sites = [site for site in self._sites if site.device == device]
            return Means().merge(self._try_site(site, round_, num_epochs) for site in sites)

        means = self._on_devices("train", train_sites)
        means |= self._count_failures(round_)
        return means | spread(
            {site: of_site for of_rank in all_gather(self._by_site) for site, of_site in of_rank.items()}
        )

    def _try_site(self, site: Site, round_: int, num_epochs: int) -> Means:
        """Train a site, and note its scores and costs or its failure."""
        cost = Cost(site.device)
        weight = Fraction(site.num_examples, self._num_examples)
        try:
            replica = self._replicas[site.device]
            means = train_site(site, replica, self._global_model, self._how, weight, round_, num_epochs)
        except Exception as error:
            if self._min_sites is not None:
                self._failures.append((site.index, describe_failure(site, round_, error)))
                return Means()
            if isinstance(error, FloatingPointError | ValueError):
                raise ValueError(describe_failure(site, round_, error)) from error
            error.add_note(f"(of site {site.index} in round {round_})")
            raise
        self._by_site[site.index] = means.result() | cost.metrics()
        return means

    def _count_failures(self, round_: int) -> Metrics:
        """Return how many sites failed on all ranks, and log which."""
        if self._min_sites is None:
            return {}
        failures = sorted(failure for of_rank in all_gather(self._failures) for failure in of_rank)
        num_left = self._topology.num_sites - len(failures)
        if num_left < self._min_sites:
            raise ValueError(
                f"min_sites: expected at least {self._min_sites} sites left in round {round_}, got {num_left} of "
                f"{self._topology.num_sites}: {failures[0][1]}"
                + (f" (and {len(failures) - 1} more)" if failures[1:] else "")
            )
        for _, sentence in failures if rank() == 0 else ():
            log.warning("%s; the round goes on without it", sentence)
        return {"sites.failed": len(failures)}

    def evaluate(self) -> Metrics:
        """Return `validation.<score>`, the means of the global weights over the whole test set.

        The batches are the same on any number of devices, and so are the means.

        Raises:
            ValueError: a score is not finite.
        """

        def evaluate_batches(device: torch.device) -> Means:
            replica = self._replicas[device]
            replica.reset(self._global_model)
            try:
                return evaluate(replica.model, self._test_batches(device), self._how.score)
            except FloatingPointError as error:
                raise ValueError(f"the global model diverged: {error}. Use a lower server_learning_rate") from error

        return self._on_devices("validation", evaluate_batches)

    def _on_devices(self, name: str, work: Callable[[torch.device], Means]) -> Metrics:
        """Call `work` for each device of each rank, in a thread for each, and return the means of all."""
        devices = self._topology.devices
        if len(devices) == 1:
            means = work(devices[0])
        else:
            with ThreadPoolExecutor(len(devices)) as pool:
                futures = [pool.submit(work, device) for device in devices]
                try:
                    means = Means().merge(future.result() for future in as_completed(futures))
                except BaseException:
                    self._how.is_ending.set()
                    raise
        total = Means().merge(map(Means.of, all_gather(means.sums())))
        return {f"{name}.{key}": value for key, value in total.result().items()}

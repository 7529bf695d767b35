"""A round over the sites of this rank: each trains the global weights on its data."""

import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import nullcontext
from copy import deepcopy
from functools import partial
from threading import Event
from typing import Any

import torch
from torch import nn

from scaling_fl.distributed.collectives import all_gather
from scaling_fl.distributed.placement import Topology
from scaling_fl.errors import one_line
from scaling_fl.federation.cohorts import Cohort, by_round
from scaling_fl.federation.global_model import GlobalModel
from scaling_fl.federation.isolation import isolated, seed_site
from scaling_fl.federation.replica import Replica
from scaling_fl.federation.site import Cost, LocalTraining, Site, SiteFunction, describe_failure, read_scores
from scaling_fl.federation.strategies import fedavg
from scaling_fl.training.loop import Batch, try_step, with_fixed_kernels
from scaling_fl.training.metrics import Means, Metrics, spread

log = logging.getLogger(__name__)


class Federation:
    """The sites of this rank, the models of its devices, and the global model of all ranks.

    Args:
        topology: where this rank's sites run.
        sites: this rank's sites, or a function that returns those of a round: its cohort.
        model: the model to train; it is moved to this rank's first device.
        global_model: holds the global weights; None: that of FedAvg.
        train_site: trains a site, such as `LocalTraining`. See `SiteFunction` for what it must do.
        evaluate_site: evaluates the global model on the data of a site, if there is no `evaluate_device`.
        evaluation_sites: those that are evaluated, likewise; None: those that train, before round 1 those of round 1.
        evaluate_device: evaluates the global model on a device's part of a common test set, and returns the scores,
            each (sum, count).
        seed: of all randomness in training.
        weight_by: the weight of a site in the mean: "examples" that it trained on, or "sites" for the same weight each.
        min_sites: a round goes on without sites that fail while at least so many are left; None: any failure is an
            error.
    """

    def __init__(
        self,
        topology: Topology,
        sites: Sequence[Site] | Callable[[int], Sequence[Site]],
        model: nn.Module,
        global_model: GlobalModel | None = None,
        *,
        train_site: SiteFunction,
        evaluate_site: SiteFunction | None = None,
        evaluation_sites: Sequence[Site] | Callable[[int], Sequence[Site]] | None = None,
        evaluate_device: Callable[[nn.Module, torch.device], Mapping[str, Any]] | None = None,
        seed: int = 0,
        weight_by: str = "examples",
        min_sites: int | None = None,
    ) -> None:
        if evaluate_site is not None and evaluate_device is not None:
            raise ValueError("evaluate_site: expected None beside evaluate_device, got a function")
        self._topology = topology
        self._sites_of = by_round(sites)
        self._evaluated_of = self._sites_of if evaluation_sites is None else by_round(evaluation_sites)
        self.global_model = global_model or GlobalModel(model, fedavg, device=topology.devices[0])
        self._train_site, self._evaluate_site, self._evaluate_device = train_site, evaluate_site, evaluate_device
        self._seed, self._min_sites, self._weight_by = seed, min_sites, weight_by
        self._failures: dict[int, str] = {}  # of sites of this rank in this round
        self._by_site: dict[int, dict[str, float]] = {}  # scores and costs, likewise
        self._num_tests: dict[int, int] = {}  # of each site, likewise
        self._is_ending = Event()  # a site of another device has ended the run
        copies = [model, *(deepcopy(model) for _ in topology.devices[1:])]
        self._replicas = {
            device: Replica(copy.to(device)) for device, copy in zip(topology.devices, copies, strict=True)
        }

    @property
    def model(self) -> nn.Module:
        """The model of this rank's first device, with the global weights."""
        replica = self._replicas[self._topology.devices[0]]
        replica.reset(self.global_model)
        return replica.release()

    def try_out(self, batches: Mapping[torch.device, Batch]) -> None:
        """Pass a batch forward and backward through the model of each device, and leave everything as it was.

        Raises:
            ValueError: the model does not take it, or its loss is not finite.
        """
        for device, batch in batches.items():
            replica = self._replicas[device]
            replica.reset(self.global_model)
            size = "{} texts of {} tokens".format(*batch["attention_mask"].shape)
            try:
                # A trainer of a plugin is not tried out, and so may not fail at its kernels later.
                is_tried = device.type != "cpu" and isinstance(self._train_site, LocalTraining)
                step = partial(try_step, replica.model, batch)
                loss = with_fixed_kernels(step) if is_tried else step()
            except Exception as error:
                hint = ". A smaller batch_size or max_seq_len takes less" if "memory" in str(error) else ""
                raise ValueError(f"it cannot train on its longest batch ({size}): {one_line(error)}{hint}") from error
            if not math.isfinite(loss):
                raise ValueError(f"expected a finite loss of its longest batch ({size}), got {loss}")

    def train(self, round_: int) -> Metrics:
        """Train the global weights on every site, and hand the sites' weights to the global model, which does not move.

        All ranks call it, then `GlobalModel.step`, which moves the global weights by the mean.

        Args:
            round_: the number of the round, from 1, on which the order of batches and dropout depend.

        Returns:
            `train.<score>`, the means over all examples of all ranks; with `min_sites`, how many sites failed; and
            the scores, seconds and peak memory (MB) of each site that did not, and their spread: see `metrics.spread`.

        Raises:
            ValueError: a site's loss or weights are not finite, too few sites are left, or the last round was not
                followed by a step.
        """
        self.global_model.start_round()
        self._failures, self._by_site = {}, {}
        cohort = self._cohort = Cohort(self._sites_of(round_), self._weight_by)
        seconds = dict.fromkeys(self._replicas, 0.0)
        for replica in self._replicas.values():
            replica.is_reset = False  # as the global model may have moved

        def train_sites(device: torch.device) -> Means:
            start = time.perf_counter()
            means = Means().merge(self._try_site(site, round_) for site in cohort.sites if site.device == device)
            seconds[device] = time.perf_counter() - start
            return means

        means = self._on_devices("train", train_sites)
        if self._min_sites is not None:
            means |= cohort.count_failures(self._failures, self._min_sites, round_)
        by_site = {site: of_site for of_rank in all_gather(self._by_site) for site, of_site in of_rank.items()}
        num_examples = {site: by_site[site].pop("examples") for site in sorted(by_site)}
        means |= cohort.describe(busy=max(seconds.values()))
        return means | {"site.examples": num_examples} | spread(by_site)

    def _try_site(self, site: Site, round_: int) -> Means:
        """Train a site and hand its weights to the global model; note its scores and costs, or its failure."""
        cost, replica = Cost(site.device), self._replicas[site.device]
        try:
            if not replica.is_reset:
                replica.reset(self.global_model)
            replica.is_reset = False  # until the exchange
            with replica.stopped_by(self._is_ending):
                returned = self._call(self._train_site, replica.model, site, round_)
            num_examples, means = read_scores(returned, most=site.num_examples)
            if num_examples:
                weight = self._cohort.weigh(num_examples)
                replica.exchange(self.global_model, weight, check_first=self._min_sites is not None)
        except Exception as error:
            if self._min_sites is not None:
                self._failures[site.number] = describe_failure(site, round_, error)
                return Means()
            if isinstance(error, FloatingPointError | ValueError):
                raise ValueError(describe_failure(site, round_, error)) from error
            error.add_note(f"(of {site} in round {round_})")
            raise
        self._by_site[site.number] = {"examples": num_examples, **means.result(), **cost.metrics()}
        return means

    def _call(self, function: SiteFunction, model: nn.Module, site: Site, round_: int) -> Mapping[str, Any]:
        """Call a site's function, which finds the process as if no other site had been there."""
        is_alone = len(self._replicas) == 1  # else another device's thread is in the process, too
        is_ours = isinstance(function, LocalTraining)  # which leaves nothing behind
        with isolated() if is_alone and not is_ours else nullcontext():
            seed_site(self._seed, round_, site, is_alone=is_alone)
            return function(model, site, round_)

    def evaluate(self, round_: int) -> Metrics:
        """Return `validation.<score>`, the means of the global weights over all that is evaluated on.

        The batches of a common test set are the same on any number of devices, and so are the means.

        Args:
            round_: the number of the round, from 0; passed to `evaluate_site`.

        Raises:
            ValueError: a score is not finite.
        """

        def evaluate_on(device: torch.device) -> Means:
            replica, means = self._replicas[device], Means()
            for evaluate in self._evaluations(device, round_):
                replica.reset(self.global_model)
                try:
                    with torch.no_grad():
                        means.merge([evaluate(replica.model.eval())])
                except FloatingPointError as error:
                    raise ValueError(f"the global model diverged: {error}. Use a lower server_learning_rate") from error
            return means

        self._num_tests = {}
        metrics = self._on_devices("validation", evaluate_on)
        if self._evaluate_device is None and self._evaluate_site is not None:
            counts = {site: count for of_rank in all_gather(self._num_tests) for site, count in of_rank.items()}
            metrics |= {"site.test_examples": {site: counts[site] for site in sorted(counts)}}
        return metrics

    def _evaluations(self, device: torch.device, round_: int) -> list[Callable[[nn.Module], Means]]:
        """Return what evaluates the model of a device."""
        on_device, on_site = self._evaluate_device, self._evaluate_site
        if on_device is not None:
            return [lambda model: Means.of(on_device(model, device))]
        if on_site is None:
            return []

        def evaluate_site(site: Site, model: nn.Module) -> Means:
            try:
                self._num_tests[site.number], means = read_scores(self._call(on_site, model, site, round_))
                return means
            except (ValueError, FloatingPointError) as error:
                raise ValueError(f"{site} was not evaluated in round {round_}: {error}") from error

        return [partial(evaluate_site, site) for site in self._evaluated_of(max(round_, 1)) if site.device == device]

    def _on_devices(self, name: str, work: Callable[[torch.device], Means]) -> Metrics:
        """Call `work` for each device of each rank, in a thread for each, and return the means of all."""
        devices = self._topology.devices
        with isolated():
            if len(devices) == 1:
                means = work(devices[0])
            else:
                with ThreadPoolExecutor(len(devices)) as pool:
                    futures = [pool.submit(work, device) for device in devices]
                    try:
                        means = Means().merge(future.result() for future in as_completed(futures))
                    except BaseException:
                        self._is_ending.set()
                        raise
        totals = {key: (str(total), count) for key, (total, count) in means.totals().items()}
        total = Means().merge(map(Means.of, all_gather(totals)))
        return {f"{name}.{key}": value for key, value in total.result().items()}

"""A round over the sites of this rank: each trains the global weights on its data."""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
from torch import nn

from scaling_fl.distributed.collectives import all_gather_items
from scaling_fl.distributed.placement import Topology
from scaling_fl.errors import one_line
from scaling_fl.federation.cohorts import Cohort, by_round
from scaling_fl.federation.devices import Devices
from scaling_fl.federation.evaluation import EvaluateDevice, Scores, describe_sites, name_scores, score
from scaling_fl.federation.global_model import GlobalModel
from scaling_fl.federation.site import Cost, Site, SiteFunction, describe_failure, leaves_nothing, read_scores
from scaling_fl.federation.strategies import fedavg
from scaling_fl.training.loop import Batch, try_step, with_fixed_kernels
from scaling_fl.training.metrics import Means, Metrics, spread


class Federation:
    """The sites of this rank, the models of its devices, and the global model of all ranks.

    Args:
        topology: where this rank's sites run.
        sites: this rank's sites, or a function that returns those of a round: its cohort.
        model: the model to train; it is moved to this rank's first device.
        global_model: holds the global weights; None: that of FedAvg.
        train_site: trains a site, such as `LocalTraining`. See `SiteFunction` for what it must do.
        evaluate_site: evaluates the global model on the data of a site.
        evaluation_sites: those that are evaluated, or such a function; None: those that train, before round 1 those of
            round 1.
        evaluate_device: evaluates the global model on a device's part of a common test set, and returns the scores,
            each (sum, count).
        seed: of all randomness in training.
        weight_by: the weight of a site in the mean: see `Cohort`.
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
        evaluate_device: EvaluateDevice | None = None,
        seed: int = 0,
        weight_by: str = "examples",
        min_sites: int | None = None,
    ) -> None:
        self._first_device = topology.devices[0]
        self._sites_of = by_round(sites)
        self._evaluated_of = self._sites_of if evaluation_sites is None else by_round(evaluation_sites)
        self.global_model = global_model or GlobalModel(model, fedavg, device=topology.devices[0])
        self._train_site, self._evaluate_site, self._evaluate_device = train_site, evaluate_site, evaluate_device
        self._min_sites, self._weight_by = min_sites, weight_by
        self._failures: dict[int, str] = {}  # of sites of this rank in this round
        self._by_site: dict[int, dict[str, float]] = {}  # scores and costs, likewise
        self._devices = Devices(topology.devices, model, self.global_model, seed)

    @property
    def model(self) -> nn.Module:
        """The model of this rank's first device, with the global weights."""
        return self._devices.load(self._first_device).release()

    def try_out(self, batches: Mapping[torch.device, Batch], autocast: torch.dtype | None = None) -> None:
        """Pass a batch forward and backward through the model of each device, and leave everything as it was.

        Args:
            batches: by device.
            autocast: what matrix products are computed in; None: the type of the weights.

        Raises:
            ValueError: the model does not take it, or its loss is not finite.
        """
        for device, batch in batches.items():
            replica = self._devices.load(device)
            size = "{} texts of {} tokens".format(*batch["input_ids"].shape)
            try:
                # Not for a trainer of a plugin: this step does not try its operators, which could fail in training.
                fixes_kernels = device.type != "cpu" and leaves_nothing(self._train_site)
                step = partial(try_step, replica.model, batch, autocast)
                loss = with_fixed_kernels(step) if fixes_kernels else step()
            except Exception as error:
                hint = ". A smaller batch_size or max_seq_len takes less" if "memory" in str(error) else ""
                raise ValueError(f"it cannot train on its longest batch ({size}): {one_line(error)}{hint}") from error
            if not math.isfinite(loss):
                raise ValueError(f"expected a finite loss of its longest batch ({size}), got {loss}")

    def train(self, round_: int, evaluate_local: SiteFunction | None = None) -> Metrics:
        """Train the global weights on every site, and hand the sites' weights to the global model, which does not move.

        All ranks call it, then `GlobalModel.step`, which moves the global weights by the mean.

        Args:
            round_: the number of the round, from 1, on which the order of batches and dropout depend.
            evaluate_local: evaluates the model that a site has trained, before its weights are handed over.

        Returns:
            `train.<score>`, the means over all examples of all ranks; with `min_sites`, how many sites failed; and
            the scores, seconds and peak memory (MB) of each site that did not, those of `evaluate_local` as
            `local_<score>`, and their spread: see `metrics.spread`.

        Raises:
            ValueError: a site's loss or weights are not finite, too few sites are left, or the last round was not
                followed by a step.
        """
        self._failures, self._by_site = {}, {}
        cohort = self._cohort = Cohort(self._sites_of(round_), self._weight_by)
        self.global_model.start_round(round_, cohort.num_sites)
        seconds = dict.fromkeys(self._devices.replicas, 0.0)
        for replica in self._devices.replicas.values():
            replica.is_reset = False  # as the global model may have moved

        def train_sites(device: torch.device) -> Means:
            start = time.perf_counter()
            sites = [site for site in cohort.sites if site.device == device]
            means = Means().merge(self._try_site(site, round_, evaluate_local) for site in sites)
            seconds[device] = time.perf_counter() - start
            return means

        means = name_scores("train", self._devices.pool(train_sites).result())
        if self._min_sites is not None:
            means |= cohort.count_failures(self._failures, self._min_sites, round_)
        by_site = all_gather_items(self._by_site)
        num_examples = {site: by_site[site].pop("examples") for site in sorted(by_site)}
        means |= cohort.describe(busy=max(seconds.values()))
        return means | {"site.examples": num_examples} | spread(by_site)

    def _try_site(self, site: Site, round_: int, evaluate_local: SiteFunction | None) -> Means:
        """Train a site and hand its weights to the global model; note its scores and costs, or its failure."""
        cost, replica = Cost(site.device), self._devices.replicas[site.device]
        try:
            if not replica.is_reset:
                replica.reset(self.global_model)
            replica.is_reset = False  # until the exchange
            with replica.stopped_by(self._devices.is_ending):
                returned = self._devices.call(self._train_site, replica.model, site, round_)
            num_examples, means = read_scores(returned, most=site.num_examples)
            costs, local = cost.metrics(), Means()
            if evaluate_local is not None:
                with replica.unchanged(), torch.no_grad():
                    _, local = read_scores(self._devices.call(evaluate_local, replica.model.eval(), site, round_))
            if num_examples:
                weight = self._cohort.weigh(site, num_examples)
                replica.exchange(self.global_model, weight, check_first=self._min_sites is not None)
        except Exception as error:
            if self._min_sites is not None:
                self._failures[site.number] = describe_failure(site, round_, error)
                return Means()
            if isinstance(error, FloatingPointError | ValueError):
                raise ValueError(describe_failure(site, round_, error)) from error
            error.add_note(f"(of {site} in round {round_})")
            raise
        of_local = {f"local_{name}": value for name, value in local.result().items()}
        self._by_site[site.number] = {"examples": num_examples, **means.result(), **costs, **of_local}
        return means

    def evaluate(self, round_: int) -> Metrics:
        """Evaluate the global weights, and name the scores: see `score`, which it calls.

        Returns:
            `validation.<score>`, the means over the common test set, or over all that the sites evaluate on if there is
            none; and of each site `site.test_examples` and `site.test_<score>`, and their spread.
        """
        scores = self.score(round_)
        means = scores.of_sites if self._evaluate_device is None else scores.common
        return name_scores("validation", means.result()) | describe_sites(scores.by_site)

    def score(self, round_: int) -> Scores:
        """Return what the global weights score on the common test set and at the sites.

        The batches of a common test set are the same on any number of devices, and so are the scores.

        Args:
            round_: the number of the round, from 0; passed to `evaluate_site`.

        Raises:
            ValueError: a score is not finite.
        """
        sites = self._evaluated_of(max(round_, 1))
        return score(self._devices, self._evaluate_device, self._evaluate_site, sites, round_)

"""The models of this rank's devices, and the work on them, in a thread for each."""

from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import nullcontext
from copy import deepcopy
from threading import Event
from typing import Any

import torch
from torch import nn

from scaling_fl.distributed.collectives import all_gather
from scaling_fl.federation.global_model import GlobalModel
from scaling_fl.federation.isolation import isolated, seed_site
from scaling_fl.federation.replica import Replica
from scaling_fl.federation.site import Site, SiteFunction, leaves_nothing
from scaling_fl.models.quantised import move_
from scaling_fl.training.metrics import Means


class Devices:
    """The models of this rank's devices.

    Args:
        devices: of this rank.
        model: moves to the first device; the others have copies.
        global_model: holds the global weights.
        seed: of all randomness in training.
    """

    def __init__(
        self, devices: tuple[torch.device, ...], model: nn.Module, global_model: GlobalModel, seed: int
    ) -> None:
        self._global_model, self._seed = global_model, seed
        self.is_ending = Event()  # a site of another device has ended the run
        copies = [model, *(deepcopy(model) for _ in devices[1:])]
        self.replicas = {device: Replica(move_(copy, device)) for device, copy in zip(devices, copies, strict=True)}

    def load(self, device: torch.device, *, has_weights: bool = False) -> Replica:
        """Return the replica of a device, with the global weights, which need not be loaded if it has them."""
        replica = self.replicas[device]
        replica.reset(self._global_model, has_weights=has_weights)
        return replica

    def call(self, function: SiteFunction, model: nn.Module, site: Site, round_: int) -> Mapping[str, Any]:
        """Call a site's function, which finds the process as if no other site had been there."""
        is_alone = len(self.replicas) == 1  # else another device's thread is in the process, too
        with isolated() if is_alone and not leaves_nothing(function) else nullcontext():
            seed_site(self._seed, round_, site, is_alone=is_alone)
            return function(model, site, round_)

    def evaluate(self, device: torch.device, evaluate: Callable[[nn.Module], Means], *, has_weights: bool) -> Means:
        """Return what the global weights score on a device.

        Args:
            device: of this rank.
            evaluate: returns the scores of the model.
            has_weights: the model of the device has them.

        Raises:
            ValueError: a score is not finite.
        """
        try:
            with torch.no_grad():
                return evaluate(self.load(device, has_weights=has_weights).model.eval())
        except FloatingPointError as error:
            raise ValueError(f"the global model diverged: {error}. Use a lower server_learning_rate") from error

    def pool(self, work: Callable[[torch.device], Means]) -> Means:
        """Call `work` for each device of each rank, and return the means of all."""
        with isolated():
            if len(self.replicas) == 1:
                means = work(*self.replicas)
            else:
                with ThreadPoolExecutor(len(self.replicas)) as threads:
                    futures = [threads.submit(work, device) for device in self.replicas]
                    try:
                        means = Means().merge(future.result() for future in as_completed(futures))
                    except BaseException:
                        self.is_ending.set()
                        raise
        return Means().merge(map(Means.of, all_gather(means.as_texts())))

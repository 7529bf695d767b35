"""The cases of overhead.py by BlazeFL: its pool of threads, each with a model that stays from round to round."""

from functools import partial
from pathlib import Path
from queue import SimpleQueue
from threading import Event

import torch
from blazefl.contrib.fedavg import FedAvgBaseServerHandler, FedAvgDownlinkPackage, FedAvgUplinkPackage
from blazefl.core import ThreadPoolClientTrainer
from overhead import CASES, NUM_RANKS, Case, make_batches, make_trainer, time_rounds
from torch import nn


class Trainer(ThreadPoolClientTrainer[FedAvgUplinkPackage, FedAvgDownlinkPackage]):
    """Trains the sites of a case on threads."""

    def __init__(self, case: Case) -> None:
        self.num_parallels, self.device, self.device_count = NUM_RANKS, "cpu", 0
        self.cache: list[FedAvgUplinkPackage] = []
        self.stop_event = Event()
        self._num_examples = case.num_examples
        self._idle: SimpleQueue = SimpleQueue()
        batches = make_batches(case)
        for _ in range(NUM_RANKS):
            self._idle.put(make_trainer(case, batches.__getitem__))

    def worker(self, cid: int, device: str, payload: FedAvgDownlinkPackage, stop_event: Event) -> FedAvgUplinkPackage:
        """Train one site with a model that no other thread uses."""
        vector, train = self._idle.get()
        vector.copy_(payload.model_parameters)
        train(cid)
        package = FedAvgUplinkPackage(cid, vector.clone(), self._num_examples)
        self._idle.put((vector, train))
        return package

    def uplink_package(self) -> list[FedAvgUplinkPackage]:
        """Return what the sites of a round have sent."""
        packages, self.cache = self.cache, []
        return packages


class Models:
    """What BlazeFL asks for the global model."""

    def __init__(self, case: Case) -> None:
        self._case = case

    def select_model(self, _: str) -> nn.Module:
        """Return the model with its first weights."""
        return self._case.model()


def run(name: str, result: Path) -> None:
    """Train a case in one process."""
    torch.set_num_threads(1)
    case = CASES[name]
    trainer = Trainer(case)
    handler = FedAvgBaseServerHandler(
        Models(case), "", None, case.num_rounds, case.num_sites, 1.0, "cpu", case.batch_size, seed=0
    )
    moments = time_rounds(partial(run_round, handler, trainer), case.num_rounds)
    torch.save((moments, nn.utils.parameters_to_vector(handler.model.parameters()).detach()), result)


def run_round(handler: FedAvgBaseServerHandler, trainer: Trainer, _: int) -> None:
    """Train a round."""
    trainer.local_process(handler.downlink_package(), handler.sample_clients())
    for package in trainer.uplink_package():
        handler.load(package)

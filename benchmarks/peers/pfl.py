"""The cases of overhead.py by pfl: two processes of its own protocol, forked so that they share what is imported."""

import os
import socket
import time
from functools import partial
from pathlib import Path

import torch
from overhead import CASES, LEARNING_RATE, NUM_RANKS, Case
from pfl.aggregate.simulate import SimulatedBackend
from pfl.aggregate.weighting import WeightByDatapoints
from pfl.algorithm.base import NNAlgorithmParams
from pfl.algorithm.federated_averaging import FederatedAveraging
from pfl.callback.base import TrainingProcessCallback
from pfl.data.federated_dataset import FederatedDataset
from pfl.data.sampling import get_user_sampler
from pfl.hyperparam import NNEvalHyperParams, NNTrainHyperParams
from pfl.metrics import Metrics, Weighted
from torch import Tensor, nn


class Classifier(nn.Module):
    """A model with the methods that pfl calls."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def loss(self, ids: Tensor, labels: Tensor) -> Tensor:
        """Return the mean loss of a batch."""
        return self.model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=labels).loss

    def metrics(self, ids: Tensor, labels: Tensor) -> dict[str, Weighted]:
        """Return nothing of value: pfl evaluates each user of the first round, and the others do not."""
        return {"users": Weighted(1, 1)}


class Moments(TrainingProcessCallback):
    """When training began, and when each round ended."""

    def __init__(self) -> None:
        self.moments = [time.monotonic()]

    def after_central_iteration(self, *_: object, **__: object) -> tuple[bool, Metrics]:
        """Note the time."""
        self.moments.append(time.monotonic())
        return False, Metrics()


def run(name: str, result: Path) -> None:
    """Train a case on two ranks."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    os.environ["PFL_WORKER_ADDRESSES"] = ",".join([f"localhost:{port}"] * NUM_RANKS)
    child = os.fork()
    os.environ["PFL_WORKER_RANK"] = str(int(child == 0))
    run_rank(CASES[name], result if child else None)
    if child == 0:
        os._exit(0)
    raise SystemExit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))


def run_rank(case: Case, result: Path | None) -> None:
    """Train the sites that pfl gives to one rank, and write the result if there is a place for it."""
    from pfl.data.pytorch import PyTorchTensorDataset
    from pfl.model.pytorch import PyTorchModel  # the import joins the ranks

    torch.set_num_threads(1)
    tokens, labels = (torch.from_numpy(values).long() for values in case.examples())
    users = [
        PyTorchTensorDataset((tokens[own], labels[own]), user_id=str(site))
        for site, own in enumerate(torch.arange(len(labels)).split(case.num_examples))
    ]
    data = FederatedDataset(users.__getitem__, get_user_sampler("minimize_reuse", list(range(case.num_sites))))
    module = Classifier(case.model().train())
    model = PyTorchModel(
        module, partial(torch.optim.SGD, fused=True), torch.optim.SGD(module.parameters(), lr=1.0, fused=True)
    )
    moments = Moments()
    FederatedAveraging().run(
        NNAlgorithmParams(case.num_rounds, case.num_rounds + 1, case.num_sites, val_cohort_size=0),
        SimulatedBackend(data, data, [WeightByDatapoints()]),
        model,
        NNTrainHyperParams(local_batch_size=case.batch_size, local_num_epochs=1, local_learning_rate=LEARNING_RATE),
        NNEvalHyperParams(local_batch_size=None),
        [moments],
        send_metrics_to_platform=False,
    )
    torch.distributed.destroy_process_group()
    if result:
        torch.save((moments.moments, nn.utils.parameters_to_vector(module.parameters()).detach()), result)

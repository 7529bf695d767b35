"""The cases of overhead.py by Flower: its simulation with Ray, an actor a core, each with a model that stays."""

import logging
import os
import time
from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path

# Read on import. Ray would give its workers the least of the processor.
os.environ.update(FLWR_TELEMETRY_ENABLED="0", RAY_USAGE_STATS_ENABLED="0", RAY_worker_niceness="0")

import ray
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from flwr.simulation import run_simulation
from overhead import CASES, NUM_RANKS, make_batches, make_trainer
from torch import Tensor, nn

client = ClientApp()


@cache
def trainer(name: str) -> tuple[Tensor, Callable[[int], None]]:
    """Return the trainer of a case, which an actor makes once."""
    torch.set_num_threads(1)
    return make_trainer(CASES[name], make_batches(CASES[name]).__getitem__)


@client.train()
def train(message: Message, context: Context) -> Message:
    """Train one site."""
    name = str(message.content["config"]["case"])
    vector, train_site = trainer(name)
    vector.copy_(torch.from_numpy(message.content["arrays"]["weights"].numpy()))
    train_site(int(context.node_config["partition-id"]))
    reply = {"arrays": pack(vector), "metrics": MetricRecord({"num-examples": CASES[name].num_examples})}
    return Message(RecordDict(reply), reply_to=message)


def pack(weights: Tensor) -> ArrayRecord:
    """Return weights as one array, which is faster than one for each tensor."""
    return ArrayRecord({"weights": Array(weights.numpy())})


class TimedFedAvg(FedAvg):
    """FedAvg that notes when training began, and when each round ended."""

    def __init__(self) -> None:
        super().__init__(fraction_evaluate=0.0)
        self.moments = [time.monotonic()]

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Average, and note the time."""
        averaged = super().aggregate_train(server_round, replies)
        self.moments.append(time.monotonic())
        return averaged


def run(name: str, result: Path) -> None:
    """Train a case by a simulation."""
    server = ServerApp()

    @server.main()
    def main(grid: Grid, context: Context) -> None:
        weights = pack(nn.utils.parameters_to_vector(CASES[name].model().parameters()).detach())
        strategy = TimedFedAvg()
        found = strategy.start(grid, weights, CASES[name].num_rounds, train_config=ConfigRecord({"case": name}))
        torch.save((strategy.moments, torch.from_numpy(found.arrays["weights"].numpy())), result)

    logging.getLogger("flwr").setLevel(logging.ERROR)
    # Started here, Ray needs no environment for its workers, which takes Flower seconds to make.
    os.environ["PYTHONPATH"] = str(Path(__file__).parent.parent)
    ray.init(num_cpus=NUM_RANKS, include_dashboard=False, log_to_driver=False, logging_level="error")
    resources = {"num_cpus": 1, "num_gpus": 0.0}
    run_simulation(server, client, CASES[name].num_sites, backend_config={"client_resources": resources})

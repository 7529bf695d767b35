"""The cases of overhead.py by the library: its command, without settings, files and reports."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import NoReturn

import numpy as np
import torch
from overhead import CASES, LEARNING_RATE, NUM_RANKS, Case, time_rounds

from scaling_fl.data.examples import Examples
from scaling_fl.distributed.collectives import rank
from scaling_fl.distributed.ending import run_program
from scaling_fl.distributed.launch import launch
from scaling_fl.distributed.placement import place_sites
from scaling_fl.distributed.world import world
from scaling_fl.federation.global_model import GlobalModel
from scaling_fl.federation.local_training import LocalTraining
from scaling_fl.federation.round import Federation
from scaling_fl.federation.site import Site
from scaling_fl.federation.strategies import make_strategy
from scaling_fl.training.loop import Batch, evaluate
from scaling_fl.training.optimisers import OPTIMISERS
from scaling_fl.training.scores import score_classes


def run(name: str, result: Path, comm_dtype: str) -> NoReturn:
    """Train a case on ranks forked from this process, and exit."""
    run_program(partial(launch, train_rank, CASES[name], result, comm_dtype, num_ranks=NUM_RANKS, fork=True))


def train_rank(case: Case, result: Path, comm_dtype: str) -> None:
    """Train one rank's sites."""
    with world():
        federation = make_federation(case, comm_dtype)
        moments = time_rounds(partial(run_round, federation), case.num_rounds)
        if rank() == 0:
            torch.save((moments, federation.global_model.weights), result)


def make_federation(case: Case, comm_dtype: str) -> Federation:
    """Return the federation of a case, whose sites are on the first device."""
    topology = place_sites([0] * case.num_sites)
    tokens, labels = case.examples()
    lengths = np.full(len(tokens), case.length)
    starts = np.arange(0, tokens.size, case.length)
    examples = Examples({"input_ids": tokens.reshape(-1)}, starts, lengths, labels, {"input_ids": 0})
    model = case.model()
    test = examples.fixed_batches(case.batch_size)

    def batches(site: Site, seed: int, start: int) -> Iterator[Batch]:
        return (examples.select(indices).batch() for indices in case.batches(site.number))

    return Federation(
        topology,
        [Site(number, device, case.num_examples) for number, device in topology.sites.items()],
        model,
        GlobalModel(model, make_strategy("fedavg"), comm_dtype, topology.devices[0]),
        train_site=LocalTraining(partial(OPTIMISERS["sgd"], lr=LEARNING_RATE), batches, score_classes, seed=0),
        evaluate_device=lambda model, _: evaluate(model, (part.batch() for part in test), score_classes).totals(),
        seed=0,
    )


def run_round(federation: Federation, round_: int) -> None:
    """Train a round of the library."""
    federation.train(round_)
    federation.global_model.step()

"""What the settings of the main job ask for: its data, model, server and sites. Only this module sees the settings."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
import transformers
from torch import Tensor
from torch.optim import Optimizer
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from scaling_fl import checkpoint, saving
from scaling_fl.distributed import agree, first_of_node_first, num_threads, rank, world_size
from scaling_fl.federation import Federation, Site
from scaling_fl.footprint import estimate, state_bytes
from scaling_fl.holdings import Encode, Holdings, Part, deal_corpus, files_of, read_own_files
from scaling_fl.metrics import Metrics
from scaling_fl.models import load_tokenizer, make_classifier
from scaling_fl.partition import PARTITIONERS
from scaling_fl.placement import Topology, place
from scaling_fl.server import Server, trained_weights
from scaling_fl.strategies import make_strategy
from scaling_fl.tasks import read_task, sample
from scaling_fl.tasks.task import encode, score_classes
from scaling_fl.tracking import Progress
from scaling_fl.training import OPTIMISERS, Batch

# A resumed run may change these; any other setting makes another run.
FREE = {"site_ids", "num_sites", "site_paths", "train_path", "test_path", "num_rounds", "val_batch_size", "author"}
FREE |= {"job_name", "checkpoints_dir", "keep_checkpoints", "iid_split", "on_site_failure", "min_sites", "report"}


@dataclass(frozen=True)
class Job:
    """What a run is made of."""

    held: Holdings
    tokenizer: PreTrainedTokenizerBase
    model: PreTrainedModel
    drawn: list[str]  # the weights that are not pretrained
    server: Server
    history: checkpoint.History  # of the rounds that are done
    settings: dict[str, Any]  # what the weights depend on


def set_up(config: SimpleNamespace) -> Job:
    """Read and tokenise the data, load the model, and take over the last checkpoint."""
    settings = what_matters(config)
    agree(settings | {"num_rounds": config.num_rounds, "checkpoints_dir": config.checkpoints_dir})
    checkpoint.check(config.checkpoints_dir)
    topology = place(config.site_ids, config.num_sites)
    if config.on_site_failure == "skip" and config.min_sites > topology.num_sites:
        raise ValueError(f"min_sites={config.min_sites} was given: {topology.num_sites}, the number of sites, would do")
    tokenizer = first_of_node_first(partial(load_tokenizer, config.model, config.max_seq_len))
    held = hold(config, topology, partial(encode, tokenizer=tokenizer, max_seq_len=config.max_seq_len))
    model, drawn = first_of_node_first(partial(make_classifier, config.model, held.label_names, tokenizer, config.seed))
    settings |= what_is_there(config, held)
    agree(settings)
    server = Server(model, server_optimiser(config), config.comm_dtype, held.topology.devices[0])
    history = checkpoint.restore(config.checkpoints_dir, server, settings)
    if len(history) > config.num_rounds + 1:
        raise ValueError(
            f"num_rounds={config.num_rounds} was given, but {len(history) - 1} rounds are done: more would do"
        )
    return Job(held, tokenizer, model, drawn, server, history, settings)


def hold(config: SimpleNamespace, topology: Topology, tokens: Encode) -> Holdings:
    """Read the data of the sites, which is dealt to them or their own."""
    columns = config.text_column, config.label_column
    if config.site_paths is None:
        return first_of_node_first(partial(deal_data, config, columns, topology, tokens))
    if config.num_sites not in (None, topology.num_slots):
        raise ValueError(
            f"num_sites={config.num_sites} was given, but the nodes that are here have the data of "
            f"{topology.num_slots} sites (site_paths), and a site's data stays where it is: all its nodes would do"
        )
    held = read_own_files(config.task_name, config.site_paths, columns, topology, tokens, config.val_batch_size)
    for site, entry in sorted(held.topology.entries.items()):
        files = " and ".join(files_of(config.site_paths[entry]))
        print(f"site {site:<4} {files}, {held.extents[site].num_examples:,} examples")
    return held


def deal_data(
    config: SimpleNamespace, columns: tuple[str | None, str | None], topology: Topology, tokens: Encode
) -> Holdings:
    """Read the task's data set, and deal it to the sites."""
    corpus = read_task(config.task_name, config.train_path, config.test_path, *columns)
    corpus = sample(corpus, config.max_train_examples, config.max_test_examples, config.data_seed)
    partitioner = PARTITIONERS[config.partition]
    if config.partition == "dirichlet":
        partitioner = partial(partitioner, alpha=config.dirichlet_alpha)
    return deal_corpus(corpus, topology, tokens, partitioner, config.data_seed, config.val_batch_size)


def make_federation(config: SimpleNamespace, job: Job, training: Progress, testing: Progress) -> Federation:
    """Bind the data to the sites of this rank."""
    held = job.held

    def site_batches(part: Part, seed: int) -> Iterator[Batch]:
        return training.watch(part.shuffled_batches(config.batch_size, seed))

    return Federation(
        held.topology,
        [
            Site(index, device, len(held.train[index]), partial(site_batches, held.train[index]))
            for index, device in held.topology.sites.items()
        ],
        job.model,
        job.server,
        make_optimiser=local_optimiser(config),
        score=score_classes,
        test_batches=lambda device: testing.watch(part.batch() for part in held.test[device]),
        seed=config.seed,
        proximal_mu=config.proximal_mu,
        min_sites=config.min_sites if config.on_site_failure == "skip" else None,
    )


def local_optimiser(config: SimpleNamespace) -> Callable[[Iterable[Tensor]], Optimizer]:
    """Return what makes the optimiser of a site."""
    return partial(OPTIMISERS[config.optimiser], lr=config.learning_rate)


def server_optimiser(config: SimpleNamespace) -> Callable[[Iterable[Tensor]], Optimizer]:
    """Return what makes the optimiser of the global weights."""
    return make_strategy(config.strategy, config.server_learning_rate, config.server_momentum)


def what_matters(config: SimpleNamespace) -> dict[str, Any]:
    """Return the settings that the weights of a round depend on."""
    return {key: value for key, value in vars(config).items() if key not in FREE} | {
        "data": "dealt" if config.site_paths is None else "of the sites' own (site_paths)",
        "OMP_NUM_THREADS": num_threads(),
        "versions": f"torch {torch.__version__}, transformers {transformers.__version__}",
    }


def what_is_there(config: SimpleNamespace, held: Holdings) -> dict[str, Any]:
    """Return what the weights of a round depend on besides: a resumed run must have the same."""
    return held.sha256 | {
        "number of sites": held.topology.num_sites,
        "kind of device": held.topology.devices[0].type,
        "number of devices": "any" if config.comm_dtype == "exact" else held.topology.num_devices,
    }


def estimate_memory(config: SimpleNamespace, job: Job, device: torch.device) -> int | None:
    """Return how many bytes a device of this rank takes at its largest batches; None if its model does not tell."""
    held = job.held
    parts = [held.train[site] for site, where in held.topology.sites.items() if where == device]
    training = max((part.longest_batch(config.batch_size) for part in parts), key=size_of, default=None)
    testing = max((part.batch() for part in held.test[device]), key=size_of, default=None)
    try:
        num_bytes = estimate(job.model, training, testing, local_optimiser(config))
    except Exception:  # some models look at the values of their tensors, and there are none
        return None
    if device == held.topology.devices[0]:
        num_bytes += job.server.nbytes + state_bytes(server_optimiser(config), job.server.weights.numel())
    return num_bytes


def check_saving(config: SimpleNamespace, job: Job, folder: str | None) -> None:
    """Find out on rank 0, before training, whether what the run leaves can be written.

    Raises:
        ValueError: it cannot.
    """
    if rank() != 0:
        return
    weights = job.server.weights
    beside = 256 * len(job.server.state_dict()["weights"])  # their names and places in the file
    size = weights.nbytes + state_bytes(server_optimiser(config), weights.numel()) + beside
    num_rounds = config.num_rounds - max(len(job.history) - 1, 0)
    needs = saving.need_of_checkpoints(config.checkpoints_dir, size, num_rounds, config.keep_checkpoints)
    saving.check(needs, folder, config.model, job.model, job.tokenizer)


def size_of(batch: Batch) -> int:
    """Return the number of tokens of a batch, padding included."""
    return batch["input_ids"].numel()


def count(config: SimpleNamespace, held: Holdings, server: Server, metrics: Metrics) -> Metrics:
    """Return how much was trained on in a round, how fast, and how many bytes that should have sent."""
    trained = [extent for extent, loss in zip(held.extents, metrics["site.loss"], strict=True) if loss is not None]
    epochs_a_second = config.num_local_epochs / metrics["time.train_s"]
    return {
        "site.examples": [extent.num_examples for extent in held.extents],
        "speed.examples_per_s": epochs_a_second * sum(extent.num_examples for extent in trained),
        "speed.tokens_per_s": epochs_a_second * sum(extent.num_tokens for extent in trained),
        "comm.expected_bytes": server.bytes_a_round,
    }


def describe(config: SimpleNamespace, job: Job) -> list[str]:
    """Return what is about to run, in words."""
    held, topology = job.held, job.held.topology
    num_weights = sum(weight.numel() for weight in trained_weights(job.model).values())
    sizes = [extent.num_examples for extent in held.extents]
    how = config.partition if config.site_paths is None else "of their own"
    where = f"{topology.num_devices} device{'s' * (topology.num_devices > 1)} ({topology.devices[0].type})"
    where += f" of {world_size()} rank{'s' * (world_size() > 1)}"
    return [
        f"model     {config.model}: {num_weights:,} weights ({num_weights * 4e-6:.1f} MB), "
        f"drawn at random: {', '.join(job.drawn) or 'none'}",
        f"data      {config.task_name}: {sum(sizes):,} examples to train on, {held.num_test:,} to evaluate on",
        f"sites     {topology.num_sites} with {min(sizes):,} to {max(sizes):,} examples each ({how}), on {where}",
        f"strategy  {config.strategy}, weighted by examples, sent as {config.comm_dtype}",
        *([f"resumed   after round {len(job.history) - 1}, from {config.checkpoints_dir}"] if job.history else []),
    ]

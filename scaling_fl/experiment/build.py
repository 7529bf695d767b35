"""What the settings of the main job ask for: its data, model, server and sites. Only this module sees the settings."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from types import SimpleNamespace
from typing import Any

import torch
import transformers
from torch import Tensor
from torch.optim import Optimizer
from transformers import PreTrainedTokenizerBase

from scaling_fl.data.encoder import TextEncoder
from scaling_fl.data.labels import order_labels
from scaling_fl.data.partition import PARTITIONERS
from scaling_fl.data.sites import Encode, OrderLabels, Part, SiteData, files_of, partition_corpus, read_site_files
from scaling_fl.data.tasks import name_labels, read_task, sample
from scaling_fl.distributed.collectives import check_equal, local_first, rank, world_size
from scaling_fl.distributed.placement import Topology, place_sites
from scaling_fl.distributed.world import num_threads
from scaling_fl.federation.global_model import GlobalModel
from scaling_fl.federation.round import Federation
from scaling_fl.federation.site import Site
from scaling_fl.federation.strategies import make_strategy
from scaling_fl.models.classifier import Classifier, labels_of, make_classifier
from scaling_fl.models.flat import trained_weights
from scaling_fl.models.memory import estimate_bytes, state_bytes
from scaling_fl.models.pretrained import load_pretrained
from scaling_fl.records import checkpoint, export
from scaling_fl.records.console import Progress
from scaling_fl.storage import host_path
from scaling_fl.training.loop import Batch
from scaling_fl.training.metrics import Metrics
from scaling_fl.training.optimisers import OPTIMISERS
from scaling_fl.training.scores import score_classes

# A resumed run may change these; any other setting makes another run.
FREE = {"site_ids", "num_sites", "site_paths", "train_path", "test_path", "num_rounds", "val_batch_size", "author"}
FREE |= {"job_name", "checkpoints_dir", "keep_checkpoints", "iid_split", "on_site_failure", "min_sites", "report"}


@dataclass(frozen=True)
class Job:
    """What a run is made of."""

    held: SiteData
    tokenizer: PreTrainedTokenizerBase
    classifier: Classifier
    server: GlobalModel
    history: checkpoint.History  # of the rounds that are done
    settings: dict[str, Any]  # what the weights depend on
    checkpoints_dir: str | None  # as this machine knows it


def build(config: SimpleNamespace) -> Job:
    """Read and tokenise the data, load the model, and take over the last checkpoint."""
    settings = resume_settings(config)
    check_equal(settings | {"num_rounds": config.num_rounds, "checkpoints_dir": config.checkpoints_dir})
    checkpoints_dir = config.checkpoints_dir and host_path(config.checkpoints_dir)
    checkpoint.check(checkpoints_dir)
    topology = place_sites(config.site_ids, config.num_sites)
    if config.on_site_failure == "skip" and config.min_sites > topology.num_sites:
        raise ValueError(f"min_sites={config.min_sites} was given: {topology.num_sites}, the number of sites, would do")
    pretrained = local_first(partial(load_pretrained, host_path(config.model), config.max_seq_len))
    limits = pretrained.num_ids, pretrained.width, pretrained.end_id
    encoder = TextEncoder(pretrained.tokenizer, config.max_seq_len, *limits)
    of_head = labels_of(pretrained.config)
    held = read_data(config, topology, encoder.encode, lambda names: order_labels(names, of_head) or names)
    keeps_head = order_labels(held.label_names, of_head) == held.label_names
    classifier = local_first(partial(make_classifier, pretrained, held.label_names, config.seed, keeps_head))
    settings |= resume_data(config, held)
    check_equal(settings)
    server = GlobalModel(classifier.model, server_optimiser(config), config.comm_dtype, held.topology.devices[0])
    history: checkpoint.History = []
    if (state := checkpoint.restore(checkpoints_dir, settings)) is not None:
        server.load_state_dict(state["server"])
        history = state["history"]
    if len(history) > config.num_rounds + 1:
        raise ValueError(
            f"num_rounds={config.num_rounds} was given, but {len(history) - 1} rounds are done: more would do"
        )
    return Job(held, pretrained.tokenizer, classifier, server, history, settings, checkpoints_dir)


def read_data(config: SimpleNamespace, topology: Topology, encode: Encode, order_labels: OrderLabels) -> SiteData:
    """Read the data of the sites, which is dealt to them or their own."""
    columns = config.text_column, config.label_column
    if config.site_paths is None:
        return local_first(partial(read_partitioned, config, columns, topology, encode, order_labels))
    if config.num_sites not in (None, topology.num_slots):
        raise ValueError(
            f"num_sites={config.num_sites} was given, but the nodes that are here have the data of "
            f"{topology.num_slots} sites (site_paths), and a site's data stays where it is: all its nodes would do"
        )
    known = name_labels(config.task_name, config.labels)
    site_paths = [list(map(host_path, files_of(entry))) for entry in config.site_paths]
    held = read_site_files(
        config.task_name, site_paths, columns, known, topology, encode, order_labels, config.val_batch_size
    )
    for site, entry in sorted(held.topology.entries.items()):
        print(f"site {site:<4} {' and '.join(site_paths[entry])}, {held.extents[site].num_examples:,} examples")
    return held


def read_partitioned(
    config: SimpleNamespace,
    columns: tuple[str | None, str | None],
    topology: Topology,
    encode: Encode,
    order_labels: OrderLabels,
) -> SiteData:
    """Read the task's data set, and deal it to the sites."""
    train_path, test_path = (path and host_path(path) for path in (config.train_path, config.test_path))
    corpus = read_task(config.task_name, train_path, test_path, *columns, config.labels)
    corpus = sample(corpus, config.max_train_examples, config.max_test_examples, config.data_seed)
    partitioner = PARTITIONERS[config.partition]
    if config.partition == "dirichlet":
        partitioner = partial(partitioner, alpha=config.dirichlet_alpha)
    return partition_corpus(
        corpus, topology, encode, order_labels, partitioner, config.data_seed, config.val_batch_size
    )


def make_federation(config: SimpleNamespace, job: Job, training: Progress, testing: Progress) -> Federation:
    """Bind the data to the sites of this rank, and try the model on the largest batch of each device.

    Raises:
        ValueError: the model does not take it.
    """
    held = job.held

    def site_batches(part: Part, seed: int) -> Iterator[Batch]:
        return training.watch(part.shuffled_batches(config.batch_size, seed))

    federation = Federation(
        held.topology,
        [
            Site(index, device, len(held.train[index]), partial(site_batches, held.train[index]))
            for index, device in held.topology.sites.items()
        ],
        job.classifier.model,
        job.server,
        make_optimiser=local_optimiser(config),
        score=score_classes,
        test_batches=lambda device: testing.watch(part.batch() for part in held.test[device]),
        seed=config.seed,
        proximal_mu=config.proximal_mu,
        min_sites=config.min_sites if config.on_site_failure == "skip" else None,
    )
    largest = {device: _largest(_training_batches(config, held, device)) for device in held.topology.devices}
    try:
        federation.try_out({device: batch for device, batch in largest.items() if batch is not None})
    except ValueError as error:
        raise ValueError(f"model={config.model!r}: {error}") from error
    return federation


def local_optimiser(config: SimpleNamespace) -> Callable[[Iterable[Tensor]], Optimizer]:
    """Return what makes the optimiser of a site."""
    return partial(OPTIMISERS[config.optimiser], lr=config.learning_rate)


def server_optimiser(config: SimpleNamespace) -> Callable[[Iterable[Tensor]], Optimizer]:
    """Return what makes the optimiser of the global weights."""
    return make_strategy(config.strategy, config.server_learning_rate, config.server_momentum)


def resume_settings(config: SimpleNamespace) -> dict[str, Any]:
    """Return the settings that the weights of a round depend on."""
    settings = {key: value for key, value in vars(config).items() if key not in FREE}
    return settings | {
        "labels": config.labels and list(config.labels),  # of no class of Sacred's, which a checkpoint cannot hold
        "data": "dealt" if config.site_paths is None else "of the sites' own (site_paths)",
        "OMP_NUM_THREADS": num_threads(),
        "versions": f"scaling_fl {version('scaling_fl')}, torch {torch.__version__}, "
        f"transformers {transformers.__version__}",
    }


def resume_data(config: SimpleNamespace, held: SiteData) -> dict[str, Any]:
    """Return what the weights of a round depend on besides: a resumed run must have the same."""
    return held.sha256 | {
        "number of sites": held.topology.num_sites,
        "kind of device": held.topology.devices[0].type,
        "number of devices": "any" if config.comm_dtype == "exact" else held.topology.num_devices,
    }


def estimate_memory(config: SimpleNamespace, job: Job, device: torch.device) -> int | None:
    """Return how many bytes a device of this rank takes at its largest batches; None if its model does not tell."""
    held = job.held
    training = _largest(_training_batches(config, held, device))
    testing = _largest(part.batch() for part in held.test[device])
    try:
        num_bytes = estimate_bytes(job.classifier.model, training, testing, local_optimiser(config))
    except Exception:  # some models look at the values of their tensors, and there are none
        return None
    if device == held.topology.devices[0]:
        num_bytes += job.server.nbytes + state_bytes(server_optimiser(config), job.server.weights.numel())
    return num_bytes


def _training_batches(config: SimpleNamespace, held: SiteData, device: torch.device) -> Iterator[Batch]:
    """Yield for each site of a device the batch with its longest texts."""
    for site, where in held.topology.sites.items():
        if where == device:
            yield held.train[site].longest_batch(config.batch_size)


def _largest(batches: Iterable[Batch]) -> Batch | None:
    """Return the batch with the most tokens, padding included; None if there is none."""
    return max(batches, key=lambda batch: batch["attention_mask"].numel(), default=None)


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
    needs = export.space_for_checkpoints(job.checkpoints_dir, size, num_rounds, config.keep_checkpoints)
    export.check(needs, folder, config.model, job.classifier.model, job.tokenizer)


def count_round(config: SimpleNamespace, held: SiteData, server: GlobalModel, metrics: Metrics) -> Metrics:
    """Return how much was trained on in a round, how fast, and how many bytes that should have sent."""
    trained = {site: held.extents[site] for site in metrics["site.loss"]}
    epochs_a_second = config.num_local_epochs / metrics["time.train_s"]
    return {
        "site.examples": {site: extent.num_examples for site, extent in trained.items()},
        "speed.examples_per_s": epochs_a_second * sum(extent.num_examples for extent in trained.values()),
        "speed.tokens_per_s": epochs_a_second * sum(extent.num_tokens for extent in trained.values()),
        "comm.expected_bytes": server.bytes_a_round,
    }


def describe(config: SimpleNamespace, job: Job) -> list[str]:
    """Return what is about to run, in words."""
    held, topology = job.held, job.held.topology
    num_weights = sum(weight.numel() for weight in trained_weights(job.classifier.model).values())
    sizes = [extent.num_examples for extent in held.extents]
    how = config.partition if config.site_paths is None else "of their own"
    where = f"{topology.num_devices} device{'s' * (topology.num_devices > 1)} ({topology.devices[0].type})"
    where += f" of {world_size()} rank{'s' * (world_size() > 1)}"
    return [
        f"model     {config.model}: {num_weights:,} weights ({num_weights * 4e-6:.1f} MB), "
        f"newly initialised: {', '.join(job.classifier.new) or 'none'}"
        + (f" ({job.classifier.note})" if job.classifier.note else ""),
        f"data      {config.task_name}: {sum(sizes):,} examples to train on, {held.num_test:,} to evaluate on",
        f"sites     {topology.num_sites} with {min(sizes):,} to {max(sizes):,} examples each ({how}), on {where}",
        f"strategy  {config.strategy}, weighted by examples, sent as {config.comm_dtype}",
        *([f"resumed   after round {len(job.history) - 1}, from {config.checkpoints_dir}"] if job.history else []),
    ]

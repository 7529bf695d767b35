"""Fine-tune a language model on the data of many sites, none of which gives its data away."""

import logging
import os
import signal
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any

import datasets
import huggingface_hub
import numpy as np
import torch
import transformers
from sacred import SETTINGS, Experiment
from sacred.run import Run
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from scaling_fl import checkpoint, observers, tracking
from scaling_fl.distributed import first_of_node_first, gather, launched, local_rank, lost_after, num_threads, world
from scaling_fl.federation import Federation, Site
from scaling_fl.launch import launch, num_ranks, run_program
from scaling_fl.models import load_tokenizer, make_classifier, model_defaults
from scaling_fl.partition import PARTITIONERS, deal
from scaling_fl.placement import Topology, place
from scaling_fl.server import COMM_DTYPES, Server, trained_weights
from scaling_fl.settings import DEVICE_IDS, FLAG, TEXT, check, literal, number, one_of, optional, whole_number
from scaling_fl.strategies import STRATEGIES, make_strategy
from scaling_fl.tasks import TASKS, read_task, sample, task_defaults
from scaling_fl.tasks.task import Examples, encode, score_classes
from scaling_fl.training import OPTIMISERS, Batch
from scaling_fl.vigil import Interrupted, PeerError

SETTINGS.CAPTURE_MODE = "sys"
experiment = Experiment("train_federated", save_git_info=False)


@experiment.config
def defaults() -> None:  # noqa: D103 - Sacred would take a docstring for a setting
    site_ids = [0, 0, 0, 0]  # the GPU id of each site of this node; without a GPU the ids name CPU slots
    num_sites = None  # of the federation, which take the nodes' site_ids in turn; None takes one for each of these
    task_name = "bbcnews"  # bbcnews, agnews, imdb, yelp, spooky_author, or text for labelled texts of your own
    model = "minilm"  # minilm, albert, bert, distilbert, a hub id, or a local folder
    _own = {**task_defaults(task_name), **model_defaults(model)}

    num_rounds = 3  # how often the sites train and their weights are averaged
    num_local_epochs = _own.get("num_local_epochs", 2)  # passes of a site over its data in a round
    batch_size = _own.get("batch_size", 32)  # examples in a training step of a site
    val_batch_size = _own.get("val_batch_size", 512)  # most examples in an evaluation batch
    learning_rate = _own.get("learning_rate", 2e-5)  # of the sites' optimiser
    max_seq_len = _own.get("max_seq_len", 128)  # longer texts are cut to so many tokens
    optimiser = _own.get("optimiser", "sgd")  # of the sites: sgd or adamw, made anew each round

    strategy = "fedavg"  # how the mean moves the global weights: fedavg, fedavgm, fedadam, fedadagrad, diloco
    server_learning_rate = None  # of the strategy; None takes its own
    server_momentum = None  # of fedavgm, fedadam and diloco; None takes their own
    proximal_mu = 0.0  # FedProx's pull of the local towards the global weights
    comm_dtype = "exact"  # what ranks send: exact (float64), or float32, bfloat16, float16, which depend on placement

    train_path = None  # the training file, for tasks that need one: a local path or any fsspec URL
    test_path = None  # the test file, which is evaluated whole after every round
    text_column = None  # the column of the text; None takes the task's own
    label_column = None  # the column of the label; None takes the task's own
    max_train_examples = _own.get("max_train_examples")  # train on a random sample of so many
    max_test_examples = None  # evaluate on a random sample of so many

    on_site_failure = "abort"  # a site that fails or diverges: abort the run, or skip it for that round
    min_sites = 1  # of on_site_failure=skip: abort nevertheless when fewer are left in a round

    iid_split = True  # False deals the data sorted by label
    partition = "iid" if iid_split else "by_label"  # how data is dealt: iid, by_label, dirichlet; wins over iid_split
    dirichlet_alpha = 0.5  # of partition=dirichlet: the smaller, the more the sites differ
    seed = 1  # of all randomness in training
    data_seed = 1  # of the samples and of the dealing

    job_name = None  # the name under which MongoDB continues a run that is resumed
    checkpoints_dir = None  # where each round leaves a checkpoint, and from where a run resumes; any fsspec URL
    keep_checkpoints = None  # how many of the last checkpoints to keep; None keeps all
    author = os.environ.get("USER") or "unknown"  # written into the record
    del _own


OPTIONAL_TEXT = optional(TEXT)
LARGE = 1e36  # torch refuses factors that float32 does not hold, and Adam divides its own by 0.1 first
KINDS = {
    "site_ids": DEVICE_IDS,
    "num_sites": optional(whole_number(1)),
    "task_name": one_of(TASKS),
    "model": TEXT,
    "num_rounds": whole_number(0),
    "num_local_epochs": whole_number(1),
    "batch_size": whole_number(1),
    "val_batch_size": whole_number(1),
    "learning_rate": number(above=0),
    "max_seq_len": whole_number(1),
    "optimiser": one_of(OPTIMISERS),
    "strategy": one_of(STRATEGIES),
    "server_learning_rate": optional(number(above=0, below=LARGE)),
    "server_momentum": optional(number(least=0, below=1)),
    "proximal_mu": number(least=0, below=LARGE),
    "comm_dtype": one_of(COMM_DTYPES),
    "train_path": OPTIONAL_TEXT,
    "test_path": OPTIONAL_TEXT,
    "text_column": OPTIONAL_TEXT,
    "label_column": OPTIONAL_TEXT,
    "max_train_examples": optional(whole_number(1)),
    "max_test_examples": optional(whole_number(1)),
    "on_site_failure": one_of(("abort", "skip")),
    "min_sites": whole_number(1),
    "iid_split": FLAG,
    "partition": one_of(PARTITIONERS),
    "dirichlet_alpha": number(above=0),
    "seed": whole_number(0, below=2**32),  # Sacred seeds numpy with it
    "data_seed": whole_number(0),
    "job_name": OPTIONAL_TEXT,
    "checkpoints_dir": OPTIONAL_TEXT,
    "keep_checkpoints": optional(whole_number(1)),
    "author": TEXT,
}
TEXT_KEYS = {"task_name"} | {key for key, kind in KINDS.items() if kind in (TEXT, OPTIONAL_TEXT)}
# A resumed run may change these; any other setting makes another run.
FREE = {"site_ids", "num_sites", "num_rounds", "val_batch_size", "train_path", "test_path", "author", "job_name"}
FREE |= {"checkpoints_dir", "keep_checkpoints", "iid_split", "on_site_failure", "min_sites"}
UNOBSERVED = {"-u", "--unobserved"}  # Sacred's options for a run without a record


@experiment.config_hook
def check_settings(config: dict[str, Any], command_name: str, logger: logging.Logger) -> dict[str, Any]:
    """Refuse unknown settings and wrong values before anything starts."""
    try:
        check(config, KINDS)
        make_strategy(config["strategy"], config["server_learning_rate"], config["server_momentum"])
        num_ranks(config["num_sites"] or len(config["site_ids"]))
        num_threads()
        lost_after()
        if command_name == "train_federated" and is_observed():
            observers.check_mongo(config, goes_on)
            observers.check_files()
    except ValueError as error:
        raise SystemExit(f"error: {error}") from None
    return {}


@experiment.main
def train_federated(_config: dict[str, Any], _run: Run) -> float | None:
    """Train on the ranks of this run, and start them first if nobody has."""
    if not is_rank():
        launch(main, num_ranks=num_ranks(_config["num_sites"] or len(_config["site_ids"])))
        return None
    try:
        with world():
            return run_rounds(SimpleNamespace(**_config), _run)
    except (ValueError, PeerError) as error:
        # Every rank knows of the error; one of each node says it.
        raise SystemExit(f"error: {error}" if local_rank() == 0 else 1) from error


def run_rounds(config: SimpleNamespace, run: Run) -> float:
    """Train, average, evaluate, record and save, round by round; return the last accuracy."""
    ledger = tracking.Ledger()
    topology = place(config.site_ids, config.num_sites)
    task = first_of_node_first(partial(prepare, config))
    settings = what_matters(config, topology, task)
    agree(settings | {"num_rounds": config.num_rounds, "checkpoints_dir": config.checkpoints_dir})
    parts = deal_data(config, topology, task)
    strategy = make_strategy(config.strategy, config.server_learning_rate, config.server_momentum)
    server = Server(task.model, strategy, config.comm_dtype, topology.devices[0])
    history = checkpoint.restore(config.checkpoints_dir, server, settings)
    federation = make_federation(config, topology, task, parts, server)
    tracking.say(*describe(config, topology, task, parts), tracking.table_head())
    for round_, metrics in enumerate(history):
        tracking.record(run.log_scalar, round_, metrics)
    if len(history) > config.num_rounds + 1:
        raise ValueError(
            f"num_rounds={config.num_rounds} was given, but {len(history) - 1} rounds are done: more would do"
        )
    metrics = ledger.lap("setup")
    for round_ in range(len(history), config.num_rounds + 1):
        if round_ > 0:
            metrics |= federation.train(round_, config.num_local_epochs)
            metrics |= ledger.lap("train")
            server.step()
            metrics |= ledger.lap("aggregate")
        metrics |= federation.evaluate()
        metrics |= ledger.lap("evaluate") | ledger.total("round")
        tracking.record(run.log_scalar, round_, metrics)
        history.append(metrics)
        if round_ > 0:
            checkpoint.save(config.checkpoints_dir, server, history, settings, config.keep_checkpoints)
        metrics = {}
    tracking.finish(observers.run_folder(run), federation.model, task.tokenizer, server.sha256(), history)
    return history[-1]["validation.accuracy"]


@dataclass(frozen=True)
class Prepared:
    """A task's examples, and the model and tokenizer for them."""

    train: Examples
    test: Examples
    tokenizer: PreTrainedTokenizerBase
    model: PreTrainedModel
    drawn: list[str]  # the weights that are not pretrained


def prepare(config: SimpleNamespace) -> Prepared:
    """Read and tokenise the data, and load the model."""
    tokenizer = load_tokenizer(config.model, config.max_seq_len)
    paths = config.train_path, config.test_path
    corpus = read_task(config.task_name, *paths, config.text_column, config.label_column)
    corpus = sample(corpus, config.max_train_examples, config.max_test_examples, config.data_seed)
    model, drawn = make_classifier(config.model, corpus.label_names, tokenizer, config.seed)
    train, test = (encode(part, tokenizer, config.max_seq_len) for part in (corpus.train, corpus.test))
    return Prepared(train, test, tokenizer, model, drawn)


def deal_data(config: SimpleNamespace, topology: Topology, task: Prepared) -> list[np.ndarray]:
    """Return the indices of each site's examples, alike on every rank."""
    partitioner = PARTITIONERS[config.partition]
    if config.partition == "dirichlet":
        partitioner = partial(partitioner, alpha=config.dirichlet_alpha)
    return deal(task.train.labels, topology.num_sites, partitioner, config.data_seed)


def make_federation(
    config: SimpleNamespace, topology: Topology, task: Prepared, parts: list[np.ndarray], server: Server
) -> Federation:
    """Bind the data to the sites of this rank."""
    batches_of = {site: -(-len(parts[site]) // config.batch_size) for site in topology.sites}
    test_batches = task.test.fixed_batches(config.val_batch_size)
    num_test_batches = sum(len(test_batches[topology.turn(device)]) for device in topology.devices)
    training = tracking.Progress("training", sum(batches_of.values()) * config.num_local_epochs)
    testing = tracking.Progress("evaluating", num_test_batches)

    def site_batches(indices: np.ndarray, seed: int) -> Iterator[Batch]:
        return training.watch(task.train.shuffled_batches(indices, config.batch_size, seed))

    return Federation(
        topology,
        [
            Site(index, device, len(parts[index]), partial(site_batches, parts[index]))
            for index, device in topology.sites.items()
        ],
        task.model,
        server,
        make_optimiser=partial(OPTIMISERS[config.optimiser], lr=config.learning_rate),
        score=score_classes,
        test_batches=lambda device: testing.watch(map(task.test.batch, test_batches[topology.turn(device)])),
        seed=config.seed,
        proximal_mu=config.proximal_mu,
        min_sites=config.min_sites if config.on_site_failure == "skip" else None,
    )


def what_matters(config: SimpleNamespace, topology: Topology, task: Prepared) -> dict[str, Any]:
    """Return all that the weights of a round depend on: a resumed run must have the same."""
    return {key: value for key, value in vars(config).items() if key not in FREE} | {
        "number of sites": topology.num_sites,
        "training data (SHA-256)": task.train.sha256(),
        "test data (SHA-256)": task.test.sha256(),
        "kind of device": topology.devices[0].type,
        "OMP_NUM_THREADS": num_threads(),
        "versions": f"torch {torch.__version__}, transformers {transformers.__version__}",
        "number of devices": "any" if config.comm_dtype == "exact" else topology.num_devices,
    }


def agree(settings: dict[str, Any]) -> None:
    """Refuse to train on nodes that were started with different settings or data.

    Raises:
        ValueError: some rank's differ from those of rank 0.
    """
    by_rank = gather(settings)
    for rank_, theirs in enumerate(by_rank):
        for key, value in theirs.items():
            if value != by_rank[0][key]:
                raise ValueError(
                    f"all ranks must have the same settings and data: {key} is {by_rank[0][key]!r} on rank 0 "
                    f"and {value!r} on rank {rank_}"
                )


def describe(config: SimpleNamespace, topology: Topology, task: Prepared, parts: list[np.ndarray]) -> list[str]:
    """Return what is about to run, in words."""
    num_weights = sum(weight.numel() for weight in trained_weights(task.model).values())
    sizes = sorted(map(len, parts))
    return [
        f"model     {config.model}: {num_weights:,} weights ({num_weights * 4e-6:.1f} MB), "
        f"drawn at random: {', '.join(task.drawn) or 'none'}",
        f"data      {config.task_name}: {len(task.train):,} examples to train on, {len(task.test):,} to evaluate on",
        f"sites     {topology.num_sites} with {sizes[0]:,} to {sizes[-1]:,} examples each ({config.partition}), "
        f"on {topology.num_devices} devices ({topology.devices[0].type})",
        f"strategy  {config.strategy}, weighted by examples, sent as {config.comm_dtype}",
    ]


def interrupt(signum: int, _: object) -> None:
    """End a run by SIGTERM as by Ctrl-C: its record says INTERRUPTED."""
    raise Interrupted(signum)


def main() -> None:
    """Run Sacred's command line. Of several ranks the first alone is observed."""
    argv = [literal(argument, TEXT_KEYS) for argument in sys.argv]
    if is_observed() and is_rank():
        try:
            experiment.observers.extend(observers.make_observers(goes_on))
        except ValueError as error:
            raise SystemExit(f"error: {error}") from None
    elif not UNOBSERVED.intersection(argv):
        argv.append("--unobserved")
    experiment.logger = observers.make_logger()
    datasets.disable_progress_bars()
    huggingface_hub.utils.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    for signum in (signal.SIGTERM, signal.SIGINT):
        if signal.getsignal(signum) != signal.SIG_IGN:
            signal.signal(signum, interrupt)
    try:
        experiment.run_commandline(argv)
    except Interrupted as error:
        raise SystemExit(128 + error.number) from None


def is_rank() -> bool:
    """Tell whether this process trains: launched as a rank, or the only one that RANKS asks for."""
    return launched() or os.environ.get("RANKS", "1") in ("", "1")


def is_observed() -> bool:
    """Tell whether this process, or the first of the ranks that it starts, is on record."""
    return os.environ.get("RANK", "0") == "0" and not UNOBSERVED.intersection(sys.argv)


def goes_on(config: dict[str, Any]) -> bool:
    """Tell whether a run with this configuration continues from a checkpoint."""
    return checkpoint.exists(config["checkpoints_dir"])


if __name__ == "__main__":
    run_program(main)

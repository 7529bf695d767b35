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
import torch
import transformers
from sacred import SETTINGS, Experiment
from sacred.run import Run
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from scaling_fl import checkpoint, observers, tracking
from scaling_fl.distributed import first_of_node_first, gather, launched, local_rank, lost_after, num_threads, world
from scaling_fl.federation import Federation, Site
from scaling_fl.holdings import Encode, Holdings, Part, deal_corpus, files_of, read_own_files
from scaling_fl.launch import launch, num_ranks, run_program
from scaling_fl.ledger import Ledger, machine, places, write_round
from scaling_fl.metrics import Metrics
from scaling_fl.models import load_tokenizer, make_classifier, model_defaults
from scaling_fl.partition import PARTITIONERS
from scaling_fl.placement import Topology, place
from scaling_fl.server import COMM_DTYPES, Server, trained_weights
from scaling_fl.settings import (
    DEVICE_IDS,
    FLAG,
    SITE_PATHS,
    TEXT,
    check,
    literal,
    number,
    one_of,
    optional,
    whole_number,
)
from scaling_fl.strategies import STRATEGIES, make_strategy
from scaling_fl.tasks import TASKS, read_task, sample, task_defaults
from scaling_fl.tasks.task import encode, score_classes
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

    site_paths = None  # the files of each of site_ids, which stay on this node: training file, or [it, test file]
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
    "site_paths": optional(SITE_PATHS),
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
FREE = {"site_ids", "num_sites", "site_paths", "train_path", "test_path", "num_rounds", "val_batch_size", "author"}
FREE |= {"job_name", "checkpoints_dir", "keep_checkpoints", "iid_split", "on_site_failure", "min_sites"}
UNOBSERVED = {"-u", "--unobserved"}  # Sacred's options for a run without a record


@experiment.config_hook
def check_settings(config: dict[str, Any], command_name: str, logger: logging.Logger) -> dict[str, Any]:
    """Refuse unknown settings and wrong values before anything starts."""
    try:
        check(config, KINDS)
        check_site_paths(config)
        make_strategy(config["strategy"], config["server_learning_rate"], config["server_momentum"])
        count_ranks(config)
        num_threads()
        lost_after()
        if command_name == "train_federated" and is_observed():
            observers.check_mongo(config, goes_on)
            observers.check_files()
    except ValueError as error:
        raise SystemExit(f"error: {error}") from None
    return {}


def count_ranks(config: dict[str, Any]) -> int:
    """Return how many ranks this node starts."""
    return num_ranks(config["num_sites"] or len(config["site_ids"]))


def check_site_paths(config: dict[str, Any]) -> None:
    """Refuse settings that mean nothing for sites with files of their own."""
    if config["site_paths"] is None:
        return
    if len(config["site_paths"]) != len(config["site_ids"]):
        raise ValueError(
            f"site_paths names the files of {len(config['site_paths'])} sites and site_ids the devices of "
            f"{len(config['site_ids'])}: one entry for each would do"
        )
    for key in ("train_path", "test_path", "max_train_examples", "max_test_examples"):
        if config[key] is not None:
            raise ValueError(f"{key}={config[key]!r} is of data that is dealt to sites: leave it out, or site_paths")
    if config["partition"] != "iid":
        raise ValueError(f"partition={config['partition']!r} deals data to sites: leave it out, or site_paths")


@experiment.main
def train_federated(_config: dict[str, Any], _run: Run) -> float | None:
    """Train on the ranks of this run, and start them first if nobody has."""
    if not is_rank():
        launch(main, num_ranks=count_ranks(_config))
        return None
    try:
        with world():
            return run_rounds(SimpleNamespace(**_config), _run)
    except (ValueError, PeerError) as error:
        # Every rank knows of the error; one of each node says it.
        raise SystemExit(f"error: {error}" if local_rank() == 0 else 1) from error


def run_rounds(config: SimpleNamespace, run: Run) -> float:
    """Train, average, evaluate, record and save, round by round; return the last accuracy."""
    ledger = Ledger()
    settings = what_matters(config)
    agree(settings | {"num_rounds": config.num_rounds, "checkpoints_dir": config.checkpoints_dir})
    checkpoint.check(config.checkpoints_dir)
    prepared = prepare(config, place(config.site_ids, config.num_sites))
    held = prepared.held
    settings |= what_is_there(config, held)
    agree(settings)
    strategy = make_strategy(config.strategy, config.server_learning_rate, config.server_momentum)
    server = Server(prepared.model, strategy, config.comm_dtype, held.topology.devices[0])
    history = checkpoint.restore(config.checkpoints_dir, server, settings)
    if len(history) > config.num_rounds + 1:
        raise ValueError(
            f"num_rounds={config.num_rounds} was given, but {len(history) - 1} rounds are done: more would do"
        )
    training = tracking.Progress(config.num_local_epochs * sum(map(len, held.train.values())))
    testing = tracking.Progress(sum(len(batch) for of_device in held.test.values() for batch in of_device))
    federation = make_federation(config, prepared, server, training, testing)
    for site, entry in sorted(held.topology.entries.items()) if config.site_paths else ():
        files = " and ".join(files_of(config.site_paths[entry]))
        print(f"site {site:<4} {files}, {held.extents[site].num_examples:,} examples")
    folder = observers.run_folder(run)
    tracking.say(*describe(config, prepared, observers.results(run, config.checkpoints_dir)))
    run.info |= {
        "labels": list(held.label_names),
        "sites": describe_sites(held),
        "machine": machine(held.topology.devices),
    }
    if history:
        tracking.say(f"resumed   after round {len(history) - 1}, from {config.checkpoints_dir}")
    tracking.say(tracking.table_head())

    def record(round_: int, metrics: Metrics) -> None:
        tracking.record(run.log_scalar, round_, metrics)
        write_round(folder, round_, metrics)

    for round_, metrics in enumerate(history):
        record(round_, metrics)
    metrics = ledger.lap("setup")
    for round_ in range(len(history), config.num_rounds + 1):
        if round_ > 0:
            with training.shown(f"round {round_}, training"):
                metrics |= federation.train(round_, config.num_local_epochs)
            metrics |= ledger.lap("train")
            server.step()
            metrics |= ledger.lap("aggregate") | count(config, held, server, metrics)
        with testing.shown(f"round {round_}, evaluating"):
            metrics |= federation.evaluate()
        metrics |= ledger.lap("evaluate")
        metrics |= ledger.total(metrics)
        history.append(metrics)
        if round_ > 0:
            checkpoint.save(config.checkpoints_dir, server, history, settings, config.keep_checkpoints)
            metrics |= ledger.lap("checkpoint")
        record(round_, metrics)
        metrics = {}
    tracking.finish(folder, federation.model, prepared.tokenizer, server.sha256(), history)
    return history[-1]["validation.accuracy"]


@dataclass(frozen=True)
class Prepared:
    """The sites' examples, and the model and tokenizer for them."""

    held: Holdings
    tokenizer: PreTrainedTokenizerBase
    model: PreTrainedModel
    drawn: list[str]  # the weights that are not pretrained


def prepare(config: SimpleNamespace, topology: Topology) -> Prepared:
    """Read and tokenise the data, and load the model."""
    tokenizer = first_of_node_first(partial(load_tokenizer, config.model, config.max_seq_len))
    tokens = partial(encode, tokenizer=tokenizer, max_seq_len=config.max_seq_len)
    columns = config.text_column, config.label_column
    if config.site_paths is None:
        held = first_of_node_first(partial(deal_data, config, columns, topology, tokens))
    else:
        if config.num_sites not in (None, topology.num_slots):
            raise ValueError(
                f"num_sites={config.num_sites} was given, but the nodes that are here have the data of "
                f"{topology.num_slots} sites (site_paths), and a site's data stays where it is: all its nodes would do"
            )
        held = read_own_files(config.task_name, config.site_paths, columns, topology, tokens, config.val_batch_size)
    model, drawn = first_of_node_first(partial(make_classifier, config.model, held.label_names, tokenizer, config.seed))
    return Prepared(held, tokenizer, model, drawn)


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


def make_federation(
    config: SimpleNamespace,
    prepared: Prepared,
    server: Server,
    training: tracking.Progress,
    testing: tracking.Progress,
) -> Federation:
    """Bind the data to the sites of this rank."""
    held = prepared.held

    def site_batches(part: Part, seed: int) -> Iterator[Batch]:
        return training.watch(part.shuffled_batches(config.batch_size, seed))

    return Federation(
        held.topology,
        [
            Site(index, device, len(held.train[index]), partial(site_batches, held.train[index]))
            for index, device in held.topology.sites.items()
        ],
        prepared.model,
        server,
        make_optimiser=partial(OPTIMISERS[config.optimiser], lr=config.learning_rate),
        score=score_classes,
        test_batches=lambda device: testing.watch(part.batch() for part in held.test[device]),
        seed=config.seed,
        proximal_mu=config.proximal_mu,
        min_sites=config.min_sites if config.on_site_failure == "skip" else None,
    )


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


def describe(config: SimpleNamespace, prepared: Prepared, results: list[str]) -> list[str]:
    """Return what is about to run, in words."""
    held, topology = prepared.held, prepared.held.topology
    num_weights = sum(weight.numel() for weight in trained_weights(prepared.model).values())
    sizes = [extent.num_examples for extent in held.extents]
    how = config.partition if config.site_paths is None else "of their own"
    devices = f"{topology.num_devices} device{'s' * (topology.num_devices > 1)} ({topology.devices[0].type})"
    return [
        f"model     {config.model}: {num_weights:,} weights ({num_weights * 4e-6:.1f} MB), "
        f"drawn at random: {', '.join(prepared.drawn) or 'none'}",
        f"data      {config.task_name}: {sum(sizes):,} examples to train on, {held.num_test:,} to evaluate on",
        f"sites     {topology.num_sites} with {min(sizes):,} to {max(sizes):,} examples each ({how}), on {devices}",
        f"strategy  {config.strategy}, weighted by examples, sent as {config.comm_dtype}",
        f"results   {', '.join(results) or 'not on record'}",
    ]


def describe_sites(held: Holdings) -> list[dict[str, Any]]:
    """Return for each site where it runs and what it trains on."""
    return [
        place | {"examples": extent.num_examples, "tokens": extent.num_tokens, "labels": list(extent.label_counts)}
        for place, extent in zip(places(held.topology), held.extents, strict=True)
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
    logging.getLogger("gcsfs").setLevel(logging.CRITICAL)  # it logs stack traces of what it raises, or tries again
    for signum in (signal.SIGTERM, signal.SIGINT):
        if signal.getsignal(signum) != signal.SIG_IGN:
            signal.signal(signum, interrupt)
    try:
        check_updates(argv)
        experiment.run_commandline(argv)
    except Interrupted as error:
        if is_observed():
            print(f"interrupted by {signal.Signals(error.number).name}", file=sys.stderr)
        raise SystemExit(128 + error.number) from None


def check_updates(argv: list[str]) -> None:
    """Refuse what follows `with` and is neither a setting nor a file of settings, such as half a list."""
    for word in argv[argv.index("with") + 1 :] if "with" in argv else ():
        if "=" not in word and not word.startswith("-") and not os.path.isfile(word):
            raise SystemExit(
                f"error: {word!r} is neither a setting nor a file of settings: key=value would do, in quotes if there "
                "is a space in it"
            )


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

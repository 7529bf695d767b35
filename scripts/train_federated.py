"""Fine-tune a language model on the data of many sites, none of which gives its data away."""

import logging
import os
import sys
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any, TypeVar

import datasets
import huggingface_hub
import transformers
from sacred import SETTINGS, Experiment
from sacred.config.config_files import load_config_file
from sacred.run import Run

from scaling_fl import report
from scaling_fl.data.partition import PARTITIONERS
from scaling_fl.data.tasks import TASKS, name_labels, task_defaults
from scaling_fl.distributed import signals
from scaling_fl.distributed.collectives import all_gather, local_rank
from scaling_fl.distributed.heartbeat import PeerError
from scaling_fl.distributed.launch import launch, num_ranks, run_program, was_launched_here
from scaling_fl.distributed.world import launched, lost_after, num_threads, world
from scaling_fl.errors import one_line
from scaling_fl.experiment.build import (
    Job,
    build,
    check_saving,
    count_round,
    describe,
    estimate_memory,
    make_federation,
)
from scaling_fl.experiment.settings import (
    DEVICE_IDS,
    FLAG,
    LABELS,
    SITE_PATHS,
    TEXT,
    check,
    literal,
    number,
    one_of,
    optional,
    unknown,
    whole_number,
)
from scaling_fl.federation.aggregation import COMM_DTYPES
from scaling_fl.federation.strategies import STRATEGIES, make_strategy
from scaling_fl.models.loading import model_defaults
from scaling_fl.records import checkpoint, console, observers
from scaling_fl.records.console import escape_unprintable
from scaling_fl.records.export import save_elsewhere
from scaling_fl.records.machine import describe_machine
from scaling_fl.records.rounds import ROUNDS, Clock, write_round
from scaling_fl.storage import WriteError, host_path
from scaling_fl.training.metrics import Metrics
from scaling_fl.training.optimisers import OPTIMISERS

T = TypeVar("T")

SETTINGS.CAPTURE_MODE = "sys"
experiment = Experiment("train_federated", save_git_info=False)


@experiment.config
def defaults() -> None:  # noqa: D103 - Sacred would take a docstring for a setting
    site_ids = [0, 0, 0, 0]  # the GPU id of each site of this node; without a GPU the ids name CPU slots
    num_sites = None  # of the federation, which take the nodes' site_ids in turn; None takes one for each of these
    task_name = "bbcnews"  # bbcnews, agnews, imdb, yelp, spooky_author, or text for labelled texts of your own
    model = "minilm"  # minilm, albert, bert, distilbert, a hub id, or a local folder
    _own = {**task_defaults(str(task_name)), **model_defaults(str(model))}  # of any type as yet

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
    labels = None  # the labels there may be, in the order of the classes; None takes the task's own or those found
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
    report = True  # draw the run at its end, as a page among its files
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
    "labels": optional(LABELS),
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
    "report": FLAG,
    "author": TEXT,
}
TEXT_KEYS = {"task_name"} | {key for key, kind in KINDS.items() if kind in (TEXT, OPTIONAL_TEXT)}
UNOBSERVED = {"-u", "--unobserved"}  # Sacred's options for a run without a record
unrecorded: list[str] = []  # why a run cannot be on record, which is said beside all else that is wrong


@experiment.config_hook
def check_settings(config: dict[str, Any], command_name: str, logger: logging.Logger) -> dict[str, Any]:
    """Refuse unknown settings and wrong values before anything starts."""
    is_to_train = command_name in ("train_federated", "plan")
    is_on_record = is_to_train and is_observed() and not was_launched_here()
    problems = find_problems([lambda: check(config, KINDS)]) or find_problems(
        [
            lambda: check_site_paths(config),
            lambda: name_labels(config["task_name"], config["labels"]),
            lambda: make_strategy(config["strategy"], config["server_learning_rate"], config["server_momentum"]),
            lambda: count_ranks(config),
            num_threads,
            lost_after,
            *([lambda: observers.check_mongo(config, goes_on)] if is_on_record else []),
        ]
    )
    if is_on_record and not problems:
        problems = find_problems([observers.check_files])  # last, as it makes their folder
    problems += unrecorded if is_to_train else []
    if problems:
        raise SystemExit("\n".join(f"error: {problem}" for problem in dict.fromkeys(problems)))
    return {}


def find_problems(checks: list[Callable[[], object]]) -> list[str]:
    """Return what all checks that fail have to say."""
    problems = []
    for check_ in checks:
        try:
            check_()
        except ValueError as error:
            problems += str(error).splitlines()
    return problems


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
    """Train on the ranks of this run."""
    try:
        with signals.interruptible():
            return on_ranks(_config, lambda config: train(config, _run))
    finally:
        observers.attach(_run, ROUNDS)
        observers.flush(_run)


@experiment.command(unobserved=True)
def plan(_config: dict[str, Any]) -> None:
    """Print what would run where, and what it takes, or what would be refused. Trains nothing."""
    on_ranks(_config, show_plan)


def on_ranks(config: dict[str, Any], work: Callable[[SimpleNamespace], T]) -> T | None:
    """Do `work` as one of the ranks of this run, or start them if nobody has: each comes back here."""
    if not is_rank():
        launch(main, num_ranks=count_ranks(config))
        return None
    try:
        with world():
            return work(SimpleNamespace(**config))
    except (ValueError, PeerError) as error:
        # Every rank knows of the error; one of each node says it, and the one whose error it is if others know less.
        is_to_say = local_rank() == 0 or hasattr(error, "told")
        raise SystemExit(f"error: {error}{places(config, str(error))}" if is_to_say else 1) from error


def places(config: dict[str, Any], sentence: str) -> str:
    """Return what was given for the paths in a sentence that are at another place on this machine."""
    site_paths = [
        path for entry in config["site_paths"] or () for path in ([entry] if isinstance(entry, str) else entry)
    ]
    given = [
        path for key in ("model", "train_path", "test_path", "checkpoints_dir") if (path := config[key])
    ] + site_paths
    found = {path: host_path(path) for path in given if host_path(path) != path and host_path(path) in sentence}
    return "".join(f" ({place} stands for {path}: see DATA_MOUNT_DIR)" for path, place in found.items())


def train(config: SimpleNamespace, run: Run) -> float:
    """Set a run up and train; if a disk fails, look after the weights. Return the last accuracy."""
    ledger = Clock()
    job = build(config)
    folder = observers.run_folder(run)
    check_saving(config, job, folder)
    announce(config, job, run)
    try:
        run_rounds(config, job, run, ledger)
    except WriteError as error:
        saved = None if isinstance(error, checkpoint.CheckpointError) else job.checkpoints_dir
        raise ValueError(
            f"{error}. {save_elsewhere(saved, job.server.state_dict(), job.history, job.settings, folder)}"
        ) from error
    return job.history[-1]["validation.accuracy"]


def run_rounds(config: SimpleNamespace, job: Job, run: Run, ledger: Clock) -> None:
    """Train, average, evaluate, record and save, round by round."""
    held, server, history = job.held, job.server, job.history
    training = console.Progress(config.num_local_epochs * sum(map(len, held.train.values())))
    testing = console.Progress(sum(len(batch) for of_device in held.test.values() for batch in of_device))
    federation = make_federation(config, job, training, testing)
    folder = observers.run_folder(run)
    table = console.Table(with_failures=config.on_site_failure == "skip")

    def record(round_: int, metrics: Metrics) -> None:
        table.record(run.log_scalar, round_, metrics)
        write_round(folder, round_, metrics)
        observers.check_record(run)

    for round_, metrics in enumerate(history):
        record(round_, metrics)
    metrics = ledger.lap("setup")
    for round_ in range(len(history), config.num_rounds + 1):
        if round_ > 0:
            with training.display(f"round {round_}, training"):
                metrics |= federation.train(round_, config.num_local_epochs)
            metrics |= ledger.lap("train")
            server.step()
            metrics |= ledger.lap("aggregate") | count_round(config, held, server, metrics)
        with testing.display(f"round {round_}, evaluating"):
            metrics |= federation.evaluate()
        metrics |= ledger.lap("evaluate")
        metrics |= ledger.total(metrics)
        history.append(metrics)
        if round_ > 0:
            checkpoint.save(job.checkpoints_dir, server.state_dict(), history, job.settings, config.keep_checkpoints)
            metrics |= ledger.lap("checkpoint")
        record(round_, metrics)
        metrics = {}
    page = observers.REPORT if config.report else None
    console.finish(folder, federation.model, job.tokenizer, server.sha256(), history, page)


def announce(config: SimpleNamespace, job: Job, run: Run) -> None:
    """Print and record what is about to run."""
    console.print_once(
        *describe(config, job),
        f"results   {', '.join(observers.results(run, job.checkpoints_dir)) or 'not on record'}",
    )
    run.info |= {
        "labels": list(job.held.label_names),
        "sites": job.held.describe_sites(job.topology),
        "machine": describe_machine(job.topology.devices),
    }


def show_plan(config: SimpleNamespace) -> None:
    """Set a run up as if to train, and print what it comes to."""
    job = build(config)
    held, server = job.held, job.server
    check_saving(config, job, observers.runs_dir() if is_observed() else None)
    memory = all_gather({str(device): estimate_memory(config, job, device) for device in job.topology.devices})
    make_federation(config, job, console.Progress(0), console.Progress(0))  # which tries it out
    sites = held.describe_sites(job.topology)
    console.print_once(
        *describe(config, job),
        f"round     {server.weights.numel():,} weights shared, {server.bytes_a_round * 1e-6:.1f} MB sent by all ranks",
        *console.site_table(sites, held.label_names, config.batch_size, config.num_local_epochs),
        *console.device_table(memory),
        "the plan holds: nothing of it would be refused",
    )


def main() -> None:
    """Run Sacred's command line, until a signal ends it."""
    signals.install_handlers()
    with signals.interruptible():
        run_command()
    signals.restore_defaults()


def run_command() -> None:
    """Run Sacred's command line. Of several ranks the first alone is observed."""
    argv = [literal(argument, TEXT_KEYS) for argument in sys.argv]
    if is_observed() and is_rank():
        try:
            experiment.observers.extend(observers.make_observers(goes_on))
        except ValueError as error:
            unrecorded.append(str(error))
    elif not UNOBSERVED.intersection(argv):
        argv.append("--unobserved")
    experiment.logger = observers.make_logger()
    escape_unprintable()
    datasets.disable_progress_bars()
    huggingface_hub.utils.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    datasets.utils.logging.set_verbosity(logging.CRITICAL)  # what keeps us from data, our own sentence says
    huggingface_hub.utils.logging.set_verbosity(logging.CRITICAL)
    logging.getLogger("gcsfs").setLevel(logging.CRITICAL)  # it logs stack traces of what it raises, or tries again
    check_updates(argv)
    run = experiment.run_commandline(argv)
    if run is None:
        return
    try:
        observers.check_record(run)
    except WriteError as error:
        raise SystemExit(f"error: {error}") from None
    if run.config["report"]:
        draw_report(run)


def draw_report(run: Run) -> None:
    """Draw the page of a run that has ended, among its files, and attach it."""
    folder = observers.run_folder(run)
    if folder is None:
        return
    try:
        report.write([folder], os.path.join(folder, observers.REPORT))
        observers.attach(run, observers.REPORT)
    except Exception as error:  # a run of days does not fail for its pictures
        experiment.logger.warning("the report of %s was not drawn: %s", folder, one_line(error))


def check_updates(argv: list[str]) -> None:
    """Refuse what follows `with` and is neither a setting nor a file of settings, such as half a list."""
    end = argv.index("with") if "with" in argv else len(argv)
    problems = [
        f"{word!r}: expected `with` before the first setting, got none: ... with {word}"
        for word in argv[1:end]
        if word.partition("=")[0] in KINDS and "=" in word
    ]
    problems += find_problems([partial(check_update, word) for word in argv[end + 1 :] if not word.startswith("-")])
    if problems:
        raise SystemExit("\n".join(f"error: {problem}" for problem in dict.fromkeys(problems)))


def check_update(word: str) -> None:
    """Refuse what Sacred would take apart at a dot, or stumble over."""
    key, equals, _ = word.partition("=")
    if equals and key.strip():
        if not key.strip().isidentifier():  # others are checked with all settings
            raise ValueError(unknown(key.strip(), KINDS))
    elif os.path.isfile(word):
        check(read_settings(word), KINDS)
    else:
        raise ValueError(
            f"{word!r} is neither a setting nor a file of settings: key=value would do, in quotes if there is a space "
            "in it"
        )


def read_settings(path: str) -> dict[str, Any]:
    """Return the settings of a file, but of no pickle, which could run code."""
    got = "a file of another kind"
    if path.endswith((".json", ".yaml", ".yml")):
        try:
            found = load_config_file(path)
        except Exception as error:
            got = f"one that cannot be read: {one_line(error)}"
        else:
            if isinstance(found, dict):
                return found
            got = "an empty one" if found is None else f"a {type(found).__name__}"
    raise ValueError(f'{path}: expected settings such as {{"seed": 2}} in JSON (.json) or YAML (.yaml), got {got}')


def is_rank() -> bool:
    """Tell whether this process trains: launched as a rank, or the only one that RANKS asks for."""
    return launched() or os.environ.get("RANKS", "1") in ("", "1")


def is_observed() -> bool:
    """Tell whether this process, or the first of the ranks that it starts, is on record."""
    return os.environ.get("RANK", "0") == "0" and not UNOBSERVED.intersection(sys.argv)


def goes_on(config: dict[str, Any]) -> bool:
    """Tell whether a run with this configuration continues from a checkpoint."""
    return checkpoint.exists(config["checkpoints_dir"] and host_path(config["checkpoints_dir"]))


if __name__ == "__main__":
    run_program(main)

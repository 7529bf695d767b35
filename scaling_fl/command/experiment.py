"""Fine-tune a language model on the data of many sites, none of which gives its data away."""

import logging
import os
import re
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any, TypeVar

import datasets
import huggingface_hub
import transformers
from sacred import SETTINGS, Experiment
from sacred.config.config_summary import ConfigSummary
from sacred.run import Run

from scaling_fl.command.arguments import check_updates, insert_files
from scaling_fl.distributed import caller, signals
from scaling_fl.distributed.collectives import local_rank
from scaling_fl.distributed.heartbeat import PeerError
from scaling_fl.distributed.launch import launch, was_launched_here
from scaling_fl.distributed.world import launched, lost_after, num_threads, world
from scaling_fl.errors import escape_unprintable, one_line
from scaling_fl.experiment.centralised import count_ranks
from scaling_fl.experiment.checks import check, find_changed, find_problems, quote_text
from scaling_fl.experiment.contradictions import find_contradictions
from scaling_fl.experiment.plan import plan as plan_run
from scaling_fl.experiment.run import REPORT, explain_paths, is_resumed, train_on_rank
from scaling_fl.experiment.settings import FIELDS, Settings
from scaling_fl.experiment.trackers import tracked
from scaling_fl.records import observers
from scaling_fl.records.rounds import ROUNDS

T = TypeVar("T")

SETTINGS.CAPTURE_MODE = "sys"
SETTINGS.DISCOVER_SOURCES = "none"  # but this file: the record has the commit
UNOBSERVED = {"-u", "--unobserved"}  # Sacred's options for a run without a record
experiment = Experiment("train_federated", save_git_info=False)
record_problems: list[str] = []  # why a run cannot be recorded, which is printed beside all else that is wrong


def configure(fixed: Any = None, preset: Any = None, fallback: Any = None) -> ConfigSummary:
    """Return all settings, those that are given and the defaults of the others, in the form that Sacred asks for."""
    given = {**(preset or {}), **(fixed or {})}
    known = {name: value for name, value in given.items() if name in FIELDS}
    try:
        settings = Settings(**known)
    except ValueError as error:
        raise SystemExit(f"error: {error}") from error
    summary = ConfigSummary(
        added=given.keys() - known.keys(),
        modified=find_changed(vars(settings)),
        # Without Markdown's links and marks.
        docs={name: re.sub(r"\[([^]]*)\]\([^)]*\)|`", r"\1", of["help"]) for name, of in FIELDS.items()},
    )
    summary.update({**with_text_keys(vars(settings)), **given})
    return summary


def with_text_keys(value: Any) -> Any:
    """Return a value with texts as keys of all dicts in it, which is what JSON and MongoDB keep."""
    return {str(key): with_text_keys(item) for key, item in value.items()} if isinstance(value, dict) else value


experiment.configurations.append(configure)


@experiment.config_hook
def check_settings(config: dict[str, Any], command_name: str, logger: logging.Logger) -> dict[str, Any]:
    """Refuse unknown settings and wrong values before anything starts."""
    is_to_train = command_name in ("train_federated", "plan")
    is_on_record = is_to_train and is_observed() and not was_launched_here()
    problems = find_problems([lambda: check(config)])
    if not problems:
        settings = Settings(**config)
        problems = find_contradictions(settings) + find_problems(
            [
                lambda: count_ranks(settings),
                num_threads,
                lost_after,
                *([lambda: observers.check_mongo(config, is_resumed)] if is_on_record else []),
            ]
        )
    if is_on_record and not problems:
        problems = find_problems([observers.check_files])  # last, as it makes their folder
    problems += record_problems if is_to_train else []
    if problems:
        raise SystemExit("\n".join(f"error: {problem}" for problem in dict.fromkeys(problems)))
    return {}


@experiment.main
def train_federated(_config: dict[str, Any], _run: Run) -> float | None:
    """Train on the ranks of this run."""
    try:
        with signals.interruptible():
            return on_ranks(Settings(**_config), lambda settings: train_on_record(settings, _run))
    finally:
        observers.attach(_run, ROUNDS)
        observers.flush(_run)


def train_on_record(settings: Settings, run: Run) -> float:
    """Train as one of the ranks of a run, which trackers follow, and a caller in Python, who may end it."""
    record = observers.make_record(run)
    if record.folder is not None:
        caller.tell(folder=os.path.abspath(record.folder))
    record = replace(record, goes_on=lambda metrics: caller.ask(metrics=metrics) is not False)
    with tracked(settings, record) as tracked_record:
        return train_on_rank(settings, tracked_record)


@experiment.command(unobserved=True)
def plan(_config: dict[str, Any]) -> None:
    """Print what would run where, and what it takes, or what would be refused. Trains nothing."""
    folder = observers.runs_dir() if is_observed() else None
    on_ranks(Settings(**_config), lambda settings: caller.tell(plan=plan_run(settings, folder)))


def on_ranks(settings: Settings, work: Callable[[Settings], T]) -> T | None:
    """Do `work` as one of the ranks of this run, or start them if no launcher has: each comes back here."""
    if not is_rank():
        launch(main, num_ranks=count_ranks(settings), fork=True)
        return None
    try:
        with world():
            return work(settings)
    except (ValueError, PeerError) as error:
        # Every rank knows of the error; the first of each node prints it, and the one with details that others lack.
        prints = local_rank() == 0 or hasattr(error, "message_for_peers")
        raise SystemExit(f"error: {error}{explain_paths(settings, str(error))}" if prints else 1) from error


def main() -> None:
    """Run Sacred's command line, until a signal ends it."""
    # A process that was started with its standard output closed has None in its place, which Sacred does not expect.
    sys.stdout, sys.stderr = (stream or open(os.devnull, "w") for stream in (sys.stdout, sys.stderr))  # noqa: SIM115
    signals.install_handlers()
    if not launched():
        caller.end_with_caller()
    with signals.interruptible():
        run_command()
    signals.restore_defaults()


def run_command() -> None:
    """Run Sacred's command line. Of several ranks the first alone is observed."""
    argv = [quote_text(argument) for argument in sys.argv]
    if is_observed() and is_rank():
        try:
            experiment.observers.extend(observers.make_observers(is_resumed))
        except ValueError as error:
            record_problems.append(str(error))
    elif not UNOBSERVED.intersection(argv):
        argv.append("--unobserved")
    experiment.logger = observers.make_logger()
    escape_unprintable()
    silence_libraries()
    check_updates(argv)
    run = experiment.run_commandline(insert_files(argv))
    if run is None:
        return
    try:
        observers.check_record(run)
    except ValueError as error:
        raise SystemExit(f"error: {error}") from None
    if run.config["report"]:
        draw_report(run)


def silence_libraries() -> None:
    """Leave it to our own sentences to say what is wrong."""
    datasets.disable_progress_bars()
    huggingface_hub.utils.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    datasets.utils.logging.set_verbosity(logging.CRITICAL)
    huggingface_hub.utils.logging.set_verbosity(logging.CRITICAL)
    logging.getLogger("gcsfs").setLevel(logging.CRITICAL)  # it logs stack traces of what it raises, or tries again
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # accelerate, of trackers, imports it, if it is there


def draw_report(run: Run) -> None:
    """Write the report of a run that has ended, among its files, and attach it."""
    from scaling_fl import report  # matplotlib takes its time

    folder = observers.run_folder(run)
    if folder is None:
        return
    try:
        report.write([folder], os.path.join(folder, REPORT), with_png=False)
        observers.attach(run, REPORT)
    except Exception as error:  # a run of days does not fail for its pictures
        experiment.logger.warning("the report of %s was not written: %s", folder, one_line(error))


def is_rank() -> bool:
    """Tell whether this process trains: launched as a rank, or the only one that RANKS asks for."""
    return launched() or os.environ.get("RANKS", "1") in ("", "1")


def is_observed() -> bool:
    """Tell whether this process, or the first of the ranks that it starts, is recorded."""
    return os.environ.get("RANK", "0") == "0" and not UNOBSERVED.intersection(sys.argv)

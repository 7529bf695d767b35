"""Trackers, such as TensorBoard and MLflow, which get a run's settings and rounds through accelerate."""

import logging
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from datetime import datetime
from typing import Any

from scaling_fl.distributed.collectives import rank
from scaling_fl.errors import one_line
from scaling_fl.experiment.settings import Settings
from scaling_fl.federation.isolation import isolated
from scaling_fl.records.rounds import Record
from scaling_fl.training.metrics import Metrics, by_step

log = logging.getLogger(__name__)

PROJECT = "scaling_fl"
LONGEST_TEXT = 500  # characters, of which older servers of MLflow take no more
ABOUT_SITES = ("site_paths", "site_settings", "eligible_sites", "evaluation_sites")  # settings that name sites
# Some trackers take the output and the command line of a process, which name sites and may hold credentials.
WANDB_TAKES_NEITHER = {"console": "off", "x_disable_meta": True}
TAKE_OUTPUT = ("clearml", "comet_ml", "swanlab")
ARGUMENTS: dict[str, Callable[[str, str], dict[str, Any]]] = {  # by tracker, of a run's name and folder
    "mlflow": lambda run, folder: {"run_name": run},
    "trackio": lambda run, folder: {"name": run},
    "wandb": lambda run, folder: {"name": run, "dir": folder, "settings": WANDB_TAKES_NEITHER},
}


def check_trackers(names: Sequence[str] | None, *, with_sites: bool) -> None:
    """Check the names of trackers.

    Args:
        names: of trackers.
        with_sites: they may get what is about single sites.

    Raises:
        ValueError: accelerate is missing or does not have one of them, or one would get more than it may.
    """
    if not names:
        return
    known = _classes()
    for name in names:
        if name not in known:
            raise ValueError(f"trackers: expected some of {', '.join(known)}, got {name!r}")
        if name in TAKE_OUTPUT and not with_sites:
            raise ValueError(f"track_sites: expected True, as {name} also takes what a run prints, got False")


@contextmanager
def tracked(settings: Settings, record: Record) -> Iterator[Record]:
    """Yield a record that passes each round on to the trackers of a run too, on rank 0.

    Raises:
        ValueError: a tracker cannot start.
    """
    names = settings.trackers or ()
    if not names or rank() > 0:
        yield record
        return
    if record.folder is None:
        raise ValueError(f"trackers: expected None, as a run without a record is not tracked, got {names}")
    running: dict[str, Any] = {}
    try:
        for name in names:
            running[name] = _start(name, settings, record.folder)
        yield replace(record, log_round=lambda round_, metrics: _log_round(running, settings, round_, metrics))
    finally:
        _call_all(running, lambda tracker: tracker.finish())


def flatten_settings(settings: Mapping[str, Any], *, with_sites: bool) -> dict[str, Any]:
    """Return settings as trackers take them: numbers, flags, and texts of 500 characters at most.

    Args:
        settings: all of a run.
        with_sites: those that name sites too.

    Returns:
        The settings, without credentials and queries of URLs, which may hold a key.
    """
    return {
        name: value if isinstance(value, int | float) else _cut(_hide_secrets(str(value)))
        for name, value in settings.items()
        if with_sites or name not in ABOUT_SITES
    }


def flatten_metrics(metrics: Metrics, *, with_sites: bool) -> dict[str, float]:
    """Return the numbers among metrics, with those of site 3, if asked for, as `site.loss/3`."""
    values: dict[str, Any] = dict(metrics)
    if with_sites:
        for name, by_site in metrics.items():
            if isinstance(by_site, Mapping):
                values |= {f"{name}/{site}": value for site, value in by_site.items()}
    return {name: value for name, value in values.items() if isinstance(value, int | float)}


def _classes() -> Mapping[str, Any]:
    """Return accelerate's classes of trackers by name."""
    try:
        from accelerate.tracking import LOGGER_TYPE_TO_CLASS  # which takes its time
    except ImportError as error:
        raise ValueError(
            f"trackers: expected the package accelerate, got {one_line(error)}. "
            "EXTRAS=trackers for run-local.sh, or pip install accelerate, installs it"
        ) from None
    return LOGGER_TYPE_TO_CLASS


def _start(name: str, settings: Settings, folder: str) -> Any:
    """Start a tracker with a run of its own, which gets the settings."""
    kind = _classes()[name]
    now = datetime.now().strftime("%Y%m%d-%H%M%S")  # the numbers of runs repeat in other folders
    run = f"{settings.job_name or settings.task_name}-{os.path.basename(folder)}-{now}"
    arguments = ARGUMENTS[name](run, folder) if name in ARGUMENTS else {}
    if kind.requires_logging_directory:
        arguments["logging_dir"] = folder
    try:
        with _alone():
            tracker = kind(name if kind.requires_logging_directory else PROJECT, **arguments)
            tracker.start()
            if name == "wandb":
                tracker.tracker.define_metric("*", step_metric="round")
                tracker.tracker.define_metric("step.*", step_metric="step")
            tracker.store_init_configuration(flatten_settings(vars(settings), with_sites=settings.track_sites))
    except Exception as error:
        reason = _hide_secrets(one_line(error))
        raise ValueError(f"trackers: expected a tracker that can start, got {name!r} ({reason})") from error
    return tracker


def _log_round(running: dict[str, Any], settings: Settings, round_: int, metrics: Metrics) -> None:
    values = flatten_metrics(metrics, with_sites=settings.track_sites)
    points = [("step", *point) for point in by_step(metrics, with_sites=settings.track_sites)]

    def log_all(tracker: Any) -> None:
        for axis, place, of_place in (*points, ("round", round_, values)):
            if tracker.name == "wandb":  # whose steps may not fall, as from step 90 to round 3
                tracker.log({"round": round_, axis: place, **of_place})
            else:
                tracker.log(of_place, step=place)

    _call_all(running, log_all)


def _call_all(running: dict[str, Any], call: Callable[[Any], object]) -> None:
    """Call trackers, and remove those that fail: a run of days does not fail for its charts, or wait for each round."""
    for name, tracker in list(running.items()):
        try:
            with _alone():
                call(tracker)
        except Exception as error:
            del running[name]
            reason = _hide_secrets(one_line(error))
            log.warning("the tracker %s failed and gets no more of this run: %s", name, reason)


@contextmanager
def _alone() -> Iterator[None]:
    """Let a tracker find one process, as on several ranks accelerate would change the number of threads."""
    from accelerate import PartialState

    with isolated():
        PartialState(cpu=True)  # without which accelerate's log fails
        yield


def _hide_secrets(text: str) -> str:
    without_credentials = re.sub(r"(?<=://)[^/\s'\"]*@", "", text)
    return re.sub(r"(://[^\s'\"?]*)\?[^\s'\"]*", r"\1", without_credentials)


def _cut(text: str) -> str:
    return text if len(text) <= LONGEST_TEXT else f"{text[: LONGEST_TEXT - 4]} ..."

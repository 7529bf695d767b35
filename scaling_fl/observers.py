"""Sacred's record of a run: in files always, in MongoDB where there is one."""

import logging
import os
from collections.abc import Callable
from copy import deepcopy
from tempfile import TemporaryFile
from typing import Any
from urllib.parse import quote_plus

import pymongo
from sacred.observers import FileStorageObserver, MongoObserver
from sacred.run import Run

from scaling_fl.settings import one_line

Config = dict[str, Any]

PATIENCE_MS = 5_000  # a server that does not answer for so long is away


class Files(FileStorageObserver):
    """A folder a run, numbered on its own whatever number MongoDB gives the run."""

    def started_event(self, **event: Any) -> Any:
        """Make the folder."""
        return super().started_event(**{**event, "_id": None})


# Of the document of a run that goes on.
KEPT = ("start_time", "info", "captured_out", "artifacts", "resources")
ENDED = ("stop_time", "fail_trace", "result")


class Mongo(MongoObserver):
    """A document a run. A run that goes on keeps its document, and no step of a metric is there twice.

    Args:
        url: of the server, credentials included.
        database: where Sacred's collections are.
        goes_on: tells from its configuration whether a run goes on from a checkpoint.
        failure_dir: where the document is saved if MongoDB cannot take it at the end.
    """

    run_entry: dict[str, Any]

    def __init__(self, url: str, database: str, goes_on: Callable[[Config], bool], failure_dir: str) -> None:
        super().__init__(url, database, failure_dir=failure_dir, serverSelectionTimeoutMS=PATIENCE_MS)
        self._goes_on = goes_on
        self._before: dict[str, Any] = {}
        self._waiting: dict[str, dict[int, tuple[Any, Any]]] = {}  # name -> step -> value and time

    def started_event(self, **event: Any) -> int:
        """Open the document of the run that goes on, or a new one."""
        self._before = find_run(self.runs, event["config"], self._goes_on(event["config"]))
        self.overwrite = deepcopy(self._before) or None
        return super().started_event(**{**event, "_id": None})

    def insert(self) -> None:
        """Write the document as it opens: what a run had before it went on, and no end."""
        kept = {key: value for key, value in self._before.items() if key in KEPT}
        self.run_entry = {key: value for key, value in self.run_entry.items() if key not in ENDED} | kept
        super().insert()
        if self._before:
            self.runs.update_one({"_id": self.run_entry["_id"]}, {"$unset": dict.fromkeys(ENDED, "")})

    def heartbeat_event(self, **event: Any) -> None:
        """Save what changed, after what the run had before it went on."""
        info = {**self._before.get("info", {}), **event["info"]}
        output = self._before.get("captured_out", "") + event["captured_out"]
        super().heartbeat_event(**{**event, "info": info, "captured_out": output})

    def log_metrics(self, metrics_by_name: dict[str, dict[str, list]], info: dict[str, Any]) -> None:
        """Save values by their steps; while MongoDB is away they wait."""
        for name, new in metrics_by_name.items():
            steps = zip(new["steps"], zip(new["values"], new["timestamps"], strict=True), strict=True)
            self._waiting.setdefault(name, {}).update(steps)
        try:
            for name in list(self._waiting):
                metric_id = self._save_metric(name, self._waiting[name])
                del self._waiting[name]
                known = info.setdefault("metrics", list(self._before.get("info", {}).get("metrics", [])))
                if name not in [metric["name"] for metric in known]:
                    known.append({"name": name, "id": metric_id})
        except pymongo.errors.ConnectionFailure:
            pass  # the next heartbeat tries again

    def _save_metric(self, name: str, new: dict[int, tuple[Any, Any]]) -> str:
        query = {"run_id": self.run_entry["_id"], "name": name}
        old = self.metrics.find_one(query) or {"steps": [], "values": [], "timestamps": []}
        steps = dict(zip(old["steps"], zip(old["values"], old["timestamps"], strict=True), strict=True))
        steps |= {step: point for step, point in new.items() if step not in steps or steps[step][0] != point[0]}
        points = [(step, *steps[step]) for step in sorted(steps)]
        columns = dict(zip(("steps", "values", "timestamps"), map(list, zip(*points, strict=True)), strict=True))
        result = self.metrics.update_one(query, {"$set": columns}, upsert=True)
        return str(result.upserted_id or old.get("_id"))


def find_run(runs: pymongo.collection.Collection, config: Config, goes_on: bool) -> dict[str, Any]:
    """Return the document of the job that a configuration names, or an empty one.

    Args:
        runs: where the documents are.
        config: names the job.
        goes_on: whether there is a checkpoint. Without one, only a job that never got to its end is begun again.

    Raises:
        ValueError: several runs have that name.
    """
    job_name = config["job_name"]
    begun = {} if goes_on else {"status": {"$ne": "COMPLETED"}}
    found = [] if job_name is None else list(runs.find({"config.job_name": job_name, **begun}))
    if len(found) > 1:
        ids = ", ".join(str(run["_id"]) for run in found)
        raise ValueError(f"job_name={job_name!r} is the name of several runs ({ids}): remove all but one")
    return found[0] if found else {}


def mongo_url(host: str, user: str | None = None, password: str | None = None) -> str:
    """Return the URL of a MongoDB server.

    Args:
        host: a host, host:port, or a mongodb:// or mongodb+srv:// URL.
        user: put into the URL, escaped, unless it names one itself.
        password: the same.
    """
    scheme, _, address = host.rpartition("://")
    if user and "@" not in address:
        address = f"{quote_plus(user)}:{quote_plus(password or '')}@{address}"
    return f"{scheme or 'mongodb'}://{address}"


def _mongo_from_environment() -> tuple[str, str]:
    env = os.environ
    url = mongo_url(env["SACRED_HOST"], env.get("SACRED_USER"), env.get("SACRED_PASSWORD"))
    database = env.get("SACRED_DATABASE") or "sacred"
    try:
        # Not with connect=False, which puts off to look up the servers of mongodb+srv.
        client: pymongo.MongoClient
        with pymongo.MongoClient(url) as client:
            client.get_database(database)
    except pymongo.errors.InvalidName as error:
        raise ValueError(f"SACRED_DATABASE={database!r} names no database: {one_line(error)}") from None
    except (pymongo.errors.PyMongoError, ValueError) as error:
        raise ValueError(f"SACRED_HOST names no MongoDB server: {one_line(error)}") from None
    return url, database


def check_mongo(config: Config, goes_on: Callable[[Config], bool]) -> None:
    """Find out whether MongoDB, where `SACRED_HOST` names one, can record a run.

    Raises:
        ValueError: it does not answer within 5 seconds or lets nobody in, or the run to go on with is unclear.
    """
    if not os.environ.get("SACRED_HOST"):
        return
    url, database = _mongo_from_environment()
    try:
        client: pymongo.MongoClient
        with pymongo.MongoClient(url, serverSelectionTimeoutMS=PATIENCE_MS) as client:
            runs: pymongo.collection.Collection = client[database].runs
            runs.find_one({}, {"_id": 1})
            find_run(runs, config, goes_on(config))
    except pymongo.errors.PyMongoError as error:
        reason = one_line(error).partition(" (configured timeouts")[0]
        raise ValueError(f"the run cannot be recorded in MongoDB (SACRED_HOST): {reason}") from None


def check_files() -> None:
    """Find out whether a run can be recorded in files.

    Raises:
        ValueError: their folder cannot be written to.
    """
    try:
        os.makedirs(_runs_dir(), exist_ok=True)
        TemporaryFile(dir=_runs_dir()).close()
    except OSError as error:
        raise ValueError(f"SACRED_RUNS_DIR={_runs_dir()!r} cannot be written to: {one_line(error)}") from None


def _runs_dir() -> str:
    return os.environ.get("SACRED_RUNS_DIR") or "runs"


def make_observers(goes_on: Callable[[Config], bool]) -> list[FileStorageObserver | MongoObserver]:
    """Return the observers that the environment asks for.

    Files always, under `SACRED_RUNS_DIR` (default: runs); MongoDB where `SACRED_HOST` is set, with
    `SACRED_USER`, `SACRED_PASSWORD` and `SACRED_DATABASE` (default: sacred).
    """
    observers: list[FileStorageObserver | MongoObserver] = [Files(_runs_dir())]
    if os.environ.get("SACRED_HOST"):
        observers.append(Mongo(*_mongo_from_environment(), goes_on, failure_dir=_runs_dir()))
    return observers


def run_folder(run: Run) -> str | None:
    """Return the folder of a run's files, None for a run that nobody observes."""
    return next((observer.dir for observer in run.observers if isinstance(observer, Files)), None)


def results(run: Run, checkpoints_dir: str | None) -> list[str]:
    """Return where a run's results go, in words without credentials."""
    places = [observer.dir for observer in run.observers if isinstance(observer, Files)]
    for observer in run.observers:
        if isinstance(observer, Mongo):
            places.append(f"MongoDB (run {observer.run_entry['_id']} in {observer.runs.database.name})")
    return places + ([f"checkpoints in {checkpoints_dir}"] if checkpoints_dir is not None else [])


# What Sacred logs that we say better, or that is no news.
NOISE = ("Changed type of config entry", "No observers have been added", "Failed after", "Aborted after")


def make_logger() -> logging.Logger:
    """Return the logger that Sacred writes its warnings to."""
    logger = logging.getLogger("scaling_fl")
    logger.setLevel(logging.WARNING)
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("warning: %(message)s"))
    handler.addFilter(lambda record: not record.getMessage().startswith(NOISE))
    logger.handlers = [handler]
    return logger

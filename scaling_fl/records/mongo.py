"""Sacred's record of a run in MongoDB, which may go away and come back while the run goes on."""

import logging
import time
from collections.abc import Callable
from copy import deepcopy
from datetime import UTC, datetime
from threading import Lock
from typing import Any
from urllib.parse import quote_plus

import pymongo
from sacred.observers import MongoObserver

from scaling_fl.errors import one_line

log = logging.getLogger(__name__)

Config = dict[str, Any]

PATIENCE_MS = 5_000  # a server that does not answer for so long is away
FAREWELLS = 3  # how often the end of a run is tried to be recorded
BEAT_S = 10  # seconds between two signs of life of a run, which is Sacred's own
FORGOTTEN_S = 600  # whose last sign of life is so long ago is dead, whatever the clocks of two machines say

# Of the document of a run that goes on.
KEPT = ("start_time", "info", "captured_out", "artifacts", "resources")
ENDED = ("stop_time", "fail_trace", "result")


class Mongo(MongoObserver):
    """A document a run. A run that goes on keeps its document, and no step of a metric is there twice.

    While the server is away nothing is lost: what is to be saved waits for the next heartbeat.

    Args:
        url: of the server, credentials included.
        database: where Sacred's collections are.
        goes_on: tells from its configuration whether a run goes on from a checkpoint.
    """

    run_entry: dict[str, Any]

    def __init__(self, url: str, database: str, goes_on: Callable[[Config], bool]) -> None:
        super().__init__(url, database, serverSelectionTimeoutMS=PATIENCE_MS)
        self._goes_on = goes_on
        self._before: dict[str, Any] = {}
        self._waiting: dict[str, dict[int, tuple[Any, Any]]] = {}  # name -> step -> value and time
        self._files: dict[str, tuple[str, str]] = {}  # artifacts that wait: name -> path and type
        self._is_away = False
        self._lock = Lock()  # Sacred's heartbeats come from a thread

    def started_event(self, **event: Any) -> int:
        """Open the document of the run that goes on, or a new one."""
        goes_on = self._goes_on(event["config"])
        self._before = find_run(self.runs, event["config"], goes_on)
        if self._before:
            self._claim()
        if self._before and not goes_on:  # it begins again
            self.metrics.delete_many({"run_id": self._before["_id"]})
            self._before.pop("info", None)
        self.overwrite = deepcopy(self._before) or None
        return super().started_event(**{**event, "_id": None})

    def _claim(self) -> None:
        as_it_was = {key: self._before.get(key) for key in ("_id", "status", "heartbeat")}
        now = datetime.now(UTC)
        if self.runs.update_one(as_it_was, {"$set": {"status": "RUNNING", "heartbeat": now}}).matched_count == 0:
            raise SystemExit(
                f"error: run {self._before['_id']} in MongoDB was taken over by another start of the same job"
            )

    def insert(self) -> None:
        """Write the document as it opens: what a run had before it went on, and no end."""
        kept = {key: value for key, value in self._before.items() if key in KEPT}
        kept["heartbeat"] = datetime.now(UTC)
        self.run_entry = {key: value for key, value in self.run_entry.items() if key not in ENDED} | kept
        super().insert()
        if self._before:
            self.runs.update_one({"_id": self.run_entry["_id"]}, {"$unset": dict.fromkeys(ENDED, "")})

    def heartbeat_event(self, **event: Any) -> None:
        """Save what changed, after what the run had before it went on."""
        before = {**self._before.get("info", {}), **self.run_entry.get("info", {})}
        info = {**before, **event["info"]}
        output = self._before.get("captured_out", "") + event["captured_out"]
        super().heartbeat_event(**{**event, "info": info, "captured_out": output})

    def artifact_event(self, name: str, filename: str, metadata: Any = None, content_type: str = "") -> None:
        """Save a file, in place of one of the same name."""
        with self._lock:
            self._files[name] = filename, content_type
        self.save()

    def log_metrics(self, metrics_by_name: dict[str, dict[str, list]], info: dict[str, Any]) -> None:
        """Take values to be saved by their steps, with the heartbeat that follows."""
        with self._lock:
            for name, new in metrics_by_name.items():
                steps = zip(new["steps"], zip(new["values"], new["timestamps"], strict=True), strict=True)
                self._waiting.setdefault(name, {}).update(steps)

    def save(self) -> None:
        """Save the document, and the metrics and files that wait."""
        with self._lock:
            try:
                self._save()
            except pymongo.errors.PyMongoError as error:
                if not self._is_away:
                    log.warning("MongoDB does not answer (%s): what is logged waits", reason(error))
                self._is_away = True
            else:
                if self._is_away:
                    log.warning("MongoDB answers again")
                self._is_away = False

    def final_save(self, attempts: int) -> None:
        """Save the end of the run, or say where it is on record if the server stays away."""
        for _ in range(FAREWELLS):
            self.save()
            if not self._is_away:
                return
            time.sleep(1)
        log.warning(
            "MongoDB has not all of run %s: its files have. With a job_name and checkpoints_dir, the same command "
            "again fills in the metrics that are missing",
            self.run_entry["_id"],
        )

    def _save(self) -> None:
        document = {"_id": self.run_entry["_id"]}
        self.runs.update_one(document, {"$set": self.run_entry}, upsert=True)  # first, as it is the sign of life
        if self._waiting or self._files:
            self._save_metrics()
            self._save_files()
            self.runs.update_one(document, {"$set": {key: self.run_entry[key] for key in ("info", "artifacts")}})

    def _save_metrics(self) -> None:
        """Merge what waits into what is there. A step keeps its value and its time unless the value has changed."""
        if not self._waiting:
            return
        run_id = self.run_entry["_id"]
        there = {metric["name"]: metric for metric in self.metrics.find({"run_id": run_id})}
        updates = []
        for name, new in self._waiting.items():
            old = there.get(name, {"steps": [], "values": [], "timestamps": []})
            steps = dict(zip(old["steps"], zip(old["values"], old["timestamps"], strict=True), strict=True))
            steps |= {step: point for step, point in new.items() if step not in steps or steps[step][0] != point[0]}
            points = [(step, *steps[step]) for step in sorted(steps)]
            columns = dict(zip(("steps", "values", "timestamps"), map(list, zip(*points, strict=True)), strict=True))
            updates.append(pymongo.UpdateOne({"run_id": run_id, "name": name}, {"$set": columns}, upsert=True))
        self.metrics.bulk_write(updates)
        self._waiting.clear()
        known = self.metrics.find({"run_id": run_id}, {"name": 1}, sort=[("_id", 1)])
        self.run_entry["info"]["metrics"] = [{"name": metric["name"], "id": str(metric["_id"])} for metric in known]

    def _save_files(self) -> None:
        for name, (path, content_type) in list(self._files.items()):
            filename = f"artifact://{self.runs.name}/{self.run_entry['_id']}/{name}"
            with open(path, "rb") as file:
                file_id = self.fs.put(file, filename=filename, content_type=content_type)
            artifacts = self.run_entry["artifacts"]
            for artifact in [artifact for artifact in artifacts if artifact["name"] == name]:
                self.fs.delete(artifact["file_id"])
                artifacts.remove(artifact)
            artifacts.append({"name": name, "file_id": file_id})
            del self._files[name]


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


def check_dead(runs: pymongo.collection.Collection, run: dict[str, Any]) -> None:
    """Find out whether a run has ended, which may take two heartbeats.

    A run that was killed is RUNNING for ever. Clocks of two machines differ, so what counts is that its heartbeat
    moves.

    Raises:
        ValueError: it gives signs of life.
    """
    if _is_alive(runs, run):
        raise ValueError(
            f"job_name={run['config']['job_name']!r} is the name of run {run['_id']}, which is running on "
            f"{run['host']['hostname']}: another name would do, or to wait for its end"
        )


def _is_alive(runs: pymongo.collection.Collection, run: dict[str, Any]) -> bool:
    if run.get("status") != "RUNNING":
        return False
    began = run.get("heartbeat") or run["start_time"]
    if (datetime.now(UTC).replace(tzinfo=None) - began).total_seconds() > FORGOTTEN_S:
        return False
    log.warning("run %s is RUNNING in MongoDB: waiting up to %d s for a sign of life", run["_id"], 2 * BEAT_S + 1)
    deadline = time.monotonic() + 2 * BEAT_S + 1
    while time.monotonic() < deadline:
        now = runs.find_one({"_id": run["_id"]}, {"heartbeat": 1, "status": 1})
        if now is None or now["status"] != "RUNNING":
            return False
        if now.get("heartbeat") != run.get("heartbeat"):
            return True
        time.sleep(0.5)
    return False


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


def reason(error: Exception) -> str:
    """Return what MongoDB's client says, without its timeouts."""
    return one_line(error).partition(" (configured timeouts")[0]

"""Sacred's record of a run in MongoDB, which may be unreachable for a while during the run."""

import logging
import time
from collections.abc import Callable
from datetime import UTC, datetime
from threading import Lock
from typing import Any
from urllib.parse import quote_plus

import pymongo
from sacred.observers import MongoObserver

from scaling_fl.errors import one_line

log = logging.getLogger(__name__)

Config = dict[str, Any]

TIMEOUT_MS = 5_000  # until a server must answer
FINAL_ATTEMPTS = 3  # to record the end of a run
BEAT_S = 10  # seconds between two heartbeats of a run, Sacred's default
DEAD_AFTER_S = 600  # without a heartbeat, after which a run is dead even if the clocks of two machines differ

# Fields of the document of a resumed run that stay, and those that are removed.
RESUMED_FIELDS = ("start_time", "info", "captured_out", "artifacts", "resources")
END_FIELDS = ("stop_time", "fail_trace", "result")


class Mongo(MongoObserver):
    """Records a run in a document. A resumed run keeps its document, with each step of a metric once.

    While the server does not answer, unsaved data waits for the next heartbeat.

    Args:
        url: of the server, including credentials.
        database: with Sacred's collections.
        is_resumed: tells from the configuration whether a run resumes from a checkpoint.
    """

    run_entry: dict[str, Any]

    def __init__(self, url: str, database: str, is_resumed: Callable[[Config], bool]) -> None:
        # The server answers when a write is on its disk, as what it has taken and loses is not sent again.
        super().__init__(url, database, serverSelectionTimeoutMS=TIMEOUT_MS, journal=True)
        self._is_resumed = is_resumed
        self._before: dict[str, Any] = {}
        self._waiting: dict[str, dict[int, tuple[Any, Any]]] = {}  # name -> step -> value and time
        self._files: dict[str, tuple[str, str]] = {}  # unsaved artifacts: name -> path and type
        self._is_away = False
        self._lock = Lock()  # Sacred's heartbeats come from a thread

    def started_event(self, **event: Any) -> int:
        """Open the document of the resumed run, or a new one."""
        is_resumed = self._is_resumed(event["config"])
        self._before = find_run(self.runs, event["config"], is_resumed)
        if self._before:
            self._claim()
        if self._before and not is_resumed:  # it starts from round 0
            self.metrics.delete_many({"run_id": self._before["_id"]})
            self._before.pop("info", None)
        self.overwrite = {key: value for key, value in self._before.items() if key not in END_FIELDS} or None
        return super().started_event(**{**event, "_id": None})

    def _claim(self) -> None:
        unchanged = {key: self._before.get(key) for key in ("_id", "status", "heartbeat")}
        now = datetime.now(UTC)
        claim = {"$set": {"status": "RUNNING", "heartbeat": now}, "$unset": dict.fromkeys(END_FIELDS, "")}
        if self.runs.update_one(unchanged, claim).matched_count == 0:
            raise SystemExit(
                f"error: run {self._before['_id']} in MongoDB was taken over by another process of the same job"
            )

    def insert(self) -> None:
        """Write the document at the start, with the fields of the resumed run."""
        self.run_entry |= {key: value for key, value in self._before.items() if key in RESUMED_FIELDS}
        self.run_entry["heartbeat"] = datetime.now(UTC)
        super().insert()

    def heartbeat_event(self, **event: Any) -> None:
        """Save the changes, after the information and output from before the run was resumed."""
        info = {**self.run_entry["info"], **event["info"]}
        output = self._before.get("captured_out", "") + event["captured_out"]
        super().heartbeat_event(**{**event, "info": info, "captured_out": output})

    def artifact_event(self, name: str, filename: str, metadata: Any = None, content_type: str = "") -> None:
        """Save a file, and replace one of the same name."""
        with self._lock:
            self._files[name] = filename, content_type
        self.save()

    def log_metrics(self, metrics_by_name: dict[str, dict[str, list]], info: dict[str, Any]) -> None:
        """Store values by their steps; the next heartbeat saves them."""
        with self._lock:
            for name, new in metrics_by_name.items():
                steps = zip(new["steps"], zip(new["values"], new["timestamps"], strict=True), strict=True)
                self._waiting.setdefault(name, {}).update(steps)

    def save(self) -> None:
        """Save the document, and the unsaved metrics and files."""
        with self._lock:
            try:
                self._save()
            except pymongo.errors.PyMongoError as error:
                if not self._is_away:
                    log.warning(
                        "MongoDB does not answer (%s). The run continues and saves its record later", reason(error)
                    )
                self._is_away = True
            else:
                if self._is_away:
                    log.warning("MongoDB answers again")
                self._is_away = False

    def final_save(self, attempts: int) -> None:
        """Save the end of the run, or print a warning if the server does not answer."""
        for _ in range(FINAL_ATTEMPTS):
            self.save()
            if not self._is_away:
                return
            time.sleep(1)
        log.warning(
            "the record of run %s in MongoDB is incomplete; its files are complete. With a job_name and "
            "checkpoints_dir, the same command adds the missing metrics",
            self.run_entry["_id"],
        )

    def _save(self) -> None:
        document = {"_id": self.run_entry["_id"]}
        self.runs.update_one(document, {"$set": self.run_entry}, upsert=True)  # first, as it has the heartbeat
        if self._waiting or self._files:
            self._save_metrics()
            self._save_files()
            self.runs.update_one(document, {"$set": {key: self.run_entry[key] for key in ("info", "artifacts")}})

    def _save_metrics(self) -> None:
        """Merge the unsaved metrics into the saved ones. A step keeps its time unless its value has changed."""
        run_id = self.run_entry["_id"]
        saved = {metric["name"]: metric for metric in self.metrics.find({"run_id": run_id})}
        updates = []
        for name, new in self._waiting.items():
            old = saved.get(name, {"steps": [], "values": [], "timestamps": []})
            steps = dict(zip(old["steps"], zip(old["values"], old["timestamps"], strict=True), strict=True))
            steps |= {step: point for step, point in new.items() if step not in steps or steps[step][0] != point[0]}
            points = [(step, *steps[step]) for step in sorted(steps)]
            columns = dict(zip(("steps", "values", "timestamps"), map(list, zip(*points, strict=True)), strict=True))
            updates.append(pymongo.UpdateOne({"run_id": run_id, "name": name}, {"$set": columns}, upsert=True))
        if updates:
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


def find_run(runs: pymongo.collection.Collection, config: Config, is_resumed: bool) -> dict[str, Any]:
    """Return the document of a configuration's job, or an empty one.

    Args:
        runs: the collection of documents.
        config: with the job's name.
        is_resumed: there is a checkpoint. Without one, a completed job keeps its document.

    Raises:
        ValueError: several runs have that name.
    """
    job_name = config["job_name"]
    status = {} if is_resumed else {"status": {"$ne": "COMPLETED"}}
    found = [] if job_name is None else list(runs.find({"config.job_name": job_name, **status}))
    if len(found) > 1:
        ids = ", ".join(str(run["_id"]) for run in found)
        raise ValueError(f"job_name: expected the name of one run, got {job_name!r} of runs {ids}. Remove all but one")
    return found[0] if found else {}


def check_dead(runs: pymongo.collection.Collection, run: dict[str, Any]) -> None:
    """Check that a run has ended, which may take the time of two heartbeats.

    A run that was killed stays RUNNING. As the clocks of two machines differ, a run is alive if its heartbeat changes.

    Raises:
        ValueError: the run is alive.
    """
    if run.get("status") != "RUNNING":
        return
    last_beat = run.get("heartbeat") or run["start_time"]
    if (datetime.now(UTC).replace(tzinfo=None) - last_beat).total_seconds() > DEAD_AFTER_S:
        return
    log.warning("run %s is RUNNING in MongoDB: waiting up to %d s for its next heartbeat", run["_id"], 2 * BEAT_S + 1)
    deadline = time.monotonic() + 2 * BEAT_S + 1
    while time.monotonic() < deadline:
        now = runs.find_one({"_id": run["_id"]}, {"heartbeat": 1, "status": 1})
        if now is None or now["status"] != "RUNNING":
            return
        if now.get("heartbeat") != run.get("heartbeat"):
            raise ValueError(
                f"job_name: expected the name of a run that has ended, got {run['config']['job_name']!r} of run "
                f"{run['_id']}, which is running on {run['host']['hostname']}. Use another name, or wait for its end"
            )
        time.sleep(0.5)


def mongo_url(host: str, user: str | None = None, password: str | None = None) -> str:
    """Return the URL of a MongoDB server.

    Args:
        host: a host, host:port, or a mongodb:// or mongodb+srv:// URL.
        user: added to the URL, escaped, unless the URL already has a user.
        password: of the user.
    """
    scheme, _, address = host.rpartition("://")
    if user and "@" not in address:
        address = f"{quote_plus(user)}:{quote_plus(password or '')}@{address}"
    return f"{scheme or 'mongodb'}://{address}"


def reason(error: Exception) -> str:
    """Return the message of MongoDB's client, without its timeouts."""
    return one_line(error).partition(" (configured timeouts")[0]

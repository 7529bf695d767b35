"""Sacred's record of a run: in files, and in MongoDB if `SACRED_HOST` is set."""

import logging
import mimetypes
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from tempfile import TemporaryFile
from threading import Lock
from typing import Any

import pymongo
from sacred.observers import FileStorageObserver
from sacred.run import Run

from scaling_fl.errors import one_line
from scaling_fl.records.export import RECORD_BYTES, free_bytes
from scaling_fl.records.mongo import TIMEOUT_MS, Config, Mongo, check_dead, find_run, mongo_url, reason
from scaling_fl.records.rounds import Record
from scaling_fl.storage import WriteError, naming_place


class Files(FileStorageObserver):
    """Records a run in a folder, with a number that does not depend on MongoDB's.

    An error of the disk stops no event; `check_record` raises it.
    """

    error: WriteError | None = None
    dir: Any
    run_entry: Any
    _lock = Lock()  # Sacred's heartbeats come from a thread

    def started_event(self, **event: Any) -> Any:
        """Make the folder with all its files, or no folder."""
        try:
            started = super().started_event(**{**event, "_id": None})
            if self.error is not None:
                raise SystemExit(f"error: {self.error}")
            return started
        except BaseException:
            if self.dir is not None:
                shutil.rmtree(self.dir, ignore_errors=True)
            self.dir, self.run_entry = None, {}  # the event of the run's end must write nothing
            raise

    def save_json(self, obj: object, filename: str) -> None:
        """Write a file completely, or leave it unchanged."""
        if self.dir is None:
            return
        part = f".{filename}.part"
        with self._storing_error():
            try:
                super().save_json(obj, part)
                os.replace(os.path.join(self.dir, part), os.path.join(self.dir, filename))
            finally:
                with suppress(OSError):
                    os.remove(os.path.join(self.dir, part))

    def save_cout(self) -> None:
        """Write the output since the last call."""
        with self._storing_error():
            super().save_cout()

    @contextmanager
    def _storing_error(self) -> Iterator[None]:
        try:
            with self._lock, naming_place(self.dir or self.basedir):
                yield
        except WriteError as error:
            self.error = self.error or error

    def artifact_event(self, name: str, filename: str, *_: Any, **__: Any) -> None:
        """Record a file of the folder as an artifact."""
        self.run_entry["artifacts"].append(name)
        self.save_json(self.run_entry, "run.json")


def _mongo_from_environment() -> tuple[str, str]:
    env = os.environ
    url = mongo_url(env["SACRED_HOST"], env.get("SACRED_USER"), env.get("SACRED_PASSWORD"))
    database = env.get("SACRED_DATABASE") or "sacred"
    try:
        # Without connect=False, which would delay the look-up of the servers of mongodb+srv.
        client: pymongo.MongoClient
        with pymongo.MongoClient(url) as client:
            client.get_database(database)
    except pymongo.errors.InvalidName as error:
        raise ValueError(
            f"SACRED_DATABASE: expected the name of a database, got {database!r} ({one_line(error)})"
        ) from None
    except (pymongo.errors.PyMongoError, ValueError) as error:
        raise ValueError(f"SACRED_HOST: expected the address of a MongoDB server, got {one_line(error)}") from None
    return url, database


def check_mongo(config: Config, is_resumed: Callable[[Config], bool]) -> None:
    """Check that the MongoDB server of `SACRED_HOST`, if it is set, can record a run.

    Raises:
        ValueError: it does not answer or denies access, or the job's name is that of several runs or of a running one.
    """
    if not os.environ.get("SACRED_HOST"):
        return
    url, database = _mongo_from_environment()
    try:
        client: pymongo.MongoClient
        with pymongo.MongoClient(url, serverSelectionTimeoutMS=TIMEOUT_MS) as client:
            runs: pymongo.collection.Collection = client[database].runs
            runs.find_one({}, {"_id": 1})
            check_dead(runs, find_run(runs, config, is_resumed(config)))
    except pymongo.errors.PyMongoError as error:
        raise ValueError(
            f"SACRED_HOST: expected a MongoDB server that can be written to, got {reason(error)}"
        ) from None


def check_files() -> None:
    """Check that a run can be recorded in files.

    Raises:
        ValueError: the folder cannot be written to, or its disk is full.
    """
    folder = runs_dir()
    try:
        os.makedirs(folder, exist_ok=True)
        TemporaryFile(dir=folder).close()
    except OSError as error:
        raise ValueError(
            f"SACRED_RUNS_DIR: expected a folder that can be written to, got {folder!r} ({one_line(error)})"
        ) from None
    free = free_bytes(folder)
    if free < RECORD_BYTES:
        raise ValueError(
            f"SACRED_RUNS_DIR={folder!r}: expected {RECORD_BYTES * 1e-6:.1f} MB free for a record, "
            f"got {free * 1e-6:.2f} MB"
        )


def runs_dir() -> str:
    """Return the folder of all runs, `SACRED_RUNS_DIR` or runs."""
    return os.environ.get("SACRED_RUNS_DIR") or "runs"


def make_observers(is_resumed: Callable[[Config], bool]) -> list[Files | Mongo]:
    """Make the observers: files, and MongoDB if `SACRED_HOST` is set."""
    observers: list[Files | Mongo] = [Files(runs_dir(), priority=40)]  # before MongoDB, which may not answer
    if os.environ.get("SACRED_HOST"):
        observers.append(Mongo(*_mongo_from_environment(), is_resumed))
    return observers


def run_folder(run: Run) -> str | None:
    """Return the folder of a run's files, None for a run without a record."""
    return next((observer.dir for observer in run.observers if isinstance(observer, Files)), None)


def attach(run: Run, *names: str) -> None:
    """Record those of these files that exist in the run's folder as its artifacts, also in MongoDB."""
    for name in names:
        path = os.path.join(run_folder(run) or os.devnull, name)
        if os.path.exists(path):
            run.add_artifact(path, content_type=mimetypes.guess_type(path)[0] or "application/octet-stream")


def flush(run: Run) -> None:
    """Record the output and metrics since the last heartbeat, which Sacred does not save if a run fails."""
    if run.observers:
        run._emit_heartbeat()


def check_record(run: Run) -> None:
    """Check that the files of a run could be written.

    Raises:
        WriteError: a file could not.
    """
    for observer in run.observers:
        if isinstance(observer, Files) and observer.error is not None:
            raise observer.error


def make_record(run: Run) -> Record:
    """Return where a run leaves its results."""
    places = [
        observer.dir
        if isinstance(observer, Files)
        else f"MongoDB (run {observer.run_entry['_id']} in {observer.runs.database.name})"
        for observer in run.observers
    ]
    return Record(run_folder(run), run.log_scalar, run.info.update, lambda: check_record(run), tuple(places))


# Sacred's warnings that repeat ours, or that users do not need.
HIDDEN_WARNINGS = ("Changed type of config entry", "No observers have been added", "Failed after", "Aborted after")


def make_logger() -> logging.Logger:
    """Return the logger for Sacred's warnings."""
    logger = logging.getLogger("scaling_fl")
    logger.setLevel(logging.WARNING)
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("warning: %(message)s"))
    handler.addFilter(lambda record: not record.getMessage().startswith(HIDDEN_WARNINGS))
    logger.handlers = [handler]
    return logger

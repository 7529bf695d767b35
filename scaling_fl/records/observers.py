"""Sacred's record of a run: in files always, in MongoDB where there is one."""

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
from scaling_fl.records.export import RECORD, free_bytes
from scaling_fl.records.mongo import PATIENCE_MS, Config, Mongo, check_dead, find_run, mongo_url, reason
from scaling_fl.records.rounds import Record
from scaling_fl.storage import WriteError, naming_place

log = logging.getLogger(__name__)


class Files(FileStorageObserver):
    """A folder a run, numbered on its own whatever number MongoDB gives the run.

    A disk that cannot be written to any more stops no event: `check_record` says so.
    """

    trouble: WriteError | None = None
    dir: Any
    run_entry: Any
    _lock = Lock()  # Sacred's heartbeats come from a thread

    def started_event(self, **event: Any) -> Any:
        """Make the folder, whole or not at all."""
        try:
            started = super().started_event(**{**event, "_id": None})
            if self.trouble is not None:
                raise SystemExit(f"error: {self.trouble}")
            return started
        except BaseException:
            if self.dir is not None:
                shutil.rmtree(self.dir, ignore_errors=True)
            self.dir, self.run_entry = None, {}  # the run may still end, which is not to be written
            raise

    def save_json(self, obj: object, filename: str) -> None:
        """Write a file whole, or leave it as it is."""
        if self.dir is None:
            return
        part = f".{filename}.part"
        with self._noting_trouble():
            try:
                super().save_json(obj, part)
                os.replace(os.path.join(self.dir, part), os.path.join(self.dir, filename))
            finally:
                with suppress(OSError):
                    os.remove(os.path.join(self.dir, part))

    def save_cout(self) -> None:
        """Write what was printed since the last time."""
        with self._noting_trouble():
            super().save_cout()

    @contextmanager
    def _noting_trouble(self) -> Iterator[None]:
        try:
            with self._lock, naming_place(self.dir or self.basedir):
                yield
        except WriteError as error:
            self.trouble = self.trouble or error

    def artifact_event(self, name: str, filename: str, *_: Any, **__: Any) -> None:
        """Note a file that lies in the folder."""
        self.run_entry["artifacts"].append(name)
        self.save_json(self.run_entry, "run.json")


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
        ValueError: it does not answer within 5 seconds or lets nobody in, or the run to go on with is unclear or is
            still running.
    """
    if not os.environ.get("SACRED_HOST"):
        return
    url, database = _mongo_from_environment()
    try:
        client: pymongo.MongoClient
        with pymongo.MongoClient(url, serverSelectionTimeoutMS=PATIENCE_MS) as client:
            runs: pymongo.collection.Collection = client[database].runs
            runs.find_one({}, {"_id": 1})
            check_dead(runs, find_run(runs, config, goes_on(config)))
    except pymongo.errors.PyMongoError as error:
        raise ValueError(f"the run cannot be recorded in MongoDB (SACRED_HOST): {reason(error)}") from None


def check_files() -> None:
    """Find out whether a run can be recorded in files.

    Raises:
        ValueError: their folder cannot be written to.
    """
    folder = runs_dir()
    try:
        os.makedirs(folder, exist_ok=True)
        TemporaryFile(dir=folder).close()
    except OSError as error:
        raise ValueError(f"SACRED_RUNS_DIR={folder!r} cannot be written to: {one_line(error)}") from None
    free = free_bytes(folder)
    if free < RECORD:
        raise ValueError(
            f"SACRED_RUNS_DIR={folder!r}: expected {RECORD * 1e-6:.1f} MB free for a record, got {free * 1e-6:.2f} MB"
        )


def runs_dir() -> str:
    """Return where runs have their folders."""
    return os.environ.get("SACRED_RUNS_DIR") or "runs"


def make_observers(goes_on: Callable[[Config], bool]) -> list[Files | Mongo]:
    """Return the observers that the environment asks for.

    Files always, under `SACRED_RUNS_DIR` (default: runs); MongoDB where `SACRED_HOST` is set, with
    `SACRED_USER`, `SACRED_PASSWORD` and `SACRED_DATABASE` (default: sacred).
    """
    observers: list[Files | Mongo] = [Files(runs_dir(), priority=40)]  # before MongoDB, which may be away
    if os.environ.get("SACRED_HOST"):
        observers.append(Mongo(*_mongo_from_environment(), goes_on))
    return observers


def run_folder(run: Run) -> str | None:
    """Return the folder of a run's files, None for a run that nobody observes."""
    return next((observer.dir for observer in run.observers if isinstance(observer, Files)), None)


def attach(run: Run, *names: str) -> None:
    """Make files in the folder of a run's files, where they are there, artifacts of it, which MongoDB keeps too."""
    for name in names:
        path = os.path.join(run_folder(run) or os.devnull, name)
        if os.path.exists(path):
            run.add_artifact(path, content_type=mimetypes.guess_type(path)[0] or "application/octet-stream")


def flush(run: Run) -> None:
    """Record what was printed and logged since the last heartbeat, which Sacred forgets of a run that fails."""
    if run.observers:
        run._emit_heartbeat()


def check_record(run: Run) -> None:
    """Find out whether all that was to be recorded in files was.

    Raises:
        WriteError: some of it was not.
    """
    for observer in run.observers:
        if isinstance(observer, Files) and observer.trouble is not None:
            raise observer.trouble


def make_record(run: Run) -> Record:
    """Return where a run leaves its results."""
    places = [observer.dir for observer in run.observers if isinstance(observer, Files)]
    for observer in run.observers:
        if isinstance(observer, Mongo):
            places.append(f"MongoDB (run {observer.run_entry['_id']} in {observer.runs.database.name})")
    return Record(run_folder(run), run.log_scalar, run.info.update, lambda: check_record(run), tuple(places))


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

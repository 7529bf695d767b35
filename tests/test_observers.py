"""The record of a run in a real MongoDB, over TCP."""

import json
import os
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from urllib.parse import quote_plus

import gridfs
import pymongo
import pytest
from helpers import PASSWORD, USER, Command, Mongod, accuracies, succeed, wait_for_exit
from sacred import SETTINGS

from scaling_fl.records import mongo as mongo_module
from scaling_fl.records import observers
from scaling_fl.records.mongo import Mongo, check_dead, find_run, mongo_url


@pytest.fixture
def database(mongo: dict[str, str], request: pytest.FixtureRequest) -> Iterator[pymongo.database.Database]:
    """A separate database for this test."""
    with pymongo.MongoClient(mongo_url(mongo["SACRED_HOST"], USER, PASSWORD)) as client:
        yield client[request.node.name[:40].replace("[", "-").replace("]", "")]


@pytest.fixture
def separate_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Mongod, pymongo.database.Database]]:
    """A separate server that the test may stop, and a database on it."""
    server = Mongod(tmp_path_factory.mktemp("separate"))
    with pymongo.MongoClient(mongo_url(server.environment["SACRED_HOST"], USER, PASSWORD)) as client:
        yield server, client["sacred"]
    server.stop()


def environment(mongo: dict[str, str], database: pymongo.database.Database) -> dict[str, str]:
    return {**mongo, "SACRED_DATABASE": database.name}


class Background:
    """The running command."""

    def __init__(self, pid: int, file: Path) -> None:
        self.pid, self.file = pid, file
        self.status: int | None = None

    @property
    def output(self) -> str:
        return self.file.read_text()

    def wait_for(self, pattern: str) -> None:
        """Wait for a line that matches."""
        while not re.search(f"^{pattern}", self.output, re.MULTILINE):
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            assert not pid, (status, self.output)
            time.sleep(0.02)

    def end(self) -> str:
        """Wait for its end, and return its output."""
        self.status = wait_for_exit(self.pid)
        return self.output


@pytest.fixture
def background(start: Callable[..., tuple[int, Path]]) -> Callable[..., Background]:
    """Starts the command with an environment and settings."""
    return lambda env, **settings: Background(*start(env=env, **settings))


def metric(database: pymongo.database.Database, name: str) -> dict:
    (found,) = database.metrics.find({"name": name})
    return found


@pytest.mark.parametrize(
    ("host", "user", "password", "url"),
    [
        ("db", None, None, "mongodb://db"),
        ("db:27018", None, None, "mongodb://db:27018"),
        ("db:27018", "a b", "p@:/%", "mongodb://a+b:p%40%3A%2F%25@db:27018"),
        ("db", "user", None, "mongodb://user:@db"),
        ("mongodb://db/?tls=true", "u", "p", "mongodb://u:p@db/?tls=true"),
        ("mongodb+srv://cluster.example", "u", "p", "mongodb+srv://u:p@cluster.example"),
        ("mongodb+srv://me:mine@cluster.example", "u", "p", "mongodb+srv://me:mine@cluster.example"),
    ],
)
def test_a_url_has_the_given_host_user_and_password(
    host: str, user: str | None, password: str | None, url: str
) -> None:
    assert mongo_url(host, user, password) == url


def test_a_run_is_recorded_once_and_without_its_password(
    command: Command, mongo: dict[str, str], database: pymongo.database.Database, tmp_path: Path
) -> None:
    output = succeed(command(ranks=2, env=environment(mongo, database), job_name="first", report=True))
    (run,) = database.runs.find()
    assert (run["status"], run["config"]["job_name"]) == ("COMPLETED", "first")
    assert run["captured_out"].strip() == output.strip()
    assert metric(database, "validation.loss")["steps"] == [0, 1, 2]
    assert {entry["name"] for entry in run["info"]["metrics"]} == set(database.metrics.distinct("name"))
    written = [path.read_text(errors="replace") for path in (tmp_path / "runs").rglob("*.json")]
    assert [artifact["name"] for artifact in run["artifacts"]] == ["rounds.jsonl", "report.html"]
    for artifact in run["artifacts"]:
        kept = gridfs.GridFS(database).get(artifact["file_id"]).read()
        assert kept == (tmp_path / "runs" / "1" / artifact["name"]).read_bytes()
    for secret in (PASSWORD, quote_plus(PASSWORD)):
        assert all(secret not in text for text in [output, str(run), *written])


@pytest.mark.long
def test_a_resumed_job_keeps_its_entry_and_has_every_step_once(
    command: Command, mongo: dict[str, str], database: pymongo.database.Database, tmp_path: Path
) -> None:
    settings = {"job_name": "20261121_090000", "checkpoints_dir": tmp_path / "checkpoints"}
    env = environment(mongo, database)
    succeed(command(env=env, num_rounds=2, **settings))
    (before,) = database.runs.find()
    first = metric(database, "validation.loss")
    # As if the process had died in round 2: logged, but the checkpoint was not written.
    (tmp_path / "checkpoints" / "round-2.pt").unlink()
    database.runs.update_one({}, {"$set": {"status": "FAILED", "fail_trace": ["..."], "info.note": "kept"}})

    succeed(command(env=env, num_rounds=4, ranks=2, **settings))
    (after,) = database.runs.find()
    assert (after["_id"], after["start_time"]) == (before["_id"], before["start_time"])
    assert (after["status"], after["config"]["num_rounds"], after["info"]["note"]) == ("COMPLETED", 4, "kept")
    assert "fail_trace" not in after
    assert after["captured_out"].startswith(before["captured_out"])
    assert len(after["captured_out"]) > len(before["captured_out"])
    assert [entry["name"] for entry in after["info"]["metrics"]] == [m["name"] for m in before["info"]["metrics"]]
    last = metric(database, "validation.loss")
    assert (last["steps"], last["values"][:3]) == ([0, 1, 2, 3, 4], first["values"])
    assert last["timestamps"][:3] == first["timestamps"], "old steps keep their times"
    assert metric(database, "train.loss")["steps"] == [1, 2, 3, 4]


def test_a_job_name_without_a_checkpoint_is_a_separate_run(
    command: Command, mongo: dict[str, str], database: pymongo.database.Database, tmp_path: Path
) -> None:
    env = environment(mongo, database)
    for _ in range(2):
        succeed(command(env=env, num_rounds=0, job_name="again"))
    assert [run["_id"] for run in database.runs.find()] == [1, 2]
    settings = {"job_name": "again", "checkpoints_dir": tmp_path / "checkpoints", "num_rounds": 1}
    succeed(command("--unobserved", **settings))
    status, output = command(env=env, **settings)
    assert status == 1
    assert "job_name: expected the name of one run, got 'again' of runs 1, 2. Remove all but one" in output
    assert "Traceback" not in output


def test_a_job_is_found_by_any_name(database: pymongo.database.Database) -> None:
    names = ["../a/b", "$where", "a.$b", "two\nlines\0", "ünï 漢字 🙂", "x" * 5000, ".*", "a"]
    database.runs.insert_many({"_id": number, "config": {"job_name": name}} for number, name in enumerate(names))
    for number, name in enumerate(names):
        assert find_run(database.runs, {"job_name": name}, is_resumed=True)["_id"] == number


def test_a_job_that_failed_before_its_first_checkpoint_restarts_in_its_entry(
    command: Command, mongo: dict[str, str], database: pymongo.database.Database, tmp_path: Path
) -> None:
    settings = {"job_name": "typo", "checkpoints_dir": tmp_path / "checkpoints", "env": environment(mongo, database)}
    assert command(train_path="typo.csv", **settings)[0] == 1
    (failed,) = database.runs.find()
    assert failed["status"] == "FAILED"
    # As if it had failed in round 7 of a run without checkpoints.
    old = {"steps": [0, 7], "values": [0.0, 7.0], "timestamps": [failed["start_time"]] * 2}
    database.metrics.insert_one({"run_id": failed["_id"], "name": "validation.loss", **old})
    succeed(command(num_rounds=1, **settings))
    succeed(command(num_rounds=2, **settings))
    assert [run["status"] for run in database.runs.find()] == ["COMPLETED"]
    assert metric(database, "validation.loss")["steps"] == [0, 1, 2]


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes a run notice within two seconds that its database does not answer."""
    monkeypatch.setattr(mongo_module, "TIMEOUT_MS", 500)
    monkeypatch.setattr(SETTINGS, "DEFAULT_BEAT_INTERVAL", 1.0)


@pytest.mark.long
@pytest.mark.usefixtures("impatient")
def test_training_continues_without_the_database_and_the_record_is_complete_afterwards(
    separate_server: tuple[Mongod, pymongo.database.Database], background: Callable[..., Background], tmp_path: Path
) -> None:
    server, database = separate_server
    settings = {"num_rounds": 16, "num_local_epochs": 6}
    run = background(environment(server.environment, database), **settings)
    run.wait_for(r" +2 \|")
    server.stop()
    run.wait_for("warning: MongoDB does not answer ")
    server.start()
    output = run.end()
    assert run.status == 0, output
    assert len(accuracies(output)) == 17
    (entry,) = database.runs.find()
    assert entry["status"] == "COMPLETED"
    assert entry["captured_out"].splitlines() == [
        line for line in output.splitlines() if not line.startswith("warning: ")
    ]
    assert [artifact["name"] for artifact in entry["artifacts"]] == ["rounds.jsonl"]
    for name, written in json.loads((tmp_path / "runs" / "1" / "metrics.json").read_text()).items():
        kept = metric(database, name)
        assert (kept["steps"], kept["values"]) == (written["steps"], written["values"])


@pytest.mark.long
@pytest.mark.usefixtures("impatient")
def test_the_same_command_completes_the_record_after_the_database_was_down(
    separate_server: tuple[Mongod, pymongo.database.Database],
    command: Command,
    background: Callable[..., Background],
    tmp_path: Path,
) -> None:
    server, database = separate_server
    env = environment(server.environment, database)
    settings = {"job_name": "lonely", "checkpoints_dir": tmp_path / "checkpoints", "num_local_epochs": 6}
    run = background(env, **settings)
    run.wait_for(r" +0 \|")
    server.stop()
    output = run.end()
    server.start()
    assert run.status == 0, output
    assert "warning: the record of run 1 in MongoDB is incomplete; its files are complete." in output
    assert json.loads((tmp_path / "runs" / "1" / "run.json").read_text())["status"] == "COMPLETED"
    assert not list(tmp_path.rglob("*.pickle"))
    assert [entry["status"] for entry in database.runs.find()] == ["RUNNING"]
    long_ago = datetime.now(UTC) - timedelta(hours=1)
    database.runs.update_one({}, {"$set": {"start_time": long_ago, "heartbeat": long_ago}})
    succeed(command(env=env, **settings))
    (entry,) = database.runs.find()
    assert entry["status"] == "COMPLETED"
    assert metric(database, "validation.loss")["steps"] == [0, 1, 2]
    assert [artifact["name"] for artifact in entry["artifacts"]] == ["rounds.jsonl"]


def test_only_one_of_two_starts_takes_over_a_dead_run(
    mongo: dict[str, str], database: pymongo.database.Database
) -> None:
    now = datetime.now(UTC)
    dead = {"_id": 3, "status": "RUNNING", "heartbeat": now, "config": {"job_name": "a"}}
    database.runs.insert_one(dead)
    first, second = (
        Mongo(mongo_url(mongo["SACRED_HOST"], USER, PASSWORD), database.name, lambda _: True) for _ in "ab"
    )
    for observer in (first, second):
        observer._before = find_run(database.runs, {"job_name": "a"}, is_resumed=True)
    first._claim()
    with pytest.raises(SystemExit, match="run 3 in MongoDB was taken over by another process"):
        second._claim()


def test_a_running_job_is_not_taken_over_and_resumes_after_an_interruption(
    server: Mongod,
    monkeypatch: pytest.MonkeyPatch,
    command: Command,
    background: Callable[..., Background],
    database: pymongo.database.Database,
    tmp_path: Path,
) -> None:
    env = environment(server.environment, database)
    monkeypatch.setattr(mongo_module, "BEAT_S", 1)
    monkeypatch.setattr(SETTINGS, "DEFAULT_BEAT_INTERVAL", 1.0)
    settings = {"job_name": "alive", "checkpoints_dir": tmp_path / "checkpoints", "keep_checkpoints": 1}
    run = background(env, **{**settings, "num_rounds": 100_000})
    run.wait_for(r" +1 \|")
    status, output = command(env=env, **settings)
    assert (status, "got 'alive' of run 1, which is running on " in output) == (1, True)
    os.kill(run.pid, signal.SIGTERM)
    run.end()
    (entry,) = database.runs.find()
    assert entry["status"] == "INTERRUPTED"
    (last,) = (int(path.stem.partition("-")[2]) for path in (tmp_path / "checkpoints").glob("round-*.pt"))
    succeed(command(env=env, **{**settings, "num_rounds": last + 1}))
    (entry,) = database.runs.find()
    assert entry["status"] == "COMPLETED"
    assert metric(database, "validation.loss")["steps"] == list(range(last + 2))


@pytest.mark.long
@pytest.mark.parametrize(("what", "lives"), [("beats", True), ("is silent", False), ("ends", False)])
def test_a_run_is_alive_if_its_heartbeat_changes(
    database: pymongo.database.Database, monkeypatch: pytest.MonkeyPatch, what: str, lives: bool
) -> None:
    monkeypatch.setattr(mongo_module, "BEAT_S", 1)
    now = datetime.now(UTC).replace(microsecond=0, tzinfo=None)
    run = {"_id": what, "status": "RUNNING", "heartbeat": now, "start_time": now, "host": {"hostname": "north"}}
    database.runs.insert_one({**run, "config": {"job_name": "a"}})
    change = {"beats": {"heartbeat": now + timedelta(seconds=1)}, "is silent": {}, "ends": {"status": "FAILED"}}[what]
    timer = threading.Timer(1.2, lambda: change and database.runs.update_one({"_id": what}, {"$set": change}))
    timer.start()
    if lives:
        with pytest.raises(ValueError, match="got 'a' of run beats, which is running on north"):
            check_dead(database.runs, database.runs.find_one({"_id": what}))
    else:
        check_dead(database.runs, database.runs.find_one({"_id": what}))
    timer.join()


def test_two_parallel_runs_have_an_entry_each(
    server: Mongod, background: Callable[..., Background], database: pymongo.database.Database, tmp_path: Path
) -> None:
    names = ("north", "south")
    runs = []
    for name in names:
        (tmp_path / name).mkdir()
        env = environment(server.environment, database)
        runs.append(background(env, folder=tmp_path / name, job_name=name, seed=len(name) + len(runs)))
    for run in runs:
        assert run.end()
        assert run.status == 0, run.output
    entries = list(database.runs.find())
    assert sorted(entry["config"]["job_name"] for entry in entries) == sorted(names)
    for entry in entries:
        folder = tmp_path / entry["config"]["job_name"] / "runs" / "1"
        assert entry["captured_out"].strip() == (folder / "cout.txt").read_text().strip()
        (losses,) = database.metrics.find({"run_id": entry["_id"], "name": "validation.loss"})
        assert losses["values"] == json.loads((folder / "metrics.json").read_text())["validation.loss"]["values"]


@pytest.mark.parametrize("ranks", [1, 2])
def test_an_invalid_host_is_one_sentence(command: Command, ranks: int) -> None:
    status, output = command(ranks=ranks, env={"SACRED_HOST": "mongodb://me:secret@host:1x"})
    assert status == 1
    assert output.startswith("error: SACRED_HOST: expected the address of a MongoDB server, got ")
    assert "secret" not in output


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_missing_server_is_one_sentence_within_seconds(
    command: Command, monkeypatch: pytest.MonkeyPatch, ranks: int
) -> None:
    assert observers.TIMEOUT_MS <= 5_000
    monkeypatch.setattr(observers, "TIMEOUT_MS", 500)
    started = time.monotonic()
    env = {"SACRED_HOST": "127.0.0.1:9", "SACRED_USER": "u", "SACRED_PASSWORD": "secret"}
    status, output = command(ranks=ranks, env=env)
    assert time.monotonic() - started < 20
    assert status == 1
    assert output.startswith("error: SACRED_HOST: expected a MongoDB server that can be written to, got 127.0.0.1:9")
    assert len(output.splitlines()) == 1
    assert "secret" not in output
    succeed(command("--unobserved", env=env))


def test_a_wrong_password_is_one_sentence_without_it(
    command: Command, mongo: dict[str, str], database: pymongo.database.Database
) -> None:
    status, output = command(env={**environment(mongo, database), "SACRED_PASSWORD": "wrong-one"})
    assert status == 1
    assert "Authentication failed" in output
    assert len(output.splitlines()) == 1
    assert "wrong-one" not in output

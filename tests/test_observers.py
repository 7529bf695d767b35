"""The record of a run in a real MongoDB, over TCP."""

import time
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote_plus

import pymongo
import pytest
from conftest import PASSWORD, USER, Command, succeed

from scaling_fl.observers import find_run, mongo_url


@pytest.fixture
def database(mongo: dict[str, str], request: pytest.FixtureRequest) -> Iterator[pymongo.database.Database]:
    """A database of this test's own."""
    with pymongo.MongoClient(mongo_url(mongo["SACRED_HOST"], USER, PASSWORD)) as client:
        yield client[request.node.name[:40].replace("[", "-").replace("]", "")]


def environment(mongo: dict[str, str], database: pymongo.database.Database) -> dict[str, str]:
    return {**mongo, "SACRED_DATABASE": database.name}


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
def test_a_url_is_made_of_what_is_given(host: str, user: str | None, password: str | None, url: str) -> None:
    assert mongo_url(host, user, password) == url


def test_a_run_is_recorded_once_and_its_password_nowhere(
    command: Command, mongo: dict[str, str], database: pymongo.database.Database, tmp_path: Path
) -> None:
    output = succeed(command(ranks=2, env=environment(mongo, database), job_name="first"))
    (run,) = database.runs.find()
    assert (run["status"], run["config"]["job_name"]) == ("COMPLETED", "first")
    assert run["captured_out"].strip() == output.strip()
    assert metric(database, "validation.loss")["steps"] == [0, 1, 2]
    assert {entry["name"] for entry in run["info"]["metrics"]} == set(database.metrics.distinct("name"))
    written = [path.read_text(errors="replace") for path in (tmp_path / "runs").rglob("*.json")]
    for secret in (PASSWORD, quote_plus(PASSWORD)):
        assert all(secret not in text for text in [output, str(run), *written])


def test_a_job_that_goes_on_keeps_its_entry_and_has_every_step_once(
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
    assert last["timestamps"][:3] == first["timestamps"], "what happened then keeps its time"
    assert metric(database, "train.loss")["steps"] == [1, 2, 3, 4]


def test_a_job_name_alone_without_a_checkpoint_is_a_run_of_its_own(
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
    assert "job_name='again' is the name of several runs (1, 2): remove all but one" in output
    assert "Traceback" not in output


def test_a_job_is_found_by_its_name_whatever_that_is(database: pymongo.database.Database) -> None:
    names = ["../a/b", "$where", "a.$b", "two\nlines\0", "ünï 漢字 🙂", "x" * 5000, ".*", "a"]
    database.runs.insert_many({"_id": number, "config": {"job_name": name}} for number, name in enumerate(names))
    for number, name in enumerate(names):
        assert find_run(database.runs, {"job_name": name}, goes_on=True)["_id"] == number


def test_a_job_that_failed_before_its_first_checkpoint_begins_again_in_its_entry(
    command: Command, mongo: dict[str, str], database: pymongo.database.Database, tmp_path: Path
) -> None:
    settings = {"job_name": "typo", "checkpoints_dir": tmp_path / "checkpoints", "env": environment(mongo, database)}
    assert command(train_path="typo.csv", **settings)[0] == 1
    assert [run["status"] for run in database.runs.find()] == ["FAILED"]
    succeed(command(num_rounds=1, **settings))
    succeed(command(num_rounds=2, **settings))
    assert [run["status"] for run in database.runs.find()] == ["COMPLETED"]
    assert metric(database, "validation.loss")["steps"] == [0, 1, 2]


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_host_that_is_none_is_one_sentence(command: Command, ranks: int) -> None:
    status, output = command(ranks=ranks, env={"SACRED_HOST": "mongodb://me:secret@host:1x"})
    assert status == 1
    assert output.startswith("error: SACRED_HOST names no MongoDB server: ")
    assert "secret" not in output


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_server_that_is_not_there_is_one_sentence_within_seconds(command: Command, ranks: int) -> None:
    started = time.monotonic()
    env = {"SACRED_HOST": "127.0.0.1:9", "SACRED_USER": "u", "SACRED_PASSWORD": "secret"}
    status, output = command(ranks=ranks, env=env)
    assert time.monotonic() - started < 20
    assert status == 1
    assert output.startswith("error: the run cannot be recorded in MongoDB (SACRED_HOST): 127.0.0.1:9")
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

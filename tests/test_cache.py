"""If the cache cannot be written, or the hub does not answer, a run continues without it and warns."""

import errno
import http.server
import logging
import resource
import shutil
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import datasets
import huggingface_hub
import pyarrow as pa
import pytest
from datasets import Dataset
from helpers import Command, refusal, succeed, weights_hash
from transformers import AutoConfig

from scaling_fl import hub
from scaling_fl.data import cache
from scaling_fl.data.encoder import TextEncoder
from scaling_fl.data.reader import read_task, sample
from scaling_fl.models.pretrained import load_pretrained

Corpus = tuple[list[Dataset], tuple[str, ...]]
ROWS = "stars,text\n" + "".join(f'{i % 2 + 1},"goal match team {i}\\nchip"\n' for i in range(40))


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of the cache."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(hub, "_has_warned", False)
    hub._find_problem.cache_clear()
    datasets.disable_progress_bars()  # a full disk cannot store them here
    return tmp_path / "cache"


@pytest.fixture
def corpus_of(tmp_path: Path) -> Callable[[], Corpus]:
    """Reads a sample of training rows and all test rows."""
    path = tmp_path / "rows.csv"
    path.write_text(ROWS)

    def read() -> Corpus:
        rows, names = read_task("yelp", str(path), str(path))
        return [sample(rows["train"], 30, seed=1), rows["test"]], names

    return read


def digests(corpus: Corpus, model: str) -> list[str]:
    encoder = TextEncoder(load_pretrained(model, 8).tokenizer, 8)
    rows, names = corpus
    return [encoder.encode(of_split, names).examples.sha256() for of_split in rows]


@contextmanager
def full(num_bytes: int) -> Iterator[None]:
    """Limit the size of files, as a full disk does."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.parametrize("fit", ["none", "the smallest", "all but the largest"])
def test_a_full_disk_changes_no_token(
    fit: str, corpus_of: Callable, tiny_model: str, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    expected = digests(corpus_of(), tiny_model)
    sizes = sorted(file.stat().st_size for file in folder.rglob("*.arrow"))
    assert sizes[0] < sizes[-1]
    shutil.rmtree(folder)
    with full({"none": 0, "the smallest": sizes[0], "all but the largest": sizes[-1] - 1}[fit]):
        assert digests(corpus_of(), tiny_model) == expected
    (record,) = caplog.records
    assert (
        f"HF_HOME: expected a folder where the cache can be written, got {str(folder)!r} ([Err" in record.getMessage()
    )
    assert {file.stat().st_size for file in folder.rglob("*.arrow*")} <= set(sizes), "no half of a file"


def lose(folder: Path) -> None:
    shutil.rmtree(folder)


def replace_by_a_file(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.write_text("")


def cut(folder: Path, share: int = 2) -> None:
    for file in folder.rglob("*.arrow"):
        content = file.read_bytes()
        file.unlink()  # processes that have mapped it keep their content
        file.write_bytes(content[: len(content) // share])


def empty(folder: Path) -> None:
    cut(folder, share=10**9)


@pytest.mark.parametrize("harm", [lose, replace_by_a_file, cut, empty])
def test_a_cache_that_is_removed_during_use_changes_no_token(
    harm: Callable[[Path], None], corpus_of: Callable, tiny_model: str, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    corpus = corpus_of()
    expected = digests(corpus, tiny_model)
    harm(folder)
    assert digests(corpus, tiny_model) == digests(corpus_of(), tiny_model) == expected
    assert len(caplog.records) <= 1


def test_a_truncated_cache_file_is_written_again(folder: Path) -> None:
    rows = [("text",), *((str(i),) for i in range(250))]
    assert cache.store("key", lambda: iter(rows))["text"][:] == [str(i) for i in range(250)]
    (file,) = folder.rglob("*.arrow")
    whole = file.read_bytes()
    sink = pa.BufferOutputStream()
    reader = pa.ipc.open_stream(whole)
    writer = pa.ipc.new_stream(sink, reader.schema)
    writer.write_batch(reader.read_next_batch())
    file.write_bytes(sink.getvalue())  # to the end of a batch, so that what is left is a stream
    assert file.read_bytes() == whole[: file.stat().st_size]
    assert len(cache.store("key", lambda: iter(rows))) == 250
    assert file.read_bytes() == whole


def test_an_error_of_a_file_is_not_reported_as_an_error_of_the_cache(
    tmp_path: Path, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "t.csv").write_text("stars,text\n1,a\n2\n")
    folder.write_text("")
    assert "row 2: expected 2 fields, got 1" in refusal(lambda: read_task("yelp", str(tmp_path / "t.csv"), "none"))
    folder.unlink()
    assert "row 2: expected 2 fields, got 1" in refusal(lambda: read_task("yelp", str(tmp_path / "t.csv"), "none"))
    assert not list(folder.rglob("rows*"))


@pytest.mark.long
def test_a_run_continues_without_the_cache_and_warns_once(command: Command, folder: Path) -> None:
    with_cache = succeed(command("--unobserved", num_rounds=1, ranks=2))
    shutil.rmtree(folder)
    folder.write_text("")
    without = succeed(command("--unobserved", num_rounds=1, ranks=2))
    assert weights_hash(without) == weights_hash(with_cache)
    warnings = [line for line in without.splitlines() if "cache" in line]
    assert len(warnings) == 1
    assert warnings[0].startswith(
        f"warning: HF_HOME: expected a folder where the cache can be written, got '{folder}' ("
    )


# The hub.


@pytest.fixture
def online(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Sets the address of the hub to a port of this machine."""
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub, "ANSWER_SECONDS", 2.0)
    return lambda port: monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", f"http://127.0.0.1:{port}")


@pytest.fixture
def silent_port() -> Iterator[int]:
    """A port that accepts connections and sends no answer."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        yield listener.getsockname()[1]


@pytest.mark.parametrize("is_silent", [False, True])
def test_a_hub_that_does_not_answer_is_reported_at_once(
    is_silent: bool, online: Callable[[int], None], silent_port: int, caplog: pytest.LogCaptureFixture
) -> None:
    port = silent_port if is_silent else 9
    online(port)
    began = time.monotonic()
    for load in (lambda: load_pretrained("some/id", 8), lambda: read_task("text", "some/data")):
        sentence = refusal(load)
        assert f"the hub, http://127.0.0.1:{port}, does not answer: " in sentence
        assert ("no answer within 2 seconds" if is_silent else "refused") in sentence
    assert time.monotonic() - began < 30, "the client alone takes a minute"
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


def test_a_hub_that_does_not_answer_is_not_needed_for_what_is_in_its_cache(online: Callable[[int], None]) -> None:
    online(9)
    assert hub.from_hub("some/id", lambda folder: (folder, huggingface_hub.is_offline_mode())) == (None, True)
    assert not huggingface_hub.is_offline_mode()


class Slow(http.server.BaseHTTPRequestHandler):
    """Answers 404 after a delay."""

    def do_HEAD(self) -> None:
        time.sleep(0.5)
        self.send_error(404)

    def log_message(self, *_: object) -> None:
        """Log nothing."""


def test_a_run_waits_for_a_slow_hub(online: Callable[[int], None], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "ANSWER_SECONDS", 20.0)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Slow) as server:
        threading.Thread(target=server.serve_forever).start()
        online(server.server_address[1])
        assert hub.from_hub("some/id", lambda _: huggingface_hub.is_offline_mode()) is False
        server.shutdown()


@pytest.mark.parametrize("number", [errno.EROFS, errno.ENOSPC, errno.EACCES, errno.ENOTDIR])
def test_a_download_that_the_hub_cache_cannot_store_goes_to_a_temporary_folder(
    number: int, tiny_model: str, caplog: pytest.LogCaptureFixture
) -> None:
    used = []

    def load(folder: str | None) -> AutoConfig:
        used.append(folder)
        if folder is None:
            try:
                raise OSError(number, "no", f"{huggingface_hub.constants.HF_HUB_CACHE}/some")
            except OSError as error:
                raise ValueError("another error") from error
        return AutoConfig.from_pretrained(tiny_model, cache_dir=folder)

    assert hub.from_hub("some/id", load).hidden_size == 32
    assert used[0] is None
    assert not Path(used[1]).exists()
    (record,) = caplog.records
    assert "HF_HOME: expected a folder where the cache can be written" in record.getMessage()


@pytest.mark.parametrize("error", [OSError("no such model"), PermissionError(errno.EACCES, "no", "/some/model")])
def test_an_error_outside_the_cache_is_not_retried(error: OSError) -> None:
    used = []

    def load(folder: str | None) -> None:
        used.append(folder)
        raise error

    with pytest.raises(OSError, match="no"):
        hub.from_hub("some/id", load)
    assert used == [None]

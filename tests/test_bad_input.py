"""Bad input of any kind is one clear sentence and an exit status, and overwrites nothing."""

import io
import json
import os
import pickle
import re
import runpy
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import SCRIPT, Command, make_bert, succeed
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from scaling_fl.distributed.world import world
from scaling_fl.federation.global_model import GlobalModel
from scaling_fl.federation.strategies import make_strategy
from scaling_fl.records import checkpoint

ROWS = b"text,label\n" + b"goal match,sport\nchip code,tech\n" * 4


@dataclass(frozen=True)
class Bad:
    """Wrong input, and parts of the error sentence."""

    says: tuple[str, ...]
    settings: dict[str, object] = field(default_factory=dict)
    env: dict[str, str] = field(default_factory=dict)
    files: dict[str, bytes] = field(default_factory=dict)
    is_read: bool = True  # a run begins, as files have to be read; a bad setting leaves none


def table(name: str, content: bytes, *says: str) -> Bad:
    return Bad((repr(name), *says), {"train_path": name, "test_path": name}, files={name: content})


# One or two of each kind; tests/test_bad_settings.py and tests/test_bad_tables.py have the others.
BAD: dict[str, Bad] = {
    "a rate that is code": Bad(
        ("learning_rate: expected a number > 0",), {"learning_rate": "__import__('os').mkdir('sprung')"}, is_read=False
    ),
    "a name that is no setting": Bad(("'learning_rat': expected the name",), {"learning_rat": 1}, is_read=False),
    "a job without a server": Bad(
        ("SACRED_HOST: expected the address of a MongoDB server, got Port must be",),
        env={"SACRED_HOST": "127.0.0.1:99999"},
        is_read=False,
    ),
    "too few tokens for any text": Bad(("max_seq_len: expected at least 3 for model=", "got 2"), {"max_seq_len": 2}),
    "fewer examples than sites": Bad(
        ("site_ids, num_sites: expected at most 1 sites for 1 training examples, got 4",), {"max_train_examples": 1}
    ),
    "a model that is no name of the hub": Bad(
        ("model: expected a nickname (minilm,", "got 'no such model' ("), {"model": "no such model"}
    ),
    "a model that is a file": Bad(("got 'm.txt' (",), {"model": "m.txt"}, files={"m.txt": b"hello"}),
    "a model that is an empty folder": Bad(("got 'm' (",), {"model": "m"}, files={"m/no.txt": b""}),
    "a row with a field too few": table("t.csv", b"text,label\na,x\nb\n", "row 2: expected 2 fields, got 1"),
    "another label in the test set": Bad(
        ("labels: expected the same in train and test, or each at two sites or more, got food",),
        {"train_path": "t.csv", "test_path": "u.csv"},
        files={"t.csv": ROWS, "u.csv": ROWS + b"soup,food\n"},
    ),
    "a CSV called parquet": table("t.parquet", ROWS, "Parquet magic bytes not found"),
    "no test set": Bad(("test_path: expected a path or URL for task_name='text', got None",), {"test_path": None}),
    "folders without texts": Bad(
        ("'some/train/neg/*.txt': expected a folder of .txt files for each label, got none",),
        {"task_name": "imdb", "train_path": "some", "test_path": "some"},
        files={"some/train/pos/a.txt": b"good"},
    ),
    "checkpoints in a file": Bad(
        ("checkpoints_dir: expected a folder that can be written to, got 't.csv' (",),
        {"checkpoints_dir": "t.csv"},
        files={"t.csv": ROWS},
    ),
    "checkpoints below a file": Bad(
        ("checkpoints_dir: expected a folder that can be written to, got 't.csv/x' (",),
        {"checkpoints_dir": "t.csv/x"},
        files={"t.csv": ROWS},
    ),
    "checkpoints of an unknown scheme": Bad(
        ("checkpoints_dir: expected a folder that can be written to, got 'foo://x' (Protocol not known: foo",),
        {"checkpoints_dir": "foo://x"},
    ),
    "checkpoints with a NUL byte": Bad(
        (
            "checkpoints_dir: expected a folder that can be",
            "got 'a\\x00b' (",
        ),
        {"checkpoints_dir": "a\0b"},
    ),
    "a checkpoint that is a folder": Bad(
        ("checkpoints/round-1.pt: expected a file that can be read, got ", "Is a directory"),
        {"checkpoints_dir": "checkpoints"},
        files={"checkpoints/round-1.pt/x": b""},
    ),
    "a record in a file": Bad(
        ("SACRED_RUNS_DIR: expected a folder that can be written to, got 't.csv' (",),
        env={"SACRED_RUNS_DIR": "t.csv"},
        files={"t.csv": ROWS},
        is_read=False,
    ),
    "a record in a folder without permission": Bad(
        ("SACRED_RUNS_DIR: expected a folder that can be written to, got '/proc/no/folder'",),
        env={"SACRED_RUNS_DIR": "/proc/no/folder"},
        is_read=False,
    ),
}


def contents(folder: Path) -> dict[str, bytes]:
    """Return all files of a folder except the printed output and the record."""
    ours = ("output.txt", "runs")
    files = (file for file in folder.rglob("*") if file.is_file() and file.relative_to(folder).parts[0] not in ours)
    return {str(file.relative_to(folder)): file.read_bytes() for file in files}


def write(folder: Path, files: dict[str, bytes]) -> None:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)


def sentence_of(result: tuple[int, str]) -> str:
    """Return the one error sentence of a command."""
    status, output = result
    lines = [line for line in output.splitlines() if not line.startswith("warning: skipping ")]
    assert status == 1, output
    assert len(lines) == 1, output
    assert re.match(r"error: \S", lines[0])
    assert len(lines[0]) < 800
    return lines[0]


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_clear_sentence_and_overwrites_nothing(name: str, command: Command, tmp_path: Path) -> None:
    bad = BAD[name]
    write(tmp_path, bad.files)
    before = contents(tmp_path)
    started = time.monotonic()
    sentence = sentence_of(command(env=bad.env, **bad.settings))
    assert time.monotonic() - started < 20
    assert all(part in sentence for part in bad.says), sentence
    assert contents(tmp_path) == before
    assert bad.is_read or not (tmp_path / "runs").exists()
    assert not (tmp_path / "sprung").exists()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_without_read_permission_is_one_clear_sentence(command: Command, tmp_path: Path) -> None:
    write(tmp_path, {"t.csv": ROWS, "checkpoints/round-1.pt": b""})
    for name in ("t.csv", "checkpoints/round-1.pt"):
        (tmp_path / name).chmod(0)
    assert "'t.csv' cannot be read as csv: [Errno 13]" in sentence_of(command(train_path="t.csv"))
    assert "round-1.pt: expected a file that can be read, got [Errno 13]" in sentence_of(
        command(checkpoints_dir="checkpoints")
    )


def test_a_text_without_a_token_is_one_clear_sentence(command: Command, tmp_path: Path, tiny_model: str) -> None:
    write(tmp_path, {f"model/{file.name}": file.read_bytes() for file in Path(tiny_model).iterdir()})
    # The tokenizer of BERT would put a token before and after each text.
    for name, change in {
        "tokenizer": {"post_processor": None},
        "tokenizer_config": {"tokenizer_class": "PreTrainedTokenizerFast"},
    }.items():
        file = tmp_path / "model" / f"{name}.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | change))
    write(tmp_path, {"t.csv": ROWS + b",sport\n"})
    sentence = sentence_of(command(model="model", train_path="t.csv", test_path="t.csv"))
    assert "text 9 of the 9 in use: expected a token or more, got none" in sentence


HUGE = [b"x" * 3_000_000, b'"' + b"goal, " * 10_000 + b'"', b""]


def test_very_long_texts_and_empty_texts_are_accepted(command: Command, tmp_path: Path) -> None:
    write(tmp_path, {"t.csv": ROWS + b"".join(text + b",sport\n" for text in HUGE)})
    output = succeed(command(train_path="t.csv", test_path="t.csv", num_rounds=1))
    assert "11 examples to train on" in output


def test_a_label_that_the_output_encoding_lacks_is_escaped(
    tmp_path: Path, small_run: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ["\U0001f600 <b>s\xe4d</b>", "a/b\nc"]
    rows = "".join(f'goal {i},"{names[i % 2]}"\n' for i in range(8))
    write(tmp_path, {"t.csv": f"text,label\n{rows}".encode()})
    settings = {**small_run, "train_path": tmp_path / "t.csv", "test_path": tmp_path / "t.csv"}
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), "plan", "with", *(f"{key}={settings[key]}" for key in settings)])
    pid = os.fork()
    if pid == 0:
        try:
            with open(tmp_path / "output.txt", "w", encoding="ascii") as sys.stdout:
                runpy.run_path(str(SCRIPT), run_name="__main__")
        finally:
            os._exit(0)
    os.waitpid(pid, 0)
    output = (tmp_path / "output.txt").read_text()
    assert len(re.findall(r"\| a/b\\nc \d, \\U0001f600 <b>s\\xe4d</b> \d$", output, re.MULTILINE)) == 4
    assert "the plan holds" in output


def test_a_job_may_have_any_name(command: Command, tmp_path: Path) -> None:
    name = '../a/$(touch sprung) $where.x=1\ntwo lines, it\'s "so"\\ ünï 漢字 🙂' + "x" * 5000
    succeed(command(job_name=name, num_rounds=0))
    assert json.loads((tmp_path / "runs" / "1" / "config.json").read_text())["job_name"] == name
    assert {entry.name for entry in tmp_path.iterdir()} == {"output.txt", "runs"}


# Checkpoints.

SETTINGS = {"seed": 1, "betas": None}
HISTORY: checkpoint.History = [{"validation.loss": 1.5}, {"validation.loss": 0.5, "train.loss": 0.1}]


class Trap:
    """Unpickling it makes a folder."""

    def __reduce__(self) -> tuple:
        return (os.mkdir, ("sprung",))


def save(model: nn.Module, folder: Path) -> bytes:
    with world():
        server = GlobalModel(model, make_strategy("fedadam"))
        server.exchange(server.weights - 0.1, Fraction(1))
        server.step()
        checkpoint.save(str(folder), server.state_dict(), HISTORY, SETTINGS, keep=None)
    return (folder / "round-1.pt").read_bytes()


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A checkpoint of a few weights."""
    return save(nn.Linear(1, 5), tmp_path_factory.mktemp("small"))


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A working folder for all examples of one test."""
    folder = tmp_path_factory.mktemp("scratch")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        yield folder


def is_same(one: Any, other: Any) -> bool:
    """Return whether two states are equal in every bit and type."""
    if type(one) is not type(other):
        return False
    if isinstance(one, Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return list(one) == list(other) and all(is_same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(is_same, one, other))
    return one == other


def read_or_refuse(content: bytes, whole: dict | None) -> str:
    """Read a file, which is either the complete checkpoint or refused; return the error sentence."""
    Path("round-1.pt").write_bytes(content)
    try:
        state = checkpoint.read("round-1.pt")
    except ValueError as error:
        state, sentence = None, str(error)
    assert not Path("sprung").exists()
    if state is None:
        assert re.fullmatch(r"expected .+, got .+", sentence)
        return sentence
    assert whole is not None
    assert is_same(state, whole)
    return ""


def in_zip(value: object, zipped: bool = True) -> bytes:
    file = io.BytesIO()
    torch.save(value, file, _use_new_zipfile_serialization=zipped)
    return file.getvalue()


def weight_of(whole: bytes) -> bytes:
    return torch.load(io.BytesIO(whole), weights_only=True)["server"]["weights"]["weight"].numpy().tobytes()


def flip(content: bytes, where: int, mask: int = 1) -> bytes:
    return content[:where] + bytes([content[where] ^ mask]) + content[where + 1 :]


def cycle() -> list:
    ring: list = []
    ring.append(ring)
    return ring


NOT_OURS: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda whole: b"",
    "cut in half": lambda whole: whole[: len(whole) // 2],
    "without its last byte": lambda whole: whole[:-1],
    "all zeros": lambda whole: bytes(len(whole)),
    "a flipped bit in a weight": lambda whole: flip(whole, whole.index(weight_of(whole))),
    "a text": lambda whole: ROWS,
    "another program's": lambda whole: in_zip({"epoch": 3, "model": nn.Linear(1, 1).state_dict()}),
    "another program's of one tensor": lambda whole: in_zip(torch.zeros(3)),
    "with another checksum": lambda whole: in_zip({"round": 1, "sha256": "0" * 64}),
    "a module": lambda whole: in_zip(nn.Linear(1, 1)),
    "a ring": lambda whole: in_zip({"round": cycle()}),
    "a pickle that runs code": lambda whole: pickle.dumps(Trap()),
    "an old pickle that runs code": lambda whole: pickle.dumps(Trap(), protocol=0),
    "torch's file that runs code": lambda whole: in_zip({"round": 1, "server": Trap()}),
    "torch's old file that runs code": lambda whole: in_zip({"round": 1, "server": Trap()}, zipped=False),
    "code by name": lambda whole: b"cbuiltins\nexec\n(Vimport os; os.mkdir('sprung')\ntR.",
}


@pytest.mark.parametrize("name", NOT_OURS)
def test_an_invalid_checkpoint_is_not_read(name: str, scratch: Path, small: bytes) -> None:
    assert read_or_refuse(NOT_OURS[name](small), None)


@pytest.mark.parametrize("name", ["empty", "a flipped bit in a weight", "a text", "a pickle that runs code"])
def test_an_invalid_checkpoint_is_one_clear_sentence_and_stays_unchanged(
    name: str, command: Command, tmp_path: Path, small: bytes
) -> None:
    write(tmp_path, {"checkpoints/round-7.pt": NOT_OURS[name](small)})
    before = contents(tmp_path)
    result = command(checkpoints_dir="checkpoints")
    assert "got damaged files only in 'checkpoints', the last of round 7" in sentence_of(result)
    (warning,) = [line for line in result[1].splitlines() if line.startswith("warning: ")]
    assert re.match(r"warning: skipping checkpoints/round-7.pt, which is damaged: expected \w", warning)
    assert contents(tmp_path) == before
    assert not (tmp_path / "sprung").exists()


def test_the_traps_run_code_when_pickle_reads_them(scratch: Path) -> None:
    for name in ("a pickle that runs code", "an old pickle that runs code", "code by name"):
        pickle.loads(NOT_OURS[name](b""))
        Path("sprung").rmdir()
    for name in ("torch's file that runs code", "torch's old file that runs code"):
        torch.load(io.BytesIO(NOT_OURS[name](b"")), weights_only=False)
        Path("sprung").rmdir()


def test_a_checkpoint_cut_at_any_kilobyte_is_refused(scratch: Path, tmp_path: Path) -> None:
    whole = save(make_bert(), tmp_path)
    assert len(whole) > 200_000
    for size in range(0, len(whole), 1024):
        assert read_or_refuse(whole[:size], None)


@given(where=st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(1, 255)), min_size=1, max_size=4))
@settings(deadline=None, max_examples=250)
def test_a_checkpoint_with_flipped_bits_is_read_correctly_or_refused(
    small: bytes, scratch: Path, where: list[tuple[float, int]]
) -> None:
    content = small
    for part, mask in where:
        content = flip(content, int(part * len(content)), mask)
    read_or_refuse(content, state_of(small))


def state_of(content: bytes) -> dict:
    """Return the content of a checkpoint, read by torch only."""
    state = torch.load(io.BytesIO(content), weights_only=True)
    del state["sha256"]
    return state


def test_a_checkpoint_is_restored_as_it_was_saved(small: bytes, scratch: Path) -> None:
    state = state_of(small)
    assert read_or_refuse(small, state) == ""
    assert (state["round"], state["history"], state["settings"]) == (1, HISTORY, SETTINGS)


@given(
    pieces=st.lists(
        st.one_of(
            st.binary(max_size=40),
            st.tuples(st.floats(0, 1), st.floats(0, 1)),  # a piece of a whole checkpoint
            st.sampled_from(
                [b"PK\x03\x04", b"PK\x05\x06", b"\x80\x02", b"cos\nmkdir\n(Vsprung\ntR.", pickle.dumps(Trap())]
            ),
        ),
        max_size=6,
    )
)
@settings(deadline=None, max_examples=200)
def test_random_bytes_are_refused_as_a_checkpoint_and_run_no_code(
    small: bytes, scratch: Path, pieces: list[bytes | tuple[float, float]]
) -> None:
    def piece(part: bytes | tuple[float, float]) -> bytes:
        if isinstance(part, bytes):
            return part
        return small[int(min(part) * len(small)) : int(max(part) * len(small))]

    read_or_refuse(b"".join(map(piece, pieces)), state_of(small))

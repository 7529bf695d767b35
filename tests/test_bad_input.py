"""Bad input of any kind is one clear sentence and a status, and nothing is written over."""

import csv
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
from functools import partial
from importlib.util import find_spec
from itertools import count
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import SCRIPT, Command, make_bert, refusal, succeed
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from scaling_fl.data.files import read_table
from scaling_fl.distributed.world import world
from scaling_fl.federation.global_model import GlobalModel
from scaling_fl.federation.strategies import make_strategy
from scaling_fl.records import checkpoint

ROWS = b"text,label\n" + b"goal match,sport\nchip code,tech\n" * 4
JSON_ROWS = b'{"text": "goal", "label": "sport"}\n{"text": "chip", "label": "tech"}\n'


@dataclass(frozen=True)
class Bad:
    """What is wrong, and parts of the sentence that says so."""

    says: tuple[str, ...]
    settings: dict[str, object] = field(default_factory=dict)
    env: dict[str, str] = field(default_factory=dict)
    files: dict[str, bytes] = field(default_factory=dict)
    is_read: bool = True  # a run begins, as files have to be read; a bad setting leaves none


def setting(key: str, value: object, *says: str, **others: object) -> Bad:
    return Bad(says, {key: value, **others}, is_read=False)


def path(value: str, *says: str, **files: bytes) -> Bad:
    return Bad((repr(value), *says), {"train_path": value, "test_path": value}, files=files)


def table(name: str, content: bytes, *says: str) -> Bad:
    return Bad((repr(name), *says), {"train_path": name, "test_path": name}, files={name: content})


table_csv, table_jsonl, table_parquet = (partial(table, f"t.{suffix}") for suffix in ("csv", "jsonl", "parquet"))


def labels(train: str, test: str, *says: str) -> Bad:
    """Rows with these labels."""
    files = {
        name: "\n".join(["text,label", *(f"a text,{label}" for label in found.split())]).encode()
        for name, found in (("train.csv", train), ("test.csv", test))
    }
    return Bad(says, {"train_path": "train.csv", "test_path": "test.csv"}, files=files)


def host(value: str, *says: str, database: str = "") -> Bad:
    """A SACRED_HOST, with a user and a password that would break a URL."""
    env = {"SACRED_HOST": value, "SACRED_USER": "so me@:/%$", "SACRED_PASSWORD": "s@cr:e/t%$"}
    return Bad(says, {}, {**env, "SACRED_DATABASE": database}, is_read=False)


def parquet(**columns: Any) -> bytes:
    return write_parquet(pa.table(columns))


def write_parquet(rows: pa.Table) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(rows, sink)
    return sink.getvalue().to_pybytes()


PARQUET = parquet(text=["goal", "chip"], label=["sport", "tech"])
NOT_UTF8 = pa.Array.from_buffers(pa.string(), 2, pa.array([b"goal", b"caf\xe9"]).buffers())
TWINS = pa.Table.from_arrays([pa.array(["a", "b"])] * 3, names=["text", "label", "text"])

BAD: dict[str, Bad] = {
    # Settings that tests/test_train_federated.py has not.
    "a setting of a setting": setting("seed.b", 1, "there is no setting 'seed.b': did you mean seed?"),
    "a setting without a name": setting("", 1, "'=1' is neither a setting nor a file of settings"),
    "a seed below zero": setting("seed", -1, "seed=-1 was given: a whole number from 0 below 4294967296"),
    "a seed that numpy does not take": setting("seed", 2**32, "seed=4294967296 was given"),
    "a rate that is nan": setting("learning_rate", "nan", "learning_rate='nan' was given: a number above 0"),
    "a rate that is infinite": setting("learning_rate", "1e999", "learning_rate=inf was given"),
    "a rate that no float holds": setting("learning_rate", "1" + "0" * 400, "was given: a number above 0"),
    "a rate that is a flag": setting("learning_rate", True, "learning_rate=True was given"),
    "a rate that is code": setting("learning_rate", "__import__('os').mkdir('sprung')", "a number above 0"),
    "a rate of the server beyond float32": setting("server_learning_rate", "1e300", "above 0 below 1e+36 or None"),
    "a pull beyond float32": setting("proximal_mu", "1e300", "a number from 0 below 1e+36"),
    "a pull below zero": setting("proximal_mu", -1, "proximal_mu=-1 was given"),
    "a momentum of one": setting("server_momentum", 1, "a number from 0 below 1 or None", strategy="fedavgm"),
    "a flag for a number": setting("batch_size", True, "batch_size=True was given: a whole number from 1"),
    "rounds in words": setting("num_rounds", "three", "num_rounds='three' was given"),
    "rounds left empty": setting("num_rounds", "", "num_rounds='' was given"),
    "sites by their number": setting("site_ids", 4, "site_ids=4 was given: a list of GPU ids"),
    "sites that are fractions": setting("site_ids", "[0.5]", "site_ids=[0.5] was given"),
    "sites in a list in a list": setting("site_ids", "[[0]]", "site_ids=[[0]] was given"),
    "a number for a flag": setting("iid_split", 1, "iid_split=1 was given: True or False"),
    "no tokens": setting("max_seq_len", 0, "max_seq_len=0 was given: a whole number from 1"),
    "no task": setting("task_name", None, "task_name=None was given: bbcnews, "),
    "a task in capitals": setting("task_name", "AGNEWS", "task_name='AGNEWS' was given: bbcnews, agnews"),
    "a model without a name": setting("model", "", "model='' was given: a text"),
    "a column without a name": setting("text_column", "", "text_column='' was given: a text or None"),
    "a folder without a name": setting("checkpoints_dir", "", "checkpoints_dir='' was given: a text or None"),
    "too few tokens for any text": Bad(("max_seq_len=2 is too short for model=", "at least 3"), {"max_seq_len": 2}),
    "fewer examples than sites": Bad(("4 sites cannot share 1 training example",), {"max_train_examples": 1}),
    "a model that is no name of the hub": Bad(("model='no such model' cannot be loaded",), {"model": "no such model"}),
    "a model that is a file": Bad(("model='m.txt' cannot be loaded",), {"model": "m.txt"}, files={"m.txt": b"hello"}),
    "a model that is an empty folder": Bad(("model='m' cannot be loaded",), {"model": "m"}, files={"m/no.txt": b""}),
    "labels that are no list": setting("labels", "[a,b]", "labels='[a,b]' was given: a list of two or more labels"),
    "a label twice": setting("labels", "['a','a ']", "labels: expected names that differ and are not empty, got ['a',"),
    "labels of a task that has its own": setting("labels", "[0,1]", "has its own (neg, pos)", task_name="imdb"),
    "a label that is not named": Bad(("there are unknown labels, food: sport, tech",), {"labels": "['sport','tech']"}),
    "one column for both": Bad(("text_column and label_column are both 'label'",), {"text_column": "label"}),
    # CSV files.
    "a row with a field too few": table_csv(b"text,label\na,x\nb\n", "row 2 has 1 fields, not 2"),
    "a row with a field too many": table_csv(b"text,label\na,x\nb,y,z\n", "row 2 has 3 fields, not 2"),
    "a quote left open": table_csv(b'text,label\n"a,x\nb,y\n', "line 3: unexpected end of data"),
    "a NUL byte in a text": table_csv(b"text,label\na\0b,x\nb,y\n", "line 2 has a NUL byte"),
    "a NUL byte in the header": table_csv(b"te\0xt,label\na,x\nb,y\n", "line 1 has a NUL byte"),
    "nothing but NUL bytes": table_csv(bytes(5000), "line 1 has a NUL byte, which is no text in UTF-8"),
    "an empty file": table_csv(b"", "it is empty"),
    "a byte order mark alone": table_csv("\ufeff".encode(), "it is empty"),
    "a header alone": table_csv(b"text,label\n", "it has no row below its header"),
    "blank lines alone": table_csv(b"\n\r\n\n", "it is empty"),
    "lines of spaces": table_csv(b"  \n  \n", "text_column='text' is not in", "' ' would do"),
    "a column twice": table_csv(b"text,label,text\na,x,b\n", "it has several columns called text: rename them"),
    "no column of texts": table_csv(b"body,label\na,x\n", "text_column='text' is not in", "'body', 'label' would do"),
    "no column of labels": table_csv(
        b"text,class\na,x\n", "label_column='label' is not in", "'text', 'class' would do"
    ),
    "names with a space before them": table_csv(b"text, label\na, x\n", "label_column='label'", "'text', ' label'"),
    "names in capitals": table_csv(b"Text,Label\na,x\n", "text_column='text' is not in", "'Text', 'Label' would do"),
    "semicolons and another header": table_csv(b"body;label\na;x\n", "is not in 't.csv': 'body', 'label' would do"),
    "tabs and a field too many": table_csv(b"text\tlabel\na\tx\ty\n", "row 1 has 3 fields, not 2"),
    "a text that is no table": table("t.txt", ROWS, "is no table: a file that ends in .csv, .tsv, "),
    "a packed file that is none": table("t.csv.gz", ROWS, "cannot be read as csv: Not a gzipped file"),
    "Latin-1": table_csv("text,label\ncafé,x\n".encode("latin-1"), "it is not UTF-8", "save it as that"),
    "Latin-1 far down": table_csv(ROWS * 999 + "café,x\n".encode("latin-1"), "it is not UTF-8"),
    "UTF-16": table_csv(ROWS.decode().encode("utf-16"), "it is not UTF-8"),
    "UTF-16 without its mark": table_csv(ROWS.decode().encode("utf-16-le"), "line 1 has a NUL byte"),
    "UTF-32": table_csv(ROWS.decode().encode("utf-32"), "it is not UTF-8"),
    "half a character": table_csv(b"text,label\n\xed\xa0\x80,x\n", "it is not UTF-8"),
    "what gzip wrote": table_csv(b"\x1f\x8b\x08\0" + bytes(range(256)), "it is not UTF-8"),
    "a label left empty": table_csv(b"text,label\na,x\nb,\n", "row 2 of", "has no label: give it one or leave it out"),
    "nan among labels that are numbers": table_csv(b"text,label\na,1\nb,NaN\nc,2.5\n", "row 2 of", "has no label"),
    "nan for every label": table_csv(b"text,label\na,nan\nb,nan\n", "row 1 of", "has no label"),
    "a header of a megabyte": table_csv(b"text " * 200_000 + b",label\na,x\n", "text_column='text' is not in", "..."),
    "one label": labels("x x x x", "x", "there is one label only, x"),
    "labels that print alike": labels(
        "x\u200dy xy", "xy", "got xy (U+0078 U+0079) and x\\u200dy (U+0078 U+200D U+0079). Write it one way"
    ),
    "a label that the test set lacks": labels("x y z x", "x y", "z only in train, none only in test"),
    "a label that the training set lacks": labels("x y x y", "x z y", "none only in train, z only in test"),
    "labels in other letters": labels("pos neg", "Pos Neg", "neg, pos only in train, Neg, Pos only in test"),
    "a file of another task": Bad(("it has 2 columns, not the 3 expected: Class Index",), {"task_name": "agnews"}),
    # JSON Lines and parquet files.
    "half a row of JSON": table_jsonl(JSON_ROWS + b'{"text": "b",', "cannot be read as json"),
    "words for JSON": table_jsonl(b"hello\n", "its first row is no object", '{"text": "...", "label": "..."}'),
    "null for JSON": table_jsonl(b"null\n" + JSON_ROWS, "its first row is no object"),
    "null first in a list": table("t.json", b"\xef\xbb\xbf [ null, {}]", "its first row is no object"),
    "lists for rows": table_jsonl(b'["a", "x"]\n["b", "y"]\n', "its first row is no object"),
    "null for a later row": table_jsonl(JSON_ROWS + b"null\n", "row 3 of", "has no text"),
    "an empty list": table("t.json", b"[]", "it has no row"),
    "rows without fields": table_jsonl(b"{}\n{}\n", "it has no row"),
    "an empty JSON file": table_jsonl(b"", "it is empty"),
    "rows under a name": table("t.json", b'{"data": [{"text": "a"}]}', "text_column='text' is not in", "'data'"),
    "texts that are numbers": table_jsonl(b'{"text": 1, "label": "x"}\n', "holds int64: a column of texts would do"),
    "texts in a list": table_jsonl(b'{"text": ["a"], "label": "x"}\n', "holds list<item: string>"),
    "texts in a record": table_jsonl(b'{"text": {"en": "a"}, "label": "x"}\n', "holds struct<en: string>"),
    "texts and numbers": table_jsonl(JSON_ROWS + b'{"text": 5, "label": "x"}\n', "a column of texts would do"),
    "labels in a list": table_jsonl(b'{"text": "a", "label": [1]}\n', "label_column='label'", "holds lists"),
    "labels in a record": table_jsonl(b'{"text": "a", "label": {"v": 1}}\n', "label_column='label'", "holds lists"),
    "a label that is NaN": table_jsonl(b'{"text": "a", "label": 1.5}\n{"text": "b", "label": NaN}\n', "row 2 of"),
    "a label that is null": table_jsonl(b'{"text": "a", "label": 1}\n{"text": "b", "label": null}\n', "row 2 of"),
    "a row without a label": table_jsonl(JSON_ROWS + b'{"text": "b"}\n', "row 3 of", "has no label"),
    "a field twice": table_jsonl(b'{"text": "a", "text": "b", "label": 1}\n', "specified twice"),
    "JSON in Latin-1": table_jsonl('{"text": "café", "label": "x"}\n'.encode("latin-1"), "it is not UTF-8"),
    "JSON in UTF-16": table_jsonl(JSON_ROWS.decode().encode("utf-16"), "its first row is no object", "in UTF-8"),
    "half a surrogate in JSON": table_jsonl(b'{"text": "\\ud800", "label": "x"}\n', "surrogate"),
    "a parquet file without its end": table_parquet(PARQUET[:-9], "Parquet magic bytes not found"),
    "half a parquet file": table_parquet(PARQUET[: len(PARQUET) // 2], "Parquet"),
    "a parquet file without its start": table_parquet(PARQUET[20:], "cannot be read as parquet"),
    "a parquet file with a hole": table_parquet(PARQUET[:8] + bytes(40) + PARQUET[48:], "cannot be read as parquet"),
    "a CSV called parquet": table_parquet(ROWS, "Parquet magic bytes not found"),
    "an empty parquet file": table_parquet(b"", "it is empty"),
    "a parquet file without rows": table_parquet(parquet(text=[], label=[]), "it has no row"),
    "a parquet file with a column twice": table_parquet(write_parquet(TWINS), "several columns called text"),
    "texts that are bytes": table_parquet(parquet(text=[b"a", b"b"], label=[1, 2]), "holds binary"),
    "texts of parquet in Latin-1": table_parquet(parquet(text=NOT_UTF8, label=[1, 2]), "it is not UTF-8"),
    "a NaN in parquet": table_parquet(parquet(text=["a", "b"], label=[1.0, float("nan")]), "row 2 of", "has no label"),
    # Paths.
    "a file that is not there": path("none.csv", "there is no such file"),
    "a folder for a file": path("t.csv", "there is no such file", **{"t.csv/t.csv": ROWS}),
    "a path of two lines": path("a\nb.csv", "there is no such file"),
    "a path with a NUL byte": path("a\0b.csv", "there is no such file"),
    "a path that is too long": path("a" * 300 + ".csv", "there is no such file"),
    "a scheme that nobody knows": path("foo://t.csv", "Protocol not known: foo"),
    "a server that is not there": path("http://127.0.0.1:9/t.csv", "there is no such file"),
    "a spreadsheet": path("t.xlsx", "is neither a file that ends in .csv, ", "nor a data set of the hub"),
    "a number for a path": path("5", "nor a data set of the hub"),
    "no test set": Bad(("task_name='text' needs test_path",), {"test_path": None}),
    "folders without texts": Bad(
        ("there are no texts some/train/neg/*.txt",),
        {"task_name": "imdb", "train_path": "some", "test_path": "some"},
        files={"some/train/pos/a.txt": b"good"},
    ),
    "folders of a scheme that nobody knows": Bad(
        ("'foo://x' is no local path or fsspec URL: Protocol not known: foo",),
        {"task_name": "imdb", "train_path": "foo://x", "test_path": "foo://x"},
    ),
    "checkpoints in a file": Bad(
        ("checkpoints_dir='t.csv' cannot be written to",), {"checkpoints_dir": "t.csv"}, files={"t.csv": ROWS}
    ),
    "checkpoints below a file": Bad(
        ("checkpoints_dir='t.csv/x' cannot be written to",), {"checkpoints_dir": "t.csv/x"}, files={"t.csv": ROWS}
    ),
    "checkpoints in a scheme that nobody knows": Bad(
        ("checkpoints_dir='foo://x' cannot be written to: Protocol not known: foo",), {"checkpoints_dir": "foo://x"}
    ),
    "checkpoints with a NUL byte": Bad(("checkpoints_dir='a\\x00b' cannot be",), {"checkpoints_dir": "a\0b"}),
    "a checkpoint that is a folder": Bad(
        ("checkpoints/round-1.pt cannot be read: ", "Is a directory"),
        {"checkpoints_dir": "checkpoints"},
        files={"checkpoints/round-1.pt/x": b""},
    ),
    # The record.
    "a record in a file": Bad(
        ("SACRED_RUNS_DIR='t.csv' cannot be written to",),
        env={"SACRED_RUNS_DIR": "t.csv"},
        files={"t.csv": ROWS},
        is_read=False,
    ),
    "a record where nobody may write": Bad(
        ("SACRED_RUNS_DIR='/proc/no/folder' cannot",), env={"SACRED_RUNS_DIR": "/proc/no/folder"}, is_read=False
    ),
    "a server that refuses": host("127.0.0.1:9", "cannot be recorded in MongoDB (SACRED_HOST): 127.0.0.1:9: "),
    "a port beyond the last": host("127.0.0.1:99999", "SACRED_HOST names no MongoDB server: Port must be"),
    "port zero": host("127.0.0.1:0", "Port must be an integer between 0 and 65535"),
    "a port below zero": host("127.0.0.1:-1", "SACRED_HOST names no MongoDB server: Port"),
    "a port left empty": host("127.0.0.1:", "SACRED_HOST names no MongoDB server: Port"),
    "another server's scheme": host("http://127.0.0.1:9", "URI must begin with 'mongodb://' or 'mongodb+srv://'"),
    "a scheme alone": host("mongodb://", "SACRED_HOST names no MongoDB server: Empty host"),
    "an address left open": host("[::1", "SACRED_HOST names no MongoDB server: an IPv6 address"),
    "a name to look up that is an address": host("mongodb+srv://127.0.0.1", "SACRED_HOST names no MongoDB server: "),
    "a name to look up with a port": host("mongodb+srv://a.b:27017", "must not include a port number"),
    "a password in the URL as it stands": host("mongodb://me:s@cr:e/t%$@127.0.0.1:9", "SACRED_HOST names no"),
    "a database that cannot be": host("127.0.0.1:9", "SACRED_DATABASE='a/b $.' names no database", database="a/b $."),
}


def contents(folder: Path) -> dict[str, bytes]:
    """All files of a folder, but for the printed output and the record."""
    ours = ("output.txt", "runs")
    files = (file for file in folder.rglob("*") if file.is_file() and file.relative_to(folder).parts[0] not in ours)
    return {str(file.relative_to(folder)): file.read_bytes() for file in files}


def write(folder: Path, files: dict[str, bytes]) -> None:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)


def sentence_of(result: tuple[int, str]) -> str:
    """The one sentence with which a command ends."""
    status, output = result
    lines = [line for line in output.splitlines() if not line.startswith("warning: skipping ")]
    assert status == 1, output
    assert len(lines) == 1, output
    assert re.match(r"error: \S", lines[0])
    assert len(lines[0]) < 800
    return lines[0]


def test_the_table_is_long() -> None:
    assert len(BAD) >= 60
    assert len({repr(bad) for bad in BAD.values()}) == len(BAD)


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_clear_sentence_and_nothing_is_written_over(
    name: str, command: Command, tmp_path: Path
) -> None:
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
    assert not re.search(r"s(@|%40)cr|e(/|%2F)t%", sentence), "the password"


@pytest.mark.parametrize(("scheme", "package"), [("s3", "s3fs"), ("abfs", "adlfs"), ("sftp", "paramiko")])
def test_a_url_whose_package_is_missing_names_the_package(command: Command, scheme: str, package: str) -> None:
    if find_spec(package):
        pytest.skip(f"{package} is here")
    url = f"{scheme}://place/t.csv"
    sentence = sentence_of(command(train_path=url))
    assert repr(url) in sentence
    assert re.search(rf"[Ii]nstall.*{package}|{package}.*install", sentence)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_what_may_not_be_read_is_one_clear_sentence(command: Command, tmp_path: Path) -> None:
    write(tmp_path, {"t.csv": ROWS, "checkpoints/round-1.pt": b""})
    for name in ("t.csv", "checkpoints/round-1.pt"):
        (tmp_path / name).chmod(0)
    assert "'t.csv' cannot be read as csv: [Errno 13]" in sentence_of(command(train_path="t.csv"))
    assert "round-1.pt cannot be read: [Errno 13]" in sentence_of(command(checkpoints_dir="checkpoints"))


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
    assert "text 9 of the 9 in use has no token: leave its row out" in sentence


HUGE = [b"x" * 3_000_000, b'"' + b"goal, " * 10_000 + b'"', b""]


def test_texts_of_megabytes_and_texts_of_nothing_are_texts(command: Command, tmp_path: Path) -> None:
    write(tmp_path, {"t.csv": ROWS + b"".join(text + b",sport\n" for text in HUGE)})
    output = succeed(command(train_path="t.csv", test_path="t.csv", num_rounds=1))
    assert "11 examples to train on" in output


def test_a_label_that_the_output_has_no_code_for_is_escaped(
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


def test_nan_among_words_is_a_word(command: Command, tmp_path: Path) -> None:
    write(tmp_path, {"t.csv": b"text,label\n" + b"goal,nan\nchip,en\n" * 4})
    succeed(command(train_path="t.csv", test_path="t.csv", num_rounds=0))


# A job's name is a text in the record and no path, no query and no code.
JOB_NAMES = ["../a/b", "$where.x=1", "$(touch sprung)", 'two\nlines, it\'s "so"\\', "ünï 漢字 🙂", "x" * 5000]


@pytest.mark.parametrize("name", JOB_NAMES, ids=lambda name: ascii(name)[:20])
def test_a_job_may_have_any_name(name: str, command: Command, tmp_path: Path) -> None:
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
    """A working folder that the examples of one test share."""
    folder = tmp_path_factory.mktemp("scratch")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", str(folder / "cache"))
        yield folder


def is_same(one: Any, other: Any) -> bool:
    """Whether two states are the same to the last bit and type."""
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
    """Read a file: either it is the whole checkpoint, or the sentence that refuses it."""
    Path("round-1.pt").write_bytes(content)
    try:
        state = checkpoint.read("round-1.pt")
    except ValueError as error:
        state, sentence = None, str(error)
    assert not Path("sprung").exists()
    if state is None:
        assert re.fullmatch(r"it.+", sentence)
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
    "with a checksum of its own": lambda whole: in_zip({"round": 1, "sha256": "0" * 64}),
    "a module": lambda whole: in_zip(nn.Linear(1, 1)),
    "a ring": lambda whole: in_zip({"round": cycle()}),
    "a pickle that runs code": lambda whole: pickle.dumps(Trap()),
    "an old pickle that runs code": lambda whole: pickle.dumps(Trap(), protocol=0),
    "torch's file that runs code": lambda whole: in_zip({"round": 1, "server": Trap()}),
    "torch's old file that runs code": lambda whole: in_zip({"round": 1, "server": Trap()}, zipped=False),
    "code by name": lambda whole: b"cbuiltins\nexec\n(Vimport os; os.mkdir('sprung')\ntR.",
}


@pytest.mark.parametrize("name", NOT_OURS)
def test_what_is_no_whole_checkpoint_is_not_read(name: str, scratch: Path, small: bytes) -> None:
    assert read_or_refuse(NOT_OURS[name](small), None)


@pytest.mark.parametrize("name", ["empty", "a flipped bit in a weight", "a text", "a pickle that runs code"])
def test_what_is_no_whole_checkpoint_is_one_clear_sentence_and_stays(
    name: str, command: Command, tmp_path: Path, small: bytes
) -> None:
    write(tmp_path, {"checkpoints/round-7.pt": NOT_OURS[name](small)})
    before = contents(tmp_path)
    result = command(checkpoints_dir="checkpoints")
    assert "no checkpoint in checkpoints_dir='checkpoints' is whole (round 7 is the last)" in sentence_of(result)
    (warning,) = [line for line in result[1].splitlines() if line.startswith("warning: ")]
    assert re.match(r"warning: skipping checkpoints/round-7.pt, which is damaged: it\w* \w", warning)
    assert contents(tmp_path) == before
    assert not (tmp_path / "sprung").exists()


def test_the_traps_are_traps(scratch: Path) -> None:
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
def test_a_checkpoint_with_flipped_bits_is_the_same_or_refused(
    small: bytes, scratch: Path, where: list[tuple[float, int]]
) -> None:
    content = small
    for part, mask in where:
        content = flip(content, int(part * len(content)), mask)
    read_or_refuse(content, state_of(small))


def state_of(content: bytes) -> dict:
    """What a whole file holds, read by torch alone."""
    state = torch.load(io.BytesIO(content), weights_only=True)
    del state["sha256"]
    return state


def test_a_whole_checkpoint_is_what_was_saved(small: bytes, scratch: Path) -> None:
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
def test_bytes_of_any_kind_are_no_checkpoint_and_run_no_code(
    small: bytes, scratch: Path, pieces: list[bytes | tuple[float, float]]
) -> None:
    def piece(part: bytes | tuple[float, float]) -> bytes:
        if isinstance(part, bytes):
            return part
        return small[int(min(part) * len(small)) : int(max(part) * len(small))]

    read_or_refuse(b"".join(map(piece, pieces)), state_of(small))


# CSV files.

NAMES = st.lists(
    st.sampled_from(["text", "label", "a b", "Größe", 'the "id"', "x,y", "1", ""]), unique=True, min_size=1
)
FIELDS = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=12) | st.text(
    "\",\r\n; '\\", max_size=6
)
numbers = count()


def put_csv(content: bytes) -> str:
    """A file of its own for each example, as what was read of one is cached."""
    name = f"{next(numbers)}.csv"
    Path(name).write_bytes(content)
    return name


@given(data=st.data(), names=NAMES, is_all_quoted=st.booleans(), has_mark=st.booleans())
@settings(deadline=None, max_examples=120)
def test_fields_come_back_as_python_wrote_them(
    scratch: Path, data: st.DataObject, names: list[str], is_all_quoted: bool, has_mark: bool
) -> None:
    rows = data.draw(st.lists(st.lists(FIELDS, min_size=len(names), max_size=len(names)), min_size=1, max_size=5))
    file = io.StringIO(newline="")
    style = {"quoting": csv.QUOTE_ALL, "lineterminator": "\n"} if is_all_quoted else {}
    csv.writer(file, **style).writerows([names, *rows])
    table = read_table(put_csv(file.getvalue().encode("utf-8-sig" if has_mark else "utf-8")))
    assert table.column_names == names
    assert [list(row.values()) for row in table] == rows


def rows_of(content: bytes) -> list[list[str]] | None:
    """The rows as Python's own module reads them, None if it does not; empty fields at their ends are no matter."""
    try:
        rows = [row for row in csv.reader(io.StringIO(content.decode("utf-8-sig"), newline=""), strict=True) if row]
    except (UnicodeDecodeError, csv.Error):
        return None
    for row in rows[1:]:
        while len(row) > len(rows[0]) and not row[-1].strip():
            row.pop()
        if not any(name.strip() for name in rows[0][len(row) :]):
            row += [""] * (len(rows[0]) - len(row))
    return rows


def is_table(rows: list[list[str]] | None) -> bool:
    """Whether a file is one of ours: not all that a program calls CSV is a table."""
    if rows is None or len(rows) < 2 or any("\0" in name for row in rows for name in row):
        return False
    if len(rows[0]) == 1 and re.search(r"[;\t|]", rows[0][0]):
        return False  # commas were not what separates its columns
    return len(set(rows[0])) == len(rows[0]) and {len(row) for row in rows} == {len(rows[0])}


ENCODINGS = st.sampled_from(["utf-8", "utf-8", "utf-8", "utf-8-sig", "latin-1", "utf-16", "utf-16-le"])


@given(
    content=st.binary(max_size=60)
    | st.builds(lambda text, encoding: text.encode(encoding), st.text('ab",\r\n é', max_size=30), ENCODINGS)
    | st.builds(lambda rows: "\n".join(map(",".join, rows)).encode(), st.lists(st.lists(st.sampled_from("abc"))))
)
@example(content=b"a,b\nc,\0\n")
@example(content=b"a\n\xff\n")
@example(content=b"a|b\nc\n")
@example(content=b"a,b,\nc,d\ne,f,,,\n")
@example(content=b"a,b\nc\n")
@example(content=b"a,b\nc,d,e\n")
@settings(deadline=None, max_examples=300)
def test_bytes_of_any_kind_are_the_rows_that_python_reads_or_refused(scratch: Path, content: bytes) -> None:
    rows, name = rows_of(content), put_csv(content)
    if not is_table(rows):
        assert repr(name) in refusal(lambda: read_table(name))
        return
    assert rows is not None
    table = read_table(name)
    assert table.column_names == rows[0]
    assert [list(row.values()) for row in table] == rows[1:]

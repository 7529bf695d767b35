"""A table that cannot be read, or that does not fit the task, is one clear sentence."""

import re
from dataclasses import dataclass, field
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers import refusal

from scaling_fl.data.reader import read_task

ROWS = b"text,label\n" + b"goal match,sport\nchip code,tech\n" * 4
JSON_ROWS = b'{"text": "goal", "label": "sport"}\n{"text": "chip", "label": "tech"}\n'


@dataclass(frozen=True)
class Bad:
    """A wrong table, and parts of the error sentence."""

    says: tuple[str, ...]
    settings: dict[str, Any] = field(default_factory=dict)
    files: dict[str, bytes] = field(default_factory=dict)


def path(value: str, *says: str, **files: bytes) -> Bad:
    return Bad((repr(value), *says), {"train_path": value, "test_path": value}, files=files)


def table(name: str, content: bytes, *says: str) -> Bad:
    return Bad((repr(name), *says), {"train_path": name, "test_path": name}, files={name: content})


csv, jsonl, parquet = (partial(table, f"t.{suffix}") for suffix in ("csv", "jsonl", "parquet"))


def labels(train: str, test: str, *says: str) -> Bad:
    """Rows with these labels."""
    files = {
        name: "\n".join(["text,label", *(f"a text,{label}" for label in found.split())]).encode()
        for name, found in (("train.csv", train), ("test.csv", test))
    }
    return Bad(says, {"train_path": "train.csv", "test_path": "test.csv"}, files=files)


def parquet_bytes(**columns: Any) -> bytes:
    return write_parquet(pa.table(columns))


def write_parquet(rows: pa.Table) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(rows, sink)
    return sink.getvalue().to_pybytes()


PARQUET = parquet_bytes(text=["goal", "chip"], label=["sport", "tech"])
NOT_UTF8 = pa.Array.from_buffers(pa.string(), 2, pa.array([b"goal", b"caf\xe9"]).buffers())
TWINS = pa.Table.from_arrays([pa.array(["a", "b"])] * 3, names=["text", "label", "text"])

NOT_A_ROW = 'row 1: expected an object such as {"text": "...", "label": "..."} in UTF-8, got another value'
BAD_LABEL = "row 1: label_column='label': expected texts or numbers, got lists or records"
ENDINGS = "expected a file that ends in .csv, .tsv, .jsonl, .json, .parquet, or a data set of the hub"


def utf8(place: str, error: str) -> str:
    return f"{place}: expected UTF-8, got an {error}"


def no_column(kind: str, found: str) -> str:
    return f"{kind}_column: expected a column of 't.csv' ({found}), got '{kind}'"


def not_text(row: int, got: str) -> str:
    return f"row {row}: text_column='text': expected texts, got a {got}"


def no_label(row: int) -> str:
    return f"row {row}: expected a value in 'label', got none"


BAD: dict[str, Bad] = {
    "an unnamed label": Bad(("row 3: expected a label out of sport, tech, got food",), {"labels": ["sport", "tech"]}),
    "one column for both": Bad(
        ("text_column, label_column: expected two columns, got 'label' for both",), {"text_column": "label"}
    ),
    "a row with an extra field": csv(b"text,label\na,x\nb,y,z\n", "row 2: expected 2 fields, got 3"),
    "an unclosed quote": csv(b'text,label\n"a,x\nb,y\n', "line 3: unexpected end of data"),
    "a NUL byte in a text": csv(b"text,label\na\0b,x\nb,y\n", utf8("line 2", "unexpected NUL byte")),
    "a NUL byte in the header": csv(b"te\0xt,label\na,x\nb,y\n", utf8("line 1", "unexpected NUL byte")),
    "only NUL bytes": csv(bytes(5000), utf8("line 1", "unexpected NUL byte")),
    "an empty file": csv(b"", "expected rows, got an empty file"),
    "only a byte order mark": csv("\ufeff".encode(), "expected rows, got an empty file"),
    "only a header": csv(b"text,label\n", "expected a row below the header, got none"),
    "only blank lines": csv(b"\n\r\n\n", "expected rows, got an empty file"),
    "lines of spaces": csv(b"  \n  \n", no_column("text", "' '")),
    "a column twice": csv(b"text,label,text\na,x,b\n", "expected each column once, got several called text"),
    "no column of texts": csv(b"body,label\na,x\n", no_column("text", "'body', 'label'")),
    "no column of labels": csv(b"text,class\na,x\n", no_column("label", "'text', 'class'")),
    "names with a space before them": csv(b"text, label\na, x\n", no_column("label", "'text', ' label'")),
    "names in capitals": csv(b"Text,Label\na,x\n", no_column("text", "'Text', 'Label'")),
    "semicolons and another header": csv(b"body;label\na;x\n", no_column("text", "'body', 'label'")),
    "tabs and an extra field": csv(b"text\tlabel\na\tx\ty\n", "row 1: expected 2 fields, got 3"),
    "a text file": table(
        "t.txt", ROWS, "expected a file that ends in .csv, .tsv, .jsonl, .json, .parquet, got another ending"
    ),
    "an uncompressed gz file": table("t.csv.gz", ROWS, "expected csv, got an error: Not a gzipped file (b'te')"),
    "Latin-1": csv("text,label\ncafé,x\n".encode("latin-1"), utf8("line 2", "invalid continuation byte")),
    "Latin-1 far down": csv(ROWS * 999 + "café,x\n".encode("latin-1"), utf8("line 8992", "invalid continuation byte")),
    "UTF-16": csv(ROWS.decode().encode("utf-16"), utf8("line 1", "invalid start byte")),
    "UTF-16 without its mark": csv(ROWS.decode().encode("utf-16-le"), utf8("line 1", "unexpected NUL byte")),
    "UTF-32": csv(ROWS.decode().encode("utf-32"), utf8("line 1", "invalid start byte")),
    "an incomplete character": csv(b"text,label\n\xed\xa0\x80,x\n", utf8("line 2", "invalid continuation byte")),
    "compressed bytes": csv(b"\x1f\x8b\x08\0" + bytes(range(256)), utf8("line 1", "invalid start byte")),
    "an empty label": csv(b"text,label\na,x\nb,\n", no_label(2)),
    "nan among labels that are numbers": csv(b"text,label\na,1\nb,NaN\nc,2.5\n", no_label(2)),
    "nan for every label": csv(b"text,label\na,nan\nb,nan\n", no_label(1)),
    "a header of a megabyte": csv(
        b"text " * 200_000 + b",label\na,x\n", no_column("text", "'text text text text ..., 'label'")
    ),
    "one label": labels("x x x x", "x", "labels: expected two or more in the training data, got x"),
    "labels that look equal": labels(
        "x\u200dy xy", "xy", "got xy (U+0078 U+0079) and x\\u200dy (U+0078 U+200D U+0079). Write it one way"
    ),
    "a label that the training set lacks": labels(
        "x y x y",
        "x z y",
        "labels: expected the same in train and test, or each at two sites or more, got z only in test",
    ),
    "labels in upper case": labels("pos neg", "Pos Neg", "neg, pos only in train, Neg, Pos only in test"),
    "a file of another task": Bad(
        ("expected the 3 columns Class Index, Title, Description, got 2 columns",), {"task_name": "agnews"}
    ),
    "an incomplete row of JSON": jsonl(JSON_ROWS + b'{"text": "b",', "row 3: expected JSON, got an error"),
    "words instead of JSON": jsonl(b"hello\n", NOT_A_ROW),
    "null for JSON": jsonl(b"null\n" + JSON_ROWS, NOT_A_ROW),
    "null first in a list": table("t.json", b"\xef\xbb\xbf [ null, {}]", NOT_A_ROW),
    "lists for rows": jsonl(b'["a", "x"]\n["b", "y"]\n', NOT_A_ROW),
    "null for a later row": jsonl(JSON_ROWS + b"null\n", "row 3: expected a value in 'text', got none"),
    "an empty list": table("t.json", b"[]", "expected a row, got none"),
    "rows without fields": jsonl(b"{}\n{}\n", "expected a row, got none"),
    "an empty JSON file": jsonl(b"", "expected rows, got an empty file"),
    "rows under a name": table(
        "t.json", b'{"data": [{"text": "a"}]}', "text_column: expected a column of 't.json' ('data'), got 'text'"
    ),
    "texts that are numbers": jsonl(b'{"text": 1, "label": "x"}\n', not_text(1, "number")),
    "texts in a list": jsonl(b'{"text": ["a"], "label": "x"}\n', not_text(1, "list")),
    "texts in a record": jsonl(b'{"text": {"en": "a"}, "label": "x"}\n', not_text(1, "record")),
    "texts and numbers": jsonl(JSON_ROWS + b'{"text": 5, "label": "x"}\n', not_text(3, "number")),
    "labels in a list": jsonl(b'{"text": "a", "label": [1]}\n', BAD_LABEL),
    "labels in a record": jsonl(b'{"text": "a", "label": {"v": 1}}\n', BAD_LABEL),
    "a label that is NaN": jsonl(b'{"text": "a", "label": 1.5}\n{"text": "b", "label": NaN}\n', no_label(2)),
    "a label that is null": jsonl(b'{"text": "a", "label": 1}\n{"text": "b", "label": null}\n', no_label(2)),
    "a row without a label": jsonl(JSON_ROWS + b'{"text": "b"}\n', no_label(3)),
    "a field twice": jsonl(b'{"text": "a", "text": "b", "label": 1}\n', "row 1: expected 'text' once, got it twice"),
    "JSON in Latin-1": jsonl(
        '{"text": "café", "label": "x"}\n'.encode("latin-1"), utf8("row 1", "invalid continuation byte")
    ),
    "JSON in UTF-16": jsonl(JSON_ROWS.decode().encode("utf-16"), NOT_A_ROW),
    "an incomplete surrogate in JSON": jsonl(b'{"text": "\\ud800", "label": "x"}\n', "surrogate"),
    "half a parquet file": parquet(PARQUET[: len(PARQUET) // 2], "Parquet"),
    "a parquet file without its start": parquet(PARQUET[20:], "expected parquet, got an error"),
    "a parquet file with a hole": parquet(PARQUET[:8] + bytes(40) + PARQUET[48:], "expected parquet, got an error"),
    "a CSV called parquet": parquet(ROWS, "Parquet magic bytes not found"),
    "an empty parquet file": parquet(b"", "expected rows, got an empty file"),
    "a parquet file without rows": parquet(parquet_bytes(text=[], label=[]), "expected a row, got none"),
    "a parquet file with a column twice": parquet(
        write_parquet(TWINS), "expected each column once, got several called text"
    ),
    "texts that are bytes": parquet(
        parquet_bytes(text=[b"a", b"b"], label=[1, 2]), "text_column='text': expected texts, got binary"
    ),
    "texts of parquet in Latin-1": parquet(
        parquet_bytes(text=NOT_UTF8, label=[1, 2]),
        "expected parquet, got an error: expected UTF-8, got an unexpected end of data",
    ),
    "a NaN in parquet": parquet(parquet_bytes(text=["a", "b"], label=[1.0, float("nan")]), no_label(2)),
    "a missing file": path("none.csv", "there is no such file"),
    "a folder for a file": path("t.csv", "there is no such file", **{"t.csv/t.csv": ROWS}),
    "a path of two lines": path("a\nb.csv", "there is no such file"),
    "a path with a NUL byte": path("a\0b.csv", "there is no such file"),
    "a path that is too long": path("a" * 300 + ".csv", "there is no such file"),
    "an unknown scheme": path("foo://t.csv", "Protocol not known: foo"),
    "a missing server": path("http://127.0.0.1:9/t.csv", "there is no such file"),
    "a spreadsheet": path("t.xlsx", ENDINGS),
    "a number for a path": path("5", ENDINGS),
    "folders of an unknown scheme": Bad(
        ("expected a local path or fsspec URL, got an error: Protocol not known: foo",),
        {"task_name": "imdb", "train_path": "foo://x", "test_path": "foo://x"},
    ),
    "a row with a missing field": csv(b"text,label\na,x\nb\n", "row 2: expected 2 fields, got 1"),
    "a label that the test set lacks": labels(
        "x y z x",
        "x y",
        "labels: expected the same in train and test, or each at two sites or more, got z only in train",
    ),
    "a parquet file without its end": parquet(PARQUET[:-9], "Parquet magic bytes not found"),
    "no test set": Bad(("test_path: expected a path or URL for task_name='text', got None",), {"test_path": None}),
}


def write(folder: Path, files: dict[str, bytes]) -> None:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)


def read(settings: dict[str, Any]) -> tuple[str, ...]:
    """Read the files of the settings, and return the names of the labels."""
    columns = settings.pop("text_column", None), settings.pop("label_column", None)
    return read_task(**settings, columns=columns)[1]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, corpus: tuple[Path, Path]) -> dict[str, Any]:
    """A separate working folder, and the settings of a task with good data."""
    monkeypatch.chdir(tmp_path)
    return {"task_name": "text", "train_path": str(corpus[0]), "test_path": str(corpus[1])}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_table_is_one_clear_sentence_and_stays_unchanged(name: str, here: dict[str, Any], tmp_path: Path) -> None:
    bad = BAD[name]
    write(tmp_path, bad.files)
    sentence = refusal(lambda: read({**here, **bad.settings}))
    assert all(part in sentence for part in bad.says), sentence
    assert {str(file.relative_to(tmp_path)): file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()} == (
        bad.files
    )


@pytest.mark.parametrize(("scheme", "package"), [("s3", "s3fs"), ("abfs", "adlfs"), ("sftp", "paramiko")])
def test_a_url_whose_package_is_missing_names_the_package(here: dict[str, Any], scheme: str, package: str) -> None:
    if find_spec(package):
        pytest.skip(f"{package} is installed")
    url = f"{scheme}://place/t.csv"
    sentence = refusal(lambda: read({**here, "train_path": url}))
    assert repr(url) in sentence
    assert re.search(rf"[Ii]nstall.*{package}|{package}.*install", sentence)


def test_nan_among_labels_that_are_words_is_a_label(here: dict[str, Any], tmp_path: Path) -> None:
    write(tmp_path, {"t.csv": b"text,label\n" + b"goal,nan\nchip,en\n" * 4})
    assert read({**here, "train_path": "t.csv", "test_path": "t.csv"}) == ("en", "nan")

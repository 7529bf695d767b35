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
from conftest import refusal

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


table_csv, table_jsonl, table_parquet = (partial(table, f"t.{suffix}") for suffix in ("csv", "jsonl", "parquet"))


def labels(train: str, test: str, *says: str) -> Bad:
    """Rows with these labels."""
    files = {
        name: "\n".join(["text,label", *(f"a text,{label}" for label in found.split())]).encode()
        for name, found in (("train.csv", train), ("test.csv", test))
    }
    return Bad(says, {"train_path": "train.csv", "test_path": "test.csv"}, files=files)


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
    "a label that is not named": Bad(
        ("row 3: expected a label out of sport, tech, got food",), {"labels": ["sport", "tech"]}
    ),
    "one column for both": Bad(
        ("text_column, label_column: expected two columns, got 'label' for both",), {"text_column": "label"}
    ),
    "a row with a field too many": table_csv(b"text,label\na,x\nb,y,z\n", "row 2: expected 2 fields, got 3"),
    "a quote left open": table_csv(b'text,label\n"a,x\nb,y\n', "line 3: unexpected end of data"),
    "a NUL byte in a text": table_csv(
        b"text,label\na\0b,x\nb,y\n", "line 2: expected UTF-8, got an unexpected NUL byte"
    ),
    "a NUL byte in the header": table_csv(
        b"te\0xt,label\na,x\nb,y\n", "line 1: expected UTF-8, got an unexpected NUL byte"
    ),
    "nothing but NUL bytes": table_csv(bytes(5000), "line 1: expected UTF-8, got an unexpected NUL byte"),
    "an empty file": table_csv(b"", "expected rows, got an empty file"),
    "a byte order mark alone": table_csv("\ufeff".encode(), "expected rows, got an empty file"),
    "a header alone": table_csv(b"text,label\n", "expected a row below the header, got none"),
    "blank lines alone": table_csv(b"\n\r\n\n", "expected rows, got an empty file"),
    "lines of spaces": table_csv(b"  \n  \n", "text_column: expected a column of 't.csv' (' '), got 'text'"),
    "a column twice": table_csv(b"text,label,text\na,x,b\n", "expected each column once, got several called text"),
    "no column of texts": table_csv(
        b"body,label\na,x\n", "text_column: expected a column of 't.csv' ('body', 'label'), got 'text'"
    ),
    "no column of labels": table_csv(
        b"text,class\na,x\n", "label_column: expected a column of 't.csv' ('text', 'class'), got 'label'"
    ),
    "names with a space before them": table_csv(
        b"text, label\na, x\n", "label_column: expected a column of 't.csv' ('text', ' label'), got 'label'"
    ),
    "names in capitals": table_csv(
        b"Text,Label\na,x\n", "text_column: expected a column of 't.csv' ('Text', 'Label'), got 'text'"
    ),
    "semicolons and another header": table_csv(
        b"body;label\na;x\n", "text_column: expected a column of 't.csv' ('body', 'label'), got 'text'"
    ),
    "tabs and a field too many": table_csv(b"text\tlabel\na\tx\ty\n", "row 1: expected 2 fields, got 3"),
    "a text that is no table": table(
        "t.txt", ROWS, "expected a file that ends in .csv, .tsv, .jsonl, .json, .parquet, got another ending"
    ),
    "a packed file that is none": table("t.csv.gz", ROWS, "expected csv, got an error: Not a gzipped file (b'te')"),
    "Latin-1": table_csv(
        "text,label\ncafé,x\n".encode("latin-1"), "line 2: expected UTF-8, got an invalid continuation byte"
    ),
    "Latin-1 far down": table_csv(
        ROWS * 999 + "café,x\n".encode("latin-1"), "line 8992: expected UTF-8, got an invalid continuation byte"
    ),
    "UTF-16": table_csv(ROWS.decode().encode("utf-16"), "line 1: expected UTF-8, got an invalid start byte"),
    "UTF-16 without its mark": table_csv(
        ROWS.decode().encode("utf-16-le"), "line 1: expected UTF-8, got an unexpected NUL byte"
    ),
    "UTF-32": table_csv(ROWS.decode().encode("utf-32"), "line 1: expected UTF-8, got an invalid start byte"),
    "half a character": table_csv(
        b"text,label\n\xed\xa0\x80,x\n", "line 2: expected UTF-8, got an invalid continuation byte"
    ),
    "what gzip wrote": table_csv(
        b"\x1f\x8b\x08\0" + bytes(range(256)), "line 1: expected UTF-8, got an invalid start byte"
    ),
    "a label left empty": table_csv(b"text,label\na,x\nb,\n", "row 2: expected a value in 'label', got none"),
    "nan among labels that are numbers": table_csv(
        b"text,label\na,1\nb,NaN\nc,2.5\n", "row 2: expected a value in 'label', got none"
    ),
    "nan for every label": table_csv(b"text,label\na,nan\nb,nan\n", "row 1: expected a value in 'label', got none"),
    "a header of a megabyte": table_csv(
        b"text " * 200_000 + b",label\na,x\n",
        "text_column: expected a column of 't.csv' ('text text text text ..., 'label'), got 'text'",
    ),
    "one label": labels("x x x x", "x", "labels: expected two or more in the training data, got x"),
    "labels that print alike": labels(
        "x\u200dy xy", "xy", "got xy (U+0078 U+0079) and x\\u200dy (U+0078 U+200D U+0079). Write it one way"
    ),
    "a label that the training set lacks": labels(
        "x y x y",
        "x z y",
        "labels: expected the same in train and test, or each at two sites or more, got z only in test",
    ),
    "labels in other letters": labels("pos neg", "Pos Neg", "neg, pos only in train, Neg, Pos only in test"),
    "a file of another task": Bad(
        ("expected the 3 columns Class Index, Title, Description, got 2 columns",), {"task_name": "agnews"}
    ),
    "half a row of JSON": table_jsonl(JSON_ROWS + b'{"text": "b",', "row 3: expected JSON, got an error"),
    "words for JSON": table_jsonl(
        b"hello\n", 'row 1: expected an object such as {"text": "...", "label": "..."} in UTF-8, got another value'
    ),
    "null for JSON": table_jsonl(
        b"null\n" + JSON_ROWS,
        'row 1: expected an object such as {"text": "...", "label": "..."} in UTF-8, got another value',
    ),
    "null first in a list": table(
        "t.json",
        b"\xef\xbb\xbf [ null, {}]",
        'row 1: expected an object such as {"text": "...", "label": "..."} in UTF-8, got another value',
    ),
    "lists for rows": table_jsonl(
        b'["a", "x"]\n["b", "y"]\n',
        'row 1: expected an object such as {"text": "...", "label": "..."} in UTF-8, got another value',
    ),
    "null for a later row": table_jsonl(JSON_ROWS + b"null\n", "row 3: expected a value in 'text', got none"),
    "an empty list": table("t.json", b"[]", "expected a row, got none"),
    "rows without fields": table_jsonl(b"{}\n{}\n", "expected a row, got none"),
    "an empty JSON file": table_jsonl(b"", "expected rows, got an empty file"),
    "rows under a name": table(
        "t.json", b'{"data": [{"text": "a"}]}', "text_column: expected a column of 't.json' ('data'), got 'text'"
    ),
    "texts that are numbers": table_jsonl(
        b'{"text": 1, "label": "x"}\n', "row 1: text_column='text': expected texts, got a number"
    ),
    "texts in a list": table_jsonl(
        b'{"text": ["a"], "label": "x"}\n', "row 1: text_column='text': expected texts, got a list"
    ),
    "texts in a record": table_jsonl(
        b'{"text": {"en": "a"}, "label": "x"}\n', "row 1: text_column='text': expected texts, got a record"
    ),
    "texts and numbers": table_jsonl(
        JSON_ROWS + b'{"text": 5, "label": "x"}\n', "row 3: text_column='text': expected texts, got a number"
    ),
    "labels in a list": table_jsonl(
        b'{"text": "a", "label": [1]}\n', "row 1: label_column='label': expected texts or numbers, got lists or records"
    ),
    "labels in a record": table_jsonl(
        b'{"text": "a", "label": {"v": 1}}\n',
        "row 1: label_column='label': expected texts or numbers, got lists or records",
    ),
    "a label that is NaN": table_jsonl(
        b'{"text": "a", "label": 1.5}\n{"text": "b", "label": NaN}\n', "row 2: expected a value in 'label', got none"
    ),
    "a label that is null": table_jsonl(
        b'{"text": "a", "label": 1}\n{"text": "b", "label": null}\n', "row 2: expected a value in 'label', got none"
    ),
    "a row without a label": table_jsonl(
        JSON_ROWS + b'{"text": "b"}\n', "row 3: expected a value in 'label', got none"
    ),
    "a field twice": table_jsonl(
        b'{"text": "a", "text": "b", "label": 1}\n', "row 1: expected 'text' once, got it twice"
    ),
    "JSON in Latin-1": table_jsonl(
        '{"text": "café", "label": "x"}\n'.encode("latin-1"), "row 1: expected UTF-8, got an invalid continuation byte"
    ),
    "JSON in UTF-16": table_jsonl(
        JSON_ROWS.decode().encode("utf-16"),
        'row 1: expected an object such as {"text": "...", "label": "..."} in UTF-8, got another value',
    ),
    "half a surrogate in JSON": table_jsonl(b'{"text": "\\ud800", "label": "x"}\n', "surrogate"),
    "half a parquet file": table_parquet(PARQUET[: len(PARQUET) // 2], "Parquet"),
    "a parquet file without its start": table_parquet(PARQUET[20:], "expected parquet, got an error"),
    "a parquet file with a hole": table_parquet(
        PARQUET[:8] + bytes(40) + PARQUET[48:], "expected parquet, got an error"
    ),
    "a CSV called parquet": table_parquet(ROWS, "Parquet magic bytes not found"),
    "an empty parquet file": table_parquet(b"", "expected rows, got an empty file"),
    "a parquet file without rows": table_parquet(parquet(text=[], label=[]), "expected a row, got none"),
    "a parquet file with a column twice": table_parquet(
        write_parquet(TWINS), "expected each column once, got several called text"
    ),
    "texts that are bytes": table_parquet(
        parquet(text=[b"a", b"b"], label=[1, 2]), "text_column='text': expected texts, got binary"
    ),
    "texts of parquet in Latin-1": table_parquet(
        parquet(text=NOT_UTF8, label=[1, 2]),
        "expected parquet, got an error: expected UTF-8, got an unexpected end of data",
    ),
    "a NaN in parquet": table_parquet(
        parquet(text=["a", "b"], label=[1.0, float("nan")]), "row 2: expected a value in 'label', got none"
    ),
    "a file that is not there": path("none.csv", "there is no such file"),
    "a folder for a file": path("t.csv", "there is no such file", **{"t.csv/t.csv": ROWS}),
    "a path of two lines": path("a\nb.csv", "there is no such file"),
    "a path with a NUL byte": path("a\0b.csv", "there is no such file"),
    "a path that is too long": path("a" * 300 + ".csv", "there is no such file"),
    "an unknown scheme": path("foo://t.csv", "Protocol not known: foo"),
    "a server that is not there": path("http://127.0.0.1:9/t.csv", "there is no such file"),
    "a spreadsheet": path(
        "t.xlsx",
        "expected a file that ends in .csv, .tsv, .jsonl, .json, .parquet, or a data set of the hub",
    ),
    "a number for a path": path(
        "5",
        "expected a file that ends in .csv, .tsv, .jsonl, .json, .parquet, or a data set of the hub",
    ),
    "folders of an unknown scheme": Bad(
        ("expected a local path or fsspec URL, got an error: Protocol not known: foo",),
        {"task_name": "imdb", "train_path": "foo://x", "test_path": "foo://x"},
    ),
    "a row with a field too few": table_csv(b"text,label\na,x\nb\n", "row 2: expected 2 fields, got 1"),
    "a label that the test set lacks": labels(
        "x y z x",
        "x y",
        "labels: expected the same in train and test, or each at two sites or more, got z only in train",
    ),
    "a parquet file without its end": table_parquet(PARQUET[:-9], "Parquet magic bytes not found"),
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
        pytest.skip(f"{package} is here")
    url = f"{scheme}://place/t.csv"
    sentence = refusal(lambda: read({**here, "train_path": url}))
    assert repr(url) in sentence
    assert re.search(rf"[Ii]nstall.*{package}|{package}.*install", sentence)


def test_nan_among_labels_that_are_words_is_a_label(here: dict[str, Any], tmp_path: Path) -> None:
    write(tmp_path, {"t.csv": b"text,label\n" + b"goal,nan\nchip,en\n" * 4})
    assert read({**here, "train_path": "t.csv", "test_path": "t.csv"}) == ("en", "nan")

"""A table that is none, or not the task's, is one clear sentence of what reads it."""

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
    """What is wrong, and parts of the sentence that says so."""

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
    "a label that is not named": Bad(("there are unknown labels, food: sport, tech",), {"labels": ["sport", "tech"]}),
    "one column for both": Bad(("text_column and label_column are both 'label'",), {"text_column": "label"}),
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
    "a label that the training set lacks": labels("x y x y", "x z y", "none only in train, z only in test"),
    "labels in other letters": labels("pos neg", "Pos Neg", "neg, pos only in train, Neg, Pos only in test"),
    "a file of another task": Bad(("it has 2 columns, not the 3 expected: Class Index",), {"task_name": "agnews"}),
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
    "a file that is not there": path("none.csv", "there is no such file"),
    "a folder for a file": path("t.csv", "there is no such file", **{"t.csv/t.csv": ROWS}),
    "a path of two lines": path("a\nb.csv", "there is no such file"),
    "a path with a NUL byte": path("a\0b.csv", "there is no such file"),
    "a path that is too long": path("a" * 300 + ".csv", "there is no such file"),
    "a scheme that nobody knows": path("foo://t.csv", "Protocol not known: foo"),
    "a server that is not there": path("http://127.0.0.1:9/t.csv", "there is no such file"),
    "a spreadsheet": path("t.xlsx", "is neither a file that ends in .csv, ", "nor a data set of the hub"),
    "a number for a path": path("5", "nor a data set of the hub"),
    "folders of a scheme that nobody knows": Bad(
        ("'foo://x' is no local path or fsspec URL: Protocol not known: foo",),
        {"task_name": "imdb", "train_path": "foo://x", "test_path": "foo://x"},
    ),
    "a row with a field too few": table_csv(b"text,label\na,x\nb\n", "row 2 has 1 fields, not 2"),
    "a parquet file without its end": table_parquet(PARQUET[:-9], "Parquet magic bytes not found"),
    "a label that the test set lacks": labels("x y z x", "x y", "z only in train, none only in test"),
    "no training set": Bad(("task_name='text' needs train_path",), {"train_path": None}),
}


def write(folder: Path, files: dict[str, bytes]) -> None:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, corpus: tuple[Path, Path]) -> dict[str, Any]:
    """A working folder of this test's own, and the settings of a task whose data is good."""
    monkeypatch.chdir(tmp_path)
    return {"task_name": "text", "train_path": str(corpus[0]), "test_path": str(corpus[1])}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_table_is_one_clear_sentence_and_stays_as_it_is(name: str, here: dict[str, Any], tmp_path: Path) -> None:
    bad = BAD[name]
    write(tmp_path, bad.files)
    sentence = refusal(lambda: read_task(**{**here, **bad.settings}))
    assert all(part in sentence for part in bad.says), sentence
    assert {str(file.relative_to(tmp_path)): file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()} == (
        bad.files
    )


@pytest.mark.parametrize(("scheme", "package"), [("s3", "s3fs"), ("abfs", "adlfs"), ("sftp", "paramiko")])
def test_a_url_whose_package_is_missing_names_the_package(here: dict[str, Any], scheme: str, package: str) -> None:
    if find_spec(package):
        pytest.skip(f"{package} is here")
    url = f"{scheme}://place/t.csv"
    sentence = refusal(lambda: read_task(**{**here, "train_path": url}))
    assert repr(url) in sentence
    assert re.search(rf"[Ii]nstall.*{package}|{package}.*install", sentence)


def test_nan_among_words_is_a_word(here: dict[str, Any], tmp_path: Path) -> None:
    write(tmp_path, {"t.csv": b"text,label\n" + b"goal,nan\nchip,en\n" * 4})
    assert read_task("text", "t.csv", "t.csv")[1] == ("en", "nan")

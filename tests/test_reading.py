"""Files of every format are read unchanged, and an error in one is one sentence."""

import bz2
import csv
import gzip
import io
import json
import lzma
import re
import tracemalloc
from collections.abc import Iterator, Sequence
from datetime import date, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import datasets
import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import ClassLabel, Dataset, Features, Value
from helpers import refusal
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from scaling_fl.data.csv_rows import read_csv
from scaling_fl.data.files import read_folders, read_table
from scaling_fl.data.json_rows import read_json
from scaling_fl.data.labels import label_name, settle_labels, sort_labels
from scaling_fl.data.reader import pick, read_file
from scaling_fl.errors import printable

# Each is a text that some readers convert to another type.
TEXTS = [
    *("null", "NA", "nan", "None", "N/A", "", " spaced ", "007", "1.0", "2020-01-01", "True", "[1]"),
    *("a, b", 'say "so"', '"', "two\nlines", "two\r\nlines", "a\\nb\\", "tab\there", "ünïcødé 漢字 🙂"),
]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)


@pytest.fixture
def memory() -> Iterator[str]:
    """A folder in the memory of fsspec."""
    yield "memory://tables"
    fsspec.filesystem("memory").store.clear()


def quoted(field: object) -> str:
    return '"' + str(field).replace('"', '""') + '"'


def as_bytes(suffix: str, columns: dict[str, Sequence[Any]]) -> bytes:
    """Return a table in a format."""
    records = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    if suffix == ".csv":
        rows = [columns, *(record.values() for record in records)]
        return "".join(",".join(map(quoted, row)) + "\n" for row in rows).encode()
    if suffix == ".jsonl":
        return "".join(json.dumps(record) + "\n" for record in records).encode()
    if suffix == ".json":
        return json.dumps(records).encode()
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table(columns), sink)
    return sink.getvalue().to_pybytes()


def put(path: object, content: str | bytes) -> str:
    """Write a file at a local path or URL, with its folders."""
    filesystem, inner = fsspec.core.url_to_fs(str(path))
    filesystem.makedirs(inner.rpartition("/")[0], exist_ok=True)
    filesystem.pipe_file(inner, content.encode() if isinstance(content, str) else content)
    return str(path)


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".json", ".parquet", ".CSV"])
@pytest.mark.parametrize("place", ["{}", "file://{}", "memory://tables"])
def test_texts_are_read_unchanged_from_a_table(suffix: str, place: str, tmp_path: Path, memory: str) -> None:
    path = put(f"{place.format(tmp_path)}/table{suffix}", as_bytes(suffix.lower(), {"text": TEXTS, "label": TEXTS}))
    rows = read_table(path)
    assert rows["text"][:] == rows["label"][:] == TEXTS


@pytest.mark.parametrize(
    "content",
    [
        "\ufefftext,label\na,1\nb,2\n",
        "text,label\r\na,1\r\nb,2\r\n",
        "text,label\ra,1\rb,2",
        "\n\ntext,label\n\na,1\n\nb,2\n\n",
    ],
    ids=["byte order mark", "CR LF", "CR alone", "blank lines"],
)
def test_csv_dialects_are_accepted(content: str, tmp_path: Path) -> None:
    rows = read_table(put(tmp_path / "table.csv", content))
    assert rows.to_dict() == {"text": ["a", "b"], "label": ["1", "2"]}


def test_a_text_may_be_of_any_length(tmp_path: Path) -> None:
    text = "long " * 100_000
    assert read_table(put(tmp_path / "table.csv", f"text,label\n{text},1\n"))["text"][0] == text


@pytest.mark.parametrize("name", ["[1]", "t*t", "t?t", "a b%20c#d&é", ".hidden", "__hidden__", "**"])
@pytest.mark.parametrize("suffix", [".csv", ".jsonl"])
def test_a_path_is_not_a_glob_pattern(name: str, suffix: str, tmp_path: Path) -> None:
    for other in ("1", "tt", "txt", "a"):
        put(tmp_path / other / f"{other}{suffix}", as_bytes(suffix, {"text": ["another file"]}))
    path = put(tmp_path / name / f"{name}{suffix}", as_bytes(suffix, {"text": ["this"]}))
    assert read_table(path)["text"][:] == ["this"]
    put(tmp_path / name / "pos" / "0_9.txt", "this")
    assert read_folders(str(tmp_path / name), ["pos"])["text"][:] == ["this"]


@pytest.mark.parametrize(
    ("first_line", "has_header"),
    [("1,a,b", False), ("Class,Title,Text", True), ("Text,Class,More,Title", True), ("class,title,text", False)],
)
def test_a_header_is_recognised_by_its_column_names(first_line: str, has_header: bool, tmp_path: Path) -> None:
    row = ",".join("x" for _ in first_line.split(","))
    rows = read_table(put(tmp_path / "table.csv", f"{first_line}\n{row}\n"), ("Class", "Title", "Text"))
    assert len(rows) == (1 if has_header else 2)
    assert rows["Text"][:] == (["x"] if has_header else [first_line.split(",")[2], "x"])


@pytest.mark.parametrize("suffix", [".csv", ".jsonl"])
@pytest.mark.parametrize("place", ["{}", "memory://tables"])
def test_a_file_that_changed_is_read_again(suffix: str, place: str, tmp_path: Path, memory: str) -> None:
    for text in ("first", "other"):
        path = put(f"{place.format(tmp_path)}/table{suffix}", as_bytes(suffix, {"text": [text]}))
        assert read_table(path)["text"][:] == [text]


PARQUET = as_bytes(".parquet", {"text": ["a", "b"], "label": [0, 1]})


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("t.csv", None, "there is no such file"),
        ("t.txt", "text\n", "expected a file that ends in .csv, .tsv, .jsonl, .json, .parquet, got another ending"),
        ("t.csv.zip", "text\n", "got another ending"),
        ("t.parquet.gz", "text\n", "got another ending"),
        ("t.csv.gz", "text\n", "Not a gzipped file"),
        ("t.csv.gz", gzip.compress(b"text,label\na,1\n" * 99, mtime=0)[:-9], "ended before the end-of-stream marker"),
        ("t.tsv", 'text\tlabel\n"a\t1\tb\nc\t2\n', "line 3: unexpected end of data"),
        ("t.csv", "", "expected rows, got an empty file"),
        ("t.csv", "\n\n", "expected rows, got an empty file"),
        ("t.jsonl", "", "expected rows, got an empty file"),
        ("t.parquet", b"", "expected rows, got an empty file"),
        ("t.csv", "text,label\n", "expected a row below the header, got none"),
        ("t.json", "[]", "expected a row, got none"),
        ("t.parquet", as_bytes(".parquet", {"text": [], "label": []}), "expected a row, got none"),
        (
            "t.csv",
            "text,label,text,label\na,1,b,2\n",
            "expected each column once, got several called label, text. Rename them",
        ),
        ("t.csv", "text,label\na,1\nb\n", "row 2: expected 2 fields, got 1"),
        ("t.csv", "text,label\na,1\nb,2,3\n", "row 2: expected 2 fields, got 3"),
        ("t.csv", "text,label\nid1,a,1\nid2,b,2\n", "row 1: expected 2 fields, got 3"),
        ("t.csv", 'text,label\n"a" b,1\n', "line 2: ',' expected after '\"'"),
        ("t.csv", 'text,label\na,1\nb,"2\n', "line 3: unexpected end of data"),
        (
            "t.csv",
            "text,label\ncafé,1\n".encode("latin-1"),
            "line 2: expected UTF-8, got an invalid continuation byte. Save the file as UTF-8",
        ),
        ("t.csv", ("text,label\n" + "tea,1\n" * 9999 + "café,1\n").encode("latin-1"), "expected UTF-8, got an "),
        ("t.csv", "text,label\na,1\n".encode("utf-16"), "expected UTF-8, got an "),
        ("t.jsonl", '{"text": "a"}\n{"text":', "row 2: expected JSON, got an error: "),
        ("t.jsonl", '{"text": "a"},\n{"text": "b"}', "row 2: expected JSON, got an error: "),
        ("t.jsonl", '{"text": "a\nb"}', "row 1: expected JSON, got an error: "),
        ("t.json", '[{"text": "a"}', "row 1: expected , or ] after it, got ''"),
        ("t.json", '[{"text": "a"},]', "row 2: expected JSON, got an error: "),
        ("t.json", '[{"text": "a"}] {}', "expected one list, got more after it"),
        ("t.jsonl", '{"text": "a"}\n5\n', 'row 2: expected an object such as {"text"'),
        ("t.jsonl", b'{"text": "a"}\n{"text": "caf\xe9"}\n', "row 2: expected UTF-8, got an "),
        ("t.jsonl", '{"text": "a"}\n{"text": "\\udc00\\ud83d"}\n', "row 2: expected whole characters, got a surrogate"),
        ("t.json", "3", "row 1: expected an object such as "),
        ("t.parquet", PARQUET[:-9], "Parquet magic bytes not found"),
        ("t.parquet", PARQUET[: len(PARQUET) // 2], "Parquet"),
        ("t.parquet", "text,label\na,1\n", "Parquet"),
    ],
)
def test_a_file_that_cannot_be_read_is_refused(
    name: str, content: str | bytes | None, says: str, tmp_path: Path
) -> None:
    path = str(tmp_path / name) if content is None else put(tmp_path / name, content)
    sentence = refusal(lambda: read_table(path))
    assert says in sentence
    assert repr(path) in sentence


@pytest.mark.parametrize("path", ["nowhere://t.csv", "memory://tables/none.csv"])
def test_a_url_that_does_not_exist_is_refused(path: str) -> None:
    assert repr(path) in refusal(lambda: read_table(path))


def test_a_folder_is_refused_as_a_table(tmp_path: Path) -> None:
    put(tmp_path / "t.csv" / "t.csv", "text\na\n")
    assert "there is no such file" in refusal(lambda: read_table(str(tmp_path / "t.csv")))


def test_a_csv_with_other_columns_is_refused(tmp_path: Path) -> None:
    path = put(tmp_path / "t.csv", "a,b\n")
    assert "expected the 3 columns x, y, z, got 2 columns" in refusal(lambda: read_table(path, ("x", "y", "z")))


@pytest.mark.parametrize("place", ["{}", "file://{}", "memory://tables", "{}/"])
def test_folders_give_their_texts_a_label(place: str, tmp_path: Path, memory: str) -> None:
    root = place.format(tmp_path)
    for file, content in {"sci-fi/b": "2", "sci-fi/a": "1\r\n\n", "poems/a": b"caf\xe9", "unsup/a": "0"}.items():
        put(f"{root.rstrip('/')}/{file}.txt", content)
    put(f"{root.rstrip('/')}/sci-fi/notes.md", "no text")
    rows = read_folders(root, ["sci-fi", "poems"])
    assert list(zip(rows["label"], rows["text"], strict=True)) == [
        *(("poems", "caf\ufffd"), ("sci-fi", "1\n\n"), ("sci-fi", "2"))
    ]
    assert set(read_folders(root)["label"]) == {"sci-fi", "poems", "unsup"}


def test_a_folder_without_texts_of_a_label_is_refused(tmp_path: Path) -> None:
    put(tmp_path / "pos" / "0_9.txt", "good")
    assert f"'{tmp_path}/neg/*.txt': expected a folder" in refusal(lambda: read_folders(str(tmp_path), ["pos", "neg"]))
    assert "/*/*.txt': expected a folder of .txt files for each label, got none" in refusal(
        lambda: read_folders(str(tmp_path / "pos"))
    )


def texts_and_labels(path: str, columns: tuple[str | None, str | None] = (None, None)) -> tuple[list[str], list[str]]:
    """Return the texts of a file and the names of their labels."""
    rows = read_file("text", path, "train", columns)
    return rows["text"][:], rows["label"][:]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("t.csv", "v1,v2,,,\nx,a,,,\ny,b,,,\n"),
        ("t.csv", "v1,v2,,,\nx,a\ny,b,,,,,,\n"),
        ("t.csv", ",,v2,v1\n1,2,a,x\n3,4,b,y\n"),
        ("t.csv", "n,v1,n,v2,n\n1,x,2,a,3\n1,y,2,b,3,\n"),
        ("t.csv", b"v1,v2,n\xe9\nx,a,caf\xe9\ny,b,\0\n"),
        ("t.csv", "v1;v2\nx;a\ny;b\n"),
        ("t.csv", '"v1";"v2"\r\n"x";"a"\r\n"y";"b"\r\n'),
        ("t.csv", "v1;v2;;\nx;a;1,5;\ny;b\n"),
        ("t.csv", "v1\tv2\nx\ta\ny\tb\n"),
        ("t.csv", "v1|v2\nx|a\ny|b\n"),
        ("t.tsv", "v1\tv2\nx\ta\ny\tb\n"),
        ("t.TAB", '"v1"\t"v2"\t\n"x"\t"a"\t\ny\tb\n'),
        ("t.tsv", "v1,v2\nx,a\ny,b\n"),
        ("t.csv.gz", gzip.compress(b"v1,v2\nx,a\ny,b\n", mtime=0)),
        ("t.tsv.bz2", bz2.compress(b"v1\tv2\nx\ta\ny\tb\n")),
        ("t.jsonl.xz", lzma.compress(b'{"v1": "x", "v2": "a"}\n{"v1": "y", "v2": "b"}\n')),
        ("t.jsonl", '{"v1": "x", "v2": "a", "n": 1, "n": 2}\n{"v1": "y", "n": {"m": [1, "2"]}, "v2": "b"}\n'),
        ("t.ndjson", b'{"v1": "x", "v2": "a", "n": "caf\xe9"}\r\n\n {"v2": "b", "n": "\\ud800", "v1": "y"}'),
        ("t.json", '\ufeff [ {"v1": "x",\n"v2": "a"} , {"v1": "y", "n": 1e999, "v2": "b"} ] \n'),
        ("t.json", '{"v1": "x", "v2": "a"}{"v1": "y", "v2": "b"}'),
    ],
)
def test_only_the_columns_in_use_are_checked(name: str, content: str | bytes, tmp_path: Path) -> None:
    assert texts_and_labels(put(tmp_path / name, content), ("v2", "v1")) == (["a", "b"], ["x", "y"])


def test_columns_of_parquet_that_are_not_in_use_may_be_of_any_type(tmp_path: Path) -> None:
    unusual = [pa.array([[1], None]), pa.array([{"a": 1}, {"a": 2}]), pa.array([b"\xff", None]), pa.nulls(2)]
    table = pa.Table.from_arrays([pa.array(["a", "b"]), pa.array(["x", "y"]), *unusual], names=["v2", "v1", *"nnmm"])
    pq.write_table(table, tmp_path / "t.parquet")
    assert texts_and_labels(str(tmp_path / "t.parquet"), ("v2", "v1")) == (["a", "b"], ["x", "y"])


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("t.csv", "text,label,more\na,x\n", "row 1: expected 3 fields, got 2"),  # it may be an incomplete row
        ("t.csv", "text,label,,\na,x\nb\n", "row 2: expected 4 fields, got 1"),
        ("t.csv", "text,label,,\na,x,,,1\n", "row 1: expected 4 fields, got 5"),
        ("t.csv", "text;labels\na;x\n", "label_column: expected a column of 't.csv' ('text', 'labels'), got 'label'"),
        (
            "t.csv",
            '"text","labels"\n"a","x"\n',
            "label_column: expected a column of 't.csv' ('text', 'labels'), got 'label'",
        ),
        ("t.csv", '"te"xt,label\na,x\n', "line 1: ',' expected after"),
        ("t.csv", "text,label,label\na,x,y\n", "expected each column once, got several called label. Rename them"),
        ("t.csv", b"id,text,label\n\xe9,a,x\n1,caf\xe9,y\n", "line 3: expected UTF-8, got an "),
        ("t.csv", "id,text,label\n\0,a,x\n1,b\0,y\n", "line 3: expected UTF-8, got an unexpected NUL byte"),
        ("t.jsonl", '{"text": "a", "label": 1, "label": 2}\n', "row 1: expected 'label' once, got it twice"),
        (
            "t.jsonl",
            '{"text": "a", "label": 1}\n{"text": 1.5, "label": 1}\n',
            "row 2: text_column='text': expected texts, got a number",
        ),
        ("t.jsonl", '{"text": true, "label": 1}\n', "row 1: text_column='text': expected texts, got True or False"),
        (
            "t.jsonl",
            '{"text": "a", "label": {"b": 1}}\n',
            "row 1: label_column='label': expected texts or numbers, got lists or records",
        ),
        (
            "t.jsonl",
            '{"text": "a", "x": 1}\n{"text": "b", "y": 1}\n',
            "a column of 't.jsonl' ('text', 'x', 'y'), got 'label'",
        ),
        (
            "t.jsonl",
            '{"text": "a"}\n{"text": "b", "label": 1}\n',
            "'t.jsonl': row 1: expected a value in 'label', got none",
        ),
    ],
)
def test_errors_in_the_columns_in_use_are_refused(
    name: str, content: str | bytes, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    put(tmp_path / name, content)
    assert says in refusal(lambda: read_file("text", name, "train"))


@pytest.mark.parametrize(
    ("value", "name"),
    [
        ('"2020-01-01"', "2020-01-01"),
        ('"2020-01-01T00:00:00Z"', "2020-01-01T00:00:00Z"),
        ('"12:30"', "12:30"),
        ('"true"', "true"),
        ("true", "True"),
        ('"null"', "null"),
        ("12345678901234567891", "12345678901234567891"),
        ("9223372036854775809", "9223372036854775809"),
        ("-9223372036854775810", "-9223372036854775810"),
        ("9007199254740993.0", "9007199254740993"),
        ("1" * 5000, "1" * 5000),
        ("0.1", "0.1"),
        ("1e3", "1000"),
        ("0.30000000000000000001", "0.30000000000000000001"),
        ("5", "5"),
        ('"5"', "5"),
        ("5.0", "5"),
    ],
)
@pytest.mark.parametrize("is_list", [False, True])
def test_a_json_value_is_read_as_it_is_written(value: str, name: str, is_list: bool, tmp_path: Path) -> None:
    rows = [f'{{"text": "a", "label": {label}}}' for label in ('"other"', value)]
    path = put(tmp_path / "t.json", f"[{', '.join(rows)}]" if is_list else "\n".join(rows))
    assert texts_and_labels(path)[1] == ["other", name]


@pytest.mark.parametrize("text", ["2020-01-01", "12:30:00", "1", "true", "null", "1e3", ""])
def test_texts_that_look_like_other_types_stay_texts(text: str, tmp_path: Path) -> None:
    path = put(tmp_path / "t.jsonl", f'{{"text": "{text}", "label": 1}}\n' * 3)
    assert texts_and_labels(path)[0] == [text] * 3


TREES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda trees: st.lists(trees, max_size=3) | st.dictionaries(st.text(max_size=3), trees, max_size=3),
    max_leaves=5,
)
RECORDS = st.fixed_dictionaries({"text": st.text(), "label": st.text(), "more": TREES})


@given(records=st.lists(RECORDS, min_size=1, max_size=5), chunk=st.integers(1, 40), style=st.sampled_from("[i\n "))
@settings(deadline=None, max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_json_is_read_as_python_wrote_it_in_chunks_of_any_size(
    records: list[dict], chunk: int, style: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("scaling_fl.data.json_rows.CHUNK", chunk)
    content = {
        "[": json.dumps(records),
        "i": json.dumps(records, indent=2, ensure_ascii=False),
        "\n": "\n".join(map(json.dumps, records)),
        " ": "".join(json.dumps(record, indent=1) for record in records),
    }[style]
    found = list(read_json(put("memory://t.json", content), ("text", "label")))
    assert found == [("text", "label"), *((record["text"], record["label"]) for record in records)]


@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".csv"])
def test_reading_needs_less_memory_than_the_file(suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("scaling_fl.data.json_rows.CHUNK", 2**16)
    columns = {"text": ["goal match team " * 50] * 12_000, "label": [1, 2] * 6_000}
    path = put(tmp_path / f"t{suffix}", as_bytes(suffix, columns))
    del columns
    tracemalloc.start()
    try:
        assert len(read_file("text", path, "train")) == 12_000
        assert tracemalloc.get_traced_memory()[1] < 0.6 * Path(path).stat().st_size
    finally:
        tracemalloc.stop()


FIELDS = st.text(st.characters(exclude_characters="\0\r\n\t", exclude_categories=["Cs"]), min_size=1, max_size=6)
FIELDS |= st.text('"a ', min_size=1, max_size=6)


@given(rows=st.lists(st.tuples(FIELDS, FIELDS), min_size=1, max_size=4), is_quoted=st.booleans())
@settings(deadline=None, max_examples=150)
def test_quotes_in_a_tsv_are_read_in_every_style(rows: list[tuple[str, str]], is_quoted: bool) -> None:
    file = io.StringIO()
    if is_quoted:
        csv.writer(file, delimiter="\t").writerows([("text", "label"), *rows])
    else:  # each quote stands for itself, but a pair around a field
        rows = [row for row in rows if not any(re.fullmatch('"(|.*")', field) for field in row)] or [("a", 'b"')]
        file.write("\n".join("\t".join(row) for row in [("text", "label"), *rows]))
    try:
        found = list(read_csv(put("memory://t.tsv", file.getvalue()), ("text", "label"), ()))
    except ValueError as error:  # of quotes at the start of one line and the end of another
        assume(is_quoted or "stand for themselves" not in str(error))
        raise
    assert found == [("text", "label"), *rows]


def test_a_tsv_may_have_texts_of_several_lines(tmp_path: Path) -> None:
    path = put(tmp_path / "t.tsv", 'label\ttext\nx\t"one\ntwo ""three"""\n"y"\tb\n')
    assert texts_and_labels(path) == (['one\ntwo "three"', "b"], ["x", "y"])
    path = put(tmp_path / "two.tsv", 'label\ttext\nx\t"one\ntwo\tthree"\n"y"\tb\n')
    assert "got some that stand for themselves or enclose several rows" in refusal(lambda: texts_and_labels(path))


@pytest.mark.parametrize(
    ("labels", "names"),
    [
        (pa.array([0.1, 16777216], pa.float32()), ["0.1", "16777216"]),
        (pa.array([0.1, 2], pa.float16()), ["0.1", "2"]),
        (pa.array([0.1, 1e16]), ["0.1", "10000000000000000"]),
        (pa.array([2**64 - 1, 2**64 - 2], pa.uint64()), ["18446744073709551615", "18446744073709551614"]),
        (pa.array([-(2**63), 2**63 - 1]), ["-9223372036854775808", "9223372036854775807"]),
        (pa.array([Decimal("12345678901234567890123456789"), Decimal("1.00")]), None),
        (pa.array(["x", "y"], pa.string_view()), ["x", "y"]),
        (pa.array(["x", "y"], pa.large_string()), ["x", "y"]),
        (pa.array(["x", "y"]).dictionary_encode(), ["x", "y"]),
        (pa.array([7, 8]).dictionary_encode(), ["7", "8"]),
        (pa.array([True, False]), ["True", "False"]),
        (pa.array([date(2020, 1, 1), date(2020, 6, 1)]), ["2020-01-01", "2020-06-01"]),
        (pa.array([datetime(2020, 1, 1, 12)] * 2, pa.timestamp("ns")), ["2020-01-01 12:00:00"] * 2),
    ],
    ids=lambda value: str(getattr(value, "type", "")),
)
@pytest.mark.parametrize("kind", [pa.string_view(), pa.large_string(), pa.dictionary(pa.int32(), pa.string())])
def test_every_common_parquet_type_is_read(
    labels: pa.Array, names: list[str] | None, kind: pa.DataType, tmp_path: Path
) -> None:
    pq.write_table(pa.table({"text": pa.array(["a", "b"]).cast(kind), "label": labels}), tmp_path / "t.parquet")
    expected = names or ["12345678901234567890123456789", "1"]
    assert texts_and_labels(str(tmp_path / "t.parquet")) == (["a", "b"], expected)


@pytest.mark.parametrize(
    ("labels", "says"),
    [
        (pa.nulls(2), "'t.parquet': row 1: expected a value in 'label', got none"),
        (pa.array([0.5, None], pa.float32()), "'t.parquet': row 2: expected a value in 'label', got none"),
        (pa.array([0.5, float("nan")], pa.float32()), "'t.parquet': row 2: expected a value in 'label', got none"),
        (pa.array([b"x", b"y"]), "label_column='label': expected texts or numbers, got binary"),
        (pa.array([[1], [2]]), "label_column='label': expected texts or numbers, got list<element: int64>"),
    ],
    ids=lambda value: str(getattr(value, "type", "")),
)
def test_parquet_without_labels_is_refused(
    labels: pa.Array, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    pq.write_table(pa.table({"text": ["a", "b"], "label": labels}), "t.parquet")
    assert says in refusal(lambda: read_file("text", "t.parquet", "train"))


@pytest.mark.parametrize(
    ("values", "name"),
    [
        ([1, 1.0, "1", "1.0", "1.", " 1 "], "1"),
        ([-2, -2.0, "-2", "-2.00"], "-2"),
        ([0.5, "0.5"], "0.5"),
        (["good", " good\n"], "good"),
        (["v1.0"], "v1.0"),
        (["01"], "01"),
        ([True], "True"),
        ([0, -0.0, "-0", "-0.0"], "0"),
        (["caf\xe9", "cafe\u0301", "caf\xe9\xa0", "\ufeffcaf\xe9", "ca\xadf\u200be\u0301", "caf\xe9\u200d"], "caf\xe9"),
        (["New York", "New\xa0York", "New\u202fYork\u200e", "\u202aNew\u3000York\u202c"], "New York"),
        (["a\nb", "a\r\nb", "a\u2028b\0"], "a\nb"),
        (["\u212b"], "\xc5"),
        ([None, float("nan"), "", "  ", "\u200b", "\xa0\ufeff"], ""),
    ],
)
def test_a_label_has_one_name_in_every_format(values: list, name: str) -> None:
    assert {label_name(value) for value in values} == {name}


@pytest.mark.parametrize(
    "labels",
    [
        ("-1", "0", "0.5", "2", "10"),
        ("01", "1"),  # equal as numbers, and still in one order on every rank
        ("10", "2", "b"),
        ("1/2", "1e3", "inf", "nan"),
    ],
)
def test_labels_are_sorted_by_number_where_all_are_numbers(labels: tuple[str, ...]) -> None:
    assert sort_labels(labels[::-1]) == sort_labels(labels) == labels


def table(labels: list, texts: Sequence[object] = ("a", "b", "c"), classes: Sequence[str] = ()) -> Dataset:
    rows = Dataset.from_dict({"text": list(texts[: len(labels)]), "label": labels})
    return rows.cast(Features({"text": Value("string"), "label": ClassLabel(names=list(classes))})) if classes else rows


@pytest.mark.parametrize(
    ("rows", "columns", "says"),
    [
        (table(["x"]), ("body", "label"), "text_column: expected a column of 't.csv' ('text', 'label'), got 'body'"),
        (table(["x"]), ("text", "stars"), "label_column: expected a column of 't.csv' ('text', 'label'), got 'stars'"),
        (table([]), ("text", "label"), "'t.csv': expected one row or more, got none"),
        (
            table(["x", "", "y"]),
            ("text", "label"),
            "'t.csv': row 2: expected a value in 'label', got none. Leave the row out",
        ),
        (table(["x", "y", " "]), ("text", "label"), "'t.csv': row 3: expected a value in 'label', got none"),
        (table([1, None]), ("text", "label"), "'t.csv': row 2: expected a value in 'label', got none"),
        (table([1.0, float("nan")]), ("text", "label"), "'t.csv': row 2: expected a value in 'label', got none"),
        (
            table([0, -1], classes=["x", "y"]),
            ("text", "label"),
            "'t.csv': row 2: expected a value in 'label', got none",
        ),
        (
            table([0, None], classes=["x", "y"]),
            ("text", "label"),
            "'t.csv': row 2: expected a value in 'label', got none",
        ),
        (table(["x", "y"], ["a", None]), ("text", "label"), "'t.csv': row 2: expected a value in 'text', got none"),
        (table(["x"], [5]), ("text", "label"), "'t.csv': text_column='text': expected texts, got int64"),
        (table(["x"], [["a"]]), ("text", "label"), "expected texts, got list<item: string>"),
        (
            table([["x"]]),
            ("text", "label"),
            "label_column='label': expected texts alone or numbers alone, got lists, records or several",
        ),
        (
            table([{"x": 1}]),
            ("text", "label"),
            "label_column='label': expected texts alone or numbers alone, got lists, records or several",
        ),
    ],
)
def test_a_table_without_texts_or_labels_is_refused(rows: Dataset, columns: tuple[str, str], says: str) -> None:
    assert says in refusal(lambda: pick(rows, "t.csv", columns))


def test_one_column_for_texts_and_labels_is_refused() -> None:
    assert "text_column, label_column: expected two columns, got 'label' for both" in refusal(
        lambda: read_file("text", "none.csv", "train", ("label", None))
    )


KNOWN = {"1": "World", "2": "Sports"}


def settle(
    train: Dataset, test: Dataset, known: dict[str, str] | None = None, named: Sequence[str] = ()
) -> tuple[tuple[str, ...], list[str], list[str]]:
    """Return the label names of a training and a test set, and the label of each row."""
    known = {name: name for name in named} if named else known
    rows = {split: pick(of, "t.csv", ("text", "label"), known) for split, of in (("train", train), ("test", test))}
    found = [(split, split, of_split.unique("label")) for split, of_split in rows.items()]
    names = settle_labels(found, known, may_lack=bool(named))
    return names, rows["train"]["label"][:], rows["test"]["label"][:]


@pytest.mark.parametrize(
    ("train", "test", "known", "says"),
    [
        (
            ["x", "y"],
            ["x", "z"],
            None,
            "the same in train and test, or each at two sites or more, got y only in train, z only in test. ",
        ),
        (["x", "y"], ["x"], None, "got y only in train. "),
        (["x", "y"], ["x", "y", "z"], None, "got z only in test. "),
        (["x", "x"], ["x"], None, "expected two or more in the training data, got x"),
        ([2, 2], [1, 2], KNOWN, "expected two or more in the training data, got Sports"),
        ([1, 3], [2], KNOWN, "row 2: expected a label out of 1, 2, World, Sports, got 3"),
        ([1, 2], [5], KNOWN, "row 1: expected a label out of 1, 2, World, Sports, got 5"),
        (
            ["a long text\n" * 99, "b"],
            ["b"],
            KNOWN,
            "row 1: expected a label out of 1, 2, World, Sports, got a long text a long te...",
        ),
    ],
)
def test_labels_that_do_not_match_are_refused(train: list, test: list, known: dict | None, says: str) -> None:
    assert says in refusal(lambda: settle(table(train), table(test), known))


def test_a_thousand_labels_that_differ_are_not_all_listed() -> None:
    many = Dataset.from_dict({"text": ["a"] * 1000, "label": [f"label {i}" for i in range(1000)]})
    assert "..." in refusal(lambda: settle(many, table(["x", "y"])))


@pytest.mark.parametrize(
    ("train", "test", "known", "names", "in_train", "in_test"),
    [
        (table([10, 9, 10]), table(["9.0", "10"]), None, ("9", "10"), [1, 0, 1], [0, 1]),
        (table([2.0, 1.0]), table([1, 2]), None, ("1", "2"), [1, 0], [0, 1]),
        (table(["pos", "neg"]), table([0, 1], classes=["pos", "neg"]), None, ("neg", "pos"), [1, 0], [1, 0]),
        (table([1, 0], classes=["a", "b", "never"]), table(["a", "b"]), None, ("a", "b"), [1, 0], [0, 1]),
        (table([True, False]), table(["False", "True"]), None, ("False", "True"), [1, 0], [0, 1]),
        (table([2, 1]), table(["Sports", "World"]), KNOWN, ("World", "Sports"), [1, 0], [1, 0]),
        (table([2, 1]), table([2]), KNOWN, ("World", "Sports"), [1, 0], [1]),
    ],
)
def test_labels_are_matched_by_name(
    train: Dataset, test: Dataset, known: dict | None, names: tuple[str, ...], in_train: list, in_test: list
) -> None:
    found, *labels = settle(train, test, known)
    assert found == names
    assert [[names.index(label) for label in of_split] for of_split in labels] == [in_train, in_test]


@pytest.mark.parametrize("other", ["x\u200dy", "x\u200cy", "xy\ufe0f"])
@pytest.mark.parametrize("known", [None, {"xy": "xy", "b": "b"}])
def test_labels_that_differ_in_invisible_characters_are_refused_with_their_code_points(
    other: str, known: dict | None
) -> None:
    for refused in (
        lambda: settle(table(["xy", other, "b"]), table(["xy", other, "b"]), known),
        lambda: settle(table(["xy", "b"]), table([other, "b"]), known),
        lambda: settle_labels([("s", "train", ["xy", "b"]), ("s", "test", ["b"]), ("t", "train", ["b", other])], known),
    ):
        assert " ".join(f"U+{ord(character):04X}" for character in other) in refusal(refused)


def test_a_label_name_is_printed_on_one_line() -> None:
    assert printable("a\nb\x1b[0m\u202ec \U0001f600 \xe9\u200d") == "a\\nb\\x1b[0m\\u202ec \U0001f600 \xe9\\u200d"


def test_the_setting_labels_defines_the_classes_and_their_order() -> None:
    found = settle(table(["a", "a"]), table(["b", "1"]), named=["b", "c", "a", "1"])
    assert found == (("b", "c", "a", "1"), ["a", "a"], ["b", "1"])
    assert "row 1: expected a label out of a, c, got b" in refusal(
        lambda: settle(table(["a", "a"]), table(["b"]), named=["a", "c"])
    )


def test_a_label_of_one_site_only_is_refused_unless_the_setting_names_it() -> None:
    one_each = [("s", "train", ["a"]), ("s", "test", ["a"]), ("t", "train", ["b"])]
    assert "at two sites or more, got a only in s, b only in t" in refusal(lambda: settle_labels(one_each, None))
    for may_lack in (False, True):
        assert settle_labels(one_each, {"b": "b", "a": "a"}, may_lack=may_lack) == ("b", "a")
    of_all = [(site, split, ["a", "b"]) for site in "st" for split in ("train", "test")]
    assert settle_labels(of_all, None) == ("a", "b")
    alone = [("s", "train", ["a"]), ("s", "test", ["a"]), ("t", "train", ["a"])]
    known = {"a": "a", "b": "b"}
    assert "expected two or more in the training data, got a" in refusal(lambda: settle_labels(alone, known))
    assert "expected two or more in the training data, got a" in refusal(lambda: settle_labels(alone, None))
    assert settle_labels(alone, known, may_lack=True) == ("a", "b")


def test_a_label_of_test_files_only_is_refused_on_every_node() -> None:
    of_sites = [(site, split, ["a", "b", *("c" * (split == "test"))]) for site in "st" for split in ("train", "test")]
    assert "got also c" in refusal(lambda: settle_labels(of_sites, None))
    of_one = [("s", "train", ["a", "b"]), ("s", "test", ["b", "c"])]
    assert "got also c" in refusal(lambda: settle_labels(of_one, None))
    assert settle_labels([("s", "train", ["a", "b"]), ("s", "test", ["b"])], None) == ("a", "b")


def test_equal_numbers_of_json_are_one_label(tmp_path: Path) -> None:
    written = ["1", "1e0", "1.0", '"1"', "10E-1", "0.5", "0.50", "5e-1", "1e16", "10000000000000000"]
    path = tmp_path / "t.jsonl"
    path.write_text("".join(f'{{"text": "a", "label": {label}}}\n' for label in written))
    assert read_file("text", str(path), "train")["label"] == ["1"] * 5 + ["0.5"] * 3 + ["1" + "0" * 16] * 2


@pytest.mark.parametrize("invisible", "\u115f\u17b4\ufff9\U0001bca0\U0001d159")
def test_characters_that_print_nothing_make_no_separate_label(invisible: str) -> None:
    assert label_name(f"x{invisible}y") == "xy"

"""Files of every format are read as they stand, and what is wrong with one is said in a sentence."""

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import datasets
import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import refusal
from datasets import ClassLabel, Dataset, Features, Value

from scaling_fl.tasks.corpus import label_name, make_corpus, pick, sort_labels
from scaling_fl.tasks.reading import read_folders, read_table

# Each is a text that some reader takes for something else.
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
    """A folder of fsspec that is not on the disk."""
    yield "memory://tables"
    fsspec.filesystem("memory").store.clear()


def quoted(field: object) -> str:
    return '"' + str(field).replace('"', '""') + '"'


def as_bytes(suffix: str, columns: dict[str, Sequence[Any]]) -> bytes:
    """A table in a format."""
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
def test_texts_come_out_of_a_table_as_they_stand(suffix: str, place: str, tmp_path: Path, memory: str) -> None:
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
def test_a_csv_may_be_written_in_other_ways(content: str, tmp_path: Path) -> None:
    rows = read_table(put(tmp_path / "table.csv", content))
    assert rows.to_dict() == {"text": ["a", "b"], "label": ["1", "2"]}


def test_a_text_may_be_of_any_length(tmp_path: Path) -> None:
    text = "long " * 100_000
    assert read_table(put(tmp_path / "table.csv", f"text,label\n{text},1\n"))["text"][0] == text


@pytest.mark.parametrize("name", ["[1]", "t*t", "t?t", "a b%20c#d&é", ".hidden", "__hidden__", "**"])
@pytest.mark.parametrize("suffix", [".csv", ".jsonl"])
def test_a_path_is_a_name_and_no_pattern(name: str, suffix: str, tmp_path: Path) -> None:
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
def test_a_header_is_known_by_the_names_of_its_columns(first_line: str, has_header: bool, tmp_path: Path) -> None:
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
        ("t.tsv", "text\n", "is no table: a file that ends in .csv, .jsonl, .json, .parquet would do"),
        ("t.csv.gz", "text\n", "is no table"),
        ("t.csv", "", "it is empty"),
        ("t.csv", "\n\n", "it is empty"),
        ("t.jsonl", "", "it is empty"),
        ("t.parquet", b"", "it is empty"),
        ("t.csv", "text,label\n", "it has no row below its header"),
        ("t.json", "[]", "it has no row"),
        ("t.parquet", as_bytes(".parquet", {"text": [], "label": []}), "it has no row"),
        ("t.csv", "text,label,text,label\na,1,b,2\n", "it has several columns called label, text: rename them"),
        ("t.csv", "text,label\na,1\nb\n", "row 2 has 1 fields, not 2"),
        ("t.csv", "text,label\na,1\nb,2,3\n", "row 2 has 3 fields, not 2"),
        ("t.csv", "text,label\nid1,a,1\nid2,b,2\n", "row 1 has 3 fields, not 2"),
        ("t.csv", 'text,label\n"a" b,1\n', "line 2: ',' expected after '\"'"),
        ("t.csv", 'text,label\na,1\nb,"2\n', "line 3: unexpected end of data"),
        ("t.csv", "text,label\ncafé,1\n".encode("latin-1"), "it is not UTF-8 (invalid continuation byte)"),
        ("t.csv", ("text,label\n" + "tea,1\n" * 9999 + "café,1\n").encode("latin-1"), "it is not UTF-8"),
        ("t.csv", "text,label\na,1\n".encode("utf-16"), "it is not UTF-8"),
        ("t.jsonl", '{"text": "a"}\n{"text":', "JSON parse error"),
        ("t.json", "3", "its first row is no object"),
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
def test_a_url_that_leads_nowhere_is_refused(path: str) -> None:
    assert repr(path) in refusal(lambda: read_table(path))


def test_a_folder_is_no_table(tmp_path: Path) -> None:
    put(tmp_path / "t.csv" / "t.csv", "text\na\n")
    assert "there is no such file" in refusal(lambda: read_table(str(tmp_path / "t.csv")))


def test_a_csv_of_other_columns_is_refused(tmp_path: Path) -> None:
    path = put(tmp_path / "t.csv", "a,b\n")
    assert "it has 2 columns, not the 3 expected: x, y, z" in refusal(lambda: read_table(path, ("x", "y", "z")))


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
    assert f"there are no texts {tmp_path}/neg/*.txt" in refusal(lambda: read_folders(str(tmp_path), ["pos", "neg"]))
    assert "a folder of .txt files for each label would do" in refusal(lambda: read_folders(str(tmp_path / "pos")))


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
        ([None, float("nan"), "", "  "], ""),
    ],
)
def test_a_label_has_one_name_however_it_is_written(values: list, name: str) -> None:
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
        (table(["x"]), ("body", "label"), "text_column='body' is not in 't.csv': 'text', 'label' would do"),
        (table(["x"]), ("text", "stars"), "label_column='stars' is not in 't.csv': 'text', 'label' would do"),
        (table(["x"]), ("text", "text"), "text_column and label_column are both 'text': two columns would do"),
        (table([]), ("text", "label"), "'t.csv' has no row: one or more would do"),
        (table(["x", "", "y"]), ("text", "label"), "row 2 of 't.csv' has no label: give it one or leave it out"),
        (table(["x", "y", " "]), ("text", "label"), "row 3 of 't.csv' has no label"),
        (table([1, None]), ("text", "label"), "row 2 of 't.csv' has no label"),
        (table([1.0, float("nan")]), ("text", "label"), "row 2 of 't.csv' has no label"),
        (table([0, -1], classes=["x", "y"]), ("text", "label"), "row 2 of 't.csv' has no label"),
        (table([0, None], classes=["x", "y"]), ("text", "label"), "row 2 of 't.csv' has no label"),
        (table(["x", "y"], ["a", None]), ("text", "label"), "row 2 of 't.csv' has no text"),
        (table(["x"], [5]), ("text", "label"), "text_column='text' of 't.csv' holds int64: a column of texts would do"),
        (table(["x"], [["a"]]), ("text", "label"), "holds list<item: string>"),
        (table([["x"]]), ("text", "label"), "label_column='label' of 't.csv' holds lists, records or several types"),
        (table([{"x": 1}]), ("text", "label"), "label_column='label' of 't.csv' holds lists, records or several types"),
    ],
)
def test_a_table_without_texts_or_labels_is_refused(rows: Dataset, columns: tuple[str, str], says: str) -> None:
    assert says in refusal(lambda: pick(rows, "t.csv", *columns))


def test_labels_of_mixed_types_in_one_column_are_refused(tmp_path: Path) -> None:
    path = put(tmp_path / "t.jsonl", '{"text": "a", "label": 1}\n{"text": "b", "label": "x"}\n')
    assert "texts alone or numbers alone would do" in refusal(lambda: pick(read_table(path), path, "text", "label"))


KNOWN = {"1": "World", "2": "Sports"}


@pytest.mark.parametrize(
    ("train", "test", "known", "says"),
    [
        (["x", "y"], ["x", "z"], None, "differ, and the same in both would do: y only in train, z only in test"),
        (["x", "y"], ["x"], None, "y only in train, none only in test"),
        (["x", "y"], ["x", "y", "z"], None, "none only in train, z only in test"),
        (["x", "x"], ["x"], None, "there is one label only, x: a classifier needs two or more"),
        ([2, 2], [1, 2], KNOWN, "there is one label only, 2"),
        ([1, 3], [2], KNOWN, "there are unknown labels, 3: 1, 2, World, Sports would do"),
        ([1, 2], [5], KNOWN, "there are unknown labels, 5:"),
        (["a long text\n" * 99, "b"], ["b"], KNOWN, "there are unknown labels, a long text a long te..., b:"),
    ],
)
def test_labels_that_do_not_fit_are_refused(train: list, test: list, known: dict | None, says: str) -> None:
    assert says in refusal(lambda: make_corpus(table(train), table(test), known))


def test_a_thousand_labels_that_differ_are_not_all_listed() -> None:
    many = Dataset.from_dict({"text": ["a"] * 1000, "label": [f"label {i}" for i in range(1000)]})
    assert "..." in refusal(lambda: make_corpus(many, table(["x", "y"])))


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
def test_labels_become_indices_into_their_names(
    train: Dataset, test: Dataset, known: dict | None, names: tuple[str, ...], in_train: list, in_test: list
) -> None:
    corpus = make_corpus(train, test, known)
    assert corpus.label_names == names
    assert corpus.train["label"][:] == in_train
    assert corpus.test["label"][:] == in_test
    assert corpus.train.features["label"] == Value("int64")
    assert re.sub("large_", "", corpus.train.features["text"].dtype) == "string"

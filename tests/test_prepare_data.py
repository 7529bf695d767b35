"""Raw files of Dolly, Alpaca and OASST1 become pairs for training and validation."""

import gzip
import json
import re
import runpy
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers import ROOT, refusal

from scaling_fl.data.conversation_rows import read_conversations
from scaling_fl.data.prepare import read_pairs, split_pairs, write_rows

Row = dict[str, Any]
main: Callable[[list[str]], None] = runpy.run_path(str(ROOT / "scripts/prepare_data.py"))["main"]


def message(name: str, parent: str | None, text: str, rank: float | None = None, **fields: Any) -> Row:
    row = {"message_id": name, "parent_id": parent, "text": text, "rank": rank, "lang": "en", "deleted": False}
    role = "prompter" if parent is None or name.startswith("q") else "assistant"
    return row | {"message_tree_id": f"tree of {name[0]}", "role": role} | fields


FLAT = [
    message("b", "a", "second best", 1.0),
    message("a", None, "How?"),
    message("d", "a", "not ranked"),
    message("c", "a", "best", 0.0, message_tree_id="tree of a"),
    message("e", "a", "removed", -1.0, deleted=True),
    message("f", "a", "am besten", -1.0, lang="de"),
    message("q", "c", "And then?"),
    message("r", "q", "So."),
    message("g", None, "Wie?", lang="de"),
    message("h", "g", "So.", 0.0, lang="de"),
    message("n", None, "No reply?"),
]


def put_json(path: Path, rows: list[Row]) -> str:
    path.write_text(json.dumps(rows))
    return str(path)


def put_lines(path: Path, rows: list[Row]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def put_parquet(path: Path, rows: list[Row]) -> str:
    pq.write_table(pa.Table.from_pylist(rows), path)
    return str(path)


def as_tree(name: str) -> Row:
    """The messages of FLAT below one, as a tree."""
    (row,) = [row for row in FLAT if row["message_id"] == name]
    return row | {"replies": [as_tree(other["message_id"]) for other in FLAT if other["parent_id"] == name]}


def put_trees(path: Path, rows: list[Row]) -> str:
    roots = [row["message_id"] for row in rows if row["parent_id"] is None]
    return put_lines(path, [{"message_tree_id": f"tree of {name}", "prompt": as_tree(name)} for name in roots])


def read_lines(path: Path) -> list[Row]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def fail(arguments: list[str]) -> str:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    sentence = str(caught.value.code)
    assert sentence.startswith("error: ")
    assert "\n" not in sentence
    return sentence


@pytest.mark.parametrize(
    ("name", "put"), [("a.parquet", put_parquet), ("a.jsonl", put_lines), ("t.jsonl", put_trees), ("a.json", put_json)]
)
def test_the_best_reply_to_a_first_prompt_in_one_language_is_taken(
    tmp_path: Path, name: str, put: Callable[[Path, list[Row]], str]
) -> None:
    path = put(tmp_path / name, FLAT)
    english = read_pairs(path, "en")
    assert english.rows == [{"prompt": "How?", "response": "best", "message_tree_id": "tree of a", "lang": "en"}]
    assert english.left_out == {"not the first prompt of its tree": 1, "another language": 1, "no reply": 1}
    assert [row["response"] for row in read_pairs(path, "de").rows] == ["So."]
    assert [row["response"] for row in read_pairs(path).rows] == ["am besten", "So."]


def test_dolly_and_alpaca_become_pairs_and_rows_without_an_answer_are_counted(tmp_path: Path) -> None:
    dolly = {"instruction": " Who? ", "context": "A page.", "response": "She.", "category": "closed_qa"}
    pairs = read_pairs(put_lines(tmp_path / "dolly.jsonl", [dolly, dolly | {"response": " "}]))
    assert pairs.rows == [{"prompt": "Who?\n\nA page.", "response": "She.", "category": "closed_qa"}]
    assert pairs.left_out == {"no response": 1}
    alpaca = {"instruction": "Who?", "input": "", "output": "007", "text": "Below is ..."}
    assert read_pairs(put_json(tmp_path / "alpaca.json", [alpaca])).rows == [{"prompt": "Who?", "response": "007"}]
    with gzip.open(tmp_path / "alpaca.jsonl.gz", "wt") as file:
        file.write(json.dumps(alpaca))
    assert read_pairs(str(tmp_path / "alpaca.jsonl.gz")).rows == [{"prompt": "Who?", "response": "007"}]


def test_a_group_stays_on_one_side_whatever_the_seed_and_the_order() -> None:
    groups = [f"group {number % 37}" for number in range(100)]
    sides = set()
    for seed in range(20):
        train, validation = split_pairs(groups, 0.2, seed)
        assert sorted(train + validation) == list(range(100))
        assert train == sorted(train)
        assert not {groups[index] for index in train} & {groups[index] for index in validation}
        assert 18 <= len(validation) <= 20
        again = split_pairs(groups[::-1], 0.2, seed)[1]
        assert {groups[::-1][index] for index in again} == {groups[index] for index in validation}
        sides.add(tuple(validation))
    assert len(sides) == 20


def test_rows_about_one_context_are_a_group(tmp_path: Path) -> None:
    rows = [{"instruction": f"{n}?", "context": f"page {n % 2}", "response": "Yes."} for n in range(4)]
    assert read_pairs(put_lines(tmp_path / "dolly.jsonl", rows)).groups == ["page 0", "page 1", "page 0", "page 1"]
    alike = [row | {"context": "", "instruction": "the same"} for row in rows]
    assert set(read_pairs(put_lines(tmp_path / "alike.jsonl", alike)).groups) == {"the same"}


@pytest.mark.parametrize("context", ["context", "input"])
def test_rows_about_one_context_stay_a_group_when_they_are_read_again(tmp_path: Path, context: str) -> None:
    answer = {"context": "response", "input": "output"}[context]
    asked = [("A?", "page 0"), ("B?", "page 1"), ("C?", "page 0"), ("Which?", ""), ("Which?", ""), ("E?", "")]
    rows = [{"instruction": text, context: page, answer: f"{n}"} for n, (text, page) in enumerate(asked)]
    written = read_pairs(put_lines(tmp_path / "raw.jsonl", rows)).rows
    assert ["document_id" in row for row in written] == [True, False, True, True, True, False]
    for part in (written, written[::-1]):
        write_rows(str(tmp_path / "train.jsonl"), part)
        found = read_conversations(str(tmp_path / "train.jsonl"))["group"][:]
        groups = dict(zip([row["response"] for row in part], found, strict=True))
        assert groups["0"] == groups["2"] != groups["3"] == groups["4"]
        assert groups["1"] == groups["5"] == ""
        assert "" not in (groups["0"], groups["3"])
    again = read_pairs(put_lines(tmp_path / "other.jsonl", rows[2::-2])).rows
    assert {row["document_id"] for row in again} == {written[0]["document_id"]}  # the same in each file


def test_pairs_of_one_tree_stay_a_group_when_they_are_read_again(tmp_path: Path) -> None:
    write_rows(str(tmp_path / "train.jsonl"), read_pairs(put_parquet(tmp_path / "a.parquet", FLAT)).rows)
    found = read_conversations(str(tmp_path / "train.jsonl"), site_column="lang")
    assert found["group"][:] == ["message_tree_id tree of a", "message_tree_id tree of g"]
    assert found["site"][:] == ["en", "de"]


def test_the_script_writes_both_sides_and_replaces_files_only_when_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"instruction": f"Ä {n}?", "input": "", "output": f"{n}"} for n in range(40)]
    source = put_json(tmp_path / "alpaca.json", rows)
    train, validation = tmp_path / "new" / "train.jsonl", tmp_path / "validation.jsonl"
    arguments = ["--source", source, "--train-path", str(train), "--validation-path", f"file://{validation}"]
    main([*arguments, "--validation-fraction", "0.25"])
    assert capsys.readouterr().out == f"30 rows in {train}\n10 rows in file://{validation}\n"
    found = read_lines(train) + read_lines(validation)
    assert sorted(row["response"] for row in found) == sorted(row["output"] for row in rows)
    assert (len(read_lines(train)), found[0]["prompt"][0]) == (30, "Ä")
    before = train.read_bytes()
    assert "Ä".encode() in before  # a person can read it
    assert "got one that exists. Name another, or pass --overwrite" in fail(arguments)
    assert train.read_bytes() == before
    main([*arguments, "--overwrite"])
    assert len(read_lines(train)) == 38
    assert sorted(path.name for path in tmp_path.rglob("*.*")) == ["alpaca.json", "train.jsonl", "validation.jsonl"]


def test_a_validation_file_is_taken_as_a_whole_and_stores_are_written(tmp_path: Path) -> None:
    path = put_parquet(tmp_path / "a.parquet", FLAT)
    targets = ["--train-path", "memory://prepared/train.jsonl", "--validation-path", "memory://prepared/test.jsonl"]
    main(["--source", path, "--validation-source", put_trees(tmp_path / "t.jsonl", FLAT), "--language", "en", *targets])
    files = fsspec.filesystem("memory")
    assert files.cat_file("/prepared/train.jsonl") == files.cat_file("/prepared/test.jsonl") != b""
    assert [Path(name).name for name in files.ls("/prepared", detail=False)] == ["test.jsonl", "train.jsonl"]
    files.rm("/prepared", recursive=True)


def test_the_command_of_the_page_prints_what_the_page_shows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    page = (ROOT / "docs/data_llm.md").read_text()
    block = re.findall(r"```console\n\$ (.*?)```", page, re.DOTALL)[0].replace("\\\n", "")
    command, _, output = block.partition("\n")
    program, script, *arguments = shlex.split(command)
    assert (program, script) == ("./run-local.sh", "scripts/prepare_data.py")
    main(arguments)
    assert capsys.readouterr().out == output
    exec(re.findall(r"```python\n(.*?)```", page, re.DOTALL)[0], {})


def test_exercises_are_written_too(tmp_path: Path) -> None:
    targets = ["--train-path", str(tmp_path / "a.jsonl"), "--validation-path", str(tmp_path / "b.jsonl")]
    main(["--source", "exercises", "--num-exercises", "40", *targets])
    assert len(read_lines(tmp_path / "a.jsonl")) == 38
    assert {row["kind"] for row in read_lines(tmp_path / "a.jsonl")} == {"units", "dates", "sorting", "sums"}


def test_a_file_that_cannot_be_replaced_stays_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("before")
    filesystem = type(fsspec.filesystem("file"))

    def fail_to_move(*_: Any, **__: Any) -> None:
        raise OSError("no space")

    monkeypatch.setattr(filesystem, "mv", fail_to_move)
    assert "expected a disk that can be written to, got no space" in refusal(lambda: write_rows(str(path), [{"a": 1}]))
    assert [(file.name, file.read_text()) for file in tmp_path.iterdir()] == [("a.jsonl", "before")]


@pytest.mark.parametrize(
    ("rows", "sentence"),
    [
        ([{"question": "a"}], "row 1: expected the fields of Dolly, Alpaca or OASST1, got 'question'"),
        (
            [{"instruction": "a", "output": "b"}, {"instruction": ["a"], "output": "b"}],
            "row 2: 'instruction': expected a text, got another value",
        ),
        ([{"instruction": "a", "output": "b"}, FLAT[0]], "row 2: expected rows of one kind, got Alpaca and message"),
        ([FLAT[1], FLAT[1]], "row 1: 'message_id': expected another one in each message, got one twice"),
        ([FLAT[1], FLAT[0], message("z", "y", "a")], "row 3: 'parent_id': expected the message_id of another row"),
        ([FLAT[1], FLAT[0] | {"role": "user"}], "row 2: 'role': expected prompter or assistant, got 'user'"),
        ([FLAT[1], FLAT[0] | {"rank": "first"}], "row 2: 'rank': expected a number or null, got another value"),
        ([{"prompt": FLAT[1] | {"replies": "none"}, "message_tree_id": "a"}], "row 1: 'replies': expected a list of"),
        ([FLAT[1]], "expected a pair of a prompt and a response, got none"),
        ([], "expected a row, got none"),
    ],
)
def test_an_error_names_the_file_and_the_row(tmp_path: Path, rows: list[Row], sentence: str) -> None:
    path = put_json(tmp_path / "a.json", rows)
    assert refusal(lambda: read_pairs(path)).startswith(f"{path!r}: {sentence}")


def test_wrong_options_are_refused(tmp_path: Path) -> None:
    source = put_json(tmp_path / "a.json", [{"instruction": "a", "output": "b"}])
    a, b = str(tmp_path / "b.jsonl"), str(tmp_path / "c.jsonl")

    def say(source: str = source, train: str = a, validation: str = b, *more: str) -> str:
        return fail(["--source", source, "--train-path", train, "--validation-path", validation, *more])

    assert "expected different files to read and to write" in say(train=source)
    assert "expected different files to read and to write" in say(train=b)
    assert "no such file" in say(source=str(tmp_path / "none.json"))
    assert "language: expected None, as only rows of OASST1 name theirs" in say(source, a, b, "--language", "en")
    assert "leaves a row on each side" in say()
    assert "expected a number between 0 and 1, got 1.0" in say(source, a, b, "--validation-fraction", "1")
    assert "expected none with --validation-source" in say(
        source, a, b, "--validation-source", source, "--validation-fraction", "0.1"
    )
    assert not Path(a).exists()

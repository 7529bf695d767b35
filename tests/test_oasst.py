"""OASST1 is read as a prompt and the best-ranked reply to it, from messages and from trees, whatever their types."""

import csv
import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import ClassLabel, Dataset, Value
from helpers import refusal

from scaling_fl.data import conversation_rows, oasst
from scaling_fl.data.conversation import Conversation
from scaling_fl.data.conversation_rows import read_conversations

Row = dict[str, Any]


def message(name: str, parent: str | None, text: str, rank: int | None = None, **more: Any) -> Row:
    role = "prompter" if "?" in text else "assistant"
    row = {"message_id": name, "parent_id": parent, "role": role, "text": text, "lang": "en", "rank": rank}
    return row | {"message_tree_id": f"tree {name[0]}", "deleted": False, "review_result": True, "score": 0.5} | more


FLAT = [
    message("11", "1", "Second best.", 1),
    message("1", None, " How? "),
    message("12", "1", "Not ranked."),
    message("13", "1", "Bäst.", 0),
    message("14", "1", "Removed.", -1, deleted=True),
    message("15", "1", "Refused.", -1, review_result=False),
    message("130", "13", "And then?"),
    message("131", "130", "Later.", 0),
    message("2", None, "Wie?", lang="de"),
    message("21", "2", "So.", lang="de"),
    message("3", None, "Without a reply?"),
]
PAIRS = [("How?", "Bäst."), ("Wie?", "So.")]


def nest(row: Row) -> Row:
    """Return a message with the messages below it."""
    return row | {"replies": [nest(other) for other in FLAT if other["parent_id"] == row["message_id"]]}


TREES = [{"message_tree_id": row["message_tree_id"], "prompt": nest(row)} for row in FLAT if row["parent_id"] is None]
Put = Callable[[Path, list[Row]], str]


def put_lines(folder: Path, rows: list[Row]) -> str:
    with gzip.open(folder / "rows.jsonl.gz", "wt", encoding="utf-8") as file:
        file.writelines(f"{json.dumps(row)}\n" for row in rows)
    return str(folder / "rows.jsonl.gz")


def put_list(folder: Path, rows: list[Row]) -> str:
    (folder / "rows.json").write_text(json.dumps(rows))
    return str(folder / "rows.json")


def put_parquet(folder: Path, rows: list[Row]) -> str:
    pq.write_table(pa.Table.from_pylist(rows), folder / "rows.parquet")
    return str(folder / "rows.parquet")


def put_csv(folder: Path, rows: list[Row]) -> str:
    with (folder / "rows.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    return str(folder / "rows.csv")


@pytest.mark.parametrize(
    ("rows", "put"),
    [*((rows, put) for rows in (FLAT, TREES) for put in (put_lines, put_list, put_parquet)), (FLAT, put_csv)],
)
def test_a_file_of_messages_or_trees_is_a_pair_a_tree(tmp_path: Path, rows: list[Row], put: Put) -> None:
    check(put(tmp_path, rows))


def as_others_store_it() -> Dataset:
    """Return the messages with numbers for names and flags, classes for texts, and NaN for null."""
    numbers = {name: [int(row[name]) if row[name] else None for row in FLAT] for name in oasst.MESSAGE}
    ranks = {"rank": [float("nan") if row["rank"] is None else row["rank"] for row in FLAT]}
    flags = {
        "deleted": [int(row["deleted"]) for row in FLAT],
        "review_result": [str(row["review_result"]) for row in FLAT],
    }
    table = Dataset.from_dict({name: [row[name] for row in FLAT] for name in FLAT[0]} | numbers | ranks | flags)
    for name, kind in (
        *(("role", ClassLabel(names=["assistant", "prompter"])), ("lang", ClassLabel(names=["de", "en"]))),
        *(("text", Value("large_string")), ("rank", Value("float32")), ("deleted", Value("int8"))),
    ):
        table = table.cast_column(name, kind)
    return table


@pytest.mark.parametrize(
    "table",
    [
        Dataset.from_list(FLAT),
        Dataset.from_list(TREES),
        Dataset.from_list([row for row in FLAT for _ in range(2)]).select(range(0, 2 * len(FLAT), 2)),
        as_others_store_it(),
        Dataset.from_list([{**tree, "prompt": json.dumps(tree["prompt"])} for tree in TREES]),
    ],
    ids=["messages", "trees", "selected", "other types", "trees in JSON"],
)
def test_a_data_set_of_the_hub_with_any_types_is_a_pair_a_tree(
    table: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("scaling_fl.data.files.load_split", lambda name, split: table)
    check("oasst1")


def check(path: str) -> None:
    found = read_conversations(path, site_column="lang")
    turns = [Conversation.from_json(text) for text in found["conversation"][:]]
    assert [tuple(turn.content for turn in row.turns) for row in turns] == PAIRS
    assert {tuple(turn.role for turn in row.turns) for row in turns} == {("user", "assistant")}
    assert not any(row.is_continued or row.context for row in turns)
    assert found["group"][:] == ["message_tree_id tree 1", "message_tree_id tree 2"]
    assert found["site"][:] == ["en", "de"]
    assert read_conversations(path).column_names == ["conversation", "group"]


def test_sites_are_those_of_the_row_before_those_of_the_prompt(tmp_path: Path) -> None:
    trees = [tree | {"lang": "of the row"} for tree in TREES[:1]] + TREES[1:]
    assert read_conversations(put_list(tmp_path, trees), site_column="lang")["site"][:] == ["of the row", "de"]


BAD: list[tuple[list[Row], str]] = [
    ([FLAT[1], FLAT[0] | {"role": "user"}], "row 2: 'role': expected prompter or assistant, got 'user'"),
    ([FLAT[1], FLAT[0] | {"text": None}], "row 2: 'text': expected a text, got none"),
    ([FLAT[1], FLAT[0] | {"deleted": "perhaps"}], "row 2: 'deleted': expected true or false, got another value"),
    ([FLAT[1], FLAT[0] | {"rank": "first"}], "row 2: 'rank': expected a number or null, got another value"),
    ([FLAT[1], FLAT[0], FLAT[7]], "row 3: 'parent_id': expected the message_id of another row, got '130'"),
    ([FLAT[1], FLAT[0], FLAT[1]], "row 1: 'message_id': expected another one in each message, got one twice"),
    ([FLAT[1], FLAT[4]], "expected a pair of a prompt and a reply, got none ({'no reply': 1})"),
    ([TREES[0], {"message_tree_id": "2", "prompt": "Wie?"}], "row 2: 'prompt': expected the first message of a tree"),
    ([TREES[0], {"message_tree_id": "2", "prompt": {"message_id": 2}}], "row 2: 'message_id': expected a text, got"),
    (
        [TREES[0], {"message_tree_id": "2", "prompt": {"text": "Wie?"}}],
        "row 2: 'prompt': expected a text, got a record",
    ),
    ([{"prompt": TREES[0]["prompt"]}], "expected the columns of one kind: messages, or prompt and completion"),
]


@pytest.mark.parametrize(("rows", "sentence"), BAD)
def test_an_error_names_the_file_and_the_row(tmp_path: Path, rows: list[Row], sentence: str) -> None:
    path = put_list(tmp_path, rows)
    assert refusal(lambda: read_conversations(path)).startswith(f"{path!r}: {sentence}")


@pytest.mark.parametrize("rows", [FLAT, TREES])
def test_a_site_that_is_missing_is_an_error(tmp_path: Path, rows: list[Row]) -> None:
    path = put_list(tmp_path, rows)
    assert "site_column: expected a" in refusal(lambda: read_conversations(path, site_column="topic"))
    lacks = message("4", None, "Where?", lang=None), message("41", "4", "There.")
    tree = {"message_tree_id": "4", "prompt": lacks[0] | {"replies": [lacks[1] | {"replies": []}]}}
    path = put_list(tmp_path, [*rows, *(lacks if rows is FLAT else [tree])])
    assert refusal(lambda: read_conversations(path, site_column="lang")).startswith(
        f"{path!r}: row {len(rows) + 1}: expected a value in 'lang', got none"
    )


def test_columns_of_messages_beside_conversations_are_ignored(tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "A"}, {"role": "assistant", "content": "B"}]
    row = {"messages": turns, "message_id": "7", "parent_id": "6", "text": ["A", "B"], "rank": {"a": 1}, "role": []}
    for put in (put_list, put_parquet):
        assert len(read_conversations(put(tmp_path, [row, row]))) == 2


@pytest.mark.parametrize("rows", [FLAT, TREES])
def test_pairs_are_found_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rows: list[Row]) -> None:
    path = put_list(tmp_path, [*rows])
    before = read_conversations(path)[:]

    def fail(*_: object) -> None:
        raise ValueError("found again")

    monkeypatch.setattr(oasst, "pairs_of", fail)
    assert read_conversations(path)[:] == before
    assert "found again" in refusal(lambda: read_conversations(path, site_column="lang"))
    monkeypatch.setattr(conversation_rows, "VERSION", 0)
    assert "found again" in refusal(lambda: read_conversations(path))


def test_real_trees_are_read(shared: Path) -> None:
    found = read_conversations(str(shared / "data" / "instruct" / "oasst_en_100_trees.jsonl"), site_column="lang")
    assert len(found) == len(found.unique("group")) == 100
    assert found.unique("site") == ["en"]

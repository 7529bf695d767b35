"""Instructions, prompts and messages are read as conversations, or refused with their file and row."""

import csv
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset
from helpers import refusal

from scaling_fl.data import conversation_rows
from scaling_fl.data.conversation import Conversation, Turn
from scaling_fl.data.conversation_rows import read_conversations
from scaling_fl.data.exercises import KINDS, make_exercises
from scaling_fl.data.nicknames import DATASETS, Nickname, data_defaults
from scaling_fl.experiment.settings import Settings

ASKED, ANSWERED = Turn("user", "Which colour?"), Turn("assistant", "Réd, 1.0.")
MESSAGES = [turn._asdict() for turn in (ASKED, ANSWERED)]


def put(path: Path, rows: Sequence[dict[str, Any]]) -> str:
    """Write rows in the format of the path's ending."""
    if path.suffix == ".jsonl":
        path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    elif path.suffix == ".json":
        path.write_text(json.dumps(list(rows), ensure_ascii=False))
    elif path.suffix == ".parquet":
        names = dict.fromkeys(name for row in rows for name in row)
        pq.write_table(pa.table({name: [row.get(name) for row in rows] for name in names}), path)
    else:
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            texts = [
                {name: json.dumps(value) if isinstance(value, list) else value for name, value in row.items()}
                for row in rows
            ]
            writer.writerows(texts)
    return str(path)


def read(path: str, **options: Any) -> list[Conversation]:
    return [Conversation.from_json(text) for text in read_conversations(path, **options)["conversation"][:]]


@pytest.mark.parametrize("ending", [".jsonl", ".json", ".parquet", ".csv"])
@pytest.mark.parametrize(
    ("row", "context", "is_continued"),
    [
        ({"instruction": ASKED.content, "input": "red or blue", "output": ANSWERED.content}, "red or blue", False),
        ({"instruction": ASKED.content, "input": "", "output": ANSWERED.content, "text": "both"}, "", False),
        ({"instruction": ASKED.content, "context": "a", "response": ANSWERED.content, "category": "qa"}, "a", False),
        ({"prompt": ASKED.content, "completion": ANSWERED.content}, "", True),
        ({"prompt": ASKED.content, "response": ANSWERED.content}, "", False),
        ({"prompt": MESSAGES[:1], "completion": MESSAGES[1:]}, "", False),
        ({"messages": MESSAGES, "prompt": ASKED.content}, "", False),
    ],
)
def test_each_kind_of_row_is_read_from_each_kind_of_file(
    tmp_path: Path, ending: str, row: dict[str, Any], context: str, is_continued: bool
) -> None:
    other = {name: value if isinstance(value, list) else f"{value}!" for name, value in row.items()}
    found = read(put(tmp_path / f"rows{ending}", [row, other]))
    assert found[0] == Conversation((ASKED, ANSWERED), context, is_continued)
    assert len(found) == 2


def test_a_field_that_the_first_row_lacks_is_read(tmp_path: Path) -> None:
    rows = [{"instruction": "A", "output": "B"}, {"instruction": "C", "input": "D", "output": "E"}]
    for ending in (".jsonl", ".parquet"):
        assert [row.context for row in read(put(tmp_path / f"rows{ending}", rows))] == ["", "D"]


def test_long_chats_keep_all_turns(tmp_path: Path) -> None:
    roles = ["system", "user", "user", "assistant", "user", "assistant", "assistant", "user"]
    turns = [{"role": role, "content": f"turn {number}"} for number, role in enumerate(roles)]
    (found,) = read(put(tmp_path / "rows.jsonl", [{"messages": turns}]))
    assert found.turns == tuple(Turn(role, f"turn {number}") for number, role in enumerate(roles))
    starts = [{"role": "assistant", "content": "Hello"}]
    assert read(put(tmp_path / "starts.jsonl", [{"messages": starts}]))[0].turns == (Turn("assistant", "Hello"),)


def turns(*pairs: tuple[str, Any], **more: Any) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": content, **more} for role, content in pairs]}


BAD: list[tuple[dict[str, Any], str]] = [
    (turns(("user", "A"), ("bot", "B")), "turn 2: expected a role out of system, user, assistant, got 'bot'"),
    (turns(("user", "A"), ("system", "B"), ("assistant", "C")), "turn 2: expected the system's turn first"),
    (turns(("user", "A")), "expected a turn of the assistant, got none"),
    (turns(("user", " "), ("assistant", "B")), "turn 1: expected a text, got none"),
    (turns(("user", "A"), ("assistant", None)), "turn 2: expected a role and a content that are texts"),
    (turns(("user", "A"), ("assistant", [{"type": "text"}])), "turn 2: expected a role and a content that are texts"),
    (turns(("user", "A"), ("assistant", "B"), tool_calls=[{}]), "turn 1: expected a text alone, got also tool_calls"),
    ({"messages": []}, "'messages': expected a list of turns"),
    ({"messages": "Hello"}, "'messages': expected a list of turns"),
    ({"messages": [["user", "A"]]}, "'messages': expected a list of turns"),
    ({"messages": None}, "'messages': expected a list of turns"),
    ({"messages": [{"from": "human", "value": "A"}]}, "'messages': expected a list of turns"),
    ({"prompt": "A", "completion": [MESSAGES[1]]}, "expected a text in both prompt and completion or turns in both"),
    ({"prompt": "A", "completion": None}, "'completion': expected a text, got none"),
    ({"prompt": "A", "input": "B", "completion": "C"}, "input: expected a prompt alone, got more"),
    ({"instruction": "A", "input": "B", "context": "C", "output": "D"}, "input and context: expected one of them"),
    ({"instruction": "A", "output": ["B"]}, "'output': expected a text, got a list"),
    ({"instruction": {"en": "A"}, "output": "B"}, "'instruction': expected a text, got a record"),
    ({"instruction": "", "output": "B"}, "turn 1: expected a text, got none"),
]


@pytest.mark.parametrize(("row", "reason"), BAD)
def test_a_row_that_is_no_conversation_is_an_error_with_its_file_and_row(
    tmp_path: Path, row: dict[str, Any], reason: str
) -> None:
    fields = {name: {"messages": MESSAGES}.get(name, "text") for name in row if name not in ("input", "context")}
    path = put(tmp_path / "rows.jsonl", [fields, row])
    message = refusal(lambda: read_conversations(path))
    assert message.startswith(f"{path!r}: row 2: ")
    assert reason in message


@pytest.mark.parametrize(
    ("columns", "got"),
    [
        (("question", "answer"), "got none of them"),
        (("instruction", "completion"), "got 'completion', 'instruction'"),
        (("instruction", "output", "response"), "'output'"),
        (("messages", "prompt", "completion"), "'messages'"),
    ],
)
def test_a_file_of_other_or_too_many_columns_is_refused(tmp_path: Path, columns: tuple[str, ...], got: str) -> None:
    path = put(tmp_path / "rows.jsonl", [dict.fromkeys(columns, "text")])
    message = refusal(lambda: read_conversations(path))
    assert "expected the columns of one kind: messages, or prompt and completion" in message
    assert got in message


def test_sites_and_groups_come_with_their_rows(tmp_path: Path) -> None:
    row = {"instruction": "A", "context": "", "response": "B"}
    rows = [
        {**row, "category": " qa ", "message_tree_id": 7},
        {**row, "category": "007", "message_tree_id": 7},
        {**row, "category": "Qa", "message_tree_id": None},
        {**row, "category": "Qa", "message_tree_id": None, "context": "A lake"},
    ]
    for ending in (".jsonl", ".parquet", ".csv"):
        found = read_conversations(put(tmp_path / f"rows{ending}", rows), site_column="category")
        assert found["site"][:] == ["qa", "007", "Qa", "Qa"]
        assert found["group"][:] == ["message_tree_id 7", "message_tree_id 7", "", "context A lake"]
    path = put(tmp_path / "lacks.jsonl", [rows[0], {**row, "category": ""}])
    assert "row 2: expected a value in 'category', got none" in refusal(
        lambda: read_conversations(path, site_column="category")
    )
    assert "site_column: expected a column of" in refusal(lambda: read_conversations(path, site_column="topic"))


def test_nicknames_and_ids_are_data_sets_of_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    table = Dataset.from_dict({"messages": [MESSAGES], "topic": ["colours"], "scores": [[1, 2]]})
    asked: list[tuple[str, str]] = []

    def load(name: str, split: str) -> Dataset:
        asked.append((name, split))
        return table

    monkeypatch.setattr("scaling_fl.data.files.load_split", load)
    for name in ("dolly", "some/chats", "oasst1"):
        found = read_conversations(name, "test", site_column="topic")
        assert Conversation.from_json(found["conversation"][0]).turns == (ASKED, ANSWERED)
        assert found["site"][:] == ["colours"]
    assert asked == [
        ("databricks/databricks-dolly-15k", "test"),
        ("some/chats", "test"),
        ("OpenAssistant/oasst1", "validation"),
    ]
    assert data_defaults("dolly") == data_defaults("some/chats") == {}


def test_exercises_are_made_with_sites_of_their_kinds() -> None:
    defaults = data_defaults("exercises")
    assert (defaults["partition"], defaults["site_column"]) == ("natural", "kind")
    found = read_conversations("exercises", site_column=defaults["site_column"])
    rows = make_exercises(2_000, 0)
    assert found["site"][:] == [row["kind"] for row in rows]
    assert set(found["site"][:]) == {*KINDS}
    assert [Conversation.from_json(text).turns for text in found["conversation"][:]] == [
        tuple(Turn(**turn) for turn in row["messages"]) for row in rows
    ]
    assert found._fingerprint == read_conversations("exercises", site_column="kind")._fingerprint
    with_test = refusal(lambda: read_conversations("exercises", "test"))
    assert with_test.startswith("'exercises': expected the split 'train', which is all that is made, got 'test'")


def test_a_nickname_may_be_added_for_a_file_or_a_function(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    row = {"instruction": "A", "output": "B"}
    path = put(tmp_path / "rows.jsonl", [row])
    made: list[Any] = [row, row | {"input": "C", "document_id": 3}]
    monkeypatch.setitem(DATASETS, "mine", Nickname(path, defaults={"seed": 3}))
    monkeypatch.setitem(DATASETS, "made", Nickname(make=lambda: iter(made)))
    assert (len(read("mine")), data_defaults("mine")) == (1, {"seed": 3})
    assert Settings(task_name="instruct", train_path="mine").seed == 3
    monkeypatch.setitem(DATASETS, "mistaken", Nickname(path, defaults={"sead": 3}))
    message = refusal(lambda: Settings(task_name="instruct", train_path="mistaken"))
    assert message.startswith(
        "'sead': expected the name of a setting, got another one among the defaults of task_name="
    )
    assert [row.context for row in read("made")] == ["", "C"]
    assert read_conversations("made")["group"][:] == ["", "document_id 3"]
    for more in (["a row"], [{"output": ["B"]}]):
        monkeypatch.setitem(DATASETS, "made", Nickname(make=lambda more=more: [*made, *more]))
        assert refusal(lambda: read("made")).startswith("'made': expected its function to return rows of one kind, got")


def test_another_version_or_column_does_not_use_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = put(tmp_path / "rows.jsonl", [{"instruction": "A", "output": "B", "topic": "C", "kind": "D"}])
    assert [read_conversations(path, site_column=name)["site"][:] for name in ("topic", "kind")] == [["C"], ["D"]]

    def fail(*_: object) -> None:
        raise ValueError("read again")

    monkeypatch.setattr(conversation_rows, "read_row", fail)
    assert read(path, site_column="topic")
    monkeypatch.setattr(conversation_rows, "VERSION", 0)
    assert "read again" in refusal(lambda: read(path, site_column="topic"))


@pytest.mark.parametrize(
    ("name", "check"),
    [
        ("alpaca_original_100.json", lambda found: len(found) == 100 and any(row.context for row in found)),
        ("alpaca_en_999.json", lambda found: len(found) == 999),
        ("dolly_151.jsonl", lambda found: len(found) == 151 and any(row.context for row in found)),
        ("oasst_en_messages.jsonl", lambda found: len(found) == 102 and any(len(row.turns) > 2 for row in found)),
    ],
)
def test_real_files_are_read(shared: Path, name: str, check: Callable[[list[Conversation]], bool]) -> None:
    assert check(read(str(shared / "data" / "instruct" / name)))

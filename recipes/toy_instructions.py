"""Tiny instructions in the formats of Alpaca, of FlowerTune's three other data sets, of Dolly and of OASST1."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.parquet as pq  # type: ignore[import-untyped]

PLACES = "Lund Bergen Turku Aarhus Tartu Riga Gdansk Bremen Utrecht Ghent Lille Porto".split()  # noqa: SIM905
MOVES = {"rises": "positive", "falls": "negative", "stays as it was": "neutral"}


def pairs() -> Iterator[tuple[int, int]]:
    """Yield the numbers of two places, all different pairs."""
    yield from ((one, other) for one in range(len(PLACES)) for other in range(len(PLACES)) if one != other)


def alpaca() -> list[dict[str, Any]]:
    """Return rows of Alpaca, a third of them with an input."""
    return [
        {
            "instruction": f"Which place comes first from A to Z{':' if number % 3 == 0 else f', {places}?'}",
            "input": places if number % 3 == 0 else "",
            "output": min(PLACES[one], PLACES[other]) + ".",
        }
        for number, (one, other) in enumerate(pairs())
        for places in [f"{PLACES[one]} or {PLACES[other]}"]
    ]


def finance() -> list[dict[str, Any]]:
    """Return rows of FinGPT's sentiment of news."""
    instruction = "What is the sentiment of this news? Answer with one of negative, neutral and positive."
    return [
        {
            "input": f"The profit of a firm in {place} {move} in year {year}.",
            "output": answer,
            "instruction": instruction,
        }
        for year in range(1, 9)
        for place in PLACES
        for move, answer in MOVES.items()
    ]


def medical() -> list[dict[str, Any]]:
    """Return rows of medical flashcards."""
    return [
        {"input": f"How many patients in {PLACES[one]} had {other + 1} doses?", "output": f"There were {one + other}.",
         "instruction": "Answer this question truthfully"}
        for one, other in pairs()
    ]  # fmt: skip


def code() -> list[dict[str, Any]]:
    """Return rows of Code Alpaca."""
    return [
        {"instruction": f"Write a function in Python that adds {one} to the product of its argument and {other}.",
         "input": "", "output": f"def f(x):\n    return {other} * x + {one}"}
        for one, other in pairs()
    ]  # fmt: skip


def dolly() -> list[dict[str, Any]]:
    """Return rows of Dolly, half of them with a context."""
    return [
        {
            "instruction": f"Is {PLACES[one]} nearer than {PLACES[other]}?",
            "context": f"{PLACES[one]}: {one} km. {PLACES[other]}: {other} km." if other % 2 else "",
            "response": "Yes." if one < other else "No.",
            "category": "closed_qa" if other % 2 else "open_qa",
        }
        for one, other in pairs()
    ]


def oasst1() -> list[dict[str, Any]]:
    """Return rows of OASST1: the messages of trees with a question and two replies, of which one is ranked first."""
    rows: list[dict[str, Any]] = []
    for one, other in pairs():
        tree = f"{one}-{other}"
        texts = f"How far is it from {PLACES[one]} to {PLACES[other]}?", f"{one + other} km.", "It is far."
        rows += [
            {
                **{"message_id": f"{tree}-{number}" if number else tree, "parent_id": tree if number else None},
                **{"message_tree_id": tree, "role": "assistant" if number else "prompter", "text": text},
                **{"lang": "en", "rank": number - 1 if number else None, "deleted": False},
            }
            for number, text in enumerate(texts)
        ]
    return rows


INSTRUCTIONS: dict[str, Callable[[], list[dict[str, Any]]]] = {
    **{"alpaca": alpaca, "finance": finance, "medical": medical, "code": code, "dolly": dolly, "oasst1": oasst1}
}


def make_instructions(folder: Path) -> None:
    """Write the files of instructions as the hub has them; OASST1 has one of its own for validation."""
    folder.mkdir(parents=True, exist_ok=True)
    files = {name: make() for name, make in INSTRUCTIONS.items()}
    messages = files["oasst1"]
    num_train = len(messages) * 5 // 6 // 3 * 3
    files |= {"oasst1": messages[:num_train], "oasst1-validation": messages[num_train:]}
    (folder / "dolly.jsonl").write_text("".join(json.dumps(row) + "\n" for row in files.pop("dolly")))
    for name, rows in files.items():
        pq.write_table(pa.Table.from_pylist(rows), folder / f"{name}.parquet")

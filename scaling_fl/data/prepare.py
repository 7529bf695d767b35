"""Pairs of a prompt and a response from the raw files of Dolly, Alpaca and OASST1, split in two."""

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import fsspec
import pyarrow.parquet as pq  # type: ignore[import-untyped]

from scaling_fl.data.columns import check_text, open_text
from scaling_fl.data.files import locate, reason
from scaling_fl.data.json_rows import read_values
from scaling_fl.data.oasst import MESSAGE, Message, find_pairs, messages_of
from scaling_fl.errors import preview
from scaling_fl.storage import check_reachable, is_remote, retry, write_bytes, write_whole
from scaling_fl.training.seeds import derive_seed

ENDINGS = (".json", ".jsonl", ".ndjson", ".parquet")
KEPT = ("category",)  # fields that natural sites may be made of
# The fields of an instruction, of what it is about and of the response, by kind of file.
INSTRUCTIONS = {"Dolly": ("instruction", "context", "response"), "Alpaca": ("instruction", "input", "output")}
SHOWN = "the fields of Dolly, Alpaca or OASST1"


@dataclass
class Prepared:
    """Rows of one source.

    Args:
        rows: to be written.
        groups: what each row has in common with others: they go to one side of a split.
        left_out: reason -> number of rows.
    """

    rows: list[dict[str, Any]] = field(default_factory=list)
    groups: list[str] = field(default_factory=list)
    left_out: Counter[str] = field(default_factory=Counter)


def read_pairs(path: str, language: str | None = None) -> Prepared:
    """Read pairs of a prompt and a response.

    Args:
        path: a local path or fsspec URL of JSON, JSON Lines (packed or not) or parquet: Dolly, Alpaca, trees of OASST1
            or its messages, one a row.
        language: of OASST1, such as "en"; None takes all.

    Raises:
        ValueError: the file cannot be read, or a row is not as it should be.
    """
    kinds: set[str] = set()
    prepared, messages = Prepared(), list[Message]()
    try:
        for number, row in enumerate(_read(path), start=1):
            try:
                kind = _kind_of(row)
                kinds.add(kind)
                if len(kinds) > 1:
                    raise ValueError(f"expected rows of one kind, got {' and '.join(sorted(kinds))}")
                if kind in INSTRUCTIONS:
                    _add_instruction(prepared, row, INSTRUCTIONS[kind])
                else:
                    messages += messages_of(row, number)
            except ValueError as error:
                raise ValueError(f"row {number}: {error}") from None
        if not kinds:
            raise ValueError("expected a row, got none")
        if language is not None and kinds & {*INSTRUCTIONS}:
            raise ValueError(f"language: expected None, as only rows of OASST1 name theirs, got {language!r}")
        _name_documents(prepared)
        for prompt, reply in find_pairs(messages, language, prepared.left_out):
            tree = {"message_tree_id": prompt.tree, "lang": prompt.language}
            prepared.rows.append({"prompt": prompt.text, "response": reply.text, **tree})
            prepared.groups.append(prompt.tree)
    except Exception as error:
        ours = "" if type(error) is ValueError else "expected JSON, JSON Lines or parquet, got an error: "
        raise ValueError(f"{path!r}: {ours}{reason(error)}") from error
    if not prepared.rows:
        raise ValueError(f"{path!r}: expected a pair of a prompt and a response, got none ({dict(prepared.left_out)})")
    return prepared


def split_pairs(groups: Sequence[str], fraction: float, seed: int) -> tuple[list[int], list[int]]:
    """Return the indices of the training and of the validation rows, in their order; a group stays on one side.

    Args:
        groups: of each row.
        fraction: of the rows, for validation.
        seed: of the choice, which does not depend on the order of the rows.

    Raises:
        ValueError: the fraction is not between 0 and 1, or one side would have no row.
    """
    if not 0 < fraction < 1:
        raise ValueError(f"validation_fraction: expected a number between 0 and 1, got {fraction}")
    sizes = Counter(groups)
    wanted, count, chosen = max(1, round(fraction * len(groups))), 0, set[str]()
    for group in sorted(sizes, key=lambda group: (derive_seed(seed, "validation", group), group)):
        if count + sizes[group] <= wanted:
            chosen.add(group)
            count += sizes[group]
    if not 0 < count < len(groups):
        raise ValueError(
            f"validation_fraction: expected a fraction that leaves a row on each side, got {fraction} of "
            f"{len(groups)} rows in {len(sizes)} groups"
        )
    sides: tuple[list[int], list[int]] = [], []
    for index, group in enumerate(groups):
        sides[group in chosen].append(index)
    return sides


def check_targets(targets: Sequence[str], sources: Sequence[str], *, overwrite: bool) -> None:
    """Check that files can be written without the loss of others.

    Raises:
        ValueError: two paths are the same, or a file exists and may not be overwritten.
    """
    places = [(type(filesystem), inner) for filesystem, inner in map(locate, [*targets, *sources])]
    if len(set(places)) < len(places):
        raise ValueError(f"expected different files to read and to write, got {', '.join([*sources, *targets])}")
    for path in targets:
        filesystem, inner = locate(path)
        try:
            check_reachable(filesystem, inner)
            exists = filesystem.exists(inner)
        except Exception as error:
            raise ValueError(f"{path!r}: expected a place that can be reached, got {reason(error)}") from error
        if exists and not overwrite:
            raise ValueError(f"{path!r}: expected a new file, got one that exists. Name another, or pass --overwrite")
        if exists and filesystem.isdir(inner):
            raise ValueError(f"{path!r}: expected a file, got a folder")


def write_rows(path: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write JSON Lines, as a whole or not at all.

    Raises:
        ValueError: the place cannot be written to.
    """
    filesystem, inner = locate(path)
    data = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
    folder, _, name = inner.rpartition("/")
    if is_remote(filesystem):  # whose files appear when they are complete
        write = partial(write_bytes, filesystem, inner, data)
    else:
        write = partial(write_whole, filesystem, inner, data, part=f"{folder}/.{name}.part")
    retry(filesystem, repr(path), write)


def _read(path: str) -> Iterator[dict[str, Any]]:
    """Yield the rows of a file of any format."""
    filesystem, inner = locate(path)
    check_reachable(filesystem, inner)
    if not filesystem.isfile(inner):
        raise ValueError("expected the path or fsspec URL of a file, got none (there is no such file)")
    if path.lower().endswith(".parquet"):
        with fsspec.open(path, "rb") as file:
            for batch in pq.ParquetFile(file).iter_batches():
                yield from batch.to_pylist()
        return
    if not any(ending in path.lower() for ending in ENDINGS):
        raise ValueError(f"expected a file that ends in {', '.join(ENDINGS)}, got another ending")
    with open_text(path) as text:
        yield from read_values(text)


def _kind_of(row: Any) -> str:
    if not isinstance(row, dict):
        raise ValueError(f"expected an object with {SHOWN}, got another value")
    if isinstance(row.get("prompt"), dict):
        return "tree"
    if {*MESSAGE, "role", "text"} <= {*row}:
        return "message"
    for kind, (instruction, _, response) in INSTRUCTIONS.items():
        if {instruction, response} <= {*row}:
            return kind
    raise ValueError(f"expected {SHOWN}, got {preview(map(repr, row))}")


def _add_instruction(prepared: Prepared, row: Mapping[str, Any], names: tuple[str, str, str]) -> None:
    """Add a row of Dolly or Alpaca. Rows about one context go to one side."""
    instruction, context, response = (check_text(row.get(name) or "", name).strip() for name in names)
    kept = {name: check_text(row[name], name).strip() for name in KEPT if row.get(name)}
    empty = next((name for name, text in zip(names[::2], (instruction, response), strict=True) if not text), None)
    if empty:
        prepared.left_out[f"no {empty}"] += 1
        return
    prompt = f"{instruction}\n\n{context}" if context else instruction
    prepared.rows.append({"prompt": prompt, "response": response, **kept})
    prepared.groups.append(context or instruction)


def _name_documents(prepared: Prepared) -> None:
    """Name what several rows are about, in a column that keeps them together when a run splits them again."""
    sizes = Counter(prepared.groups)
    for row, group in zip(prepared.rows, prepared.groups, strict=True):
        if sizes[group] > 1:
            row["document_id"] = hashlib.sha256(group.encode()).hexdigest()[:16]

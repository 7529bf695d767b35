"""Rows of parquet files, and the values of any column of Arrow as texts."""

import json
from collections.abc import Iterator, Sequence
from typing import Any

import fsspec
import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.parquet as pq  # type: ignore[import-untyped]
from pyarrow import types

from scaling_fl.data.cache import NUM_ROWS, Row
from scaling_fl.data.columns import KEYS, LISTS, ROOT, Columns, find_columns, key_of
from scaling_fl.data.labels import as_text


def read_parquet(path: str, columns: Columns | None, known: Columns | None = None) -> Iterator[Row]:
    """Yield the names of the columns to read, then the fields of each row, all as texts.

    Args:
        path: a local path or fsspec URL.
        columns: of the texts, which must be strings, and of the labels. None reads all.
        known: the columns to read in place of these, as far as they exist, lists of turns and trees as JSON.
    """
    with fsspec.open(path, "rb") as file:
        table = pq.ParquetFile(file)
        if table.metadata.num_rows == 0:
            raise ValueError("expected a row, got none")
        schema = table.schema_arrow
        used = find_columns(columns, [name for name in schema.names if known is None or name in known], path)
        if columns:
            check_texts(schema, columns[0])
        yield used
        classes = {name: _class_names(schema, name) for name in used}
        keys = {name: repr(name) if known else f"{key_of(name, columns)}={name!r}" for name in used}
        for batch in table.iter_batches(batch_size=NUM_ROWS, columns=list(used)):
            by_name = {name: batch.column(name) for name in used}
            if known:
                by_name |= {name: lists_as_json(by_name[name], name) for name in set(LISTS) & set(used)}
            yield from zip(*(as_texts(by_name[name], keys[name], classes[name]) for name in used), strict=True)


def lists_as_json(column: pa.Array, name: str) -> pa.Array:
    """Return a column of lists of turns, or of trees of messages, as JSON, any other as it is."""
    kind = _plain(column.type)
    is_tree = name == ROOT[0] and types.is_struct(kind) and kind.get_field_index(ROOT[1]) >= 0
    if not is_tree and not isinstance(kind, pa.ListType | pa.LargeListType):
        return column
    values = column.cast(kind).to_pylist()
    texts = [None if value is None else json.dumps(value, ensure_ascii=False, default=str) for value in values]
    return pa.array(texts, pa.string())


def check_texts(schema: pa.Schema, name: str) -> None:
    """Check that the values of a column are texts, or missing.

    Raises:
        ValueError: they are of another type.
    """
    kind = schema.field(name).type
    plain = _plain(kind)
    if not any(is_(plain) for is_ in (types.is_string, types.is_large_string, types.is_string_view, types.is_null)):
        raise ValueError(f"{KEYS[0]}={name!r}: expected texts, got {kind!s:.80}")


def _plain(kind: pa.DataType) -> pa.DataType:
    """Return the type of the values of an extension or a dictionary."""
    kind = getattr(kind, "storage_type", kind)
    return kind.value_type if types.is_dictionary(kind) else kind


def as_texts(column: pa.Array | pa.ChunkedArray, place: str, classes: Sequence[str] | None) -> list[str | None]:
    """Return the values of a column as people write them, None for those that are missing.

    Args:
        column: of any type.
        place: of the column, in words.
        classes: whose indices the values are; -1 is none.

    Raises:
        ValueError: they are bytes, lists or records, or there is no such class.
    """
    try:
        return _as_texts(column, classes)
    except TypeError:
        raise ValueError(f"{place}: expected texts or numbers, got {column.type!s:.80}") from None


def _as_texts(column: pa.Array | pa.ChunkedArray, classes: Sequence[str] | None) -> list[str | None]:
    column = column.cast(_plain(column.type))
    values: list[Any] = column.to_pylist()
    if types.is_float16(column.type) or types.is_float32(column.type):
        # As a number of Python, 0.1 in 32 bits would be 0.10000000149011612.
        values = [float(str(value)) for value in column.to_numpy(zero_copy_only=False)]
    if not classes:
        return [as_text(value) for value in values]
    unknown = [value for value in values if value is not None and value >= len(classes)]
    if unknown:
        raise ValueError(f"expected labels of {len(classes)} classes from 0, got class {unknown[0]}")
    return [None if value is None or value < 0 else classes[value] for value in values]


def _class_names(schema: pa.Schema, name: str) -> Sequence[str] | None:
    """Return the names of the classes of a column, which `datasets` writes beside the schema."""
    about = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
    feature = about.get("info", {}).get("features", {}).get(name, {})
    return feature.get("names") if feature.get("_type") == "ClassLabel" else None

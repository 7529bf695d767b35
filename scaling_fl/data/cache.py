"""The cache of rows and tokens: in files that all ranks map, or in memory where these cannot be written."""

import os
from collections.abc import Callable, Iterator
from contextlib import suppress
from itertools import islice
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any, TypeVar

import datasets
import pyarrow as pa  # type: ignore[import-untyped]
from datasets import Dataset
from datasets.table import InMemoryTable, MemoryMappedTable

from scaling_fl.hub import causes, warn_of_cache

T = TypeVar("T")
Row = tuple[str | None, ...]
NUM_ROWS = 100  # that are written at once
END = b"\xff\xff\xff\xff\0\0\0\0"  # of a stream of Arrow


def store(key: str, read: Callable[[], Iterator[Row]]) -> Dataset:
    """Return rows of strings, from the cache where it has them.

    Args:
        key: of the file and its state; the name of a folder.
        read: yields the names of the columns, then the rows. It may be called twice.
    """
    path = Path(datasets.config.HF_DATASETS_CACHE, "scaling_fl", key, "rows.arrow")
    with suppress(OSError, pa.ArrowException):
        return _open(path, key)
    try:
        _write(path, *_batches(read()))
        return _open(path, key)
    except (OSError, pa.ArrowException) as error:
        schema, batches = _batches(read())  # an error that is not of the cache is raised again
        rows = Dataset(InMemoryTable.from_batches(list(batches), schema), fingerprint=key)
        warn_of_cache(error)
        return rows


def cached(rows: Dataset, work: Callable[[Dataset], T]) -> T:
    """Return `work(rows)`, which `datasets` writes beside the file of the rows, or keeps in memory if that fails.

    Args:
        rows: any.
        work: calls a method such as `map`. It is called again after an error of the system, which may be of the cache.
    """
    try:
        return work(rows)
    except Exception as error:
        if not (rows.cache_files and any(isinstance(cause, OSError | pa.ArrowException) for cause in causes(error))):
            raise
        table = rows.flatten_indices(keep_in_memory=True).data.table
        # Datasets writes beside the file that rows have: the same rows without one stay in memory.
        result = work(Dataset(InMemoryTable(table), info=rows.info, fingerprint=rows._fingerprint))
        warn_of_cache(error)
        return result


def mapped(rows: Dataset, function: Callable[..., Any], **options: Any) -> Dataset:
    """Return `rows.map(function, **options)`, in memory if it cannot be written."""
    return cached(rows, lambda rows: rows.map(function, **options))


def _open(path: Path, key: str) -> Dataset:
    with path.open("rb") as file:
        file.seek(-len(END), os.SEEK_END)
        if file.read() != END:  # Arrow reads a file that was cut without an error
            raise OSError("the file was cut")
    return Dataset(MemoryMappedTable.from_file(str(path)), fingerprint=key)


def _write(path: Path, schema: pa.Schema, batches: Iterator[pa.RecordBatch]) -> None:
    """Write a file as a whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with NamedTemporaryFile(dir=path.parent, delete=False) as partial:
        try:
            with pa.ipc.new_stream(partial, schema) as writer:
                for batch in batches:
                    writer.write_batch(batch)
            partial.close()
            os.replace(partial.name, path)
        except BaseException:
            os.unlink(partial.name)
            raise


def _batches(rows: Iterator[Row]) -> tuple[pa.Schema, Iterator[pa.RecordBatch]]:
    schema = pa.schema([(name, pa.string()) for name in next(rows) if name is not None])

    def batches() -> Iterator[pa.RecordBatch]:
        while some := list(islice(rows, NUM_ROWS)):
            columns = [pa.array(column, pa.string()) for column in zip(*some, strict=True)]
            yield pa.RecordBatch.from_arrays(columns, schema=schema)

    return schema, batches()

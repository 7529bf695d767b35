"""What is read and tokenised once: in files that all ranks map, or in memory where these cannot be written."""

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

import datasets
import pyarrow as pa  # type: ignore[import-untyped]
from datasets import Dataset
from datasets.table import InMemoryTable, MemoryMappedTable

from scaling_fl.distributed import local_rank
from scaling_fl.settings import one_line

T = TypeVar("T")
Row = tuple[str | None, ...]
NUM_ROWS, NUM_CHARACTERS = 1000, 2**24  # most rows that are written at once, and about how many characters

log = logging.getLogger(__name__)
_has_warned = False


class CacheError(Exception):
    """The cache cannot be written, or what was written cannot be read."""


def store(key: str, read: Callable[[], Iterator[Row]]) -> Dataset:
    """Return rows of strings, from the cache if they are there.

    Args:
        key: of what is read, as it is now; the name of a folder.
        read: yields the names of the columns, then the rows. What it raises passes; it may be called twice.
    """
    path = Path(datasets.config.HF_DATASETS_CACHE, "scaling_fl", key, "rows.arrow")
    with suppress(CacheError):
        return _open(path, key)
    try:
        _write(path, *_batches(read()))
        return _open(path, key)
    except CacheError as error:
        warn(error)
    schema, batches = _batches(read())
    return Dataset(InMemoryTable.from_batches(list(batches), schema), fingerprint=key)


def cached(rows: Dataset, work: Callable[[Dataset], T]) -> T:
    """Return `work(rows)`, which `datasets` writes beside the file of the rows, or keeps in memory if that fails.

    Args:
        rows: any.
        work: calls a method such as `map`. It is called again after any error, as that may be of the cache.
    """
    try:
        return work(rows)
    except Exception as error:
        if not rows.cache_files:
            raise
        table = rows.flatten_indices(keep_in_memory=True).data.table
        # Datasets writes beside the file that rows have: the same rows without one stay in memory.
        result = work(Dataset(InMemoryTable(table), info=rows.info, fingerprint=rows._fingerprint))
        warn(error)
        return result


def mapped(rows: Dataset, function: Callable[..., Any], **options: Any) -> Dataset:
    """Return `rows.map(function, **options)`, in memory if it cannot be written."""
    return cached(rows, lambda rows: rows.map(function, **options))


def _open(path: Path, key: str) -> Dataset:
    with _cache_errors():
        return Dataset(MemoryMappedTable.from_file(str(path)), fingerprint=key)


def _write(path: Path, schema: pa.Schema, batches: Iterator[pa.RecordBatch]) -> None:
    """Write a file that is there as a whole or not at all."""
    partial = path.with_name(f"{path.name}.{os.getpid()}")
    try:
        with _cache_errors():
            path.parent.mkdir(parents=True, exist_ok=True)
            file = pa.OSFile(str(partial), "wb")
            writer = pa.ipc.new_stream(file, schema)
        for batch in batches:
            with _cache_errors():
                writer.write_batch(batch)
        with _cache_errors():
            writer.close()
            file.close()
            os.replace(partial, path)
    finally:
        with suppress(OSError):
            partial.unlink()


@contextmanager
def _cache_errors() -> Iterator[None]:
    """Tell errors of the cache from those of what is read."""
    try:
        yield
    except (OSError, pa.ArrowException) as error:
        raise CacheError(one_line(error)) from error


def _batches(rows: Iterator[Row]) -> tuple[pa.Schema, Iterator[pa.RecordBatch]]:
    schema = pa.schema([(name, pa.string()) for name in next(rows) if name is not None])

    def batches() -> Iterator[pa.RecordBatch]:
        held: list[Row] = []
        size = 0
        for row in rows:
            held.append(row)
            size += sum(len(field or "") for field in row)
            if len(held) == NUM_ROWS or size > NUM_CHARACTERS:
                yield batch(held)
                held, size = [], 0
        if held:
            yield batch(held)

    def batch(held: list[Row]) -> pa.RecordBatch:
        columns = [pa.array(column, pa.string()) for column in zip(*held, strict=True)]
        return pa.RecordBatch.from_arrays(columns, schema=schema)

    return schema, batches()


def warn(error: Exception, folder: object = None, name: str = "HF_DATASETS_CACHE") -> None:
    """Say once, on the first rank of a node, that a cache cannot be written.

    Args:
        error: says why.
        folder: of the cache; None is that of data sets.
        name: the variable that names it. HF_HOME names them all.
    """
    global _has_warned
    if not _has_warned and local_rank() == 0:
        log.warning(
            "%s: expected a folder where the cache can be written, got %r (%s). The run goes on without the cache",
            name if name in os.environ else "HF_HOME",
            str(folder or datasets.config.HF_DATASETS_CACHE),
            one_line(os_error(error) or error),
        )
    _has_warned = True


def os_error(error: BaseException | None) -> OSError | None:
    """Return the error of the system behind another one, which libraries make of it or meet while they clean up."""
    while error is not None and not (isinstance(error, OSError) and error.errno):
        error = error.__cause__ or error.__context__
    return error

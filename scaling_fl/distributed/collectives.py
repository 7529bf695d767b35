"""Collectives: what ranks send each other."""

import os
import time
from ast import literal_eval
from collections.abc import Callable
from typing import Any, TypeVar
from warnings import catch_warnings

import torch
import torch.distributed as dist
from torch import Tensor

from scaling_fl.distributed.signals import PeerLost, check_interrupt

K = TypeVar("K")
T = TypeVar("T")
POLL = 5e-4  # seconds from one check whether a collective is complete to the next

_bytes_sent = 0


def rank() -> int:
    """Return this process's number among all ranks."""
    return dist.get_rank()


def world_size() -> int:
    """Return the number of ranks."""
    return dist.get_world_size()


def is_one_node() -> bool:
    """Tell whether all ranks were started on one machine, by one launcher."""
    return os.environ.get("LOCAL_WORLD_SIZE") == str(world_size())


def bytes_sent() -> int:
    """Return how many bytes this rank has handed to collectives so far (0 in a world of one)."""
    return _bytes_sent


def _wait(num_bytes: int, work: Any) -> None:
    """Wait for a collective, which signals can interrupt, and count its bytes."""
    check_interrupt()
    if world_size() > 1:
        count_bytes(num_bytes)
    try:
        while not work.is_completed():
            check_interrupt()
            time.sleep(POLL)
        work.wait()
    except RuntimeError as error:
        raise PeerLost(str(error)) from error


def all_gather(value: T) -> list[T]:
    """Return every rank's `value`, in the order of the ranks, on every rank.

    It is sent as the text of a Python literal: numbers, texts, None, and tuples, lists and dicts of them.
    """
    text = torch.frombuffer(bytearray(repr(value).encode()), dtype=torch.uint8)
    sizes = torch.zeros(world_size(), dtype=torch.int64)
    sizes[rank()] = len(text)
    all_reduce_(sizes)
    texts = torch.zeros(world_size(), int(sizes.max()), dtype=torch.uint8)
    padded = torch.zeros_like(texts[0])
    padded[: len(text)] = text
    _wait(len(text), dist.all_gather(list(texts), padded, async_op=True))
    return [
        literal_eval(text[:size].numpy().tobytes().decode()) for text, size in zip(texts, sizes.tolist(), strict=True)
    ]


def all_gather_items(own: dict[K, T]) -> dict[K, T]:
    """Return the items of every rank's dict as one dict, on every rank. They are sent as by `all_gather`."""
    return {key: value for of_rank in all_gather(own) for key, value in of_rank.items()}


def check_equal(values: dict[str, Any]) -> None:
    """Refuse values, by name, that are not the same on all ranks.

    Raises:
        ValueError: some rank's differ from those of rank 0.
    """
    by_rank = all_gather(values)
    first = by_rank[0]
    for number, theirs in enumerate(by_rank):
        for key in {**first, **theirs}:
            if theirs.get(key) != first.get(key):
                raise ValueError(
                    f"{key}: expected the same on all ranks, got {first.get(key)!r} on rank 0 and {theirs.get(key)!r} "
                    f"on rank {number}"
                )


def exchange_rows(rows: Tensor) -> Tensor:
    """Send row r to rank r, and return as row r what rank r has sent: (ranks, numbers)."""
    received = torch.empty_like(rows)
    _wait(rows.nbytes - rows[0].nbytes, dist.all_to_all_single(received, rows, async_op=True))
    return received


def all_gather_rows(row: Tensor) -> Tensor:
    """Return (ranks, numbers), given (1, numbers) of each rank, in the order of the ranks."""
    rows = row.new_empty(world_size(), row.shape[1])
    _wait(row.nbytes, dist.all_gather(list(rows), row[0], async_op=True))
    return rows


def broadcast_bytes(read: Callable[[], bytes], source: int = 0) -> bytes:
    """Return on every rank what `read` returns on rank `source`."""
    found = read() if rank() == source else b""
    size = int(broadcast_(torch.tensor(len(found)), source))
    with catch_warnings(action="ignore"):  # that bytes cannot be written to, which the sender does not do
        data = torch.frombuffer(found, dtype=torch.uint8) if found else torch.empty(size, dtype=torch.uint8)
    broadcast_(data, source)
    return found if rank() == source else data.numpy().tobytes()


def broadcast_(tensor: Tensor, source: int = 0) -> Tensor:
    """Overwrite `tensor` with that of rank `source`, which has the same shape and type."""
    _wait(tensor.nbytes if rank() == source else 0, dist.broadcast(tensor, source, async_op=True))
    return tensor


def all_reduce_(tensor: Tensor) -> Tensor:
    """Overwrite `tensor` with its sum over all ranks."""
    _wait(tensor.nbytes, dist.all_reduce(tensor, async_op=True))
    return tensor


def count_bytes(num_bytes: int) -> None:
    """Count what is handed to other ranks."""
    global _bytes_sent
    _bytes_sent += num_bytes


def local_first(work: Callable[[], T]) -> T:
    """Return what `work` returns, called on each node's first rank before the others, which find its caches filled."""
    if local_rank() == 0:
        result = work()
        all_gather(None)
        return result
    all_gather(None)
    return work()


def local_rank() -> int:
    """Return this rank's number within its node."""
    return int(os.environ.get("LOCAL_RANK", "0"))

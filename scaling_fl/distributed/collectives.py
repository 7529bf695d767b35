"""What ranks tell each other."""

import os
import time
from ast import literal_eval
from collections.abc import Callable
from contextlib import suppress
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from scaling_fl.distributed.signals import PeerLost, check_interrupt

T = TypeVar("T")
MEMORY = "scaling_fl"  # what memory that ranks share is called among a process's files
POLL = 5e-4  # seconds between two looks whether a collective is done

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
    """Wait for a collective in a way that signals can interrupt, and count what was handed to it."""
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
    own = _encode(value)
    sizes = torch.zeros(world_size(), dtype=torch.int64)
    sizes[rank()] = len(own)
    all_reduce_(sizes)
    texts = torch.zeros(world_size(), int(sizes.max()), dtype=torch.uint8)
    padded = torch.zeros_like(texts[0])
    padded[: len(own)] = own
    _wait(len(own), dist.all_gather(list(texts), padded, async_op=True))
    return [_decode(text[:size]) for text, size in zip(texts, sizes.tolist(), strict=True)]


def check_equal(values: dict[str, Any]) -> None:
    """Find out whether all ranks have the same values.

    Raises:
        ValueError: some rank's differ from those of rank 0.
    """
    by_rank = all_gather(values)
    for number, theirs in enumerate(by_rank):
        for key, value in theirs.items():
            if value != by_rank[0][key]:
                raise ValueError(
                    f"all ranks must have the same settings and data: {key} is {by_rank[0][key]!r} on rank 0 "
                    f"and {value!r} on rank {number}"
                )


def broadcast(value: T, source: int = 0) -> T:
    """Return the `value` of rank `source`, which is as for `gather`, on every rank."""
    return _decode(broadcast_bytes(lambda: _encode(value).numpy().tobytes(), source))


def broadcast_bytes(read: Callable[[], bytes], source: int = 0) -> bytes:
    """Return on every rank what `read` returns on rank `source`."""
    is_source = rank() == source
    own = read() if is_source else b""
    size = torch.tensor(len(own))
    broadcast_(size, source)
    data = torch.frombuffer(bytearray(own), dtype=torch.uint8) if own else torch.empty(int(size), dtype=torch.uint8)
    return broadcast_(data, source).numpy().tobytes()


def _encode(value: object) -> Tensor:
    return torch.frombuffer(bytearray(repr(value).encode()), dtype=torch.uint8)


def _decode(text: Tensor | bytes) -> Any:
    return literal_eval((text if isinstance(text, bytes) else text.numpy().tobytes()).decode())


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


def share_memory(num_bytes: int) -> list[Tensor]:
    """Return a piece of memory of each rank, uint8 (num_bytes,), which all ranks see; none where they share none.

    The memory has no name in any file system, and goes with the ranks.
    """
    if world_size() == 1 or not is_one_node() or not hasattr(os, "memfd_create"):
        return []
    own, mark, size = os.memfd_create(MEMORY), os.urandom(16).hex(), max(num_bytes, 32)
    os.truncate(own, size)
    os.write(own, mark.encode())
    names = all_gather((f"/proc/{os.getpid()}/fd/{own}", mark))
    pieces = []
    # Where ranks number their processes each for itself, as in containers, a name leads to another file or to none;
    # and a process may not look into another's everywhere.
    with suppress(OSError, RuntimeError):
        if all(MEMORY in os.readlink(path) for path, _ in names):
            pieces = [torch.from_file(path, shared=True, size=size, dtype=torch.uint8) for path, _ in names]
    found = [piece[: len(mark)].numpy().tobytes() for piece in pieces]
    all_see = all(all_gather(found == [mark.encode() for _, mark in names]))
    os.close(own)
    return [piece[:num_bytes] for piece in pieces] if all_see else []


def local_first(work: Callable[[], T]) -> T:
    """Call `work` on each node's first rank, then on the others, which find its caches filled."""
    if local_rank() == 0:
        result = work()
        all_gather(None)
        return result
    all_gather(None)
    return work()


def local_rank() -> int:
    """Return this rank's number within its node."""
    return int(os.environ.get("LOCAL_RANK", "0"))

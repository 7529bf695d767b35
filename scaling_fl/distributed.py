"""Ranks, and what they tell each other."""

import ctypes
import os
import time
from ast import literal_eval
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from functools import partial
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from scaling_fl.debugger import await_debugger, debugging
from scaling_fl.settings import whole_number_from_environment
from scaling_fl.signals import Bereft, interruptibly, look
from scaling_fl.vigil import Vigil

T = TypeVar("T")

# A collective waits for the slowest site of the federation, and that one may need hours.
TIMEOUT = timedelta(hours=24)
JOINING = timedelta(minutes=30)  # for all ranks to be there at the start
EVER = timedelta(days=365)  # with a debugger, as nobody knows how long a rank stands at a breakpoint
MEMORY = "scaling_fl"  # what memory that ranks share is called among a process's files
POLL = 5e-4  # seconds between two looks whether a collective is done
# Of glibc's mallopt: what is freed at the heap's end stays there up to 2 GiB, and blocks up to 32 MiB are of the heap.
KEEP_FREED_MEMORY = ((-1, 2**31 - 1), (-3, 2**25))  # (M_TRIM_THRESHOLD, bytes), (M_MMAP_THRESHOLD, its largest)

_bytes_sent = 0


@contextmanager
def world() -> Iterator[None]:
    """Join the ranks that the environment names; an unlaunched process is a world of one.

    The environment is that of torchrun (`RANK`, `WORLD_SIZE`, `MASTER_ADDR`, `MASTER_PORT`). A rank
    computes with one CPU thread unless `OMP_NUM_THREADS` says otherwise: one thread a rank is the
    fastest way to fill a machine, and another number gives other bits.

    What one rank raises ends all of them within seconds, and so does a rank that gives no sign of life
    for `LOST_AFTER` seconds (60). After that a process should end, by `launch.run_program` if it
    may have been in a collective. With `DEBUG=1` one rank waits for a debugger first, and none is ever lost.

    Raises:
        ValueError: another rank raised one, or no debugger can be waited for.
        PeerError: another rank failed, vanished or hangs.
        Interrupted: another rank was asked to end.
    """
    torch.set_num_threads(num_threads())
    with suppress(AttributeError):  # another C library
        # Gradients come and go with each batch: memory that went back would have to be mapped anew, page by page.
        for option, num_bytes in KEEP_FREED_MEMORY:
            ctypes.CDLL(None).mallopt(option, num_bytes)
    if accelerator() is not None:
        # Some kernels add in no fixed order otherwise, and a resumed run would end with other bits.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True, warn_only=True)
    is_debugged = debugging()
    if not launched():
        dist.init_process_group(timeout=TIMEOUT, store=dist.HashStore(), rank=0, world_size=1)
        try:
            if is_debugged:
                await_debugger(0, 1)
            yield
        finally:
            dist.destroy_process_group()
        return
    patience = timedelta(seconds=lost_after())
    store, number, num_ranks = interruptibly(partial(_join, EVER if is_debugged else TIMEOUT))
    own = store.clone()
    own.set_timeout(patience)
    with Vigil(own, number, num_ranks, patience.total_seconds(), is_one_node=is_one_node()).kept():
        if is_debugged:
            await_debugger(number, num_ranks)
        yield
        gather(None)  # nobody leaves before all are done
    dist.destroy_process_group()  # not after an error: it would wait for collectives that never end


def _join(timeout: timedelta) -> tuple[Any, int, int]:
    """Wait until all ranks are there; return where they met, this rank's number and how many they are."""
    store, number, num_ranks = next(dist.rendezvous("env://", timeout=JOINING))
    dist.init_process_group(timeout=timeout, store=store, rank=number, world_size=num_ranks)
    return store, number, num_ranks


def launched() -> bool:
    """Tell whether a launcher started this process as one rank of several."""
    return "RANK" in os.environ


def lost_after() -> int:
    """Return the seconds without a sign of life after which a rank counts as lost.

    Raises:
        ValueError: LOST_AFTER is not a whole number from 1.
    """
    seconds = whole_number_from_environment("LOST_AFTER", "60")
    return int(EVER.total_seconds()) if debugging() else seconds


def num_threads() -> int:
    """Return the number of CPU threads that this rank computes with.

    Raises:
        ValueError: OMP_NUM_THREADS is not a whole number from 1.
    """
    return whole_number_from_environment("OMP_NUM_THREADS", "1")


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


def _finish(num_bytes: int, work: Any) -> None:
    """Wait for a collective in a way that signals can interrupt, and count what was handed to it."""
    look()
    if world_size() > 1:
        count_bytes(num_bytes)
    try:
        while not work.is_completed():
            look()
            time.sleep(POLL)
        work.wait()
    except RuntimeError as error:
        raise Bereft(str(error)) from error


def gather(value: T) -> list[T]:
    """Return every rank's `value`, in the order of the ranks, on every rank.

    It is sent as the text of a Python literal: numbers, texts, None, and tuples, lists and dicts of them.
    """
    own = _encode(value)
    sizes = torch.zeros(world_size(), dtype=torch.int64)
    sizes[rank()] = len(own)
    sum_(sizes)
    texts = torch.zeros(world_size(), int(sizes.max()), dtype=torch.uint8)
    padded = torch.zeros_like(texts[0])
    padded[: len(own)] = own
    _finish(len(own), dist.all_gather(list(texts), padded, async_op=True))
    return [_decode(text[:size]) for text, size in zip(texts, sizes.tolist(), strict=True)]


def agree(values: dict[str, Any]) -> None:
    """Find out whether all ranks have the same values.

    Raises:
        ValueError: some rank's differ from those of rank 0.
    """
    by_rank = gather(values)
    for number, theirs in enumerate(by_rank):
        for key, value in theirs.items():
            if value != by_rank[0][key]:
                raise ValueError(
                    f"all ranks must have the same settings and data: {key} is {by_rank[0][key]!r} on rank 0 "
                    f"and {value!r} on rank {number}"
                )


def share(value: T, source: int = 0) -> T:
    """Return the `value` of rank `source`, which is as for `gather`, on every rank."""
    return _decode(share_bytes(lambda: _encode(value).numpy().tobytes(), source))


def share_bytes(read: Callable[[], bytes], source: int = 0) -> bytes:
    """Return on every rank what `read` returns on rank `source`."""
    is_source = rank() == source
    own = read() if is_source else b""
    size = torch.tensor(len(own))
    share_(size, source)
    data = torch.frombuffer(bytearray(own), dtype=torch.uint8) if own else torch.empty(int(size), dtype=torch.uint8)
    return share_(data, source).numpy().tobytes()


def _encode(value: object) -> Tensor:
    return torch.frombuffer(bytearray(repr(value).encode()), dtype=torch.uint8)


def _decode(text: Tensor | bytes) -> Any:
    return literal_eval((text if isinstance(text, bytes) else text.numpy().tobytes()).decode())


def share_(tensor: Tensor, source: int = 0) -> Tensor:
    """Overwrite `tensor` with that of rank `source`, which has the same shape and type."""
    _finish(tensor.nbytes if rank() == source else 0, dist.broadcast(tensor, source, async_op=True))
    return tensor


def sum_(tensor: Tensor) -> Tensor:
    """Overwrite `tensor` with its sum over all ranks."""
    _finish(tensor.nbytes, dist.all_reduce(tensor, async_op=True))
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
    names = gather((f"/proc/{os.getpid()}/fd/{own}", mark))
    pieces = []
    # Where ranks number their processes each for itself, as in containers, a name leads to another file or to none;
    # and a process may not look into another's everywhere.
    with suppress(OSError, RuntimeError):
        if all(MEMORY in os.readlink(path) for path, _ in names):
            pieces = [torch.from_file(path, shared=True, size=size, dtype=torch.uint8) for path, _ in names]
    found = [piece[: len(mark)].numpy().tobytes() for piece in pieces]
    all_see = all(gather(found == [mark.encode() for _, mark in names]))
    os.close(own)
    return [piece[:num_bytes] for piece in pieces] if all_see else []


def first_of_node_first(work: Callable[[], T]) -> T:
    """Call `work` on each node's first rank, then on the others, which find its caches filled."""
    if local_rank() == 0:
        result = work()
        gather(None)
        return result
    gather(None)
    return work()


def local_rank() -> int:
    """Return this rank's number within its node."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def accelerator() -> str | None:
    """Return the kind of accelerator here; MPS does not count, as the exact mean needs float64."""
    device = torch.accelerator.current_accelerator(check_available=True)
    return None if device is None or device.type == "mps" else device.type

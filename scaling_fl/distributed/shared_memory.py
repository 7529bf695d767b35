"""Memory that the ranks of one machine share."""

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from weakref import finalize

import torch

from scaling_fl.distributed.collectives import POLL, all_gather, is_one_node, rank, world_size
from scaling_fl.distributed.signals import check_interrupt

with suppress(ImportError):  # on Windows, where ranks share no memory
    import fcntl

NAME = "scaling_fl"  # first part of its name among a process's files


class SharedMemory:
    """Memory that all ranks see. It has no name in any file system, and is freed with the ranks.

    Args:
        path: of the open file that it is.
        num_bytes: of it.
    """

    def __init__(self, path: str, num_bytes: int) -> None:
        self.values = torch.from_file(path, shared=True, size=num_bytes, dtype=torch.uint8)
        self._file = os.open(path, os.O_RDWR)
        finalize(self, os.close, self._file)

    @contextmanager
    def locked(self, number: int) -> Iterator[None]:
        """Keep other ranks out of their block with the same number."""
        while True:
            with suppress(BlockingIOError):
                fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, number)
                break
            check_interrupt()
            time.sleep(POLL)
        try:
            yield
        finally:
            fcntl.lockf(self._file, fcntl.LOCK_UN, 1, number)


def share_memory(num_bytes: int) -> SharedMemory | None:
    """Return memory that all ranks see, filled with zeros; None where they cannot share any."""
    if world_size() == 1 or not is_one_node() or not hasattr(os, "memfd_create"):
        return None
    file = os.memfd_create(f"{NAME}-{os.urandom(16).hex()}") if rank() == 0 else None
    if file is not None:
        os.truncate(file, num_bytes)
    path = "" if file is None else f"/proc/{os.getpid()}/fd/{file}"
    path, link = all_gather((path, path and os.readlink(path)))[0]
    memory = None
    # Where ranks have process ids of their own, as in containers, a path names another file or none; and some systems
    # let no process open another's files.
    with suppress(OSError, RuntimeError):
        if os.readlink(path) == link:
            memory = SharedMemory(path, num_bytes)
    all_see = all(all_gather(memory is not None))
    if file is not None:
        os.close(file)
    return memory if all_see else None

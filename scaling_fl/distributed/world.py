"""Join the process group of a run, and leave it."""

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from functools import partial
from typing import Any

import torch
import torch.distributed as dist

from scaling_fl.distributed.collectives import all_gather, is_one_node
from scaling_fl.distributed.debugger import await_debugger, is_debugging
from scaling_fl.distributed.heartbeat import Heartbeat
from scaling_fl.distributed.signals import wait_interruptibly
from scaling_fl.errors import whole_number_from_environment

# A collective waits for the slowest site of the federation, which may need hours.
TIMEOUT = timedelta(hours=24)
JOIN_TIMEOUT = timedelta(minutes=30)  # until all ranks have joined
NO_TIMEOUT = timedelta(days=365)  # with a debugger: a rank may stand at a breakpoint for any time
# For glibc's mallopt: keep up to 2 GiB of freed memory at the end of the heap, and put blocks up to 32 MiB there.
KEEP_FREED_MEMORY = ((-1, 2**31 - 1), (-3, 2**25))  # (M_TRIM_THRESHOLD, bytes), (M_MMAP_THRESHOLD, its largest)


@contextmanager
def world() -> Iterator[None]:
    """Join the process group that the environment names; a process without a launcher is a world of one.

    The variables are those of torchrun (`RANK`, `WORLD_SIZE`, `MASTER_ADDR`, `MASTER_PORT`). A rank computes with
    `OMP_NUM_THREADS` CPU threads (default: 1). One thread a rank is the fastest way to use all cores; another number
    of threads changes the bits.

    An error of one rank soon ends all ranks, and so does a rank without a heartbeat for `LOST_AFTER` seconds (60). Then
    `ending.run_program` should end the process, as it may be in a collective. With `DEBUG=1` one rank first waits for
    a debugger, and no rank counts as lost.

    Raises:
        ValueError: another rank raised one, or the settings of the debugger are wrong.
        PeerError: another rank failed, vanished or hangs.
        Interrupted: a signal asked another rank to end.
    """
    torch.set_num_threads(num_threads())
    with suppress(AttributeError):  # another C library
        # Gradients are freed and allocated with each batch; returned memory would be mapped again, page by page.
        for option, num_bytes in KEEP_FREED_MEMORY:
            ctypes.CDLL(None).mallopt(option, num_bytes)
    if accelerator() is not None:
        # Some kernels otherwise add in no fixed order, and a resumed run would end with other bits.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # it takes time
    is_debugged = is_debugging()
    if not launched():
        dist.init_process_group(backends(), timeout=TIMEOUT, store=dist.HashStore(), rank=0, world_size=1)
        try:
            if is_debugged:
                await_debugger(0, 1)
            yield
        finally:
            dist.destroy_process_group()
        return
    peer_timeout = timedelta(seconds=lost_after())
    store, number, num_ranks = wait_interruptibly(partial(_join, NO_TIMEOUT if is_debugged else TIMEOUT))
    connection = store.clone()  # of the heartbeat's thread
    connection.set_timeout(peer_timeout)
    with Heartbeat(connection, number, num_ranks, peer_timeout.total_seconds(), is_one_node=is_one_node()).watch():
        if is_debugged:
            await_debugger(number, num_ranks)
        yield
        all_gather(None)  # no rank leaves before all have finished
    dist.destroy_process_group()  # not after an error: it would wait for collectives that never end


def _join(timeout: timedelta) -> tuple[Any, int, int]:
    """Wait until all ranks have joined; return their store, this rank and the number of ranks."""
    store, number, num_ranks = next(dist.rendezvous("env://", timeout=JOIN_TIMEOUT))
    dist.init_process_group(backends(), timeout=timeout, store=store, rank=number, world_size=num_ranks)
    return store, number, num_ranks


@contextmanager
def without_process_group() -> Iterator[None]:
    """Hide the process group from the body, so that a library there runs alone and waits for no other rank."""
    group, dist.group.WORLD = dist.group.WORLD, None
    try:
        yield
    finally:
        dist.group.WORLD = group


def backends() -> str:
    """Return the backends of collectives. torch's default has none for the CPU where there is an accelerator."""
    kind = accelerator()
    return "gloo" if kind is None else f"cpu:gloo,{kind}:{dist.get_default_backend_for_device(kind)}"


def launched() -> bool:
    """Tell whether a launcher started this process as one rank of several."""
    return "RANK" in os.environ


def lost_after() -> int:
    """Return the seconds without a heartbeat after which a rank counts as lost.

    Raises:
        ValueError: LOST_AFTER is not a whole number from 1.
    """
    seconds = whole_number_from_environment("LOST_AFTER", "60")
    return int(NO_TIMEOUT.total_seconds()) if is_debugging() else seconds


def num_threads() -> int:
    """Return the number of CPU threads that this rank computes with.

    Raises:
        ValueError: OMP_NUM_THREADS is not a whole number from 1.
    """
    return whole_number_from_environment("OMP_NUM_THREADS", "1")


def accelerator() -> str | None:
    """Return the type of this machine's accelerator, if any. MPS does not count: the exact mean needs float64."""
    device = torch.accelerator.current_accelerator(check_available=True)
    return None if device is None or device.type == "mps" else device.type

"""Join the ranks of a run, and leave them."""

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
from scaling_fl.distributed.debugger import await_debugger, debugging
from scaling_fl.distributed.heartbeat import Heartbeat
from scaling_fl.distributed.signals import wait_interruptibly
from scaling_fl.errors import whole_number_from_environment

# A collective waits for the slowest site of the federation, and that one may need hours.
TIMEOUT = timedelta(hours=24)
JOIN_TIMEOUT = timedelta(minutes=30)  # for all ranks to be there at the start
NO_TIMEOUT = timedelta(days=365)  # with a debugger, as nobody knows how long a rank stands at a breakpoint
# Of glibc's mallopt: what is freed at the heap's end stays there up to 2 GiB, and blocks up to 32 MiB are of the heap.
KEEP_FREED_MEMORY = ((-1, 2**31 - 1), (-3, 2**25))  # (M_TRIM_THRESHOLD, bytes), (M_MMAP_THRESHOLD, its largest)


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
    store, number, num_ranks = wait_interruptibly(partial(_join, NO_TIMEOUT if is_debugged else TIMEOUT))
    own = store.clone()
    own.set_timeout(patience)
    with Heartbeat(own, number, num_ranks, patience.total_seconds(), is_one_node=is_one_node()).kept():
        if is_debugged:
            await_debugger(number, num_ranks)
        yield
        all_gather(None)  # nobody leaves before all are done
    dist.destroy_process_group()  # not after an error: it would wait for collectives that never end


def _join(timeout: timedelta) -> tuple[Any, int, int]:
    """Wait until all ranks are there; return where they met, this rank's number and how many they are."""
    store, number, num_ranks = next(dist.rendezvous("env://", timeout=JOIN_TIMEOUT))
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
    return int(NO_TIMEOUT.total_seconds()) if debugging() else seconds


def num_threads() -> int:
    """Return the number of CPU threads that this rank computes with.

    Raises:
        ValueError: OMP_NUM_THREADS is not a whole number from 1.
    """
    return whole_number_from_environment("OMP_NUM_THREADS", "1")


def accelerator() -> str | None:
    """Return the kind of accelerator here; MPS does not count, as the exact mean needs float64."""
    device = torch.accelerator.current_accelerator(check_available=True)
    return None if device is None or device.type == "mps" else device.type

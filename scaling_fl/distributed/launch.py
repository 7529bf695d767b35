"""Start ranks on this machine."""

import gc
import logging
import multiprocessing
import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.synchronize import Barrier
from tempfile import TemporaryDirectory
from typing import NoReturn

from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from scaling_fl.distributed import signals
from scaling_fl.distributed.heartbeat import PeerError
from scaling_fl.distributed.world import accelerator
from scaling_fl.errors import whole_number_from_environment

RUN_ID = "scaling_fl.launch on this machine"
# A rank that fails waits so many seconds before it exits. The agent reports the first rank that exits, and this
# should be a rank that was killed, as its peers fail because of it.
EXIT_DELAY_SECONDS = 0.5


def num_ranks(num_sites: int) -> int:
    """Return how many local ranks the environment asks for by RANKS (default: 1).

    RANKS=auto starts one rank if there is an accelerator, as one rank can drive all devices. Otherwise it starts one
    for each core, but not more than there are sites.

    Raises:
        ValueError: RANKS is not a whole number from 1.
    """
    value = os.environ.get("RANKS") or "1"
    if value == "auto":
        num_cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        return 1 if accelerator() else min(num_cores, num_sites)
    return whole_number_from_environment("RANKS", value)


def was_launched_here() -> bool:
    """Tell whether this process is a rank that `launch` started, so that its settings are checked."""
    return os.environ.get("TORCHELASTIC_RUN_ID") == RUN_ID


def launch(function: Callable[..., object], *args: object, num_ranks: int) -> list:
    """Run `function(*args)` on `num_ranks` local ranks and return what each returned.

    torchrun's agent starts the ranks. It forks them from this process, so that they share its imports; with an
    accelerator, which does not survive a fork, it spawns them. Tensors travel over the loopback interface only, but
    torch's rendezvous store listens on all interfaces.

    Raises:
        SystemExit: a rank failed, with the rank's exit status. The rank has printed its error.
        Interrupted: a signal ended the ranks.
    """
    loopback = next((name for _, name in socket.if_nameindex() if name.startswith("lo")), None)
    if loopback is not None:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", loopback)
        os.environ.setdefault("NCCL_SOCKET_IFNAME", loopback)
    logs = TemporaryDirectory(prefix="scaling_fl-")
    start_method = "fork" if accelerator() is None else "spawn"
    all_started = multiprocessing.get_context(start_method).Barrier(num_ranks)
    config = _configure_agent(num_ranks, start_method, logs.name)
    handlers = signals.install_handlers()
    # The garbage collector writes into every object that it visits, and so would copy the memory that forks share.
    gc.freeze()
    try:
        with signals.interruptible():
            results = elastic_launch(config, _rank_main)(all_started, function, *args)
    except ChildFailedError as error:
        for number, failure in error.failures.items():
            if failure.exitcode in (-signal.SIGKILL, -signal.SIGSEGV, -signal.SIGBUS, -signal.SIGABRT):
                name = signal.Signals(-failure.exitcode).name
                print(f"error: rank {number} was ended by {name} (SIGKILL often means: out of memory)", file=sys.stderr)
                raise SystemExit(128 - failure.exitcode) from None
        status = error.get_first_failure()[1].exitcode
        if status - 128 in signals.ENDING:
            raise signals.Interrupted(status - 128) from None
        raise SystemExit(status) from None
    finally:
        signals.set_handlers(handlers)
        logs.cleanup()
        gc.unfreeze()
    return [results[number] for number in range(num_ranks)]


def _configure_agent(num_ranks: int, start_method: str, log_dir: str) -> LaunchConfig:
    # The rank has printed its error, which the agent's own stack trace would hide.
    elastic = "torch.distributed.elastic"
    for name in (f"{elastic}.multiprocessing.api", f"{elastic}.agent.server.api", "torch.multiprocessing.spawn"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    return LaunchConfig(
        logs_specs=DefaultLogsSpecs(log_dir=log_dir),
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=num_ranks,
        run_id=RUN_ID,
        rdzv_backend="c10d",
        rdzv_endpoint="127.0.0.1:0",
        local_addr="127.0.0.1",
        max_restarts=0,
        shutdown_timeout=10,  # seconds from SIGTERM to SIGKILL
        start_method=start_method,
        signals_to_handle="",  # an error of the agent's own handlers can be lost, as at a fork
    )


def _rank_main(all_started: Barrier, function: Callable[..., object], *args: object) -> object:
    """Call `function` and print its error, which the agent would hide or interrupt.

    No rank joins the others before all are forked. A thread of the parent process serves their store, and a lock that
    it holds at the moment of a fork, such as the name resolver's, is never released in the child.
    """
    try:
        with signals.interruptible():
            all_started.wait()
            return function(*args)
    except signals.Interrupted as error:
        raise SystemExit(128 + error.number) from None
    except BaseException as error:
        status = _print_error(error)
        time.sleep(EXIT_DELAY_SECONDS)
        raise SystemExit(status) from None


def _print_error(error: BaseException) -> int:
    """Print an error that ends a program, in one write as several ranks may print; return the exit status."""
    if isinstance(error, SystemExit):
        text = error.code if isinstance(error.code, str) else ""
    elif isinstance(error, PeerError):
        text = f"error: {error}"
    elif isinstance(error, signals.Interrupted):
        text = str(error) if os.environ.get("RANK", "0") == "0" else ""
    else:
        where = f"error on rank {os.environ['RANK']}:\n" if "RANK" in os.environ else ""
        text = where + "".join(traceback.format_exception(error)).rstrip()
    if text:
        with suppress(OSError):  # the terminal was closed
            print(f"{text}\n", end="", file=sys.stderr, flush=True)
    if isinstance(error, signals.Interrupted):
        return 128 + error.number
    if not isinstance(error, SystemExit):
        return 1
    return error.code if isinstance(error.code, int) else int(error.code is not None)


def run_program(program: Callable[[], object]) -> NoReturn:
    """Call `program` and exit with its status; exit at once after an error.

    Python's own exit would wait for a collective that a lost rank never joins.
    """
    status = 0
    try:
        program()
    except BaseException as error:
        status = _print_error(error)
    if status:
        with suppress(OSError):  # the disk is full, or the reader has ended
            sys.stdout.flush()
        os._exit(status)
    sys.exit()

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
# A rank that fails waits so many seconds before it ends: the agent reports the first to end, and a rank
# that was killed is why others fail.
HEAD_START = 0.5


def num_ranks(num_sites: int) -> int:
    """Return how many local ranks the environment asks for: RANKS, or 1 without it.

    RANKS=auto is one where there is an accelerator, whose devices one rank can drive all, and otherwise
    as many as there are cores, or sites if these are fewer.

    Raises:
        ValueError: RANKS is not a whole number from 1.
    """
    wanted = os.environ.get("RANKS") or "1"
    if wanted == "auto":
        num_cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        return 1 if accelerator() else min(num_cores, num_sites)
    return whole_number_from_environment("RANKS", wanted)


def was_launched_here() -> bool:
    """Tell whether this process is a rank that `launch` started, whose settings were checked before."""
    return os.environ.get("TORCHELASTIC_RUN_ID") == RUN_ID


def launch(function: Callable[..., object], *args: object, num_ranks: int) -> list:
    """Run `function(*args)` on `num_ranks` local ranks and return what each returned.

    The ranks are the work of torchrun's own agent, forked from this process so that they share what
    it has imported (spawned where there is an accelerator, which does not survive a fork). They
    send each other tensors over the loopback interface alone; torch's rendezvous store listens on all.

    Raises:
        SystemExit: a rank failed, with that rank's exit status. It has said what was wrong.
        Interrupted: a signal ended the ranks.
    """
    # The rank has said what was wrong; the agent's stack trace of itself would bury it.
    elastic = "torch.distributed.elastic"
    for name in (f"{elastic}.multiprocessing.api", f"{elastic}.agent.server.api", "torch.multiprocessing.spawn"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    loopback = next((name for _, name in socket.if_nameindex() if name.startswith("lo")), None)
    if loopback is not None:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", loopback)
        os.environ.setdefault("NCCL_SOCKET_IFNAME", loopback)
    logs = TemporaryDirectory(prefix="scaling_fl-")
    start_method = "fork" if accelerator() is None else "spawn"
    all_started = multiprocessing.get_context(start_method).Barrier(num_ranks)
    config = LaunchConfig(
        logs_specs=DefaultLogsSpecs(log_dir=logs.name),
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=num_ranks,
        run_id=RUN_ID,
        rdzv_backend="c10d",
        rdzv_endpoint="127.0.0.1:0",
        local_addr="127.0.0.1",
        max_restarts=0,
        shutdown_timeout=10,  # seconds from a polite signal to a kill
        start_method=start_method,
        signals_to_handle="",  # what the agent's own handlers raise can be lost, at a fork for example
    )
    handlers = signals.install_handlers()
    # The collector writes into every object that it looks at, and so would copy what forks share.
    gc.freeze()
    try:
        with signals.interruptible():
            results = elastic_launch(config, _rank_main)(all_started, function, *args)
    except ChildFailedError as error:
        for number, failure in error.failures.items():
            if failure.exitcode in (-signal.SIGKILL, -signal.SIGSEGV, -signal.SIGBUS, -signal.SIGABRT):
                name = signal.Signals(-failure.exitcode).name
                print(f"error: rank {number} was ended by {name} (SIGKILL is often: out of memory)", file=sys.stderr)
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


def _rank_main(all_started: Barrier, function: Callable[..., object], *args: object) -> object:
    """Call `function` and say what it raises, which the agent would keep to itself or interrupt.

    No rank joins the others before all are forked: a thread of this process's parent serves the store where they
    meet, and a lock that it holds at the moment of a fork (of the name resolver, say) is never released in the child.
    """
    try:
        with signals.interruptible():
            all_started.wait()
            return function(*args)
    except signals.Interrupted as error:
        raise SystemExit(128 + error.number) from None
    except BaseException as error:
        status = _say(error)
        time.sleep(HEAD_START)
        raise SystemExit(status) from None


def _say(error: BaseException) -> int:
    """Print why a program ends, in one write as several ranks may print, and return its exit status."""
    if isinstance(error, SystemExit):
        sentence = error.code if isinstance(error.code, str) else ""
    elif isinstance(error, PeerError):
        sentence = f"error: {error}"
    elif isinstance(error, signals.Interrupted):
        sentence = str(error) if os.environ.get("RANK", "0") == "0" else ""
    else:
        where = f"error on rank {os.environ['RANK']}:\n" if "RANK" in os.environ else ""
        sentence = where + "".join(traceback.format_exception(error)).rstrip()
    if sentence:
        with suppress(OSError):  # of a terminal that was closed
            print(f"{sentence}\n", end="", file=sys.stderr, flush=True)
    if isinstance(error, signals.Interrupted):
        return 128 + error.number
    if not isinstance(error, SystemExit):
        return 1
    return error.code if isinstance(error.code, int) else int(error.code is not None)


def run_program(program: Callable[[], object]) -> NoReturn:
    """Call `program` and end this process as it ends, at once if that is with an error.

    Python's own way out would wait for a collective that a lost rank never joins.
    """
    status = 0
    try:
        program()
    except BaseException as error:
        status = _say(error)
    if status:
        with suppress(OSError):  # of a disk that is full, or a reader who is gone
            sys.stdout.flush()
        os._exit(status)
    sys.exit()

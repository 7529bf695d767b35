"""Start ranks on this machine."""

import gc
import logging
import multiprocessing
import os
import pickle
import signal
import socket
import sys
import time
from collections.abc import Callable
from multiprocessing.synchronize import Barrier
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TypeVar

import cloudpickle
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from scaling_fl.distributed import rendezvous, signals
from scaling_fl.distributed.ending import print_error
from scaling_fl.distributed.heartbeat import PeerError
from scaling_fl.distributed.world import accelerator
from scaling_fl.errors import one_line, whole_number_from_environment

T = TypeVar("T")

RUN_ID = "scaling_fl.launch on this machine"
FUNCTION = "function.pkl"  # what the ranks call, in a folder of this user
FRESH_RANK = (
    "import sys, pathlib; from scaling_fl.distributed.launch import fresh_rank; fresh_rank(pathlib.Path(sys.argv[1]))"
)
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


def launch(function: Callable[..., object], *args: object, num_ranks: int, fork: bool = False) -> list:
    """Run `function(*args)` on `num_ranks` ranks of this machine and return what each returned.

    torchrun's agent starts the ranks, each in a fresh Python, whatever threads this process has. The function is sent
    by value if it is of a script or a notebook, and by name if it is of a module. Ranks talk over the loopback
    interface only.

    Args:
        function: what each rank does, such as `with world(): ...`.
        args: of the function.
        num_ranks: how many processes to start.
        fork: fork the ranks, so that they share the imports of this process, in which nothing has computed yet. With an
            accelerator, which does not survive a fork, they start fresh.

    Raises:
        ValueError: the function or its arguments cannot be sent to another process.
        PeerError: a rank failed, and has printed its error; with `fork` a SystemExit with the rank's exit status.
        Interrupted: a signal ended the ranks.
    """
    environment = dict(os.environ)
    loopback = next((name for _, name in socket.if_nameindex() if name.startswith("lo")), None)
    if loopback is not None:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", loopback)
        os.environ.setdefault("NCCL_SOCKET_IFNAME", loopback)
    handlers = signals.install_handlers()
    try:
        with TemporaryDirectory(prefix="scaling_fl-") as folder, signals.interruptible():
            if fork and accelerator() is None:
                return _launch_forks(_configure_agent(num_ranks, folder), function, args)
            return _launch_fresh(_configure_agent(num_ranks, folder), function, args, Path(folder))
    except ChildFailedError as error:
        end = _end_of(error)
        if isinstance(end, SystemExit) and not fork:
            number = error.get_first_failure()[0]
            raise PeerError(f"rank {number} failed with exit status {end.code}; its error is printed above") from None
        raise end from None
    finally:
        signals.give_back(handlers)
        os.environ.clear()
        os.environ.update(environment)


def _launch_forks(config: LaunchConfig, function: Callable[..., object], args: tuple) -> list:
    all_started = multiprocessing.get_context("fork").Barrier(config.nproc_per_node)
    results = elastic_launch(config, _forked_rank)(all_started, function, *args)
    return [results[number] for number in range(config.nproc_per_node)]


def _launch_fresh(config: LaunchConfig, function: Callable[..., object], args: tuple, folder: Path) -> list:
    try:
        (folder / FUNCTION).write_bytes(cloudpickle.dumps((sys.argv, function, args)))
    except Exception as error:
        raise ValueError(
            f"launch: expected a function and arguments that can be sent to other processes, got {function!r} "
            f"({one_line(error)}). Make what cannot be sent, such as files and locks, inside the function"
        ) from error
    os.environ["PYTHONPATH"] = python_path()  # as modules go by name
    elastic_launch(config, sys.executable)("-P", "-c", FRESH_RANK, str(folder))
    return [pickle.loads((folder / f"{number}.pkl").read_bytes()) for number in range(config.nproc_per_node)]


def python_path() -> str:
    """Return the folders in which this process finds modules, for the variable PYTHONPATH of another one."""
    return os.pathsep.join(entry or os.getcwd() for entry in sys.path if isinstance(entry, str))


def fresh_rank(folder: Path) -> None:
    """Do the work of a rank that `launch` has started in a fresh Python.

    Args:
        folder: with the function, and where the result goes. `launch` has made it, for this user alone.
    """
    gc.disable()  # it would visit the objects of the packages again and again, now and while training
    sys.argv, function, args = pickle.loads((folder / FUNCTION).read_bytes())
    gc.freeze()
    gc.enable()
    result = _run_rank(lambda: _pack(function(*args)))
    (folder / f"{os.environ['RANK']}.pkl").write_bytes(result)


def _pack(result: object) -> bytes:
    try:
        return cloudpickle.dumps(result)
    except Exception as error:
        raise SystemExit(
            f"error: launch: expected a result that can be sent to another process, got {result!r:.100} "
            f"({one_line(error)})"
        ) from error


def _end_of(error: ChildFailedError) -> BaseException:
    """Return what ends the launcher after a rank has failed."""
    for number, failure in error.failures.items():
        if failure.exitcode in (-signal.SIGKILL, -signal.SIGSEGV, -signal.SIGBUS, -signal.SIGABRT):
            name = signal.Signals(-failure.exitcode).name
            lost = PeerError(f"rank {number} was ended by {name} (SIGKILL often means: out of memory)")
            print_error(lost)
            return SystemExit(128 - failure.exitcode)
    status = error.get_first_failure()[1].exitcode
    return signals.Interrupted(status - 128) if status - 128 in signals.ENDING else SystemExit(status)


def _configure_agent(num_ranks: int, folder: str) -> LaunchConfig:
    # The rank has printed its error, which the agent's own stack trace would hide.
    elastic = "torch.distributed.elastic"
    for name in (f"{elastic}.multiprocessing.api", f"{elastic}.agent.server.api", "torch.multiprocessing.spawn"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    return LaunchConfig(
        logs_specs=DefaultLogsSpecs(log_dir=folder),
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=num_ranks,
        run_id=RUN_ID,
        rdzv_backend=rendezvous.BACKEND,
        monitor_interval=0.02,  # seconds from the end of a rank to its notice
        max_restarts=0,
        shutdown_timeout=10,  # seconds from SIGTERM to SIGKILL
        start_method="fork",  # of a function; a fresh Python is a program
        signals_to_handle="",  # an error of the agent's own handlers can be lost, as at a fork
    )


def _forked_rank(all_started: Barrier, function: Callable[..., object], *args: object) -> object:
    """Call `function` in a fork.

    No rank joins the others before all are forked. A thread of the parent process serves their store, and a lock that
    it holds at the moment of a fork, such as the name resolver's, is never released in the child.
    """
    gc.freeze()  # the collector writes into every object that it visits, and so would copy the memory that forks share

    def start(*args: object) -> object:
        all_started.wait()
        return function(*args)

    return _run_rank(start, *args)


def _run_rank(function: Callable[..., T], *args: object) -> T:
    """Call `function`, and print its error, which the agent would hide or interrupt."""
    try:
        with signals.interruptible():
            return function(*args)
    except signals.Interrupted as error:
        raise SystemExit(128 + error.number) from None
    except BaseException as error:
        status = print_error(error)
        time.sleep(EXIT_DELAY_SECONDS)
        raise SystemExit(status) from None

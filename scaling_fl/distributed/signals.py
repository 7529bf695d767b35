"""Ask a process to end: raise an error in its main thread, again until it arrives.

A signal's handler raises its error at any point of the main thread. Code that catches every error (`except:`) and
destructors lose it, and while a lock is acquired it would leave the lock locked forever. So the request is stored. A
thread lets the handler raise it again until the end of `interruptible`, and `check_interrupt` raises it too.
"""

import _thread
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any, TypeVar

T = TypeVar("T")

ENDING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
WAKE = signal.SIGURG  # interrupts the main thread; the default is to ignore it
RETRY_SECONDS = 0.1  # between two attempts to raise the request
GRACE_SECONDS = 45.0  # from a signal until the process is ended; long enough to record the end in MongoDB
# Functions in which no error is raised: those that take and release locks, the handlers, which may interrupt them, and
# those of `with` between a context manager and the body, where the manager would not learn of it.
LOCKING = ("__enter__", "__exit__", "acquire", "release", "_acquire_restore", "_release_save")
HANDLERS = ("request_end", "raise_request", "_on_signal", "_on_wake")
MODULES = ("threading", "logging", "contextlib", __name__, "scaling_fl.distributed.heartbeat")
UNSAFE_FUNCTIONS = {(name, module) for name in (*LOCKING, *HANDLERS) for module in MODULES}

_request: BaseException | None = None
_num_ends = 0  # how often the caller of `launch` has got its handlers back, and continues


class Interrupted(KeyboardInterrupt):
    """A signal asked this rank or another one to end."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number

    def __str__(self) -> str:
        return f"interrupted by {signal.Signals(self.number).name}"


class PeerLost(BaseException):
    """Another rank has ended. This is not an `Exception`, as neither this rank nor its sites failed."""


def ending_signals() -> list[signal.Signals]:
    """Return the signals that end this process: started by `nohup` or in the background, it ignores some."""
    return [number for number in ENDING if signal.getsignal(number) != signal.SIG_IGN]


def install_handlers() -> dict[signal.Signals, Any]:
    """Let SIGTERM, SIGINT and SIGHUP raise Interrupted in the main thread; return the previous handlers."""
    return set_handlers(dict.fromkeys(ending_signals(), _on_signal) | {WAKE: _on_wake})


def set_handlers(handlers: Mapping[signal.Signals, Any]) -> dict[signal.Signals, Any]:
    """Set handlers of signals and return the previous ones; do nothing outside the main thread, as Python cannot."""
    if threading.current_thread() is not threading.main_thread():
        return {}
    return {number: signal.signal(number, handler) for number, handler in handlers.items()}


def give_back(handlers: Mapping[signal.Signals, Any]) -> None:
    """Restore the handlers of a caller that continues. Earlier signals no longer end its process."""
    global _num_ends
    _num_ends += 1
    set_handlers(handlers)
    if sys.unraisablehook is _report_unraisable:
        sys.unraisablehook = sys.__unraisablehook__


def _on_wake(_: int, frame: FrameType | None) -> None:
    raise_request(frame)


def _on_signal(number: int, frame: FrameType | None) -> None:
    request_end(Interrupted(number), frame)


def _on_late_signal(number: int, _: object) -> None:
    """Raise nothing, but end the process after `GRACE_SECONDS`."""
    _thread.start_new_thread(_repeat, (Interrupted(number), _num_ends))


def restore_defaults() -> None:
    """Restore the system's handlers of signals, for Python's own exit, which no error may interrupt."""
    set_handlers(dict.fromkeys(ending_signals(), signal.SIG_DFL))


def request_end(error: Interrupted | PeerLost, frame: FrameType | None) -> None:
    """Raise an error from a signal's handler, and again from the handler of `WAKE`. Only the first request counts."""
    global _request
    if _request is None:
        _request = error
        sys.unraisablehook = _report_unraisable
        _thread.start_new_thread(_repeat, (error, _num_ends))  # a thread of `threading` would wait for its start here
    raise_request(frame)


def _repeat(error: BaseException, num_ends: int) -> None:
    """Let the handler in the main thread raise the request again; end the process after the deadline."""
    deadline = time.monotonic() + GRACE_SECONDS
    while _request is error and time.monotonic() < deadline:
        time.sleep(RETRY_SECONDS)
        signal.pthread_kill(threading.main_thread().ident or 0, WAKE)
    time.sleep(max(deadline - time.monotonic(), 0))
    # Not if the caller has restored its own handlers and continues. The heartbeat ends a rank that lost its peers.
    if not isinstance(error, Interrupted) or num_ends != _num_ends:
        return
    if signal.getsignal(error.number) in (_on_late_signal, _on_signal):
        with suppress(OSError):
            print(f"{error}; the process did not end within {GRACE_SECONDS:.0f} s", file=sys.stderr, flush=True)
        os._exit(128 + error.number)


def raise_request(frame: FrameType | None) -> None:
    """Raise the request, but not while its error is being handled, nor inside a lock's functions."""
    error = sys.exc_info()[1]
    while error is not None:
        if isinstance(error, Interrupted | PeerLost):
            return
        error = error.__context__
    if frame is None or (frame.f_code.co_name, frame.f_globals.get("__name__")) not in UNSAFE_FUNCTIONS:
        check_interrupt()


def _report_unraisable(unraisable: Any) -> None:
    """Print no request that was raised in a destructor, where Python cannot pass it on: it is raised again."""
    if not isinstance(unraisable.exc_value, Interrupted | PeerLost):
        sys.__unraisablehook__(unraisable)


def check_interrupt() -> None:
    """Raise the request to end, if there is one. Any thread may call this."""
    if _request is not None:
        raise _request


def wait_interruptibly(work: Callable[[], T]) -> T:
    """Return the result of `work`, called in a thread, so that signals reach the main thread while it waits."""
    result: Future[T] = Future()

    def fulfil() -> None:
        try:
            result.set_result(work())
        except BaseException as error:
            result.set_exception(error)

    threading.Thread(target=fulfil, name="work", daemon=True).start()
    return result.result()


@contextmanager
def interruptible() -> Iterator[None]:
    """Raise a request to end that comes during the body, even if the body catches its error.

    After an error, signals raise nothing any more.
    """
    global _request
    try:
        yield
        check_interrupt()
    except BaseException as error:
        # A signal often comes twice, and a launcher ends all ranks as soon as one has ended: neither may interrupt
        # the error's report.
        set_handlers(dict.fromkeys(ending_signals(), _on_late_signal))
        request, _request = _request, None
        if request is not None and not isinstance(error, Interrupted | PeerLost):
            raise request from None
        raise

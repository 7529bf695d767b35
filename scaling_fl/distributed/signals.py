"""How a process is asked to end: by an error in its main thread, raised until it arrives.

What a signal's handler raises appears wherever the main thread happens to be. In a library that catches everything
(`except:`) or in a destructor it is lost, and where a lock is being taken it would leave the lock taken for ever. So
the request is remembered; a thread lets the handler try again until the error has reached the end of `heeded`, and
whoever calls `look` raises it, too.
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
WAKE = signal.SIGURG  # interrupts the main thread; programs that do not know this signal ignore it
RETRY_SECONDS = 0.1  # seconds from one try to the next
GRACE_SECONDS = 45.0  # from a signal to the end of a process that goes on: MongoDB is waited for that long
# Where nothing is raised: as a lock is taken or released, and in the handlers, which may have come at such a place.
CLOSED = {"__enter__", "__exit__", "acquire", "release", "_acquire_restore", "_release_save"}
CLOSED |= {"request_end", "raise_request", "_on_signal", "_on_wake"}
MODULES = {"threading", "logging", __name__, "scaling_fl.distributed.heartbeat"}  # of those functions

_request: BaseException | None = None


class Interrupted(KeyboardInterrupt):
    """A signal asked this rank, or another, to end."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number

    def __str__(self) -> str:
        return f"interrupted by {signal.Signals(self.number).name}"


class PeerLost(BaseException):
    """Another rank has ended. It is no failure of this rank or of its sites, so it is no `Exception`."""


def ending_signals() -> list[signal.Signals]:
    """Return the signals that end this process: `nohup` and a shell's background start it to ignore some."""
    return [number for number in ENDING if signal.getsignal(number) != signal.SIG_IGN]


def install_handlers() -> dict[signal.Signals, Any]:
    """Let SIGTERM, SIGINT and SIGHUP raise Interrupted in the main thread; return the handlers from before."""
    return set_handlers(dict.fromkeys(ending_signals(), _on_signal) | {WAKE: _on_wake})


def set_handlers(handlers: Mapping[signal.Signals, Any]) -> dict[signal.Signals, Any]:
    """Set handlers of signals, and return those from before; nothing in another thread, where Python sets none."""
    if threading.current_thread() is not threading.main_thread():
        return {}
    return {number: signal.signal(number, handler) for number, handler in handlers.items()}


def _on_wake(_: int, frame: FrameType | None) -> None:
    raise_request(frame)


def _on_signal(number: int, frame: FrameType | None) -> None:
    request_end(Interrupted(number), frame)


def _on_late_signal(number: int, _: object) -> None:
    """Interrupt nothing, but let the process end in `LATEST` seconds whatever it does."""
    _thread.start_new_thread(_repeat, (Interrupted(number),))


def restore_defaults() -> None:
    """Let a signal end this process in the system's way: Python is about to end it, and may not be interrupted."""
    set_handlers(dict.fromkeys(ending_signals(), signal.SIG_DFL))


def request_end(error: Interrupted | PeerLost, frame: FrameType | None) -> None:
    """Raise an error from a signal's handler, and from that of `WAKE` until it arrives. The first error counts."""
    global _request
    if _request is None:
        _request = error
        sys.unraisablehook = _report_unraisable
        _thread.start_new_thread(_repeat, (error,))  # threading's would wait for it here
    raise_request(frame)


def _repeat(error: BaseException) -> None:
    """Let a handler in the main thread try again, and end this process if it stays."""
    deadline = time.monotonic() + GRACE_SECONDS
    while _request is error and time.monotonic() < deadline:
        time.sleep(RETRY_SECONDS)
        signal.pthread_kill(threading.main_thread().ident or 0, WAKE)
    time.sleep(max(deadline - time.monotonic(), 0))
    # Unless whoever called this has its own handlers back, and goes on; the vigil ends a rank that others have left.
    if isinstance(error, Interrupted) and signal.getsignal(error.number) in (_on_late_signal, _on_signal):
        with suppress(OSError):
            print(f"{error}; what was under way did not end in {GRACE_SECONDS:.0f} s", file=sys.stderr, flush=True)
        os._exit(128 + error.number)


def raise_request(frame: FrameType | None) -> None:
    """Raise what was asked for, but not while it is on its way, so that code may clean up, nor where a lock is."""
    error = sys.exc_info()[1]
    while error is not None:
        if isinstance(error, Interrupted | PeerLost):
            return
        error = error.__context__
    if frame is None or frame.f_code.co_name not in CLOSED or frame.f_globals.get("__name__") not in MODULES:
        check_interrupt()


def _report_unraisable(unraisable: Any) -> None:
    """Say nothing of an error that was raised where Python cannot let it pass: it is raised again."""
    if not isinstance(unraisable.exc_value, Interrupted | PeerLost):
        sys.__unraisablehook__(unraisable)


def check_interrupt() -> None:
    """Raise what this process was asked to end with, if it was. Any thread may call this."""
    if _request is not None:
        raise _request


def wait_interruptibly(work: Callable[[], T]) -> T:
    """Return what `work` returns, which waits where no signal reaches: it does so in a thread, which may be left."""
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
    """Let a request to end that comes during the body end it, whatever becomes of its error.

    After an error, signals interrupt nothing any more.
    """
    global _request
    try:
        yield
        check_interrupt()
    except BaseException as error:
        # Many a signal comes twice, and a launcher ends all ranks as soon as one has ended: neither may interrupt the
        # last words of this process.
        set_handlers(dict.fromkeys(ending_signals(), _on_late_signal))
        asked, _request = _request, None
        if asked is not None and not isinstance(error, Interrupted | PeerLost):
            raise asked from None
        raise

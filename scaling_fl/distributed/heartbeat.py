"""Each rank sends a heartbeat to the others, and hears within seconds of a rank that failed or went silent.

A collective waits as long as the slowest site may need, which can be hours, and cannot tell why another rank is
missing. So the ranks also watch each other over the store of their rendezvous.
"""

import os
import signal
import sys
import threading
import time
from ast import literal_eval
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from scaling_fl.distributed.signals import WAKE, Interrupted, PeerLost, interruptible, raise_request, request_end

BEAT_SECONDS = 1.0  # between two heartbeats, and so at most from a failure to its report
SILENCE_SECONDS = 3.0  # without a heartbeat, after which a rank counts as dead once a connection broke
STORE_LOSS_SECONDS = 5.0  # without an answer, after which the store counts as lost
REPORT_SECONDS = 3.0  # a rank that fails waits at most so long for the others to read its report
KILL_SECONDS = 30.0  # after which a rank whose main thread does not react to a report is ended
ALIVE = "alive"


class PeerError(RuntimeError):
    """Another rank failed, vanished or hangs. If it could, it has printed its own error."""


def hide_from_peers(error: Exception, message: str) -> None:
    """Send other ranks this message in place of the error's text, which may quote private data."""
    error.message_for_peers = message  # type: ignore[attr-defined]


class Heartbeat:
    """The state of this rank for the others, and the state of the others.

    Args:
        store: torch's key-value store of all ranks; only the heartbeat's thread uses it.
        rank: of this process.
        num_ranks: of the run.
        timeout: seconds without a heartbeat after which a rank is lost.
        is_one_node: all ranks run on this machine, so that errors need not name a rank.
    """

    def __init__(self, store: Any, rank: int, num_ranks: int, timeout: float, *, is_one_node: bool = False) -> None:
        self._store = store
        self._rank = rank
        self._num_ranks = num_ranks
        self._timeout = timeout
        self._is_one_node = is_one_node
        self._state = ALIVE  # or this rank's report, once it has ended
        self._values = [b""] * num_ranks  # last read from each rank
        self._last_beats = [time.monotonic()] * num_ranks
        self._reports: dict[int, tuple[str, str | int]] = {}  # of ranks that ended: kind, message or signal
        self._has_reported = False
        self._has_store = True
        self._wake_time: float | None = None  # when the main thread was interrupted
        self._is_done = threading.Event()
        self._has_ended = threading.Event()

    @contextmanager
    def watch(self) -> Iterator[None]:
        """Watch the other ranks while the body runs; report its error to them, and raise theirs.

        Raises:
            ValueError: another rank refused its input; with that rank's message.
            PeerError: another rank failed, vanished or hangs.
            Interrupted: a signal asked another rank to end.
        """
        before = signal.signal(WAKE, self._on_wake)
        try:
            with interruptible():
                # A signal that comes while the threads start is reported to the others, too.
                for work in (self._exchange, self._check_peers):
                    threading.Thread(target=work, name="heartbeat", daemon=True).start()
                yield
        except BaseException as error:
            is_peer_lost = isinstance(error, PeerLost)
            self._state = _make_report(error)
            self._has_ended.set()
            self._await_reports()
            if isinstance(error, PeerLost | KeyboardInterrupt) and (cause := self._find_cause(is_peer_lost)):
                raise cause from None
            if is_peer_lost:
                raise PeerError(f"the connection to another rank broke: {error}") from None
            raise
        finally:
            self._is_done.set()
            signal.signal(WAKE, before)

    def _exchange(self) -> None:
        """Write this rank's heartbeats and read those of the others. Torch's store may block here forever."""
        keys = [f"heartbeat/{rank}" for rank in range(self._num_ranks)]
        last_answer = time.monotonic()
        beat = 0
        while not self._is_done.is_set():
            beat += 1
            try:
                state = self._state
                self._store.set(keys[self._rank], str(beat) if state == ALIVE else state)
                self._has_reported = state != ALIVE
                self._read(self._store.multi_get(keys))
                last_answer = time.monotonic()
            except Exception:  # the process that serves the store has ended, or cannot be reached
                self._has_store = self._state == ALIVE and time.monotonic() - last_answer < STORE_LOSS_SECONDS
            self._has_ended.wait(BEAT_SECONDS) if self._state == ALIVE else time.sleep(BEAT_SECONDS / 20)

    def _read(self, values: list[bytes]) -> None:
        for rank, value in enumerate(values):
            if value != self._values[rank]:
                self._values[rank], self._last_beats[rank] = value, time.monotonic()
            if rank != self._rank and not value.isdigit():
                self._reports[rank] = literal_eval(value.decode())

    def _check_peers(self) -> None:
        """Interrupt the main thread if another rank has ended or is lost.

        If it does not react, as in a collective of NCCL, end the process.
        """
        while not self._is_done.wait(BEAT_SECONDS / 4):
            if self._state != ALIVE or not (self._reports or self._find_silent(self._timeout) or not self._has_store):
                continue
            if self._wake_time is None:
                self._wake_time = time.monotonic()
                signal.pthread_kill(threading.main_thread().ident or 0, WAKE)
            elif time.monotonic() - self._wake_time > KILL_SECONDS:
                print(f"error: {self._find_cause(is_peer_lost=True)}\n", end="", file=sys.stderr, flush=True)
                os._exit(1)

    def _find_silent(self, seconds: float) -> list[int]:
        """Return the ranks without a report and without a heartbeat for so many seconds."""
        now = time.monotonic()
        return [
            rank
            for rank, last_beat in enumerate(self._last_beats)
            if rank != self._rank and rank not in self._reports and now - last_beat > seconds
        ]

    def _on_wake(self, _: int, frame: FrameType | None) -> None:
        if self._wake_time is not None and self._state == ALIVE:
            request_end(PeerLost(), frame)
        else:
            raise_request(frame)

    def _await_reports(self) -> None:
        """Wait a few seconds until each other rank has reported its end or is silent."""
        start = time.monotonic()
        while time.monotonic() - start < REPORT_SECONDS and self._has_store:
            num_ended = len(self._reports) + len(self._find_silent(SILENCE_SECONDS))
            if self._has_reported and num_ended == self._num_ranks - 1:
                break
            time.sleep(BEAT_SECONDS / 20)
        if self._rank == 0:
            time.sleep(BEAT_SECONDS / 4)  # this process may serve the store, and the others must read it first

    def _find_cause(self, is_peer_lost: bool) -> Exception | Interrupted | None:
        """Return why another rank has ended, as an error to raise here, if it is known.

        A rank that got a signal before its first heartbeat could not report it. If this rank got a signal too, that
        is the cause.
        """
        for rank, (kind, message) in sorted(self._reports.items()):
            if kind == "refused":
                return ValueError(message if self._is_one_node else f"rank {rank}: {message}")
            if kind == "failed":
                return PeerError(f"rank {rank} failed with {message}")
        if silent := [rank for rank in self._find_silent(SILENCE_SECONDS) if is_peer_lost or self._values[rank]]:
            seconds = time.monotonic() - max(self._last_beats[rank] for rank in silent)
            return PeerError(
                f"rank {', '.join(map(str, silent))} has sent no heartbeat for {seconds:.0f} s: "
                "its process has ended or hangs, or its node cannot be reached"
            )
        for kind, number in self._reports.values():
            if kind == "interrupted":
                return Interrupted(int(number))
        if not self._has_store:
            return PeerError("the rendezvous store, on the node of rank 0, has ended or cannot be reached")
        return None


def _make_report(error: BaseException) -> str:
    """Return as text what the other ranks learn of an error: its kind, and a message or the signal's number."""
    if isinstance(error, KeyboardInterrupt):
        return repr(("interrupted", getattr(error, "number", int(signal.SIGINT))))
    if isinstance(error, PeerLost):
        return repr(("peer lost", ""))
    message = getattr(error, "message_for_peers", None)
    if isinstance(error, ValueError):
        return repr(("refused", message or str(error)))
    notes = "".join(f" {note}" for note in getattr(error, "__notes__", ()))
    return repr(("failed", message or f"{type(error).__name__}: {error}{notes}"))

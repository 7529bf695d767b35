"""Each rank shows the others that it lives, and soon hears of one that failed or fell silent.

A collective waits as long as the slowest site may need, which can be hours, and cannot tell why another
rank is missing. So the ranks watch each other beside it, over the store through which they met.
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
from typing import Protocol

from scaling_fl.distributed.signals import WAKE, Interrupted, PeerLost, interruptible, raise_request, request_end

BEAT_SECONDS = 1.0  # seconds from one sign of life to the next, and so at most from a failure to its news
SILENCE_SECONDS = 3.0  # seconds without one after which a rank whose connection broke is taken for dead
STORE_LOSS_SECONDS = 5.0  # seconds after which a store that cannot be reached is lost
REPORT_SECONDS = 3.0  # most seconds that a rank waits, when it fails, until the others have heard of it
KILL_SECONDS = 30.0  # seconds after which a rank that does not react to the news is ended
ALIVE = "alive"


class Store(Protocol):
    """What is used of torch's key-value stores."""

    def set(self, key: str, value: str) -> None:
        """Write a value."""

    def multi_get(self, keys: list[str]) -> list[bytes]:
        """Read values, and wait for those that are not there yet."""


class PeerError(RuntimeError):
    """Another rank failed, vanished or hangs; what it had to say, it has said."""


def hide_from_peers(error: Exception, told: str) -> None:
    """Let other ranks be told so much of an error, and nothing of what it says itself."""
    error.told = told  # type: ignore[attr-defined]


class Heartbeat:
    """What this rank shows of itself and knows of the others.

    Args:
        store: reached by all ranks; used by the vigil's thread alone.
        rank: of this process.
        num_ranks: of all.
        patience: seconds without a sign of life after which a rank is lost.
        is_one_node: all ranks are on this machine, so that nobody asks which of them could not read a file.
    """

    def __init__(self, store: Store, rank: int, num_ranks: int, patience: float, *, is_one_node: bool = False) -> None:
        self._store = store
        self._rank = rank
        self._num_ranks = num_ranks
        self._patience = patience
        self._is_one_node = is_one_node
        self._state = ALIVE  # or the report of how this rank ended
        self._seen = [b""] * num_ranks
        self._heard = [time.monotonic()] * num_ranks  # when each rank last gave a sign of life
        self._reports: dict[int, tuple[str, str | int]] = {}  # of the others
        self._has_told = False  # the others, how this rank ended
        self._has_store = True
        self._woken: float | None = None  # when the main thread was
        self._is_over = threading.Event()
        self._hurry = threading.Event()

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Watch while the body runs. Tell the others what it raises, and raise what they tell.

        Raises:
            ValueError: another rank refused its input, with that rank's sentence.
            PeerError: another rank failed, vanished or hangs.
            Interrupted: another rank was asked to end.
        """
        before = signal.signal(WAKE, self._on_wake)
        for work in (self._talk, self._judge):
            threading.Thread(target=work, name="vigil", daemon=True).start()
        try:
            with interruptible():
                yield
        except BaseException as error:
            self._state = _report(error)
            self._hurry.set()
            self._await_farewells()
            if isinstance(error, PeerLost | KeyboardInterrupt) and (cause := self._cause(isinstance(error, PeerLost))):
                raise cause from None
            if isinstance(error, PeerLost):
                raise PeerError(f"the connection to another rank broke: {error}") from None
            raise
        finally:
            self._is_over.set()
            signal.signal(WAKE, before)

    def _talk(self) -> None:
        """Give signs of life and listen for those of the others. Torch's store may well block here for ever."""
        keys = [f"vigil/{rank}" for rank in range(self._num_ranks)]
        answered = time.monotonic()
        beat = 0
        while not self._is_over.is_set():
            beat += 1
            try:
                state = self._state
                self._store.set(keys[self._rank], str(beat) if state == ALIVE else state)
                self._has_told = state != ALIVE
                self._hear(self._store.multi_get(keys))
                answered = time.monotonic()
            except Exception:  # the store is gone with the process that kept it, or cannot be reached
                self._has_store = self._state == ALIVE and time.monotonic() - answered < STORE_LOSS_SECONDS
            self._hurry.wait(BEAT_SECONDS) if self._state == ALIVE else time.sleep(BEAT_SECONDS / 20)

    def _judge(self) -> None:
        """Wake the main thread if another rank has failed or is lost."""
        while not self._is_over.wait(BEAT_SECONDS / 4):
            if self._reports or self._silent(self._patience) or not self._has_store:
                self._wake()

    def _hear(self, values: list[bytes]) -> None:
        for rank, value in enumerate(values):
            if value != self._seen[rank]:
                self._seen[rank], self._heard[rank] = value, time.monotonic()
            if rank != self._rank and not value.isdigit():
                self._reports[rank] = literal_eval(value.decode())

    def _silent(self, seconds: float) -> list[int]:
        """Return the ranks that have neither ended nor given a sign of life for so long."""
        now = time.monotonic()
        return [
            rank
            for rank, heard in enumerate(self._heard)
            if rank != self._rank and rank not in self._reports and now - heard > seconds
        ]

    def _wake(self) -> None:
        """Interrupt the main thread; if it does not react, as in a collective of NCCL, end the process."""
        if self._state != ALIVE or self._is_over.is_set():
            return
        now = time.monotonic()
        if self._woken is None:
            self._woken = now
            signal.pthread_kill(threading.main_thread().ident or 0, WAKE)
        elif now - self._woken > KILL_SECONDS:
            print(f"error: {self._cause(is_bereft=True)}\n", end="", file=sys.stderr, flush=True)
            os._exit(1)

    def _on_wake(self, _: int, frame: FrameType | None) -> None:
        if self._woken is not None and self._state == ALIVE:
            request_end(PeerLost(), frame)
        else:
            raise_request(frame)

    def _await_farewells(self) -> None:
        """Wait until each other rank has ended too, or is silent, or for a few seconds."""
        start = time.monotonic()
        while time.monotonic() - start < REPORT_SECONDS and self._has_store:
            if self._has_told and len(self._reports) + len(self._silent(SILENCE_SECONDS)) == self._num_ranks - 1:
                break
            time.sleep(BEAT_SECONDS / 20)
        if self._rank == 0:
            time.sleep(BEAT_SECONDS / 4)  # the store may be this process's, and the others have to see it too

    def _cause(self, is_bereft: bool) -> Exception | Interrupted | None:
        """Return what is known of why another rank has ended, as an error to raise here.

        A rank that a signal reached before it gave a first sign of life could not say so: if this rank has a signal,
        too, that is the reason.
        """
        for rank, (kind, message) in sorted(self._reports.items()):
            if kind == "refused":
                return ValueError(message if self._is_one_node else f"rank {rank}: {message}")
            if kind == "failed":
                return PeerError(f"rank {rank} failed with {message}")
        if silent := [rank for rank in self._silent(SILENCE_SECONDS) if is_bereft or self._seen[rank]]:
            seconds = time.monotonic() - max(self._heard[rank] for rank in silent)
            return PeerError(
                f"rank {', '.join(map(str, silent))} has given no sign of life for {seconds:.0f} s: "
                "its process is gone or hangs, or its node cannot be reached"
            )
        for kind, number in self._reports.values():
            if kind == "interrupted":
                return Interrupted(int(number))
        if not self._has_store:
            return PeerError("the store where ranks meet, on the node of rank 0, is gone or cannot be reached")
        return None


def _report(error: BaseException) -> str:
    """Return as text what the others are told of an error."""
    if isinstance(error, KeyboardInterrupt):
        return repr(("interrupted", getattr(error, "number", int(signal.SIGINT))))
    if isinstance(error, PeerLost):
        return repr(("bereft", ""))
    told = getattr(error, "told", None)
    if isinstance(error, ValueError):
        return repr(("refused", told or str(error)))
    notes = "".join(f" {note}" for note in getattr(error, "__notes__", ()))
    return repr(("failed", told or f"{type(error).__name__}: {error}{notes}"))

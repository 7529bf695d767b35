"""Signals end a process at any moment: in code that catches every error, at a lock, and while it prints an error."""

import os
import queue
import random
import signal
import sys
import time
import weakref
from collections.abc import Callable
from pathlib import Path

import pytest
from datasets.fingerprint import update_fingerprint
from datasets.utils.logging import set_verbosity_error

from scaling_fl.distributed import signals
from scaling_fl.distributed.ending import run_program
from scaling_fl.distributed.launch import launch

INTERRUPTED = 128 + signal.SIGTERM
PATIENCE = 40.0  # seconds, on a very busy machine, after which a process is killed; less than signals.GRACE_SECONDS


def in_fork(work: Callable[[], object]) -> int:
    """Call `work` in a process with signal handlers; return its exit status."""
    pid = os.fork()
    if pid == 0:
        status = 70
        try:
            signals.install_handlers()
            with signals.interruptible():
                work()
            status = 0
        except signals.Interrupted as error:
            status = 128 + error.number
        finally:
            os._exit(status)
    began = time.monotonic()
    while (found := os.waitpid(pid, os.WNOHANG))[0] == 0:
        time.sleep(0.005)
        if time.monotonic() - began > PATIENCE:
            os.kill(pid, signal.SIGKILL)
    return os.waitstatus_to_exitcode(found[1])


def ask(number: int = signal.SIGTERM) -> None:
    os.kill(os.getpid(), number)


def work_for_hours() -> None:
    for _ in range(360_000):
        time.sleep(0.01)


class Hashed:
    """Requests the end of the process while it is pickled."""

    def __reduce__(self) -> tuple:
        ask()
        return (Hashed, ())


class Deleted:
    def __del__(self) -> None:
        ask()


def in_a_hash() -> None:
    set_verbosity_error()  # as a command does; it would print that this has no lasting hash
    update_fingerprint("0", print, {"tokenizer": Hashed()})


def in_a_destructor() -> None:
    Deleted()


def in_a_callback_of_the_collector() -> None:
    held = Hashed()
    reference = weakref.ref(held, lambda _: ask())
    del held
    assert reference() is None


def in_a_return() -> None:
    try:
        ask()
    finally:
        return  # noqa: B012 - it swallows what is raised, which is why it is here


def as_another_error() -> None:
    try:
        ask()
    except BaseException as error:
        raise ValueError("the file could not be read") from error


@pytest.mark.parametrize(
    "place", [in_a_hash, in_a_destructor, in_a_callback_of_the_collector, in_a_return, as_another_error]
)
@pytest.mark.parametrize(
    "then", [work_for_hours, signals.check_interrupt, lambda: None], ids=["works", "looks", "ends"]
)
def test_a_signal_whose_exception_is_caught_ends_the_process_nevertheless(
    place: Callable[[], None], then: Callable[[], None], capfd: pytest.CaptureFixture[str]
) -> None:
    def work() -> None:
        place()
        then()

    assert in_fork(work) == INTERRUPTED
    assert capfd.readouterr().err == "", "not even of a destructor"


def test_every_lock_is_released_after_a_signal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(signals, "RETRY_SECONDS", 0.005)

    def use_until_asked(box: queue.Queue[int], seconds: float) -> None:
        with signals.interruptible():
            signal.setitimer(signal.ITIMER_REAL, seconds)
            while True:
                box.put(0)
                box.get()

    def work() -> None:
        moments = random.Random(0)
        for _ in range(100):
            box: queue.Queue[int] = queue.Queue()
            signals.install_handlers()
            signal.signal(signal.SIGALRM, signal.getsignal(signal.SIGTERM))
            with pytest.raises(signals.Interrupted):
                use_until_asked(box, moments.uniform(1e-4, 2e-3))
            assert box.mutex.acquire(timeout=0)

    assert in_fork(work) == 0


def test_a_second_signal_does_not_interrupt_the_end(capfd: pytest.CaptureFixture[str]) -> None:
    def work() -> None:
        try:
            with signals.interruptible():
                try:
                    ask()
                finally:
                    ask()
                    time.sleep(3 * signals.RETRY_SECONDS)
                    print("cleaned up", flush=True)
        finally:
            ask(signal.SIGINT)
            print("said goodbye", flush=True)

    assert in_fork(work) == INTERRUPTED
    assert capfd.readouterr().out == "cleaned up\nsaid goodbye\n"


def test_the_first_of_several_signals_determines_the_status() -> None:
    def work() -> None:
        in_a_return()
        ask(signal.SIGINT)

    assert in_fork(work) == INTERRUPTED


def test_a_process_that_does_not_end_is_killed(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(signals, "GRACE_SECONDS", 0.5)

    def linger_when_asked() -> None:
        try:
            ask()
        finally:
            work_for_hours()

    def fail_and_linger() -> None:
        try:
            with signals.interruptible():
                raise ValueError("no such file")
        finally:
            ask()
            work_for_hours()

    assert in_fork(linger_when_asked) == INTERRUPTED
    capfd.readouterr()
    assert in_fork(fail_and_linger) == INTERRUPTED
    assert capfd.readouterr().err == "interrupted by SIGTERM; the process did not end within 0 s\n"


def test_a_signal_ignored_at_the_start_of_a_process_stays_ignored() -> None:
    def work() -> None:
        ask(signal.SIGHUP)
        time.sleep(2 * signals.RETRY_SECONDS)

    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert in_fork(work) == 0
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_process_that_fails_without_a_signal_may_finish() -> None:
    def work() -> None:
        with pytest.raises(ValueError, match="no such file"), signals.interruptible():
            raise ValueError("no such file")
        ask()
        signals.check_interrupt()

    assert in_fork(work) == 0
    assert in_fork(lambda: signals.wait_interruptibly(lambda: 3) == 3 or ask()) == 0


def test_a_caller_that_continues_after_an_interruption_is_not_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(signals, "GRACE_SECONDS", 0.2)

    def cell() -> None:
        with pytest.raises(signals.Interrupted), signals.interruptible():
            ask()
        signals.restore_defaults()
        time.sleep(1.0)

    assert in_fork(cell) == 0


def test_a_caller_that_starts_again_after_an_interruption_is_not_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(signals, "GRACE_SECONDS", 0.5)

    def start_twice() -> None:
        handlers = signals.install_handlers()
        try:
            with signals.interruptible():
                ask()
                work_for_hours()
        except signals.Interrupted:
            signals.give_back(handlers)
        signals.install_handlers()
        time.sleep(1.5)

    assert in_fork(start_twice) == 0


def program(work: Callable[[], object], errors: str) -> int:
    """Run a program in a fork, with its errors in a file; return its exit status."""
    pid = os.fork()
    if pid == 0:
        with open(errors, "w") as sys.stderr:
            run_program(work)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def test_an_interrupted_program_prints_one_line(tmp_path: Path) -> None:
    def ranks() -> None:
        launch(ask_parent, num_ranks=2, fork=True)

    assert program(ranks, str(tmp_path / "errors")) == INTERRUPTED
    assert (tmp_path / "errors").read_text() == "interrupted by SIGTERM\n"


def ask_parent() -> None:
    os.kill(os.getppid(), signal.SIGTERM)
    time.sleep(60)


def test_a_program_without_its_terminal_ends_with_its_status() -> None:
    def work() -> None:
        raise signals.Interrupted(signal.SIGHUP)

    assert program(work, "/dev/full") == 128 + signal.SIGHUP

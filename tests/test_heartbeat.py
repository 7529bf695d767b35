"""When a rank fails, dies, hangs or is interrupted, the others end within seconds and name the cause."""

import contextlib
import os
import signal
import socket
import threading
import time
from collections.abc import Callable

import pytest

from scaling_fl.distributed import heartbeat, signals
from scaling_fl.distributed.collectives import all_gather, rank
from scaling_fl.distributed.ending import run_program
from scaling_fl.distributed.world import _join, world

SOON = 20.0  # seconds on a very busy machine; without the heartbeat a collective waits for 24 hours


@pytest.fixture
def start() -> Callable[..., dict[int, int]]:
    """Starts ranks without a launcher, as on separate nodes; returns their process ids."""

    def start(
        work: Callable[[], object], num_ranks: int = 2, without: tuple[int, ...] = (), **environment: str
    ) -> dict[int, int]:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        processes = {}
        for number in set(range(num_ranks)) - set(without):
            processes[number] = os.fork()
            if processes[number] == 0:
                os.environ.update(environment, RANK=str(number), WORLD_SIZE=str(num_ranks), GLOO_SOCKET_IFNAME="lo")
                os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
                signals.install_handlers()
                try:
                    run_program(lambda: within_world(work))
                finally:
                    os._exit(0)  # an error has ended the process before
        return processes

    return start


def within_world(work: Callable[[], object]) -> None:
    try:
        with world():
            work()
    except signals.Interrupted as error:
        raise SystemExit(128 + error.number) from None
    except ValueError as error:
        raise SystemExit(f"refused: {error}") from None


def wait(process: int) -> int:
    killer = threading.Timer(3 * SOON, os.kill, (process, signal.SIGKILL))
    killer.start()
    try:
        return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    finally:
        killer.cancel()


def train_for_hours(*_: object) -> None:
    """Work for hours without a collective."""
    for _ in range(360_000):
        time.sleep(0.01)


def meet(*_: object) -> None:
    all_gather("the others are late")


@pytest.mark.long
@pytest.mark.parametrize("others", [train_for_hours, meet])
@pytest.mark.parametrize("number", [0, 1])
@pytest.mark.parametrize(
    ("error", "heard"),
    [
        (ValueError("there is no such file"), "refused: rank {number}: there is no such file"),
        (KeyError("weight"), "error: rank {number} failed with KeyError: 'weight'"),
    ],
    ids=["refusal", "failure"],
)
def test_an_error_of_one_rank_soon_ends_the_others_with_its_message(
    start: Callable, capfd: pytest.CaptureFixture[str], others: Callable, number: int, error: Exception, heard: str
) -> None:
    def work() -> None:
        all_gather(None)
        if rank() != number:
            others()
        time.sleep(0.5)
        raise error

    began = time.monotonic()
    processes = start(work, num_ranks=3)
    assert [wait(process) for process in processes.values()] == [1, 1, 1]
    assert time.monotonic() - began < SOON
    printed = capfd.readouterr().err
    assert printed.count(heard.format(number=number)) == 2, printed
    assert printed.count("Traceback") == (0 if isinstance(error, ValueError) else 1)


def swallow_errors(*_: object) -> None:
    """Catch every error, as some libraries do."""
    with contextlib.suppress(BaseException):
        train_for_hours()


@pytest.mark.parametrize("then", [train_for_hours, meet, lambda: None], ids=["trains", "meets", "ends"])
def test_an_error_that_a_library_catches_ends_the_rank_nevertheless(
    start: Callable, capfd: pytest.CaptureFixture[str], then: Callable
) -> None:
    def work() -> None:
        all_gather(None)
        if rank() == 1:
            raise KeyError("weight")
        swallow_errors()
        then()

    began = time.monotonic()
    assert [wait(process) for process in start(work).values()] == [1, 1]
    assert time.monotonic() - began < SOON
    assert "error: rank 1 failed with KeyError: 'weight'" in capfd.readouterr().err


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_rank_that_waits_for_others_to_join_can_be_interrupted(
    start: Callable, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def join_and_ask(*args: object) -> object:
        threading.Timer(0.3, os.kill, (os.getpid(), number)).start()
        return _join(*args)

    monkeypatch.setattr("scaling_fl.distributed.world._join", join_and_ask)
    began = time.monotonic()
    (process,) = start(train_for_hours, without=(1,)).values()
    assert wait(process) == 128 + number
    assert time.monotonic() - began < SOON


def test_a_rank_that_got_a_signal_before_its_first_heartbeat_is_not_lost(
    start: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    watch = heartbeat.Heartbeat.watch

    def leave_at_once(self: heartbeat.Heartbeat) -> contextlib.AbstractContextManager[None]:
        if self._rank == 1:
            raise signals.Interrupted(signal.SIGTERM)
        return watch(self)

    monkeypatch.setattr(heartbeat.Heartbeat, "watch", leave_at_once)

    def work() -> None:
        os.kill(os.getpid(), signal.SIGTERM)

    assert [wait(process) for process in start(work).values()] == [143, 143]


@pytest.mark.parametrize("others", [train_for_hours, meet])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_one_rank_ends_all_of_them(start: Callable, number: int, others: Callable) -> None:
    def work() -> None:
        all_gather(None)
        if rank() == 1:  # twice, as a launcher and a terminal do
            threading.Timer(0.3, os.kill, (os.getpid(), number)).start()
            os.kill(os.getpid(), number)
        others()

    began = time.monotonic()
    assert [wait(process) for process in start(work, num_ranks=3).values()] == [128 + number] * 3
    assert time.monotonic() - began < SOON


@pytest.mark.parametrize("others", [train_for_hours, pytest.param(meet, marks=pytest.mark.long)])
@pytest.mark.parametrize("number", [0, pytest.param(1, marks=pytest.mark.long)])
@pytest.mark.parametrize("how", [signal.SIGKILL, pytest.param(signal.SIGSTOP, marks=pytest.mark.long)])
def test_a_rank_that_dies_or_hangs_is_detected_within_the_stated_time(
    start: Callable, capfd: pytest.CaptureFixture[str], how: int, number: int, others: Callable
) -> None:
    def work() -> None:
        all_gather(None)
        if rank() == number:
            os.kill(os.getpid(), how)
        others()

    began = time.monotonic()
    processes = start(work, LOST_AFTER="4")
    survivor = processes[1 - number]
    assert wait(survivor) == 1
    assert time.monotonic() - began < 4 + SOON
    os.kill(processes[number], signal.SIGKILL)
    wait(processes[number])
    printed = capfd.readouterr().err
    assert f"error: rank {number} has sent no heartbeat for" in printed or (
        number == 0 and "error: the rendezvous store, on the node of rank 0, has ended" in printed
    ), printed
    assert "Traceback" not in printed


@pytest.mark.long
def test_a_slow_rank_is_waited_for(start: Callable) -> None:
    def work() -> None:
        all_gather(None)
        if rank() == 1:
            time.sleep(9)
        all_gather("at last")

    assert [wait(process) for process in start(work, LOST_AFTER="4").values()] == [0, 0]


def test_each_of_several_failing_ranks_prints_its_error(start: Callable, capfd: pytest.CaptureFixture[str]) -> None:
    def work() -> None:
        raise ValueError(f"no file on {rank()}")

    began = time.monotonic()
    assert [wait(process) for process in start(work).values()] == [1, 1]
    assert time.monotonic() - began < SOON
    assert sorted(capfd.readouterr().err.splitlines()) == ["refused: no file on 0", "refused: no file on 1"]


def test_a_rank_that_does_not_react_is_killed(
    start: Callable, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As for a main thread inside a kernel that waits for another GPU."""
    monkeypatch.setattr(heartbeat, "KILL_SECONDS", 1.0)

    def work() -> None:
        all_gather(None)
        if rank() == 1:
            raise KeyError("weight")
        signal.signal(heartbeat.WAKE, signal.SIG_IGN)
        train_for_hours()

    assert [wait(process) for process in start(work).values()] == [1, 1]
    assert "error: rank 1 failed with KeyError: 'weight'" in capfd.readouterr().err

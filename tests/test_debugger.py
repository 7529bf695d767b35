"""A debugger that attaches to a rank, as an editor does: by the Debug Adapter Protocol."""

import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from dap import PATIENCE, RUN, Debugger, local_variables, stop_in_the_loop, top_frame, value
from helpers import Command, succeed, weights_hash


class Program:
    """The running script in a separate process group."""

    def __init__(self, pid: int, output: Path) -> None:
        self.pid, self.output = pid, output
        self.status: int | None = None
        os.setpgid(pid, pid)

    def says(self, words: str) -> None:
        """Wait for a printed text."""
        wait_until(lambda: words in self.output.read_text() or self.has_ended(), f"printed {words!r}")
        assert words in self.output.read_text(), "it has ended instead"

    def has_ended(self) -> bool:
        if self.status is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.status = os.waitstatus_to_exitcode(status) if pid else None
        return self.status is not None

    def ends(self) -> tuple[int, str]:
        """Wait for its end, and return its exit status and output."""
        wait_until(self.has_ended, "ended")
        assert self.status is not None
        return self.status, self.output.read_text()


def wait_until(is_so: Callable[[], bool], what: str) -> None:
    end = time.monotonic() + PATIENCE
    while not is_so():
        assert time.monotonic() < end, f"after {PATIENCE:.0f} s it has not {what}"
        time.sleep(0.05)


@pytest.fixture
def program(start: Callable[..., tuple[int, Path]], free_port: int) -> Iterator[Callable[..., Program]]:
    """Starts the script with a rank that waits for a debugger. A failed test shows its output."""
    programs = []

    def run(env: dict[str, str], **settings: Any) -> Program:
        # No rank is silent for a second, unless it is at a breakpoint.
        env = {"DEBUG": "1", "DEBUG_PORT": str(free_port), "LOST_AFTER": "1", **env}
        programs.append(Program(*start(env=env, **settings)))
        return programs[-1]

    yield run
    for started in programs:
        if not started.has_ended():
            os.killpg(started.pid, signal.SIGKILL)
            os.waitpid(started.pid, 0)
        print(started.output.read_text())


@pytest.fixture
def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def is_open(port: int, host: str = "127.0.0.1") -> bool:
    try:
        socket.create_connection((host, port), timeout=5).close()
    except OSError:
        return False
    return True


@pytest.mark.long
@pytest.mark.parametrize(("ranks", "number"), [(1, 0), (2, 1)])
def test_a_debugger_stops_a_rank_in_the_loop_of_rounds_and_changes_no_bit(
    program: Callable[..., Program], command: Command, free_port: int, tmp_path: Path, ranks: int, number: int
) -> None:
    expected = succeed(command(ranks=ranks))
    running = program({"DEBUG_RANK": str(number)}, ranks=ranks)
    running.says(f"rank {number} waits for a debugger at 127.0.0.1:{free_port}\n")
    assert not is_open(free_port, "127.0.0.2"), "other addresses of this machine lead to the debugger"
    with Debugger(free_port) as debugger:
        thread, frame = stop_in_the_loop(debugger)
        assert local_variables(debugger, frame)["round_"] == "0"
        time.sleep(3 * (ranks - 1))  # longer than the one second after which a rank counts as lost
        assert not running.has_ended()
        debugger.ask("continue", threadId=thread)
        thread = debugger.event("stopped")["threadId"]
        frame = top_frame(debugger, thread)
        assert value(debugger, frame, "round_, global_model.sha256() == history") == "(1, False)"
        assert value(debugger, frame, "__import__('torch').distributed.get_rank()") == str(number)
        debugger.ask("setBreakpoints", source={"path": str(RUN)}, breakpoints=[])
        debugger.ask("continue", threadId=thread)
        output = succeed(running.ends())
    assert weights_hash(output) == weights_hash(expected)
    assert output.count("\n") == expected.count("\n") + 1, "it says more than where it waits"
    wait_until(lambda: not is_open(free_port), "left the port")


@pytest.mark.long
def test_a_run_continues_after_its_debugger_disconnects(program: Callable[..., Program], free_port: int) -> None:
    running = program({})
    running.says("waits for a debugger")
    with Debugger(free_port) as debugger:
        stop_in_the_loop(debugger)
        debugger.ask("disconnect", terminateDebuggee=False)
    succeed(running.ends())
    wait_until(lambda: not is_open(free_port), "left the port")


@pytest.mark.long
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_a_run_that_is_ended_while_it_waits_for_a_debugger_leaves_no_process(
    program: Callable[..., Program], free_port: int, number: int
) -> None:
    running = program({})
    running.says("waits for a debugger")
    os.kill(running.pid, number)
    assert running.ends()[0] == (128 + number if number == signal.SIGINT else -number)
    wait_until(lambda: not is_open(free_port), "left the port")


@pytest.mark.parametrize(
    ("env", "sentence"),
    [
        ({"DEBUG": "yes"}, "DEBUG: expected 1 to wait for a debugger, or 0, got 'yes'"),
        ({"DEBUG_RANK": "1"}, "DEBUG_RANK: expected a rank below 1, the number of ranks, got 1"),
        ({"DEBUG_RANK": "first"}, "DEBUG_RANK: expected a whole number from 0, got 'first'"),
        ({"DEBUG_PORT": "99999"}, "DEBUG_PORT: expected a free port, got 127.0.0.1:99999 (invalid port number)"),
    ],
)
def test_an_unusable_debugger_setting_is_one_sentence(command: Command, env: dict[str, str], sentence: str) -> None:
    assert command(env={"DEBUG": "1", **env}) == (1, f"error: {sentence}\n")


def test_an_invalid_rank_is_one_sentence_of_all_ranks(command: Command) -> None:
    sentence = "error: DEBUG_RANK: expected a rank below 2, the number of ranks, got 2\n"
    assert command(ranks=2, env={"DEBUG": "1", "DEBUG_RANK": "2"}) == (1, sentence)


@pytest.mark.long
def test_a_port_in_use_is_one_sentence(command: Command) -> None:
    with socket.create_server(("127.0.0.1", 0)) as occupied:
        port = occupied.getsockname()[1]
        status, output = command(ranks=2, env={"DEBUG": "1", "DEBUG_PORT": str(port), "DEBUG_RANK": "1"})
    assert status == 1
    assert output.startswith(f"error: DEBUG_PORT: expected a free port, got 127.0.0.1:{port} (")
    assert "in use" in output
    assert len(output.splitlines()) == 1


def test_a_missing_debugger_is_one_sentence(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "debugpy", None)
    status, output = command(env={"DEBUG": "1"})
    assert status == 1
    assert output == "error: DEBUG=1: expected the package debugpy, got none. Install it: pip install debugpy\n"
    succeed(command(env={"DEBUG": "0"}))

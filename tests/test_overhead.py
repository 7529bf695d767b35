"""The arithmetic of benchmarks/overhead.py, and what the programs that it compares may import."""

import ast
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import overhead
import pytest
from processes import descendants
from waiting import state_of, wait_until

PEERS = Path(overhead.__file__).parent / "peers"
SECONDS = 30  # until processes have started, stopped or ended


def test_a_ratio_is_of_the_same_repetition() -> None:
    assert overhead.ratios([2.0, 6.0, 2.0], [1.0, 2.0, 2.0]) == "2.00 (1.00 to 3.00)"
    assert overhead.ratios([3.0], [2.0]) == "1.50"


def test_only_a_programs_own_turns_count() -> None:
    program = overhead.Program.__new__(overhead.Program)
    program._turns = [(10.0, 12.0), (20.0, 23.0)]
    assert program._in_turns(0, float("inf")) == 5
    assert program._in_turns(11.0, 21.0) == 2
    assert program._in_turns(13.0, 15.0) == 0


def test_a_processs_cpu_is_its_own() -> None:
    end = time.process_time() + 0.1
    while time.process_time() < end:
        pass
    assert overhead.cpu_of(os.getpid()) == pytest.approx(time.process_time(), abs=0.05)


@pytest.mark.parametrize(
    "path",
    [PEERS.parent / "overhead.py", PEERS.parent / "processes.py", *sorted(PEERS.glob("*.py"))],
    ids=lambda path: path.stem,
)
def test_peers_and_the_floor_run_none_of_our_code(path: Path) -> None:
    nodes = list(ast.walk(ast.parse(path.read_text())))
    imported = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    imported += [node.module or "" for node in nodes if isinstance(node, ast.ImportFrom)]
    assert imported
    assert not [name for name in imported if name.split(".")[0] in ("scaling_fl", "library")]


def test_slow_peers_are_compared_only_where_they_are_named() -> None:
    assert overhead.choose_peers([]) == ["blazefl", "pfl", "flower"]
    assert overhead.choose_peers(["nvflare"]) == ["nvflare"]
    assert overhead.choose_peers(None) == []


def test_a_program_stops_and_ends_with_all_its_processes() -> None:
    code = "import subprocess, time; subprocess.Popen(['setsid', 'sleep', '100']); time.sleep(100)"
    program = overhead.Program.__new__(overhead.Program)
    program.process = subprocess.Popen([sys.executable, "-c", code], start_new_session=True)
    try:
        wait_until(lambda: "sleep" in [*map(name_of, descendants(program.process.pid))], SECONDS)
        found = [program.process.pid, *descendants(program.process.pid)]
        program._signal(signal.SIGSTOP)
        wait_until(lambda: {*map(state_of, found)} == {"T"}, SECONDS)
    finally:
        program.end()
    wait_until(lambda: {*map(state_of, found)} <= {"Z", ""}, SECONDS)


def name_of(pid: int) -> str:
    return Path(f"/proc/{pid}/comm").read_text().strip()


def test_a_peer_that_fails_is_left_out_and_the_library_is_not(capsys: pytest.CaptureFixture[str]) -> None:
    assert overhead.take_turns("try", {"blazefl": "/bin/false"}) == {}
    assert "error: blazefl ended with exit status 1, so it is left out" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="error: exact ended with exit status 1"):
        overhead.take_turns("try", {"exact": "/bin/false"})

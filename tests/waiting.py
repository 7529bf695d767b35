"""What tests of several processes wait for."""

import time
from collections.abc import Callable
from pathlib import Path


def wait_until(is_so: Callable[[], object], seconds: float = 60, describe: Callable[[], str] = str) -> None:
    """Wait until something is so; if it is not within so many seconds, fail with a description."""
    deadline = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < deadline, describe()
        time.sleep(0.02)


def state_of(pid: int) -> str:
    """The state of a process as Linux has it: T is stopped, Z has ended; "" if there is no such process."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return ""

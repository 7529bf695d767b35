"""The command, and what /proc and the system know of processes. It imports nothing of ours, nor anything heavy."""

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from resource import RUSAGE_CHILDREN, getrusage

SCRIPT = Path(__file__).parent.parent / "scripts" / "train_federated.py"


def descendants(pid: int) -> Iterator[int]:
    """Yield the ids of a process's descendants."""
    for children in Path(f"/proc/{pid}/task").glob("*/children"):
        with suppress(OSError):  # it has ended
            for child in map(int, children.read_text().split()):
                yield child
                yield from descendants(child)


def cpu_of_ended() -> float:
    """Return the CPU seconds of all processes that this one has started and that have ended."""
    usage = getrusage(RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime

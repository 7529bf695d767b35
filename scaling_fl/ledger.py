"""What is on record of a run besides its scores: seconds, bytes, speed, machines; and a line a round in a file."""

import hashlib
import json
import os
import platform
import socket
import subprocess
import time
from collections.abc import Sequence
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path

import torch

from scaling_fl.distributed import bytes_sent, gather, rank
from scaling_fl.metrics import Metrics
from scaling_fl.stores import writing

ROOT = Path(__file__).parent.parent
ROUNDS = "rounds.jsonl"
PACKAGES = ("torch", "transformers", "datasets", "numpy")


class Ledger:
    """The seconds and bytes of a round."""

    def __init__(self) -> None:
        self._last = time.perf_counter()
        self._sent = bytes_sent()

    def lap(self, name: str) -> Metrics:
        """Return the seconds since the last lap, as a metric."""
        last, self._last = self._last, time.perf_counter()
        return {f"time.{name}_s": self._last - last}

    def total(self, metrics: Metrics) -> Metrics:
        """Return the seconds of a round's laps, and the bytes that all ranks sent since the last total."""
        sent, self._sent = bytes_sent() - self._sent, bytes_sent()
        seconds = sum(value for name, value in metrics.items() if name.startswith("time."))
        return {"time.round_s": seconds, "comm.bytes": sum(gather(sent))}


def write_round(folder: str | None, round_: int, metrics: Metrics) -> None:
    """Append a round's line to `rounds.jsonl` in the folder of a run's files, if there is one, or no part of it.

    Raises:
        WriteError: it cannot be written.
    """
    if folder is not None:
        path = os.path.join(folder, ROUNDS)
        before = os.path.getsize(path) if os.path.exists(path) else 0
        with writing(path):
            try:
                with open(path, "a", encoding="utf-8") as file:
                    file.write(json.dumps({"round": round_, **metrics}, allow_nan=False) + "\n")
            except OSError:
                with suppress(OSError):
                    os.truncate(path, before)
                raise


def machine(devices: Sequence[torch.device]) -> dict[str, str]:
    """Return on rank 0, which keeps the record, what all ranks run on: hosts, devices, versions, state of the code."""
    names = [
        device.type if device.type == "cpu" else torch.get_device_module(device).get_device_name(device)
        for device in devices
    ]
    by_rank = gather((socket.gethostname(), names))
    if rank() != 0:
        return {}
    constraints = ROOT / "constraints.txt"
    return {
        "hosts": ", ".join(dict.fromkeys(host for host, _ in by_rank)),
        "devices": "; ".join(f"rank {number}: {', '.join(of_rank)}" for number, (_, of_rank) in enumerate(by_rank)),
        "CPU threads of a rank": str(torch.get_num_threads()),
        "system": platform.platform(),
        "Python": platform.python_version(),
        **{name: version(name) for name in PACKAGES},
        "git": _git_state(),
        "constraints.txt (SHA-256)": hashlib.sha256(constraints.read_bytes()).hexdigest()
        if constraints.exists()
        else "none",
    }


def _git_state() -> str:
    """Return the commit of this code, and whether it was changed since. A remote's URL may hold a password."""

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", "-C", ROOT, *arguments], capture_output=True, text=True, check=True
        ).stdout.strip()

    if not (ROOT / ".git").exists():
        return "none"
    try:
        return git("rev-parse", "HEAD") + (", with changes" if git("status", "--porcelain") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"

"""Describe where a run runs: hosts, devices, versions, state of the code."""

import hashlib
import platform
import socket
import subprocess
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from scaling_fl.distributed.collectives import all_gather, rank

ROOT = Path(__file__).parents[2]
PACKAGES = ("scaling_fl", "torch", "transformers", "datasets", "numpy")


def describe_machine(devices: Sequence[torch.device]) -> dict[str, str]:
    """Return on rank 0 the hosts and devices of all ranks, versions, and the state of the code; nothing on others."""
    names = [
        device.type if device.type == "cpu" else torch.get_device_module(device).get_device_name(device)
        for device in devices
    ]
    by_rank = all_gather((socket.gethostname(), names))
    if rank() != 0:
        return {}
    constraints = ROOT / "constraints.txt"
    return {
        "hosts": ", ".join(dict.fromkeys(host for host, _ in by_rank)),
        "devices": "; ".join(f"rank {number}: {', '.join(of_rank)}" for number, (_, of_rank) in enumerate(by_rank)),
        "CPU threads of a rank": str(torch.get_num_threads()),
        "system": platform.platform(),
        "Python": platform.python_version(),
        **{name: version_of(name) for name in PACKAGES},
        "git": _git_state(),
        "constraints.txt (SHA-256)": hashlib.sha256(constraints.read_bytes()).hexdigest()
        if constraints.exists()
        else "none",
    }


def version_of(package: str) -> str:
    """Return the version of a package, which an imported one has at hand: to read its metadata is slow."""
    try:
        return str(getattr(sys.modules.get(package), "__version__", None) or version(package))
    except PackageNotFoundError:  # as of code that is run from a folder, by PYTHONPATH
        return "not installed"


def _git_state() -> str:
    """Return the commit of this code, and whether it was changed; not the remote's URL, which may hold a password."""

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

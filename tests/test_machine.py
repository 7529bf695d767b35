"""The record names the version of the code and of its dependencies."""

import hashlib
import subprocess

import torch
from helpers import ROOT

from scaling_fl.distributed.world import world
from scaling_fl.records.machine import describe_machine, version_of


def test_the_record_names_the_commit_and_the_constraints() -> None:
    with world():
        machine = describe_machine([torch.device("cpu")])
    constraints = hashlib.sha256((ROOT / "constraints.txt").read_bytes()).hexdigest()
    assert machine["constraints.txt (SHA-256)"] == constraints
    if (ROOT / ".git").exists():
        head = subprocess.run(["git", "-C", ROOT, "rev-parse", "HEAD"], capture_output=True, text=True, check=True)
        assert machine["git"].startswith(head.stdout.strip())


def test_code_that_is_not_installed_has_no_version() -> None:
    assert version_of("torch") == torch.__version__.split("+")[0] or version_of("torch") == torch.__version__
    assert version_of("scaling_fl_of_a_folder") == "not installed"

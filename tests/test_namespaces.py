"""Nodes with separate networks and disks train as one process does, and a cut link ends them within seconds.

Nodes are network namespaces on a bridge. They belong to processes of these tests and end with them.
"""

import ctypes
import os
import re
import runpy
import shutil
import subprocess
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import pytest
import torch
from chaos import fork, run_script, stop
from helpers import ROOT, SCRIPT, weights_hash
from processes import descendants
from warm import run_words

from scaling_fl.records import checkpoint

LOST_AFTER = 5
SOON = 20.0  # seconds more, on a very busy machine
PATIENCE = 100.0  # seconds after which ranks hang
PORT = "29500"
torch.set_num_threads(1)


class Network:
    """Nodes 10.77.0.1, 10.77.0.2 ... whose interface is eth0, and a bridge between them.

    Raises:
        OSError: the kernel or the user's rights forbid it.
    """

    def __init__(self, num_nodes: int) -> None:
        self.holders: list[subprocess.Popen] = []
        try:
            isolate = ["unshare", "--net"]
            self.holders.append(self._hold(["unshare", "--user", "--map-root-user", *isolate[1:]]))
            self.holders += [self._hold([*self.inside(None, "user"), *isolate]) for _ in range(num_nodes)]
            self._ip(None, "link add bridge type bridge")
            self._ip(None, "link set bridge up")
            for node in range(num_nodes):
                holder = self.holders[node + 1].pid
                self._ip(None, f"link add port{node} type veth peer name eth0 netns {holder}")
                self._ip(None, f"link set port{node} master bridge up")
                self._ip(node, "link set lo up")
                self._ip(node, f"address add {self.address(node)}/24 dev eth0")
                self._ip(node, "link set eth0 up")
        except BaseException:
            self.close()
            raise

    def _hold(self, command: list[str]) -> subprocess.Popen:
        """Start an idle process with new namespaces."""
        holder = subprocess.Popen([*command, "sleep", "infinity"], stderr=subprocess.PIPE, text=True)
        while "sleep" not in Path(f"/proc/{holder.pid}/comm").read_text():
            if holder.poll() is not None:
                assert holder.stderr is not None
                raise OSError(holder.stderr.read().strip())
            time.sleep(0.01)
        return holder

    def inside(self, node: int | None, *kinds: str) -> list[str]:
        """Return the start of a command that runs on a node, or in the namespace of the bridge."""
        holder = self.holders[0 if node is None else node + 1].pid
        return ["nsenter", f"--target={holder}", *(f"--{kind}" for kind in kinds or ("user", "net"))]

    def _ip(self, node: int | None, command: str) -> None:
        result = subprocess.run([*self.inside(node), "ip", *command.split()], capture_output=True, text=True)
        if result.returncode:
            raise OSError(f"ip {command}: {result.stderr.strip()}")

    @staticmethod
    def address(node: int) -> str:
        return f"10.77.0.{node + 1}"

    def enter(self, node: int) -> None:
        """Move this process onto a node."""
        libc = ctypes.CDLL(None, use_errno=True)
        for kind in ("user", "net"):
            namespace = os.open(f"/proc/{self.holders[node + 1].pid}/ns/{kind}", os.O_RDONLY)
            if libc.setns(namespace, 0):
                raise OSError(ctypes.get_errno(), f"setns: {kind}")
            os.close(namespace)

    def cut(self, node: int) -> None:
        """Disconnect a node."""
        self._ip(None, f"link set port{node} down")

    def heal(self, node: int) -> None:
        self._ip(None, f"link set port{node} up")

    def close(self) -> None:
        for holder in self.holders:
            holder.kill()
            holder.communicate()


@pytest.fixture(scope="module")
def network() -> Iterator[Network]:
    """Three nodes."""
    if missing := [tool for tool in ("ip", "unshare", "nsenter") if shutil.which(tool) is None]:
        pytest.skip(f"there is no {missing[0]}")
    try:
        made = Network(3)
    except OSError as error:
        pytest.skip(f"no network namespaces can be made here: {error}")
    yield made
    made.close()


@pytest.fixture(scope="module")
def settings(small_run: dict[str, object]) -> dict[str, object]:
    """A federation with dropout and AdamW."""
    runpy.run_path(str(SCRIPT))  # imports what the forks need
    return small_run | {"strategy": "fedadam", "num_local_epochs": 2, "num_rounds": 6}


@pytest.fixture(scope="module")
def alone(settings: dict[str, object], tmp_path_factory: pytest.TempPathFactory) -> str:
    """The weights of one process with six sites."""
    folder = tmp_path_factory.mktemp("alone")
    pid = fork(lambda: run_script(settings | {"site_ids": [0] * 6}, folder), folder / "output.txt")
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0, (folder / "output.txt").read_text()
    return weights_hash((folder / "output.txt").read_text())


class Job:
    """A command on several nodes with separate folders."""

    def __init__(self, network: Network, folders: Sequence[Path], **environment: str) -> None:
        self.network, self.folders = network, folders
        self.environment = {"GLOO_SOCKET_IFNAME": "eth0", "LOST_AFTER": str(LOST_AFTER), **environment}
        self.environment["TORCH_CPP_LOG_LEVEL"] = "ERROR"  # as in run-local.sh
        self.pids: dict[int, int] = {}  # by node
        for folder in folders:
            folder.mkdir(exist_ok=True)

    def start_bare(self, settings: dict[str, object], sites: Sequence[int], first: int = 0) -> "Job":
        """Start a rank on each node with the variables that Kubeflow sets, rank 0 on the `first`."""
        num_nodes = len(sites)
        for node, num_sites in enumerate(sites):
            variables = {"MASTER_ADDR": self.network.address(first), "MASTER_PORT": PORT, "WORLD_SIZE": str(num_nodes)}
            variables |= {"RANK": str((node - first) % num_nodes), **self.environment}

            def program(node: int = node, num_sites: int = num_sites, variables: dict[str, str] = variables) -> None:
                self.network.enter(node)
                run_script(settings | {"site_ids": [0] * num_sites}, self.folders[node], **variables)

            self.pids[node] = fork(program, self.folders[node] / "output.txt")
        return self

    def start_torchrun(self, settings: dict[str, object], sites: Sequence[int], options: Sequence[str]) -> "Job":
        """Start torchrun on each node; `{node}`, `{address}` and `{is_first}` in the options stand for its values."""
        path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
        for node, num_sites in enumerate(sites):
            given = settings | {"site_ids": f"[{','.join('0' * num_sites)}]", "checkpoints_dir": "checkpoints"}
            values = {"node": node, "address": self.network.address(node), "is_first": int(node == 0)}
            words = ["-m", "torch.distributed.run", *(option.format(**values) for option in options), str(SCRIPT)]
            words += ["with", *(f"{key}={value}" for key, value in given.items())]

            def program(node: int = node, words: list[str] = words) -> None:
                self.network.enter(node)
                os.chdir(self.folders[node])
                run_words(words, os.environ | {"PYTHONPATH": path, **self.environment})

            self.pids[node] = fork(program, self.folders[node] / "output.txt")
        return self

    def wait(self) -> dict[int, tuple[int, float]]:
        """Return each node's exit status and the time of its end."""
        began, ended = time.monotonic(), {}
        while len(ended) < len(self.pids):
            for node in self.pids.keys() - ended.keys():
                found, status = os.waitpid(self.pids[node], os.WNOHANG)
                if found:
                    ended[node] = os.waitstatus_to_exitcode(status), time.monotonic()
            if time.monotonic() - began > PATIENCE:
                self.fail(self.pids.keys() - ended.keys())
            time.sleep(0.02)
        return ended

    def outputs(self) -> str:
        return "\n".join((folder / "output.txt").read_text() for folder in self.folders)

    def weights(self) -> str:
        """Wait for the end of all nodes, and return the final weights."""
        statuses = [status for status, _ in self.wait().values()]
        assert statuses == [0] * len(self.pids), self.outputs()
        return weights_hash(self.outputs())

    def end_by_cutting(self, node: int) -> tuple[list[int], float]:
        """Disconnect a node until all nodes have ended; return their statuses, and the seconds until the last."""
        self.network.cut(node)
        began = time.monotonic()
        try:
            ended = self.wait().values()
        finally:
            self.network.heal(node)
        return [status for status, _ in ended], max(when for _, when in ended) - began

    def wait_for_round(self, round_: int) -> None:
        """Wait for a checkpoint on any node."""
        began = time.monotonic()
        while not any((folder / f"checkpoints/round-{round_}.pt").exists() for folder in self.folders):
            if time.monotonic() - began > PATIENCE:
                self.fail(self.pids.keys())
            time.sleep(0.01)

    def fail(self, nodes: Iterable[int]) -> None:
        """End hanging nodes and fail."""
        pids = [self.pids[node] for node in nodes]
        stop([process for pid in pids for process in [*descendants(pid), pid]])
        for pid in pids:
            os.waitpid(pid, 0)
        pytest.fail(f"it hangs: {self.outputs()}")


def folders(tmp_path: Path, count: int) -> list[Path]:
    return [tmp_path / f"node-{node}" for node in range(count)]


@pytest.mark.long
@pytest.mark.usefixtures("warm")
def test_two_torchrun_nodes_end_with_the_weights_of_one_process(
    network: Network, settings: dict[str, object], alone: str, tmp_path: Path
) -> None:
    meeting = ["--rdzv-backend=c10d", f"--rdzv-endpoint=10.77.0.1:{PORT}", "--rdzv-id=job"]
    addresses = ["--rdzv-conf=is_host={is_first}", "--local-addr={address}"]  # their names do not resolve
    job = Job(network, folders(tmp_path, 2))
    job.start_torchrun(settings, [1, 5], ["--nnodes=2", *meeting, *addresses])
    assert job.weights() == alone


@pytest.mark.long
def test_three_nodes_with_the_variables_of_kubeflow_end_with_the_weights_of_one_process(
    network: Network, settings: dict[str, object], alone: str, tmp_path: Path
) -> None:
    assert Job(network, folders(tmp_path, 3)).start_bare(settings, [3, 2, 1]).weights() == alone


@pytest.mark.long
@pytest.mark.usefixtures("warm")
def test_a_cut_link_ends_torchrun_on_all_nodes_and_the_same_commands_resume(
    network: Network, settings: dict[str, object], alone: str, tmp_path: Path
) -> None:
    options = ["--nnodes=2", "--node-rank={node}", "--master-addr=10.77.0.1", f"--master-port={PORT}"]
    job = Job(network, folders(tmp_path, 2)).start_torchrun(settings, [2, 4], options)
    job.wait_for_round(2)
    statuses, seconds = job.end_by_cutting(1)
    assert 0 not in statuses, job.outputs()
    assert seconds < LOST_AFTER + SOON, job.outputs()
    assert "error: rank 1 has sent no heartbeat" in (tmp_path / "node-0/output.txt").read_text()
    assert "error: rank 0 has sent no heartbeat" in (tmp_path / "node-1/output.txt").read_text()
    assert job.start_torchrun(settings, [2, 4], options).weights() == alone
    assert not (tmp_path / "node-1/checkpoints").exists(), "the disks are not shared"


@pytest.mark.long
@pytest.mark.parametrize("lost", [0, 2])
def test_a_cut_link_ends_all_ranks_and_the_same_commands_resume(
    network: Network, settings: dict[str, object], alone: str, tmp_path: Path, lost: int
) -> None:
    job = Job(network, folders(tmp_path, 3)).start_bare(settings, [1, 2, 3])
    job.wait_for_round(2)
    time.sleep(0.1)
    statuses, seconds = job.end_by_cutting(lost)
    assert statuses == [1, 1, 1], job.outputs()
    assert seconds < LOST_AFTER + SOON, job.outputs()
    for node in range(3):
        check_error_line((tmp_path / f"node-{node}/output.txt").read_text(), node, lost)
    saved = sorted((tmp_path / "node-0/checkpoints").glob("round-*.pt"))
    assert 2 <= len(saved) < 6
    for path in saved:
        checkpoint.read(str(path))
    # Rank 0 is now on a node whose disk has no checkpoint.
    assert job.start_bare(settings, [1, 2, 3], first=1).weights() == alone


def check_error_line(output: str, node: int, lost: int) -> None:
    """Check that one sentence names the lost ranks, which are all others on the isolated node."""
    (sentence,) = re.findall("^error: (.*)$", output, re.MULTILINE)
    gone = {lost} if node != lost else {0, 1, 2} - {lost}
    named = re.match(r"rank (\d(?:, \d)*) has sent no heartbeat for \d+ s: .* cannot be reached$", sentence)
    if named and lost != 0:
        assert set(map(int, named[1].split(", "))) == gone, output
    elif named:  # the store is on the lost node, with all that was known of the other ranks
        assert "0" in named[1] or node == 0, output
    else:
        assert 0 in (node, lost)
        assert sentence == "the rendezvous store, on the node of rank 0, has ended or cannot be reached", output
    assert "Traceback" not in output

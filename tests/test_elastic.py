"""torchrun restarts killed ranks and continues with the remaining nodes, with the same weights."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
from helpers import ROOT, SCRIPT, Command, succeed, weights_hash
from processes import descendants
from waiting import wait_until

from scaling_fl.records import checkpoint

pytestmark = [pytest.mark.long(seconds=30), pytest.mark.usefixtures("warm")]
SOON = 15.0  # seconds on a busy machine from a node's end until the others know
WAITS = "last_call_timeout=8,keep_alive_interval=1,keep_alive_max_attempt=6"  # of torchrun, seconds and a count
PATIENCE = 150.0  # seconds after which torchrun hangs
SETTINGS = {"max_seq_len": 32, "learning_rate": 3e-3, "optimiser": "adamw", "batch_size": 4, "strategy": "fedadam"}
SETTINGS |= {"num_local_epochs": 2, "num_rounds": 12, "report": False}


def free_port() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


class Agent:
    """A torchrun on loopback and its ranks."""

    def __init__(self, folder: Path, options: Sequence[str], settings: Sequence[str]) -> None:
        folder.mkdir(exist_ok=True)
        self.output_file = folder / "output.txt"
        loopback = next(name for _, name in socket.if_nameindex() if name.startswith("lo"))
        path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
        env = {"PYTHONPATH": path, "GLOO_SOCKET_IFNAME": loopback, "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
        with self.output_file.open("w") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "torch.distributed.run", *options, str(SCRIPT), "with", *settings],
                cwd=folder,
                env={**os.environ, **env, "TORCH_CPP_LOG_LEVEL": "ERROR"},
                stdout=output,
                stderr=subprocess.STDOUT,
            )

    @property
    def output(self) -> str:
        return self.output_file.read_text()

    def ranks(self) -> list[int]:
        return list(descendants(self.process.pid))

    def kill(self) -> None:
        """Kill it and all its ranks, as a power failure of a node does."""
        for pid in [self.process.pid, *self.ranks()]:
            os.kill(pid, signal.SIGKILL)
        self.process.wait()

    def finish(self) -> str:
        """Wait for its end, and return its output."""
        try:
            assert self.process.wait(PATIENCE) == 0, self.output
        finally:
            if self.process.returncode is None:
                self.kill()
        return self.output


@pytest.fixture
def torchrun(tiny_model: str, corpus: tuple[Path, Path]) -> Iterator[Callable[..., Agent]]:
    """Starts torchrun in a folder, with options and settings."""
    files = {"task_name": "text", "train_path": corpus[0], "test_path": corpus[1], "model": tiny_model}
    agents = []

    def start(folder: Path, *options: str, **settings: object) -> Agent:
        agents.append(
            Agent(folder, options, [f"{key}={value}" for key, value in {**files, **SETTINGS, **settings}.items()])
        )
        return agents[-1]

    yield start
    for agent in agents:
        if agent.process.poll() is None:
            agent.kill()


ALONE: dict[int, str] = {}


@pytest.fixture
def alone(command: Command) -> Callable[[int], str]:
    """The weights of one process with six sites after a number of rounds, trained once for all tests."""

    def train(num_rounds: int) -> str:
        if num_rounds not in ALONE:
            settings = {**SETTINGS, "num_rounds": num_rounds}
            ALONE[num_rounds] = weights_hash(succeed(command(site_ids=[0] * 6, **settings)))
        return ALONE[num_rounds]

    return train


def wait_for(something: Callable[[], object], agents: Sequence[Agent]) -> None:
    """Wait for something before which no agent ends."""

    def output() -> str:
        return "\n".join(agent.output for agent in agents)

    def is_so() -> bool:
        if something():
            return True
        assert all(agent.process.poll() is None for agent in agents), output()
        return False

    wait_until(is_so, PATIENCE, output)


def test_torchrun_restarts_killed_ranks_and_the_weights_are_those_of_the_uninterrupted_run(
    torchrun: Callable[..., Agent], alone: Callable[[int], str], tmp_path: Path
) -> None:
    expected = alone(12)
    agent = torchrun(
        tmp_path,
        "--standalone",
        "--nproc-per-node=2",
        "--max-restarts=2",
        site_ids="[0,0,0,0,0,0]",
        checkpoints_dir="checkpoints",
    )
    for kills, round_ in enumerate((2, 6)):
        wait_for((tmp_path / f"checkpoints/round-{round_}.pt").exists, [agent])
        os.kill(agent.ranks()[-1 - kills % 2], signal.SIGKILL)
    assert weights_hash(agent.finish()) == expected
    assert agent.output.count("round | ") == 3, "it was not restarted twice"


@pytest.mark.parametrize(("disks", "lost", "comes_back"), [("shared", 1, True), ("separate", 0, False)])
def test_the_remaining_node_trains_the_sites_of_the_lost_node_until_it_returns(
    torchrun: Callable[..., Agent], alone: Callable[[int], str], tmp_path: Path, disks: str, lost: int, comes_back: bool
) -> None:
    meeting = ["--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{free_port()}", "--rdzv-id=job"]

    num_rounds = 20 if comes_back else 12  # time to come back
    expected = alone(num_rounds)

    def start(node: int, name: str) -> Agent:
        conf = f"--rdzv-conf=is_host={int(node != lost)},{WAITS}"
        options = ["--nnodes=1:2", "--max-restarts=3", *meeting, conf, "--local-addr=127.0.0.1"]
        where = tmp_path / "checkpoints" if disks == "shared" else "checkpoints"
        return torchrun(
            tmp_path / name, *options, site_ids="[0,0,0]", num_sites=6, checkpoints_dir=where, num_rounds=num_rounds
        )

    nodes = [start(node, f"node-{node}") for node in range(2)]  # the first has rank 0, which writes the checkpoints
    written = tmp_path / ("checkpoints" if disks == "shared" else "node-0/checkpoints")
    wait_for((written / "round-3.pt").exists, nodes)
    left = nodes[1 - lost]
    killed = time.monotonic()
    nodes[lost].kill()
    wait_for(lambda: "error: " in left.output, [left])
    assert time.monotonic() - killed < SOON
    agents = [left, *([start(lost, "again")] if comes_back else [])]
    output = "".join(agent.finish() for agent in agents)  # torchrun orders nodes by process id, and rank 0 prints
    assert weights_hash(output) == expected
    if comes_back:
        first, *later = re.findall("on ([12]) device", output)  # before the loss, and at every restart
        assert (first, later[-1]) == ("2", "2")
    assert disks == "shared" or (tmp_path / "node-1/checkpoints/round-1.pt").exists(), (
        "it had no checkpoint of another node"
    )
    for path in tmp_path.glob("**/round-*.pt"):
        checkpoint.read(str(path))

"""Ranks in fresh processes, whatever the process that starts them has done before."""

import gc
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from helpers import ROOT, refusal

from scaling_fl.distributed.collectives import all_gather, rank
from scaling_fl.distributed.heartbeat import PeerError
from scaling_fl.distributed.launch import launch
from scaling_fl.distributed.world import world


@pytest.mark.long
def test_functions_and_closures_run_on_fresh_ranks_after_torch_has_computed() -> None:
    def use_threads() -> None:
        """Compute, so that torch starts threads that a fork would not have."""
        weights = torch.randn(400, 400, requires_grad=True)
        (weights @ weights).sum().backward()

    use_threads()
    before = dict(os.environ), threading.active_count(), torch.random.get_rng_state().tolist()
    lost = 3

    def work(number: int) -> list[tuple[int, int]]:
        assert gc.isenabled()
        assert gc.get_freeze_count() > 100_000, "collections visit the packages"
        with world():
            use_threads()
            if number < 0 and rank() == 1:
                os._exit(lost)
            return all_gather((rank(), number + lost))

    assert launch(work, 4, num_ranks=2) == [[(0, 7), (1, 7)]] * 2
    with pytest.raises(PeerError, match=r"^rank 1 failed with exit status 3; its error is printed above$"):
        launch(work, -1, num_ranks=2)
    assert (dict(os.environ), threading.active_count(), torch.random.get_rng_state().tolist()) == before


def test_a_function_that_cannot_be_sent_is_refused_before_a_process_starts() -> None:
    lock = threading.Lock()
    assert refusal(lambda: launch(lambda: lock, num_ranks=2)).startswith(
        "launch: expected a function and arguments that can be sent to other processes, got <function"
    )


@pytest.mark.long
def test_a_script_without_a_guard_starts_each_rank_once(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "from scaling_fl.distributed.launch import launch\n"
        "print('started')\n"
        "print(launch(lambda: 'ran', num_ranks=2))\n"
    )
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, cwd=tmp_path, check=False)
    assert (done.stdout, done.stderr) == ("started\n['ran', 'ran']\n", "")
    assert not [name for name in os.listdir(ROOT) if name.endswith(".pkl")]

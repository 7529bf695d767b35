"""Ranks exchange values correctly, and an error on one rank reaches all."""

import gc
import os
import signal
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from scaling_fl.distributed.collectives import (
    all_gather,
    all_reduce_,
    broadcast_,
    broadcast_bytes,
    bytes_sent,
    local_first,
    rank,
)
from scaling_fl.distributed.launch import launch, num_ranks
from scaling_fl.distributed.world import backends, num_threads, world


def on_ranks(num_ranks: int, work: object) -> list:
    def rank_main() -> object:
        with world():
            return work()  # type: ignore[operator]

    return launch(rank_main, num_ranks=num_ranks, fork=True)


def test_an_unlaunched_process_is_a_world_of_one_and_sends_nothing() -> None:
    before = bytes_sent()
    with world():
        assert (rank(), all_gather("x")) == (0, ["x"])
        assert all_reduce_(torch.ones(3)).tolist() == [1, 1, 1]
        assert torch.get_num_threads() == 1
    assert bytes_sent() == before
    assert not dist.is_initialized()


def where_the_store_listens() -> list[str]:
    """Return the addresses at which the store accepts connections, as Linux writes them."""
    lines = [line.split() for name in ("tcp", "tcp6") for line in Path(f"/proc/net/{name}").read_text().splitlines()]
    port = f":{int(os.environ['MASTER_PORT']):04X}"
    return [line[1].removesuffix(port) for line in lines if line[3] == "0A" and line[1].endswith(port)]


def test_collections_of_forked_ranks_visit_no_object_of_their_parent_which_visits_its_own() -> None:
    made = [[] for _ in range(10_000)]
    before = gc.get_freeze_count()
    assert launch(gc.get_freeze_count, num_ranks=1, fork=True)[0] >= before + len(made) / 2
    assert gc.get_freeze_count() <= before


@pytest.mark.skipif(not Path("/proc/net/tcp").exists(), reason="addresses are read in /proc, which is not here")
def test_the_store_of_one_machine_listens_on_loopback_alone() -> None:
    assert on_ranks(2, where_the_store_listens) == [["0100007F"]] * 2


def test_ranks_all_gather_broadcast_and_all_reduce() -> None:
    def work() -> tuple:
        mine = torch.full((3,), float(rank() + 1))
        return (
            all_gather(f"rank {rank()}"),
            broadcast_(mine.clone()).tolist(),
            all_reduce_(mine).tolist(),
        )

    assert on_ranks(3, work) == [(["rank 0", "rank 1", "rank 2"], [1, 1, 1], [6, 6, 6])] * 3


def test_every_byte_handed_to_a_collective_is_counted() -> None:
    def work() -> tuple[int, int]:
        start = bytes_sent()
        all_reduce_(torch.zeros(10, dtype=torch.float64))
        after_sum = bytes_sent()
        broadcast_(torch.zeros(7, dtype=torch.float32))
        return after_sum - start, bytes_sent() - after_sum

    assert on_ranks(2, work) == [(80, 28), (80, 0)], "a broadcast is sent by rank 0 alone"


VALUES = [None, True, 3, 2**80, 0.1, "a 'quoted' é\n", (1, 2), [(), {"a": {3: [1.5]}}], {}]


def test_all_gather_returns_values_unchanged_and_of_different_lengths() -> None:
    assert on_ranks(4, lambda: all_gather(VALUES[: 3 * rank()])) == [[[], VALUES[:3], VALUES[:6], VALUES]] * 4


def test_bytes_are_broadcast_from_the_rank_that_has_them() -> None:
    data = os.urandom(100_003)
    assert on_ranks(3, lambda: broadcast_bytes(lambda: data, source=1) == data) == [True] * 3
    assert on_ranks(2, lambda: broadcast_bytes(lambda: b"")) == [b""] * 2


def raise_on(number: int, error: BaseException) -> None:
    if rank() == number:
        raise error


def test_the_first_rank_of_a_node_runs_before_the_others() -> None:
    path = f"/tmp/scaling-fl-test-{os.getpid()}"

    def work() -> bool:
        def fill_cache() -> bool:
            was_there = os.path.exists(path)
            with open(path, "a"):
                return was_there

        return local_first(fill_cache)

    try:
        assert on_ranks(3, work) == [False, True, True]
    finally:
        os.remove(path)


@pytest.mark.parametrize("status", [1, 3])
def test_launch_ends_with_the_status_of_the_rank_that_failed(status: int, capfd: pytest.CaptureFixture[str]) -> None:
    def work() -> None:
        if os.environ["RANK"] == "1":
            print("what was wrong", file=sys.stderr)
            sys.exit(status)

    with pytest.raises(SystemExit) as end:
        launch(work, num_ranks=2, fork=True)
    assert end.value.code == status
    assert capfd.readouterr().err.strip() == "what was wrong", "and says nothing more"


def test_a_rank_that_raises_prints_its_traceback(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        on_ranks(2, lambda: raise_on(1, KeyError("weight")))
    printed = capfd.readouterr().err
    assert printed.count("Traceback") == 1
    assert "\nKeyError: 'weight'\n" in printed
    assert "error: rank 1 failed with KeyError: 'weight'\n" in printed


@pytest.mark.long
def test_a_killed_rank_ends_the_other_ranks_and_is_named(capfd: pytest.CaptureFixture[str]) -> None:
    def work() -> None:
        if rank() == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        all_gather("rank 0 waits here")

    with pytest.raises(SystemExit) as end:
        on_ranks(2, work)
    assert end.value.code == 128 + signal.SIGKILL
    assert "error: rank 1 was ended by SIGKILL" in capfd.readouterr().err


def test_the_environment_sets_the_number_of_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    assert num_ranks(4) == 1
    monkeypatch.setenv("RANKS", "3")
    assert num_ranks(2) == 3
    monkeypatch.setenv("RANKS", "auto")
    monkeypatch.setattr("scaling_fl.distributed.launch.accelerator", lambda: None)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2}, raising=False)
    assert [num_ranks(num_sites) for num_sites in (1, 2, 100)] == [1, 2, 3]
    monkeypatch.setattr("scaling_fl.distributed.launch.accelerator", lambda: "cuda")
    assert num_ranks(100) == 1, "one rank drives all devices"
    for bad in ("0", "-1", "two"):
        monkeypatch.setenv("RANKS", bad)
        with pytest.raises(ValueError, match=f"RANKS: expected a whole number from 1, got '{bad}'"):
            num_ranks(4)


def test_the_number_of_threads_is_one_unless_the_environment_sets_it(monkeypatch: pytest.MonkeyPatch) -> None:
    assert num_threads() == 1
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    assert num_threads() == 2


def test_messages_between_cpus_have_a_backend_beside_that_of_an_accelerator(monkeypatch: pytest.MonkeyPatch) -> None:
    assert backends() == "gloo"
    monkeypatch.setattr("scaling_fl.distributed.world.accelerator", lambda: "cuda")
    assert backends() == "cpu:gloo,cuda:nccl"

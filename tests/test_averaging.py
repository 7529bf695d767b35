"""Ranks that share memory and ranks that send messages compute the same mean."""

import hashlib
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from fractions import Fraction
from typing import Any

import pytest
import torch
from torch import Tensor

from scaling_fl.distributed.collectives import all_gather, bytes_sent, rank, world_size
from scaling_fl.distributed.launch import launch
from scaling_fl.distributed.shared_memory import share_memory
from scaling_fl.distributed.vectors import SharedVector
from scaling_fl.distributed.world import world
from scaling_fl.federation.aggregation import PIECE, Mean, make_mean
from scaling_fl.federation.fixed_point import UNIT

NUM_SITES = 5
SHARES = [Fraction(number + 1, 15) for number in range(NUM_SITES)]


def global_weights(size: int, largest: float) -> Tensor:
    return torch.linspace(-largest, 0.5, size)


def train(weights: Tensor, site: int, round_: int) -> Tensor:
    return weights - 0.01 * torch.randn(len(weights), generator=torch.Generator().manual_seed(10 * site + round_))


@contextmanager
def world_that(shares: bool) -> Iterator[None]:
    """Join the other ranks, either with shared memory or as if each rank was on a separate node."""
    if not shares:
        os.environ.pop("LOCAL_WORLD_SIZE", None)
    with world():
        yield


def means(size: int, comm_dtype: str, share_it: bool, largest: float = 1.0) -> list[tuple[str, list[float], int]]:
    """Return for two rounds the hash of the mean, its first numbers, and the bytes sent for it."""
    with world_that(share_it):
        mean = make_mean(size, comm_dtype, torch.device("cpu"))
        shares = isinstance(mean._vector, SharedVector) if comm_dtype == "exact" else bool(mean._vector._parts)
        assert shares == (share_it and world_size() > 1)
        found, weights = [], global_weights(size, largest)
        for round_ in range(2):
            sent = bytes_sent()
            for site in range(rank(), NUM_SITES, world_size()):
                mean.add(weights, train(weights, site, round_), SHARES[site])
            taken = mean.finish(weights)
            digest = hashlib.sha256(taken.numpy().tobytes()).hexdigest()
            found.append((digest, taken[:100].tolist(), bytes_sent() - sent))
        assert all_gather(found[0][0]) == [found[0][0]] * world_size()
        return found


@pytest.mark.parametrize(
    ("size", "largest"),
    [
        pytest.param(1, 1.0, marks=pytest.mark.long),
        (PIECE - 1, 100.0),
        pytest.param(3 * PIECE + 17, 1.0, marks=pytest.mark.long),
    ],
)
def test_the_mean_is_the_same_by_shared_memory_by_messages_and_on_one_rank(size: int, largest: float) -> None:
    runs = [
        launch(means, size, "exact", share_it, largest, num_ranks=num_ranks, fork=True)
        for num_ranks, share_it in [(1, True), (2, True), (2, False), (4, True)]
    ]
    hashes = [{of_rank[round_][0] for of_rank in run} for run in runs for round_ in (0, 1)]
    assert all(len(of_ranks) == 1 for of_ranks in hashes)
    assert hashes[::2] == [hashes[0]] * len(runs)
    assert hashes[1::2] == [hashes[1]] * len(runs)
    weights = global_weights(size, largest)
    for round_ in (0, 1):
        locals_ = [train(weights, site, round_) for site in range(NUM_SITES)]
        exact = [
            Fraction(before.item())
            - sum(share * Fraction(after.item()) for share, after in zip(SHARES, afters, strict=True))
            for before, *afters in zip(weights[:100], *(local[:100] for local in locals_), strict=True)
        ]
        assert runs[0][0][round_][1] == pytest.approx([float(mean) for mean in exact], rel=1e-7, abs=NUM_SITES * UNIT)
    for run in runs[1:]:
        assert all(of_round[2] >= 8 * size for of_rank in run for of_round in of_rank), "both kinds count the bytes"


@pytest.mark.parametrize("largest", [1.0, pytest.param(100.0, marks=pytest.mark.long)])
def test_ranks_without_sites_change_no_bit_of_the_mean(largest: float) -> None:
    """The second of four sites is refused, and the fourth rank has none."""
    size = 3 * PIECE + 1  # so that the fourth rank has a part of the mean

    def mean_of_few(share_it: bool) -> str:
        with world_that(share_it):
            mean, weights = make_mean(size, "exact", torch.device("cpu")), global_weights(size, largest)
            for site in range(rank(), 3, world_size()):
                local = train(weights, site, 0)
                if site == 1:
                    local[-1] = torch.nan
                    with pytest.raises(FloatingPointError):
                        mean.check(weights, local)
                else:
                    mean.add(weights, local, Fraction(1, 3))
            return hashlib.sha256(mean.finish(weights).numpy().tobytes()).hexdigest()

    runs = [(1, True), (2, True), (4, True), (4, False)]
    hashes = [launch(mean_of_few, share_it, num_ranks=num_ranks, fork=True) for num_ranks, share_it in runs]
    assert hashes == [[hashes[0][0]] * num_ranks for num_ranks, _ in runs]


@pytest.mark.parametrize("share_it", [True, False])
def test_a_float32_mean_equals_a_mean_computed_in_float32(share_it: bool) -> None:
    size = 2 * PIECE + 5
    (first, *_), *_ = launch(means, size, "float32", share_it, num_ranks=2, fork=True)
    weights = global_weights(size, 1.0)
    exact = sum(float(share) * (weights.double() - train(weights, site, 0)) for site, share in enumerate(SHARES))
    assert first[1] == pytest.approx(exact[:100].tolist(), rel=1e-5, abs=1e-9)


def test_shared_memory_is_seen_by_all_ranks_unnamed_and_locked_by_one_at_a_time() -> None:
    def write_and_read() -> list[int] | None:
        with world():
            memory = share_memory(4)
            if memory is None:
                return None
            memory.values[rank()] = rank() + 1
            all_gather(None)
            for _ in range(200):
                with memory.locked(7):
                    number = memory.values[3].item()
                    time.sleep(1e-5)
                    memory.values[3] = (number + 1) % 251
            all_gather(None)
            assert not [name for name in os.listdir("/dev/shm") if "scaling_fl" in name]
            return memory.values.tolist()

    assert launch(write_and_read, num_ranks=3, fork=True) == [[1, 2, 3, 600 % 251]] * 3
    assert launch(write_and_read, num_ranks=1, fork=True) == [None]


@pytest.mark.parametrize("keeps", [False, True])
def test_ranks_that_finish_sites_at_once_lose_no_piece_of_them(keeps: bool) -> None:
    """With `keeps`, rounds of one site, of which no rank reads the weights of another round."""
    size = 3 * PIECE + 17

    def many_rounds() -> list[str]:
        with world():
            mean, weights, found = make_mean(size, "exact", torch.device("cpu")), global_weights(size, 1.0), []
            for round_ in range(6):
                if keeps:
                    if rank() == round_ % world_size():
                        mean.keep(weights, train(weights, 0, round_))
                    taken = mean.take()
                else:
                    for site in range(rank(), 8, world_size()):
                        mean.add(weights, train(weights, site, round_), Fraction(1, 8))
                    taken = mean.finish(weights)
                if rank() == round_ % world_size():
                    time.sleep(0.05)  # the others go on
                assert taken is not None
                found.append(hashlib.sha256(taken.numpy().tobytes()).hexdigest())
            return found

    (alone,), *others = (launch(many_rounds, num_ranks=num_ranks, fork=True) for num_ranks in (1, 2, 3))
    assert [of_rank for of_ranks in others for of_rank in of_ranks] == [alone] * 5


def test_a_rank_that_fails_while_it_adds_leaves_no_piece_locked() -> None:
    def fail_and_add() -> bool:
        with world():
            mean, weights = make_mean(2 * PIECE, "exact", torch.device("cpu")), torch.ones(2 * PIECE)
            if rank() == 0:
                with pytest.raises(FloatingPointError) as error:
                    mean.add(weights, torch.full((2 * PIECE,), torch.nan), Fraction(1, 2))
                assert error.traceback
            all_gather(None)
            if rank() == 1:
                mean.add(weights, torch.zeros(2 * PIECE), Fraction(1, 2))
            all_gather(None)
            return True

    assert launch(fail_and_add, num_ranks=2, fork=True) == [True, True]


@pytest.mark.long
def test_memory_of_another_process_with_the_same_path_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """As for ranks in containers with separate process ids."""
    read_link = os.readlink
    monkeypatch.setattr(os, "readlink", lambda path: read_link(f"/proc/self/fd/{os.path.basename(path)}"))

    def share() -> bool:
        with world():
            return share_memory(100) is not None

    def is_own(path: str) -> bool:
        return path.startswith(f"/proc/{os.getpid()}/")

    assert launch(share, num_ranks=2, fork=True) == [False, False]
    monkeypatch.undo()
    monkeypatch.setattr(os, "readlink", lambda path: read_link(path) if is_own(path) else "/home/somebody/log.txt")
    assert launch(share, num_ranks=2, fork=True) == [False, False]
    monkeypatch.undo()
    assert launch(share, num_ranks=2, fork=True) == [True, True]


def test_no_rank_reads_a_part_of_the_mean_before_it_is_written() -> None:
    def slow_first_rank() -> str:
        with world():
            mean = make_mean(2 * PIECE, "exact", torch.device("cpu"))
            mean.add(torch.ones(2 * PIECE), torch.zeros(2 * PIECE), Fraction(1, 2))
            if rank() == 0:
                be_late(mean)
            return hashlib.sha256(mean.finish(torch.ones(2 * PIECE)).numpy().tobytes()).hexdigest()

    ones = hashlib.sha256(torch.ones(2 * PIECE).numpy().tobytes()).hexdigest()
    assert launch(slow_first_rank, num_ranks=2, fork=True) == [ones, ones]


def be_late(mean: Mean) -> None:
    """Let this rank compute its part of the mean half a second after the others."""
    drift_of = mean._drift_of

    def late(*arguments: Any) -> Tensor:
        time.sleep(0.5)
        return drift_of(*arguments)

    mean._drift_of = late  # type: ignore[method-assign]

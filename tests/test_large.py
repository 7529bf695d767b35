"""Vectors and checkpoints above 2 GiB, where sizes no longer fit into 32 bits, in bounded memory."""

import fcntl
import os
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor

from scaling_fl.distributed.collectives import all_gather, rank
from scaling_fl.distributed.launch import launch
from scaling_fl.distributed.vectors import SharedVector
from scaling_fl.distributed.world import world
from scaling_fl.federation.int8 import LEVELS, make_vector
from scaling_fl.records import checkpoint

GIB = 2**30
PERIOD = 1021  # a prime, so that no two places 2**32 bytes apart have the same number
PIECE = 2**20
SIZE = int(2.05 * GIB)

pytestmark = [
    pytest.mark.long(seconds=25),
    pytest.mark.skipif(not Path("/proc/meminfo").exists(), reason="reads /proc"),
]


def read_bytes(path: str, name: str) -> int:
    """Return an entry of a file of /proc in bytes."""
    lines = (line.split() for line in Path(path).read_text().splitlines())
    return next(int(words[1]) * 1024 for words in lines if words[0] == f"{name}:")


@pytest.fixture(autouse=True)
def one_at_a_time(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Let no other process of pytest take the memory that a test has found."""
    with open(tmp_path_factory.getbasetemp().parent / "large.lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def need_memory(num_bytes: float) -> None:
    if read_bytes("/proc/meminfo", "MemAvailable") < num_bytes:
        pytest.skip(f"needs {num_bytes / GIB:.0f} GiB of memory")


def forget_peak() -> int:
    """Let this process's peak begin now, and return its memory."""
    Path("/proc/self/clear_refs").write_text("5")
    return read_bytes("/proc/self/status", "VmRSS")


def peak() -> int:
    return read_bytes("/proc/self/status", "VmHWM")


@cache
def cached_numbers() -> Tensor:
    return torch.arange(PIECE + PERIOD).remainder_(PERIOD).float()


def numbers_at(start: int, stop: int) -> Tensor:
    """Return the numbers of at most PIECE places, a view of a cached tensor: do not write to it."""
    return cached_numbers()[start % PERIOD :][: stop - start]


def sum_vectors(size: int, dtype: torch.dtype, wire: torch.dtype, share_it: bool) -> tuple[float, float]:
    """Return the largest error of a mean of two ranks, and the peak of memory in vectors."""
    if not share_it:
        os.environ.pop("LOCAL_WORLD_SIZE", None)
    with world():
        before = forget_peak()
        vector = make_vector(size, dtype, wire, torch.device("cpu"), PIECE)
        assert isinstance(vector, SharedVector) == share_it
        for where, piece, has_sum in vector.fill(has_sum=False):
            own = numbers_at(where.start, where.stop) + rank()
            piece.copy_(piece + own if has_sum else own)
        all_gather(None)
        mean = vector.all_reduce(lambda piece, where: piece.double() if dtype == torch.int64 else piece, 2.0, 1.0)
        errors = [
            (piece - numbers_at(number * PIECE, number * PIECE + len(piece)) - 0.5).abs().max().item()
            for number, piece in enumerate(mean.split(PIECE))
        ]
        all_gather(None)
        return max(errors), (peak() - before) / (size * dtype.itemsize)


@pytest.mark.parametrize(
    ("dtype", "wire", "share_it", "tolerance", "most"),
    [
        # Of shared memory the other rank's counts, too, and each rank's part of the mean.
        pytest.param(torch.int64, torch.int64, True, 0.0, 2.6, id="exact-memory"),
        pytest.param(torch.int64, torch.int64, False, 0.0, 1.2, id="exact-messages"),
        pytest.param(torch.float32, torch.int8, False, 1.02 * PERIOD / LEVELS, 1.2, id="int8-messages"),
    ],
)
def test_a_vector_above_2_gib_is_summed_in_place(
    dtype: torch.dtype, wire: torch.dtype, share_it: bool, tolerance: float, most: float
) -> None:
    need_memory(2 * most * SIZE)
    by_rank = launch(sum_vectors, SIZE // dtype.itemsize, dtype, wire, share_it, num_ranks=2, fork=True)
    for error, num_vectors in by_rank:
        assert error <= tolerance
        assert num_vectors < most


def test_a_checkpoint_above_2_gib_reaches_a_rank_without_it_with_one_extra_copy(tmp_path: Path) -> None:
    """Rank 1 has the file, and rank 0 an empty folder."""
    need_memory(5 * SIZE)
    disk = os.statvfs(tmp_path)
    if disk.f_bavail * disk.f_frsize < 2 * SIZE:
        pytest.skip(f"needs {2 * SIZE / GIB:.1f} GiB of disk")

    def write() -> float:
        with world():
            weights, before = torch.empty(SIZE // 4), forget_peak()
            for number, piece in enumerate(weights.split(PIECE)):
                piece.copy_(numbers_at(number * PIECE, number * PIECE + len(piece)))
            state = {"weights": {"all": weights}, "optimiser": {}}
            checkpoint.save(str(tmp_path / "1"), state, [{}, {}], {}, keep=None)
            return (peak() - before) / SIZE

    def restore() -> tuple[bool, float]:
        with world():
            before = forget_peak()
            state = checkpoint.restore(str(tmp_path / str(rank())), {})
            num_copies = (peak() - before) / SIZE
            pieces = enumerate(state["server"]["weights"]["all"].split(PIECE))
            is_same = all(
                torch.equal(piece, numbers_at(number * PIECE, number * PIECE + len(piece))) for number, piece in pieces
            )
            return is_same, num_copies

    try:
        (num_copies,) = launch(write, num_ranks=1, fork=True)
        assert num_copies < 2.1, "the state and the file"
        for is_same, num_copies in launch(restore, num_ranks=2, fork=True):
            assert is_same
            assert num_copies < 2.1, "the file and the state"
    finally:
        for file in (tmp_path / "1").iterdir():
            file.unlink()

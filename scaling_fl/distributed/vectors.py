"""A vector of each rank, and their sum: by memory that the ranks share, or by messages."""

import os
from collections.abc import Callable
from contextlib import suppress
from functools import reduce

import torch
from torch import Tensor

from scaling_fl.distributed.collectives import all_gather, all_reduce_, count_bytes, is_one_node, rank, world_size

Work = Callable[[Tensor, slice], Tensor]
MEMORY = "scaling_fl"  # first part of the name of shared memory among a process's files


class RankVector:
    """A vector of this rank, and the sum of those of all ranks.

    Ranks that share memory read each other's vectors there, and each rank computes a part of the sum. Other ranks
    send messages.

    Args:
        size: of the vector.
        dtype: of its values.
        wire: the type in which ranks add them: one of the same size reads their bits, a smaller one rounds them.
        device: where it is.
        piece: how many values are worked on at a time.
    """

    def __init__(self, size: int, dtype: torch.dtype, wire: torch.dtype, device: torch.device, piece: int) -> None:
        self._wire, self._piece = wire, piece
        self._part = -(-size // (world_size() * piece)) * piece  # of the sum that a rank computes
        num_bytes = size * dtype.itemsize
        fits = wire.itemsize == dtype.itemsize
        memory = share_memory(num_bytes + 4 * self._part) if fits and device.type == "cpu" else []
        self._parts = [of_rank[num_bytes:].view(torch.float32) for of_rank in memory]
        local = memory[rank()] if memory else torch.empty(num_bytes, dtype=torch.uint8, device=device)
        self.values = local[:num_bytes].view(dtype)
        if fits and world_size() == 1:  # which needs no memory for parts
            memory, self._parts = [local], [self.values.view(torch.float32)]
        self._vectors = [of_rank[:num_bytes].view(wire) for of_rank in memory]
        # The ranks of whose vectors `all_reduce` gives the sum to its first argument.
        self.ranks = range(world_size()) if memory else range(rank(), rank() + 1)

    @property
    def nbytes(self) -> int:
        """How many bytes this rank holds."""
        return self.values.untyped_storage().nbytes()

    @property
    def num_bytes_sent(self) -> int:
        """How many bytes this rank hands to the others for a sum."""
        return len(self.values) * self._wire.itemsize if world_size() > 1 else 0

    def all_reduce(self, work: Work, divisor: float, scale: float) -> Tensor:
        """Return the sum over all ranks of what `work` makes of their vectors, divided.

        Another collective must stand between the last change of a rank's values and this one.

        Args:
            work: returns floats, given a piece of the sum of the vectors of `self.ranks`, which it may overwrite, and
                where in the vector the piece is.
            divisor: of the sum as float32.
            scale: what messages are multiplied by before they are of the wire's type.

        Returns:
            float32 (size,), in the memory of `self.values`.
        """
        mean = self.values.view(torch.float32)[: len(self.values)]
        if self._vectors:
            self._reduce_in_memory(mean, work, divisor)
        else:
            self._reduce_by_messages(mean, work, divisor, scale)
        return mean

    def _reduce_in_memory(self, mean: Tensor, work: Work, divisor: float) -> None:
        """Compute this rank's part of the sum from all vectors, and take the other ranks' parts from them."""
        first = rank() * self._part
        for where in self._slices(first, first + self._part):
            total = reduce(torch.add, (vector[where] for vector in self._vectors))
            part = self._parts[rank()][where.start - first : where.stop - first]
            torch.div(work(total, where).to(torch.float32), divisor, out=part)
        all_gather(None)  # all parts are complete
        count_bytes(self.num_bytes_sent)
        for number, out in enumerate(mean.split(self._part)):
            out.copy_(self._parts[number][: len(out)])

    def _reduce_by_messages(self, mean: Tensor, work: Work, divisor: float, scale: float) -> None:
        """Let the ranks send each other their vectors."""
        fits = self._wire.itemsize == self.values.itemsize
        message = self.values.view(self._wire) if fits else torch.empty_like(self.values, dtype=self._wire)
        vector = message if fits else self.values
        for where in self._slices(0, len(vector)):
            message[where].copy_(work(vector[where], where).mul_(scale))
        all_reduce_(message)
        for where in self._slices(0, len(vector)):
            torch.div(message[where].to(torch.float32), scale * divisor, out=mean[where])  # the first pieces overlap

    def _slices(self, start: int, stop: int) -> list[slice]:
        """Return where the pieces from `start` to `stop` or the end are."""
        stop = min(stop, len(self.values))
        return [slice(place, min(place + self._piece, stop)) for place in range(start, stop, self._piece)]


def share_memory(num_bytes: int) -> list[Tensor]:
    """Return each rank's piece of memory that all ranks see, uint8 (num_bytes,); none where they cannot share any.

    The memory has no name in any file system, and is freed with the ranks.
    """
    if world_size() == 1 or not is_one_node() or not hasattr(os, "memfd_create"):
        return []
    file = os.memfd_create(f"{MEMORY}-{os.urandom(16).hex()}")
    os.truncate(file, num_bytes)
    path = f"/proc/{os.getpid()}/fd/{file}"
    links = all_gather((path, os.readlink(path)))
    memory = []
    # Where ranks have process ids of their own, as in containers, a path names another file or none; and some systems
    # let no process open another's files.
    with suppress(OSError, RuntimeError):
        if all(os.readlink(path) == link for path, link in links):
            memory = [torch.from_file(path, shared=True, size=num_bytes, dtype=torch.uint8) for path, _ in links]
    all_see = all(all_gather(bool(memory)))
    os.close(file)
    return memory if all_see else []

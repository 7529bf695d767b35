"""A vector of each rank, and their sum: by memory that the ranks share, or by messages."""

from collections.abc import Callable, Generator
from functools import reduce

import torch
from torch import Tensor

from scaling_fl.distributed.collectives import all_gather, all_reduce_, broadcast_, count_bytes, rank, world_size
from scaling_fl.distributed.shared_memory import SharedMemory, share_memory

Work = Callable[[Tensor, slice], Tensor]
WORD = torch.float32.itemsize


class RankVector:
    """A vector of this rank, and the sum of those of all ranks.

    Ranks that share memory read each other's vectors there, and each rank computes a part of the sum. Other ranks
    send messages.

    Args:
        size: of the vector.
        dtype: of its values.
        wire: the type in which ranks add them; a smaller one rounds them.
        device: where it is.
        piece: how many values are worked on at a time.
    """

    def __init__(self, size: int, dtype: torch.dtype, wire: torch.dtype, device: torch.device, piece: int) -> None:
        self._wire, self._piece = wire, piece
        self._part = -(-size // (world_size() * piece)) * piece  # of the sum that a rank computes
        num_bytes, of_part = size * dtype.itemsize, WORD * self._part
        fits = wire == dtype and device.type == "cpu"
        shared = share_memory(world_size() * (num_bytes + of_part)) if fits else None
        memory = [] if shared is None else shared.values.split(num_bytes + of_part)
        self._parts = [of_rank[num_bytes:].view(torch.float32) for of_rank in memory]
        local = memory[rank()] if memory else torch.empty(num_bytes, dtype=torch.uint8, device=device)
        self.values = local[:num_bytes].view(dtype)
        self._vectors = [of_rank[:num_bytes].view(dtype) for of_rank in memory]
        # The ranks of whose vectors `all_reduce` gives the sum to its first argument.
        self.ranks = range(world_size()) if memory else range(rank(), rank() + 1)

    @property
    def nbytes(self) -> int:
        """How many bytes this rank holds."""
        return self.values.nbytes + (WORD * self._part if self._parts else 0)

    @property
    def num_bytes_sent(self) -> int:
        """How many bytes this rank hands to the others for a sum."""
        return len(self.values) * self._wire.itemsize if world_size() > 1 else 0

    @property
    def only(self) -> Tensor:
        """Memory for float32 (size,) in place of the values, which `broadcast` hands to all ranks."""
        return self.values.view(torch.float32)[: len(self.values)]

    def fill(self, has_sum: bool) -> Generator[tuple[slice, Tensor, bool]]:
        """Yield where each piece is, the piece, which is to be overwritten, and whether it has a sum.

        Args:
            has_sum: whether this rank has filled the vector in this round.
        """
        for where in self._slices(0, len(self.values)):
            yield where, self.values[where], has_sum

    def clear(self, origin: Tensor) -> None:
        """Overwrite a vector that was not filled. Another collective must stand between this and `all_reduce`."""
        self.values.copy_(origin)

    def all_reduce(self, work: Work, divisor: float, scale: float) -> Tensor:
        """Return the sum over all ranks of what `work` makes of their vectors, divided.

        Args:
            work: returns floats, given a piece of the sum of the vectors of `self.ranks`, which it may overwrite, and
                where in the vector the piece is.
            divisor: of the sum as float32.
            scale: what messages are multiplied by before they are of the wire's type.

        Returns:
            float32 (size,), in memory that may be shared and that the next sum overwrites.
        """
        if self._vectors:
            self._reduce_in_memory(work, divisor)
        elif world_size() == 1 and self._wire.itemsize == self.values.itemsize:
            for where in self._slices(0, len(self.values)):  # the first pieces overlap
                self.only[where] = work(self.values[where], where).to(torch.float32).div_(divisor)
        else:
            self._reduce_by_messages(self.only, work, divisor, scale)
        return self.only

    def broadcast(self, owner: int) -> Tensor:
        """Return on all ranks what one rank has put into `only`."""
        return broadcast_(self.only, owner)

    def _reduce_in_memory(self, work: Work, divisor: float) -> None:
        """Compute this rank's part of the sum from all vectors, and take the other ranks' parts from them."""
        first = rank() * self._part
        for where in self._slices(first, first + self._part):
            total = reduce(torch.add, (vector[where] for vector in self._vectors))
            part = self._parts[rank()][where.start - first : where.stop - first]
            torch.div(work(total, where).to(torch.float32), divisor, out=part)
        all_gather(None)  # all parts are complete
        count_bytes(self.num_bytes_sent)
        for number, out in enumerate(self.only.split(self._part)):
            out.copy_(self._parts[number][: len(out)])

    def _reduce_by_messages(self, mean: Tensor, work: Work, divisor: float, scale: float) -> None:
        """Let the ranks send each other their vectors."""
        fits = self._wire.itemsize == self.values.itemsize
        message = self.values.view(self._wire) if fits else torch.empty_like(self.values, dtype=self._wire)
        vector = message if fits else self.values
        for where in self._slices(0, len(vector)):
            message[where].copy_(work(vector[where].view(self.values.dtype), where).mul_(scale))
        all_reduce_(message)
        for where in self._slices(0, len(vector)):
            torch.div(message[where].to(torch.float32), scale * divisor, out=mean[where])  # the first pieces overlap

    def _slices(self, start: int, stop: int) -> list[slice]:
        """Return where the pieces from `start` to `stop` or the end are."""
        stop = min(stop, len(self.values))
        return [slice(place, min(place + self._piece, stop)) for place in range(start, stop, self._piece)]


class SharedVector(RankVector):
    """One vector in memory that all ranks share, to which each adds, for sums that no order of their terms changes.

    A rank locks the piece that it adds to, and starts at another place than the others.

    Args:
        memory: of all the bytes of `sizes(size, dtype, piece)`.
        size, dtype, piece: as for RankVector.
    """

    def __init__(self, memory: SharedMemory, size: int, dtype: torch.dtype, piece: int) -> None:
        self._memory, self._wire, self._piece = memory, dtype, piece
        values, mean, rounds = memory.values.split(self.sizes(size, dtype, piece))
        self.values, self._mean = values.view(dtype), mean.view(torch.float32)[:size]
        self._rounds = rounds.view(torch.int64)  # of each piece, the last in which it was filled
        self._round = 1
        self.ranks = range(world_size())
        self._number = rank()  # which is hidden while sites train

    @staticmethod
    def sizes(size: int, dtype: torch.dtype, piece: int) -> list[int]:
        """Return the bytes of the values, of their mean, and of the rounds of all pieces."""
        word = torch.int64.itemsize
        return [size * dtype.itemsize, -(-size * WORD // word) * word, -(-size // piece) * word]

    @property
    def nbytes(self) -> int:
        """How many bytes this rank holds: its share."""
        return -(-self._memory.values.nbytes // len(self.ranks))

    def fill(self, has_sum: bool) -> Generator[tuple[slice, Tensor, bool]]:
        """Yield as RankVector does, but whether any rank has filled the piece in this round; `has_sum` has no effect.

        No other rank sees the piece until the next one; close the iterator after use.
        """
        slices = self._slices(0, len(self.values))
        first = self._number * len(slices) // len(self.ranks)
        for number in (*range(first, len(slices)), *range(first)):
            with self._memory.locked(number):
                yield slices[number], self.values[slices[number]], self._rounds[number].item() == self._round
                self._rounds[number] = self._round

    def clear(self, origin: Tensor) -> None:
        """Do nothing, as some rank has filled all pieces, or none has and there is no sum."""

    def all_reduce(self, work: Work, divisor: float, scale: float) -> Tensor:
        """Return as RankVector does."""
        self._compute(lambda where: work(self.values[where], where).to(torch.float32).div_(divisor))
        count_bytes(self.num_bytes_sent)
        return self._mean

    def broadcast(self, owner: int) -> Tensor:
        """Return as RankVector does."""
        self._compute(lambda where: self.only[where])
        count_bytes(self._mean.nbytes if self._number == owner else 0)
        return self._mean

    def _compute(self, work: Callable[[slice], Tensor]) -> None:
        """Compute a part of the mean on each rank, of which none reads the last mean any more."""
        for where in self._slices(0, len(self.values))[self._number :: len(self.ranks)]:
            self._mean[where] = work(where)
        self._round += 1
        all_gather(None)  # all parts are complete

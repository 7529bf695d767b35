"""Messages of a byte for each number: blocks of 256 numbers, each with its largest absolute value as float32.

Only drifts travel like this: a weight is a thousand times a round's drift, so that its rounding would drown the drift.
Each number is rounded to the nearest of 255 multiples of its block's largest / 127, which itself is not rounded. The
sum of all ranks' messages would not fit into a byte. So each rank sums a part of the vector in float32, in the order of
the ranks, and sends the mean of its part to all others, again in blocks.
"""

from functools import reduce

import torch
from torch import Tensor

from scaling_fl.distributed.collectives import all_gather_rows, exchange_rows, world_size
from scaling_fl.distributed.shared_memory import share_memory
from scaling_fl.distributed.vectors import RankVector, SharedVector, Work

BLOCK = 256
BLOCK_BYTES = BLOCK + torch.float32.itemsize
LEVELS = 127
CHUNK = 2**22  # numbers of all parts that are sent at a time
TINY = torch.finfo(torch.float32).tiny


def count_bytes(size: int) -> int:
    """Return the bytes of a message of so many numbers, of which the last block may be shorter."""
    return size + torch.float32.itemsize * -(-size // BLOCK)


def encode(rows: Tensor) -> Tensor:
    """Return the messages, uint8 (rows, bytes), of finite float32 (rows, a multiple of BLOCK)."""
    blocks = rows.unflatten(1, (-1, BLOCK))
    largest = blocks.abs().amax(2)
    codes = (blocks * LEVELS).div_(largest.clamp_min(TINY).unsqueeze(2)).round_().to(torch.int8)
    return torch.cat([codes.flatten(1).view(torch.uint8), largest.view(torch.uint8)], 1)


def decode(messages: Tensor) -> Tensor:
    """Return float32 (rows, numbers) of what `encode` made of them."""
    num_blocks = messages.shape[1] // BLOCK_BYTES
    codes, largest = (part.contiguous() for part in messages.tensor_split([num_blocks * BLOCK], 1))
    blocks = codes.view(torch.int8).to(torch.float32).div_(LEVELS).unflatten(1, (-1, BLOCK))
    return blocks.mul_(largest.view(torch.float32).unsqueeze(2)).flatten(1)


class BlockVector(RankVector):
    """A vector of this rank, and the sum of those of all ranks, sent in blocks. Arguments as for RankVector."""

    def __init__(self, size: int, dtype: torch.dtype, wire: torch.dtype, device: torch.device, piece: int) -> None:
        super().__init__(size, dtype, wire, device, piece)
        self._part = -(-size // (world_size() * BLOCK)) * BLOCK

    @property
    def num_bytes_sent(self) -> int:
        """How many bytes this rank hands to the others: the parts of theirs, and its part to them."""
        return world_size() * self._part // BLOCK * BLOCK_BYTES if world_size() > 1 else 0

    def _reduce_by_messages(self, mean: Tensor, work: Work, divisor: float, scale: float) -> None:
        """Sum this rank's part of the vectors, and let the ranks send each other their parts."""
        size, width = len(self.values), min(self._part, max(CHUNK // world_size() // BLOCK, 1) * BLOCK)
        for start in range(0, self._part, width):
            stop = min(start + width, self._part)
            # The last parts may be empty.
            starts = range(start, world_size() * self._part, self._part)
            places = [slice(min(first, size), min(first + stop - start, size)) for first in starts]
            drifts = mean.new_zeros(len(places), stop - start)
            for row, where in zip(drifts, places, strict=True):
                row[: where.stop - where.start] = work(self.values[where], where).mul_(scale)
            total = reduce(torch.add, decode(exchange_rows(encode(drifts))))
            means = decode(all_gather_rows(encode(total.div_(scale * divisor).unsqueeze(0))))
            for row, where in zip(means, places, strict=True):
                mean[where].copy_(row[: where.stop - where.start])


def make_vector(size: int, dtype: torch.dtype, wire: torch.dtype, device: torch.device, piece: int) -> RankVector:
    """Return a vector whose ranks send each other numbers of type `wire`. Arguments as for RankVector.

    int64 is that of fixed-point numbers, whose sums no order changes.
    """
    if wire == torch.int64 and device.type == "cpu":
        memory = share_memory(sum(SharedVector.sizes(size, dtype, piece)))
        if memory is not None:
            return SharedVector(memory, size, dtype, piece)
    return (BlockVector if wire == torch.int8 else RankVector)(size, dtype, wire, device, piece)

"""The mean of the sites' drifts, summed so that no order and no grouping of the sites changes a bit."""

import math
from fractions import Fraction
from threading import Lock

import torch
from torch import Tensor

from scaling_fl.distributed import count_bytes, gather, rank, share_memory, sum_, world_size

# The exact sum starts at GRID, in the middle of the float64 numbers from 2**8 to 2**9, which are 2**-44
# apart: adding a term rounds it to a multiple of 2**-44, and sums of such multiples are the same in any
# order. With drifts below LIMIT a sum stays within these bounds, as the shares add up to 1. A term that
# lies halfway between two multiples would be rounded one way or the other depending on the sum: see _odd.
GRID = 1.5 * 2.0**8
LIMIT = 2.0**7

# Pieces of this many weights stay in a core's cache through all the operations on them.
PIECE = 65_536

# What ranks send each other. Only "exact" gives the same bits on any number of ranks.
COMM_DTYPES: dict[str, torch.dtype] = {
    "exact": torch.float64,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
# float16 has no numbers below 6e-8, where drifts are common: they travel multiplied by this.
FLOAT16_SCALE = 2.0**8


class Mean:
    """The weighted mean of drifts, over all ranks.

    Args:
        size: weights in a drift.
        comm_dtype: a key of COMM_DTYPES.
        device: where it is computed.
    """

    def __init__(self, size: int, comm_dtype: str, device: torch.device) -> None:
        self._wire = COMM_DTYPES[comm_dtype]
        is_exact = self._wire == torch.float64
        wide = torch.float64 if is_exact else torch.float32
        self._origin = torch.tensor(GRID if is_exact else 0.0, dtype=wide, device=device)
        self._is_fused = not is_exact or _is_fused(self._origin)
        self._piece = PIECE if device.type == "cpu" else size
        self._drift = torch.empty(self._piece, dtype=wide, device=device)
        self._is_empty = True  # nothing added yet
        self._share = Fraction()  # of all examples, whose drifts were added
        self._lock = Lock()
        # Where ranks share memory, each has there its sum and, behind it, its part of the mean.
        self._part = -(-size // (world_size() * self._piece)) * self._piece
        num_bytes = size * wide.itemsize
        shared = share_memory(num_bytes + 4 * self._part) if device.type == "cpu" and self._wire == wide else []
        self._sums = [memory[:num_bytes].view(wide) for memory in shared]
        self._parts = [memory[num_bytes:].view(torch.float32) for memory in shared]
        self._sum = self._sums[rank()] if shared else torch.empty(size, dtype=wide, device=device)

    @property
    def nbytes(self) -> int:
        """How many bytes this rank keeps."""
        return self._sum.nbytes + self._drift.nbytes + sum(part.nbytes for part in self._parts[:1])

    @property
    def bytes_handed(self) -> int:
        """How many bytes this rank hands to the others for a mean."""
        return len(self._sum) * self._wire.itemsize if world_size() > 1 else 0

    def add(self, weights: Tensor, local: Tensor, share: Fraction | float) -> None:
        """Add a site's drift, global minus local weights, or nothing if that is an error. Threads may do so at once.

        Args:
            weights: the global weights.
            local: the site's weights.
            share: the site's weight in the mean; all sites' add up to 1 at most.

        Raises:
            FloatingPointError: a weight is not finite, or has moved by 128 or more.
        """
        factor = _odd(float(share))
        pieces = list(zip(*(vector.split(self._piece) for vector in (weights, local, self._sum)), strict=True))
        with self._lock:
            for number, (before, after, total) in enumerate(pieces):
                drift = self._drift[: len(total)].copy_(before).sub_(after)
                # The root of the sum of squares bounds the largest, and takes a fraction of its time to find.
                is_small = torch.dot(drift, drift).item() < LIMIT**2
                if not is_small and not torch.linalg.vector_norm(drift, torch.inf).item() < LIMIT:
                    self._take_back(pieces[:number], factor)
                    raise FloatingPointError(f"a weight is not finite, or moved by {LIMIT:g} or more")
                self._add(total, drift, factor)
            self._is_empty = False
            self._share += Fraction(share)

    def _add(self, total: Tensor, drift: Tensor, factor: float) -> None:
        """Add `factor * drift` to the sum, rounded to the grid if it is exact; a round's first overwrite it."""
        if not self._is_fused:
            drift.mul_(factor).add_(self._origin).sub_(self._origin)
            factor = 1.0
        torch.add(self._origin if self._is_empty else total, drift, alpha=factor, out=total)

    def _take_back(self, pieces: list[tuple[Tensor, Tensor, Tensor]], factor: float) -> None:
        """Subtract what was added of a drift; where the sum is exact, it is again what it was."""
        if not self._is_empty:
            for before, after, total in pieces:
                self._add(total, self._drift[: len(total)].copy_(before).sub_(after), -factor)

    def take(self) -> Tensor:
        """Return the mean of what all ranks have added, float32 (size,), and begin anew; zeros if that is nothing.

        It is in memory that the next drift is written over.
        """
        if self._is_empty:
            self._sum.fill_(self._origin.item())
        share = sum(Fraction(*pair) for pair in gather(self._share.as_integer_ratio()))  # after it all sums are there
        self._is_empty, self._share = True, Fraction()
        divisor = float(share or 1)
        return self._reduce_in_memory(divisor) if self._sums else self._reduce_by_messages(divisor)

    def _reduce_in_memory(self, divisor: float) -> Tensor:
        """Compute this rank's part of the mean from all sums, and take the other ranks' parts from them."""
        own = slice(rank() * self._part, (rank() + 1) * self._part)
        sums = [total[own].split(self._piece) for total in self._sums]
        for place, *others, mean in zip(*sums, self._parts[rank()].split(self._piece), strict=False):
            total = self._drift[: len(place)].copy_(place).sub_(self._origin)
            for other in others:
                total.add_(other).sub_(self._origin)
            mean[: len(place)].copy_(total)
        gather(None)  # all parts are there
        count_bytes(self.bytes_handed)
        mean = self._sum.view(torch.float32)[: len(self._sum)]
        for number, place in enumerate(mean.split(self._part)):
            torch.div(self._parts[number][: len(place)], divisor, out=place)
        return mean

    def _reduce_by_messages(self, divisor: float) -> Tensor:
        """Let the ranks send each other their sums."""
        if self._origin:
            self._sum -= self._origin
        scale = FLOAT16_SCALE if self._wire == torch.float16 else 1.0
        total = self._sum if scale == 1.0 else self._sum.mul_(scale)
        mean = self._narrow_(sum_(total.to(self._wire)))
        return mean if scale * divisor == 1.0 else mean.div_(scale * divisor)

    def _narrow_(self, total: Tensor) -> Tensor:
        """Return `total` as float32; a float64 one in the first half of its own memory."""
        if total.dtype != torch.float64:
            return total.to(torch.float32)
        mean = total.view(torch.float32)[: total.numel()]
        for wide, narrow in zip(total.split(self._piece), mean.split(self._piece), strict=True):
            narrow.copy_(wide.to(torch.float32))  # by way of a copy, as the first pieces overlap
        return mean


def _odd(share: float) -> float:
    """Return a share with the last bit of its mantissa set, so that its product with no drift is a tie.

    A drift is an odd multiple of its last bit; times an odd multiple of 2**-53 or more it is one of that bit
    times 2**-53 or more. To lie halfway between two multiples of 2**-44 the drift would have to be 128 or more.
    """
    mantissa, exponent = math.frexp(share)
    return math.ldexp(int(mantissa * 2**53) | 1, exponent - 53)


def _is_fused(origin: Tensor) -> bool:
    """Tell whether `add(total, drift, alpha=share)` rounds once only, as fused multiply-adds of processors do.

    Where the product is rounded first, some land halfway between two multiples of 2**-44.
    """
    share = _odd(1 / 3)
    drifts = torch.arange(1.0, 2_000.0, 2.0, dtype=origin.dtype, device=origin.device) * 2.0**-45 / share
    totals = origin, origin + 2.0**-44
    return torch.equal(*(torch.add(total, drifts, alpha=share) - total for total in totals))

"""The mean of the drifts of the sites' weights, summed so that no order and no grouping of the sites changes a bit."""

import math
from collections import Counter
from collections.abc import Iterable
from fractions import Fraction
from threading import Lock

import torch
from torch import Tensor

from scaling_fl.distributed.collectives import all_gather, all_reduce_, count_bytes, rank, share_memory, world_size

# The exact sum starts at GRID, in the middle of the float64 numbers from 2**8 to 2**9, which are 2**-44
# apart: adding a term rounds it to a multiple of 2**-44, and sums of such multiples are the same in any
# order. With terms below LIMIT a sum stays within these bounds, as the shares add up to 1. A term that
# lies halfway between two multiples would be rounded one way or the other depending on the sum: see _odd.
# A site's term is its share of its weights, as they are. What the terms would be if nobody had trained is summed
# once a round, rounded alike, for each size of share: the difference is the drift. Where a global weight is
# LIMIT / 2 or more, the terms are of what the sites' weights have gained, which takes longer.
# So the sum is exact in order. In value it is within (number of sites) * 2**-44 of exact arithmetic, 5.7e-11 for 1,000
# sites, before one rounding to float32. Where a round goes on without some sites, it is divided by the share of those
# that are left, and so is the bound: see LEAST_SHARE.
GRID = 1.5 * 2.0**8
LIMIT = 2.0**7
LEAST_SHARE = Fraction(1, 2**10)

# Pieces of this many weights stay in a core's cache through all the operations on them; an accelerator, which
# has to be asked after each, takes larger ones.
PIECE = 65_536
ACCELERATOR_PIECE = 2**22

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
    """The weighted mean of drifts, over all ranks, as exact as the head of this file says.

    Args:
        size: weights in a drift.
        comm_dtype: a key of COMM_DTYPES.
        device: where it is computed.
    """

    def __init__(self, size: int, comm_dtype: str, device: torch.device) -> None:
        self._wire = COMM_DTYPES[comm_dtype]
        self._is_exact = self._wire == torch.float64
        wide = torch.float64 if self._is_exact else torch.float32
        self._origin = torch.tensor(GRID if self._is_exact else 0.0, dtype=wide, device=device)
        self._is_fused = not self._is_exact or _is_fused(self._origin)
        self._piece = PIECE if device.type == "cpu" else min(size, ACCELERATOR_PIECE)
        self._buffer = torch.empty(self._piece, dtype=wide, device=device)
        self._is_of_weights = False  # whether weights are summed in this round, or what they have gained
        self._shares: list[Fraction] = []  # of all examples, of what was added
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
        return self._sum.nbytes + self._buffer.nbytes + sum(part.nbytes for part in self._parts[:1])

    @property
    def bytes_handed(self) -> int:
        """How many bytes this rank hands to the others for a mean."""
        return len(self._sum) * self._wire.itemsize if world_size() > 1 else 0

    def check(self, weights: Tensor, local: Tensor) -> None:
        """Find out whether a site can be added, before a part of it is. Threads may do so at once.

        Args:
            weights: the global weights, the same until the mean is taken.
            local: the site's weights.

        Raises:
            FloatingPointError: a weight is not finite, or moved too far: less than 64 never is, 192 always.
        """
        with self._lock:
            self._begin(weights)
        for before, after in zip(weights.split(self._piece), local.split(self._piece), strict=True):
            _check(after if self._is_of_weights else after - before)

    def add(self, weights: Tensor, local: Tensor, share: Fraction | float) -> None:
        """Add what a site has trained, and make its weights the global ones again. Threads may do so at once.

        Both are done to a piece while it is in the cache, as what takes time is to fetch it from memory.

        Args:
            weights: the global weights, the same until the mean is taken.
            local: the site's weights.
            share: the site's weight in the mean; all sites' add up to 1 at most.

        Raises:
            FloatingPointError: as for `check`. The round has no mean then, as part of the site may be in the sum.
        """
        factor = _odd(float(share))
        with self._lock:
            self._begin(weights)
            vectors = (vector.split(self._piece) for vector in (weights, local, self._sum))
            for before, after, total in zip(*vectors, strict=True):
                self._move(before, after, total, factor)
            self._shares.append(Fraction(share))

    def _begin(self, weights: Tensor) -> None:
        """Before a round's first, decide what is summed: the same on all ranks, as the global weights are."""
        if not self._shares:
            pieces = weights.split(self._piece)
            self._is_of_weights = self._is_exact and all(_is_below(piece, LIMIT / 2) for piece in pieces)

    def _move(self, before: Tensor, after: Tensor, total: Tensor, factor: float) -> None:
        """Add a piece of a site to the sum, and put the global weights in its place."""
        if self._is_exact:
            term = self._buffer[: len(after)].copy_(after)
            if self._is_of_weights:
                _check(after)
            else:
                _check(term.sub_(before))
            after.copy_(before)
            self._add(total, term, factor)
        else:
            _check(after.sub_(before))
            self._add(total, after, factor)
            after.copy_(before)

    def _add(self, total: Tensor, term: Tensor, factor: float) -> None:
        """Add `factor * term` to the sum, rounded to the grid if it is exact; a round's first overwrite it."""
        if not self._is_fused:
            term, factor = self._round(term, factor), 1.0
        torch.add(total if self._shares else self._origin, term, alpha=factor, out=total)

    def _round(self, wide: Tensor, factor: float) -> Tensor:
        """Return `factor * wide`, rounded to the grid."""
        scaled = torch.add(self._origin, wide, alpha=factor) if self._is_fused else (wide * factor).add_(self._origin)
        return scaled.sub_(self._origin)

    def take(self, weights: Tensor) -> Tensor:
        """Return the mean of the drifts, global minus local weights, that all ranks have added, and begin anew.

        It is float32 (size,), in memory that the next round is summed in; zeros if nothing was added.

        Raises:
            ValueError: what was added is too small a share of all examples. All ranks raise it.
        """
        self._begin(weights)
        if not self._shares:
            self._sum.fill_(self._origin.item())
        own = [share.as_integer_ratio() for share in self._shares]
        shares = [Fraction(*pair) for of_rank in all_gather(own) for pair in of_rank]  # after it all sums are there
        if 0 < sum(shares) < LEAST_SHARE:
            raise ValueError(
                f"the sites that are left: expected at least 1/{1 / LEAST_SHARE} of all examples, got "
                f"{float(sum(shares)):.2g}. The mean is divided by this share, which would magnify its rounding"
            )
        divisor = float(sum(shares) or 1)
        if self._sums:
            mean = self._reduce_in_memory(weights, _factors(shares), divisor)
        else:
            mean = self._reduce_by_messages(weights, _factors(self._shares), divisor)
        self._shares = []
        return mean

    def _add_weights(self, total: Tensor, weights: Tensor, factors: Counter[float]) -> None:
        """Make drifts of a sum of local weights, taken negative: exactly zero where no site has moved a weight."""
        if not self._is_of_weights:
            return
        wide = weights.to(total.dtype)
        for factor, count in factors.items():
            # Multiples of 2**-44 below 2**8, of which nothing is rounded.
            total.add_(self._round(wide, factor), alpha=count)

    def _reduce_in_memory(self, weights: Tensor, factors: Counter[float], divisor: float) -> Tensor:
        """Compute this rank's part of the mean from all sums, and take the other ranks' parts from them."""
        own = slice(rank() * self._part, (rank() + 1) * self._part)
        vectors = [vector[own].split(self._piece) for vector in (weights, *self._sums)]
        for before, *sums, mean in zip(*vectors, self._parts[rank()].split(self._piece), strict=False):
            total = torch.sub(self._origin, sums[0], out=self._buffer[: len(before)])
            for other in sums[1:]:
                total.sub_(other).add_(self._origin)
            self._add_weights(total, before, factors)
            mean[: len(before)].copy_(total)
        all_gather(None)  # all parts are there
        count_bytes(self.bytes_handed)
        mean = self._sum.view(torch.float32)[: len(self._sum)]
        for number, place in enumerate(mean.split(self._part)):
            torch.div(self._parts[number][: len(place)], divisor, out=place)
        return mean

    def _reduce_by_messages(self, weights: Tensor, factors: Counter[float], divisor: float) -> Tensor:
        """Let the ranks send each other their sums."""
        for before, total in zip(weights.split(self._piece), self._sum.split(self._piece), strict=True):
            self._add_weights(torch.sub(self._origin, total, out=total), before, factors)
        scale = FLOAT16_SCALE if self._wire == torch.float16 else 1.0
        total = self._sum if scale == 1.0 else self._sum.mul_(scale)
        mean = self._narrow_(all_reduce_(total.to(self._wire)))
        return mean if scale * divisor == 1.0 else mean.div_(scale * divisor)

    def _narrow_(self, total: Tensor) -> Tensor:
        """Return `total` as float32; a float64 one in the first half of its own memory."""
        if total.dtype != torch.float64:
            return total.to(torch.float32)
        mean = total.view(torch.float32)[: total.numel()]
        for wide, narrow in zip(total.split(self._piece), mean.split(self._piece), strict=True):
            narrow.copy_(wide.to(torch.float32))  # by way of a copy, as the first pieces overlap
        return mean


def _check(term: Tensor) -> None:
    """Refuse what would not fit into the sum."""
    if not _is_below(term, LIMIT):
        raise FloatingPointError(f"a weight is not finite, or moved by {LIMIT / 2:g} or more")


def _is_below(vector: Tensor, limit: float) -> bool:
    """Tell whether all are finite and below the limit in size."""
    # The root of the sum of squares bounds the largest, and takes a fraction of its time to find.
    if torch.dot(vector, vector).item() < limit**2:
        return True
    least, most = torch.aminmax(vector)
    return -limit < least.item() and most.item() < limit


def _factors(shares: Iterable[Fraction]) -> Counter[float]:
    """Return what terms of these shares are multiplied with, and how often."""
    return Counter(_odd(float(share)) for share in shares)


def _odd(share: float) -> float:
    """Return a share with the last bit of its mantissa set, so that its product with no term is a tie.

    The last bit that is set in a product is that of its factors, multiplied, and in the share it is 2**-52 or
    less. To lie halfway between two multiples of 2**-44 a product's would be 2**-45, so the term's 128 or more.
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

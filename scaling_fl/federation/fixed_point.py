"""Sums that no order and no grouping of their terms changes by a bit: fixed-point numbers, carried in float64.

A sum starts at ORIGIN, in the middle of the float64 numbers from 2**8 to 2**9, which are UNIT = 2**-44 apart. Adding a
term rounds it to a multiple of UNIT, and sums of such multiples are exact in any order, while all terms are below LIMIT
and their weights add up to 1 at most, which keeps the sum within its binade.

One term could break this: one halfway between two multiples, as a tie is rounded up or down depending on the sum. No
product with a `tie_free` factor is a tie: its last bit that is set is that of the two factors, multiplied. In the
factor, which is at most 1, it is 2**-52 or less. The product's would have to be 2**-45, so the term's 2**7 = LIMIT or
more, and the term as large.

So ranks that share memory add to one sum, in the order in which they come. Messages have drifts divided by UNIT, which
gives integers without rounding.

In value a sum is within (number of terms) * UNIT of exact arithmetic: 5.7e-11 for 1,000 terms.
"""

import math

import torch
from torch import Tensor

ORIGIN = 1.5 * 2.0**8
UNIT = 2.0**-44
LIMIT = 2.0**7
TOO_LARGE = f"a weight is not finite, or moved by {LIMIT / 2:g} or more"


class Grid:
    """The arithmetic of multiples of UNIT on one device."""

    def __init__(self, device: torch.device) -> None:
        self.origin = torch.tensor(ORIGIN, dtype=torch.float64, device=device)
        self._is_fused = is_fused(self.origin)

    def place(self, term: Tensor, factor: float) -> Tensor:
        """Return ORIGIN plus `factor * term` (float64), rounded to a multiple of UNIT."""
        if self._is_fused:
            return torch.add(self.origin, term, alpha=factor)
        return (term * factor).add_(self.origin)

    def add(self, before: Tensor, term: Tensor, factor: float, out: Tensor) -> None:
        """Write the sum `before` plus `factor * term`, rounded to a multiple of UNIT, to `out`."""
        if self._is_fused:
            torch.add(before, term, alpha=factor, out=out)
        else:
            torch.add(before, self.place(term, factor).sub_(self.origin), out=out)


def tie_free(factor: float) -> float:
    """Return a factor with the last bit of its mantissa set."""
    mantissa, exponent = math.frexp(factor)
    return math.ldexp(int(mantissa * 2**53) | 1, exponent - 53)


def is_fused(origin: Tensor) -> bool:
    """Tell whether `add(total, term, alpha=factor)` rounds only once, as fused multiply-adds of processors do.

    Where the product is rounded first, some land halfway between two multiples.
    """
    if origin.is_meta:
        return False
    factor = tie_free(1 / 3)
    terms = torch.arange(1.0, 2_000.0, 2.0, dtype=origin.dtype, device=origin.device) * (UNIT / 2 / factor)
    sums = origin, origin + UNIT
    return torch.equal(*(torch.add(before, terms, alpha=factor) - before for before in sums))


def check_size(term: Tensor) -> Tensor | None:
    """Refuse a term that is not below LIMIT. On an accelerator return its size for `check_sizes`, as asking waits.

    Raises:
        FloatingPointError: it is not.
    """
    if term.device.type != "cpu":
        return torch.linalg.vector_norm(term, math.inf)
    if not is_below(term, LIMIT):
        raise FloatingPointError(TOO_LARGE)
    return None


def check_sizes(sizes: list[Tensor | None]) -> None:
    """Refuse sizes of terms, each () or None for one that has been checked, of which one is not below LIMIT.

    Raises:
        FloatingPointError: one is not.
    """
    found = [size for size in sizes if size is not None]
    if found and not torch.stack(found).amax().item() < LIMIT:
        raise FloatingPointError(TOO_LARGE)


def is_below(vector: Tensor, limit: float) -> bool:
    """Tell whether all numbers of a vector are finite and below a limit in size."""
    # The root of the sum of squares bounds the largest, and takes a fraction of its time to find.
    if torch.dot(vector, vector).item() < limit**2:
        return True
    least, most = torch.aminmax(vector)
    return -limit < least.item() and most.item() < limit

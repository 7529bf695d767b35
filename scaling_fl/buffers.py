"""The mean of the sites' buffers, such as batch norm's statistics, of any size and type.

The order of the sites changes no bit here either. But a buffer may move by any amount in a round, which the grid of the
weights' mean does not hold. Buffers are few: each term is written in digits of a large base, at all exponents that it
needs. Digits are integers, and their sums are exact.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from fractions import Fraction
from threading import Lock

import torch
from torch import Tensor

from scaling_fl.distributed import gather, sum_
from scaling_fl.flat import Slot

DIGIT_BITS = 40  # an int64 holds the sum of a digit over 2**23 sites
LAST_DIGIT = -25  # what is below 2**-1000 does not count
COUNT = LAST_DIGIT - 1  # in place of an exponent: how many sites changed each element

Indices = tuple[int, ...]  # of slots


class BufferMean:
    """The weighted mean of buffers, over all ranks.

    That of floating-point buffers is within 2**-50 of the largest term, and then rounded to their type. That of
    integers is rounded to the nearest, halves up, and so bool becomes what half of the examples have. An element that
    no site changed keeps its bits.

    Args:
        slots: of the buffers, in the flat vectors of the weights.
    """

    def __init__(self, slots: Sequence[Slot]) -> None:
        self._slots = slots
        self._lock = Lock()
        self._begin()

    def _begin(self) -> None:
        self._num_sites = 0
        self._share = Fraction(0)  # of all examples, of the sites that were added
        self._shares: defaultdict[Indices, Fraction] = defaultdict(Fraction)  # of those that changed these buffers
        self._sums: dict[tuple[Indices, int], Tensor] = {}  # and for each exponent the sum of that digit of their terms

    def check(self, weights: Tensor, local: Tensor) -> None:
        """Find out whether a site can be added.

        Args:
            weights: the global weights, the same until the mean is taken.
            local: the site's weights.

        Raises:
            ValueError: the site has made an element of a buffer infinite or NaN.
        """
        self._changes(weights, local)

    def add(self, weights: Tensor, local: Tensor, share: Fraction | float) -> None:
        """Add a site's buffers, and make them the global ones again. Threads may do so at once.

        Args:
            weights: the global weights, the same until the mean is taken.
            local: the site's weights.
            share: the site's weight in the mean; all sites' add up to 1 at most.

        Raises:
            ValueError: as for `check`.
        """
        indices, elements, has_moved = self._changes(weights, local)
        with self._lock:
            self._num_sites += 1
            self._share += Fraction(share)
            if indices:
                self._shares[indices] += Fraction(share)
                self._add(indices, COUNT, has_moved.long())
                for exponent, digit in _digits(_finite(elements) * float(share)):
                    self._add(indices, exponent, digit)
        for slot in (self._slots[index] for index in indices):
            slot.view(local).copy_(slot.view(weights))

    def _changes(self, weights: Tensor, local: Tensor) -> tuple[Indices, Tensor, Tensor]:
        """Return which buffers a site has changed, and of these end to end the elements, and which of them have moved.

        Raises:
            ValueError: as for `check`.
        """
        before, after = (vector.view(torch.int32) for vector in (weights, local))  # NaN is not equal to itself
        ends = [(slot.start, slot.end) for slot in self._slots]
        indices = [i for i, (start, end) in enumerate(ends) if not torch.equal(before[start:end], after[start:end])]
        elements = [torch.empty(0, dtype=torch.float64, device=local.device)]
        has_moved = [torch.empty(0, dtype=torch.bool, device=local.device)]
        for index in indices:
            pair = [_elements(self._slots[index], vector) for vector in (weights, local)]
            elements.append(pair[1].double())
            has_moved.append(_differ(*pair))
            wrong = has_moved[-1] & ~elements[-1].isfinite()
            if wrong.any():
                raise ValueError(
                    f"buffer {self._slots[index].name}: expected finite numbers, got {pair[1][wrong][0].item()}. It is "
                    "computed from what passes through the model: look for extreme values there, or a division by zero"
                )
        return tuple(indices), torch.cat(elements), torch.cat(has_moved)

    def _add(self, indices: Indices, exponent: int, digit: Tensor) -> None:
        key = indices, exponent
        self._sums[key] = self._sums[key] + digit if key in self._sums else digit

    def take(self, weights: Tensor) -> None:
        """Make the global buffers the mean of those that all ranks have added, and begin anew.

        Args:
            weights: the global weights. Their buffers stay as they are where nothing was added.
        """
        if not self._slots:
            return
        shares = {indices: share.as_integer_ratio() for indices, share in self._shares.items()}
        own = self._num_sites, self._share.as_integer_ratio(), shares, sorted({exponent for _, exponent in self._sums})
        by_rank = gather(own)
        num_sites = sum(of_rank[0] for of_rank in by_rank)
        share = sum(Fraction(*of_rank[1]) for of_rank in by_rank)
        changed = [(indices, Fraction(*of)) for of_rank in by_rank for indices, of in of_rank[2].items()]
        exponents = sorted({exponent for of_rank in by_rank for exponent in of_rank[3]})
        if share and changed:
            left = {  # slot -> the share of the sites that did not change it
                index: float(share - sum(of for others, of in changed if index in others))
                for index in sorted({index for indices, _ in changed for index in indices})
            }
            sums = self._sum_over_ranks(weights, list(left), exponents)
            self._move(weights, left, sums.pop(COUNT), sums, num_sites, float(share))
        self._begin()

    def _sum_over_ranks(self, weights: Tensor, indices: list[int], exponents: list[int]) -> dict[int, Tensor]:
        """Return for each exponent the sum of all ranks' digits, of these buffers end to end."""
        sizes = {index: len(_elements(self._slots[index], weights)) for index in indices}
        table = torch.zeros(len(exponents), sum(sizes.values()), dtype=torch.int64, device=weights.device)
        for (some, exponent), digit in self._sums.items():
            row = dict(zip(indices, table[exponents.index(exponent)].split(list(sizes.values())), strict=True))
            for index, part in zip(some, digit.split([sizes[index] for index in some]), strict=True):
                row[index] += part
        return dict(zip(exponents, sum_(table), strict=True))

    def _move(
        self,
        weights: Tensor,
        left: dict[int, float],
        counts: Tensor,
        sums: dict[int, Tensor],
        num_sites: int,
        share: float,
    ) -> None:
        """Make the means of what sites have changed, where the others count with the global buffers."""
        buffers = [_elements(self._slots[index], weights) for index in left]
        total = torch.cat([_finite(before) * of for before, of in zip(buffers, left.values(), strict=True)])
        for exponent, digit in sorted(sums.items(), reverse=True):
            total += digit.double() * 2.0 ** (DIGIT_BITS * exponent)
        means = total / share
        sizes = [len(before) for before in buffers]
        for before, mean, count in zip(buffers, means.split(sizes), counts.split(sizes), strict=True):
            rounded = mean if before.is_floating_point() else (mean + 0.5).floor()
            # What is infinite for a site that left it so has no other mean.
            stays = (count == 0) | ((count < num_sites) & ~before.double().isfinite())
            before.copy_(torch.where(stays, before, rounded.to(before.dtype)))


def _elements(slot: Slot, vector: Tensor) -> Tensor:
    """Return the numbers of a buffer in a flat vector, of a complex one two for each."""
    found = slot.view(vector)
    return (torch.view_as_real(found) if found.is_complex() else found).view(-1)


def _differ(before: Tensor, after: Tensor) -> Tensor:
    """Tell which numbers have not the same bits: bool, of their shape."""
    pair = (elements.view(torch.uint8).view(len(elements), elements.itemsize) for elements in (before, after))
    return torch.ne(*pair).any(1)


def _finite(elements: Tensor) -> Tensor:
    """Return numbers as float64, those that are not finite as 0."""
    return elements.double().nan_to_num(0.0, 0.0, 0.0)


def _digits(terms: Tensor) -> Iterator[tuple[int, Tensor]]:
    """Yield exponents, and numbers below 2**DIGIT_BITS in size (int64) that add up to the terms (float64).

    A term is the sum of `digit * 2**(DIGIT_BITS * exponent)`; its digits do not depend on the terms beside it.
    """
    exponent = (int(torch.frexp(terms).exponent.max()) - 1) // DIGIT_BITS
    while exponent >= LAST_DIGIT and terms.any():
        digit = (terms * 2.0 ** (-DIGIT_BITS * exponent)).trunc()
        terms = terms - digit * 2.0 ** (DIGIT_BITS * exponent)
        yield exponent, digit.long()
        exponent -= 1

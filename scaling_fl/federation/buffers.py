"""The mean of the sites' buffers, such as batch norm's statistics, of any size and type.

The order of the sites changes no bit here either. But a buffer may move by any amount in a round, for which the grid of
`fixed_point` is too narrow. Buffers are few: each term is written in digits of a large base, at all exponents that it
needs. Digits are integers, and their sums are exact.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from fractions import Fraction
from threading import Lock

import torch
from torch import Tensor

from scaling_fl.distributed.collectives import all_gather, all_reduce_
from scaling_fl.models.flat import Slot

DIGIT_BITS = 40  # an int64 holds the sum of a digit over 2**23 sites
LAST_DIGIT = -25  # what is below 2**-1000 does not count
COUNT = LAST_DIGIT - 1  # in place of an exponent: how many sites changed each element


class BufferMean:
    """The weighted mean of buffers, over all ranks.

    That of floating-point buffers is within 2**-50 of the largest term, and then rounded to their type. That of
    integers is rounded to the nearest, halves up, and so bool becomes what half of the examples have. An element that
    no site changed keeps its bits.

    Args:
        slots: of the buffers in flat vectors.
    """

    def __init__(self, slots: Sequence[Slot]) -> None:
        self._slots = slots
        self._lock = Lock()
        self._reset()

    def _reset(self) -> None:
        """Start a round's sums."""
        self._num_sites = 0
        self._weight = Fraction(0)  # of the sites that were added
        self._weights: defaultdict[int, Fraction] = defaultdict(Fraction)  # buffer -> of the sites that changed it
        self._sums: dict[tuple[int, int], Tensor] = {}  # buffer and exponent -> the sum of this digit of their terms

    def check(self, global_weights: Tensor, local_weights: Tensor) -> None:
        """Refuse a site that cannot be added.

        Args:
            global_weights: a flat vector, the same until the mean is finished.
            local_weights: the site's flat vector.

        Raises:
            ValueError: the site has made an element of a buffer infinite or NaN.
        """
        self._changes(global_weights, local_weights)

    def add(self, global_weights: Tensor, local_weights: Tensor, weight: Fraction) -> None:
        """Add a site's buffers, and overwrite them with the global ones. Threads may do so at once.

        Args:
            global_weights: a flat vector, the same until the mean is finished.
            local_weights: the site's flat vector.
            weight: the site's fraction of the round's planned total.

        Raises:
            ValueError: as for `check`.
        """
        changes = self._changes(global_weights, local_weights)
        with self._lock:
            self._num_sites += 1
            self._weight += weight
            for number, before, after, has_moved in changes:
                self._weights[number] += weight
                self._add(number, COUNT, has_moved.long())
                for exponent, digit in _digits(_finite(after) * float(weight)):
                    self._add(number, exponent, digit)
                after.copy_(before)

    def _add(self, number: int, exponent: int, digit: Tensor) -> None:
        key = number, exponent
        self._sums[key] = self._sums[key] + digit if key in self._sums else digit

    def finish(self, global_weights: Tensor) -> None:
        """Overwrite the global buffers with the mean over all ranks, and start the next round.

        Args:
            global_weights: a flat vector. Its buffers stay as they are where nothing was added.
        """
        if not self._slots:
            return
        weights = {number: weight.as_integer_ratio() for number, weight in self._weights.items()}
        by_rank = all_gather((self._num_sites, self._weight.as_integer_ratio(), weights, list(self._sums)))
        num_sites = sum(of_rank[0] for of_rank in by_rank)
        weight = sum(Fraction(*of_rank[1]) for of_rank in by_rank)
        sums = self._sum_over_ranks(global_weights, sorted({key for of_rank in by_rank for key in of_rank[3]}))
        for number, of_buffer in sums.items() if weight else ():
            before, count = _elements(self._slots[number], global_weights), of_buffer.pop(COUNT)
            unchanged = weight - sum(Fraction(*of_rank[2].get(number, (0, 1))) for of_rank in by_rank)
            total = _finite(before) * float(unchanged)
            for exponent, digit in sorted(of_buffer.items(), reverse=True):
                total += digit.double() * 2.0 ** (DIGIT_BITS * exponent)
            mean = total / float(weight)
            rounded = mean if before.is_floating_point() else (mean + 0.5).floor()
            # What a site leaves infinite has no other mean.
            stays = (count == 0) | ((count < num_sites) & ~before.double().isfinite())
            before.copy_(torch.where(stays, before, rounded.to(before.dtype)))
        self._reset()

    def _sum_over_ranks(self, vector: Tensor, keys: Sequence[tuple[int, int]]) -> dict[int, dict[int, Tensor]]:
        """Return the sums of all ranks, buffer -> exponent -> digit, for which they send each other one vector."""
        sizes = [len(_elements(self._slots[number], vector)) for number, _ in keys]
        local = [self._sums.get(key, vector.new_zeros(size).long()) for key, size in zip(keys, sizes, strict=True)]
        sums: defaultdict[int, dict[int, Tensor]] = defaultdict(dict)
        digits = all_reduce_(torch.cat(local)).split(sizes) if local else ()
        for (number, exponent), digit in zip(keys, digits, strict=True):
            sums[number][exponent] = digit
        return sums

    def _changes(self, global_weights: Tensor, local_weights: Tensor) -> list[tuple[int, Tensor, Tensor, Tensor]]:
        """Return each buffer that a site has changed: number, elements before and after, and which of them have moved.

        Raises:
            ValueError: as for `check`.
        """
        changes = []
        for number, slot in enumerate(self._slots):
            before, after = _elements(slot, global_weights), _elements(slot, local_weights)
            has_moved = _differ(before, after)
            if not has_moved.any():
                continue
            wrong = after[has_moved & ~after.double().isfinite()]
            if len(wrong):
                raise ValueError(
                    f"buffer {slot.name}: expected finite numbers, got {wrong[0].item()}. It is computed from what "
                    "passes through the model: look for extreme values there, or a division by zero"
                )
            changes.append((number, before, after, has_moved))
        return changes


def _elements(slot: Slot, vector: Tensor) -> Tensor:
    """Return the numbers of a buffer in a flat vector, of a complex one two for each."""
    found = slot.view(vector)
    return (torch.view_as_real(found) if found.is_complex() else found).view(-1)


def _differ(before: Tensor, after: Tensor) -> Tensor:
    """Tell which numbers have not the same bits, as NaN is not equal to itself: bool, of their shape."""
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

"""The slot between a site's update and the global step: the weighted mean of the sites' drifts, global minus local.

An aggregator gets a round's sites one by one (`add`) and returns the mean over all ranks (`finish`).
"""

from collections import Counter
from contextlib import closing
from fractions import Fraction
from threading import Lock

import torch
from torch import Tensor

from scaling_fl.distributed.collectives import all_gather
from scaling_fl.federation.fixed_point import LIMIT, UNIT, Grid, check_size, check_sizes, is_below, tie_free
from scaling_fl.federation.int8 import make_vector

LEAST_WEIGHT = Fraction(1, 2**16)  # of a round: the mean is divided by it, and so is its error

# Pieces of this many weights stay in a core's cache through all the operations on them; an accelerator, which
# has to be asked after each, takes larger ones.
PIECE = 131_072
ACCELERATOR_PIECE = 2**22

# What ranks send each other. Only "exact" gives the same bits on any number of ranks.
COMM_DTYPES: dict[str, torch.dtype] = {
    "exact": torch.int64,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "int8": torch.int8,  # in blocks with a scale each
}
# float16 has no numbers below 6e-8, where drifts are common: they travel multiplied by this.
FLOAT16_SCALE = 2.0**8


class Mean:
    """What the means have in common: sites are added to a vector piece by piece, and ranks add up their vectors.

    Args:
        size: weights in a drift.
        origin: what a sum starts at, of the type that is summed in, ().
        wire: the type of what ranks send each other.
        scale: of numbers in messages.
    """

    def __init__(self, size: int, origin: Tensor, wire: torch.dtype, scale: float) -> None:
        self._origin, self._scale = origin, scale
        self._piece = PIECE if origin.device.type == "cpu" else min(size, ACCELERATOR_PIECE)
        self._vector = make_vector(size, origin.dtype, wire, origin.device, self._piece)
        self._weights: list[Fraction] = []  # of the sites that this rank has added, or kept, in this round
        self._lock = Lock()

    @property
    def nbytes(self) -> int:
        """How many bytes this rank holds."""
        return self._vector.nbytes

    @property
    def num_bytes_sent(self) -> int:
        """How many bytes this rank hands to the others for a mean."""
        return self._vector.num_bytes_sent

    def check(self, global_weights: Tensor, local_weights: Tensor) -> None:
        """Find out whether a site can be added, before a part of it is. Threads may do so at once.

        Args:
            global_weights: float32 (size,), the same until the mean is finished.
            local_weights: the site's, likewise.

        Raises:
            FloatingPointError: a weight is not finite, or moved too far: less than 64 never is, 192 always.
        """
        with self._lock:
            self._prepare(global_weights)
        pieces = zip(global_weights.split(self._piece), local_weights.split(self._piece), strict=True)
        check_sizes([self._check_piece(before, after) for before, after in pieces])

    def add(self, global_weights: Tensor, local_weights: Tensor, weight: Fraction) -> None:
        """Add a site, and overwrite its weights with the global ones. Threads may do so at once.

        Both are done to a piece while it is in the cache, as what takes time is to fetch it from memory.

        Args:
            global_weights: as for `check`.
            local_weights: as for `check`.
            weight: the site's fraction of the round's planned total; the sites' weights add up to 1 at most.

        Raises:
            FloatingPointError: as for `check`. The round has no mean then, as part of the site may be in the sum.
        """
        factor = tie_free(float(weight))
        with self._lock:
            self._prepare(global_weights)
            with closing(self._vector.fill(has_sum=bool(self._weights))) as pieces:
                sizes = [
                    self._add_piece(
                        global_weights[where], local_weights[where], factor, out if has_sum else self._origin, out
                    )
                    for where, out, has_sum in pieces
                ]
            check_sizes(sizes)
            self._weights.append(weight)

    def finish(self, global_weights: Tensor) -> Tensor | None:
        """Return the mean over all ranks, divided by the weights that were added, and start the next round.

        Args:
            global_weights: as for `check`.

        Returns:
            float32 (size,), in memory that ranks may share and that is overwritten when they finish the next round;
            None if no rank has added anything.

        Raises:
            ValueError: the weights add up to more than 1, or to too little. All ranks raise it.
        """
        self._prepare(global_weights)
        if not self._weights:
            self._vector.clear(self._origin)
        gathered = all_gather([weight.as_integer_ratio() for weight in self._weights])
        by_rank = [[Fraction(*ratio) for ratio in of_rank] for of_rank in gathered]
        total = sum(map(sum, by_rank), Fraction(0))
        if total > 1:
            raise ValueError(
                f"the weights of a round's sites: expected a sum of at most 1, got {float(total):.4g}. "
                "A site may report less than was planned, and only once a round"
            )
        if not total:
            return None
        if total < LEAST_WEIGHT:
            raise ValueError(
                f"the sites that are left: expected at least 1/{1 / LEAST_WEIGHT} of the round's examples, got "
                f"{float(total):.2g}. The mean is divided by this fraction, which would magnify its rounding. With "
                "site_deadline_s, use a longer one, or weight_by=sites"
            )
        factors = Counter(tie_free(float(weight)) for rank in self._vector.ranks for weight in by_rank[rank])

        def drift_of(piece: Tensor, where: slice) -> Tensor:
            return self._drift_of(piece, global_weights[where], factors)

        mean = self._vector.all_reduce(drift_of, float(total), self._scale)
        self._weights = []
        return mean

    def keep(self, global_weights: Tensor, local_weights: Tensor) -> None:
        """Keep the weights of a round's only site as they are, and overwrite them with the global ones.

        Takes and raises what `check` does.
        """
        self.check(global_weights, local_weights)
        self._vector.only.copy_(local_weights)
        local_weights.copy_(global_weights)
        self._weights.append(Fraction(1))

    def take(self) -> Tensor | None:
        """Return on all ranks what `keep` was given on one; None if it was not called."""
        owners = [number for number, has_it in enumerate(all_gather(bool(self._weights))) if has_it]
        self._weights = []
        return self._vector.broadcast(owners[0]) if owners else None

    def _prepare(self, global_weights: Tensor) -> None:
        """Decide before a round's first site how to sum: the same on all ranks, as the global weights are."""

    def _check_piece(self, before: Tensor, after: Tensor) -> Tensor | None:
        """Check the size of a piece of a site, as `check_size` does."""
        return check_size(after - before)

    def _add_piece(self, before: Tensor, after: Tensor, factor: float, total: Tensor, out: Tensor) -> Tensor | None:
        """Write the sum `total` plus a piece of a site to `out`, and its global weights to `after`; check its size."""
        raise NotImplementedError

    def _drift_of(self, total: Tensor, weights: Tensor, factors: Counter[float]) -> Tensor:
        """Return the sum of the drifts of the sites of the ranks `self._vector.ranks`.

        Args:
            total: the sum of a piece of these ranks' vectors, which may be overwritten.
            weights: the global ones.
            factors: of these sites, and how often each occurs.
        """
        raise NotImplementedError


class FloatMean(Mean):
    """The mean in float32, sent as `wire`. Its last bits depend on the order of the sites."""

    def __init__(self, size: int, wire: torch.dtype, device: torch.device) -> None:
        scale = FLOAT16_SCALE if wire == torch.float16 else 1.0
        super().__init__(size, torch.tensor(0.0, device=device), wire, scale)

    def _add_piece(self, before: Tensor, after: Tensor, factor: float, total: Tensor, out: Tensor) -> Tensor | None:
        size = check_size(after.sub_(before))
        torch.add(total, after, alpha=factor, out=out)
        after.copy_(before)
        return size

    def _drift_of(self, total: Tensor, weights: Tensor, factors: Counter[float]) -> Tensor:
        return torch.sub(self._origin, total, out=total)


class ExactMean(Mean):
    """The mean of which no order and no placement of the sites changes a bit, as `fixed_point` explains.

    A site's term is its local weights. What the terms would be if no site had trained is summed once a round, rounded
    alike, for each weight of a site: the difference is the drift, exactly zero where no site has moved a weight. Where
    a global weight is LIMIT / 2 or more, the terms are local minus global weights instead, which takes longer.
    """

    def __init__(self, size: int, device: torch.device) -> None:
        self._grid = Grid(device)
        super().__init__(size, self._grid.origin, torch.int64, scale=1 / UNIT)
        self._buffer = torch.empty(self._piece, dtype=torch.float64, device=device)
        self._adds_weights = False  # in this round; or else what they have gained

    @property
    def nbytes(self) -> int:
        """How many bytes this rank holds."""
        return super().nbytes + self._buffer.nbytes

    def _prepare(self, global_weights: Tensor) -> None:
        if not self._weights:
            self._adds_weights = all(is_below(piece, LIMIT / 2) for piece in global_weights.split(self._piece))

    def _check_piece(self, before: Tensor, after: Tensor) -> Tensor | None:
        return check_size(after if self._adds_weights else after - before)

    def _add_piece(self, before: Tensor, after: Tensor, factor: float, total: Tensor, out: Tensor) -> Tensor | None:
        term = self._buffer[: len(after)].copy_(after)
        size = check_size(after if self._adds_weights else term.sub_(before))
        after.copy_(before)
        self._grid.add(total, term, factor, out)
        return size

    def _drift_of(self, total: Tensor, weights: Tensor, factors: Counter[float]) -> Tensor:
        drift = torch.sub(self._origin, total, out=self._buffer[: len(total)])
        if self._adds_weights:
            wide = weights.double()
            for factor, count in factors.items():
                # Multiples of UNIT below 2**8, of which nothing is rounded.
                drift.add_(self._grid.place(wide, factor).sub_(self._origin), alpha=count)
        return drift


def make_mean(size: int, comm_dtype: str, device: torch.device) -> Mean:
    """Return the aggregator for `size` weights on `device` whose ranks send what a key of COMM_DTYPES says."""
    if comm_dtype == "exact":
        return ExactMean(size, device)
    return FloatMean(size, COMM_DTYPES[comm_dtype], device)

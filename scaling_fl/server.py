"""The global weights, their exact mean, and the optimiser that moves them.

There is no server process: every rank holds a `Server` and takes the same step on the same bits.
"""

import hashlib
import math
from collections.abc import Callable, Iterable
from fractions import Fraction
from threading import Lock

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from scaling_fl.distributed import gather, share_, sum_, world_size

# The exact sum starts at GRID, in the middle of the float64 numbers from 2**8 to 2**9, which are 2**-44
# apart: adding a term rounds it to a multiple of 2**-44, and sums of such multiples are the same in any
# order. With drifts below LIMIT a sum stays within these bounds, as the shares add up to 1. A term that
# lies halfway between two multiples would be rounded one way or the other depending on the sum: see _odd.
GRID = 1.5 * 2.0**8
LIMIT = 2.0**7

# Pieces of this many weights stay in a core's cache through all the operations on them.
PIECE = 32_768

# What ranks send each other. Only "exact" gives the same bits on any number of ranks.
COMM_DTYPES: dict[str, torch.dtype] = {
    "exact": torch.float64,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
# float16 has no numbers below 6e-8, where drifts are common: they travel multiplied by this.
FLOAT16_SCALE = 2.0**8


def trained_weights(model: nn.Module) -> dict[str, Tensor]:
    """Return the weights that are trained, and so travel, by name."""
    return {name: weight for name, weight in model.named_parameters() if weight.requires_grad}


def _shared(model: nn.Module) -> dict[str, Tensor]:
    """Return the trained weights, then the floating-point buffers that a saved model holds."""
    saved = model.state_dict().keys()
    buffers = {name: buffer for name, buffer in model.named_buffers() if name in saved and buffer.is_floating_point()}
    return trained_weights(model) | buffers


def flatten_(model: nn.Module) -> Tensor:
    """Lay the shared tensors of `model` end to end and make them views of the vector returned.

    Returns:
        A float32 vector, first the trained weights, then the floating-point buffers.

    Raises:
        ValueError: a shared tensor is not float32, or nothing is trained.
    """
    shared = _shared(model)
    if not trained_weights(model):
        raise ValueError("the model has no weight that requires a gradient: there is nothing to train")
    for name, tensor in shared.items():
        if tensor.dtype != torch.float32:
            raise ValueError(f"{name} is {tensor.dtype}: trained weights must be torch.float32")
    vector = torch.cat([tensor.detach().reshape(-1) for tensor in shared.values()])
    for tensor, view in zip(shared.values(), vector.split([t.numel() for t in shared.values()]), strict=True):
        tensor.data = view.view(tensor.shape)
    return vector


class Server:
    """The global weights and the optimiser that moves them, alike on every rank.

    Args:
        model: gives the first weights (rank 0's are taken everywhere) and their names.
        make_optimiser: a strategy; the gradient that its optimiser sees is the mean drift of the
            sites, global minus local weights.
        comm_dtype: a key of COMM_DTYPES.
        device: where the global weights live and are averaged.
    """

    def __init__(
        self,
        model: nn.Module,
        make_optimiser: Callable[[Iterable[Tensor]], Optimizer],
        comm_dtype: str = "exact",
        device: torch.device | None = None,
    ) -> None:
        shared = _shared(model)
        self._shapes = {name: tensor.shape for name, tensor in shared.items()}
        self.weights = torch.cat([tensor.detach().reshape(-1) for tensor in shared.values()]).to(device)
        share_(self.weights)
        self._trained_shapes = [weight.shape for weight in trained_weights(model).values()]
        num_trained = sum(shape.numel() for shape in self._trained_shapes)
        self._trained = nn.Parameter(self.weights[:num_trained])
        self._buffers = self.weights[num_trained:]
        self._optimiser = make_optimiser([self._trained])
        self._wire = COMM_DTYPES[comm_dtype]
        wide = torch.float64 if self._is_exact else torch.float32
        self._sum = torch.empty_like(self.weights, dtype=wide)
        self._is_empty = True  # nothing collected in this round
        self._share = Fraction()  # of the round's examples, whose drifts are in the sum
        self._origin = torch.tensor(GRID if self._is_exact else 0.0, dtype=wide, device=self.weights.device)
        self._is_fused = not self._is_exact or _is_fused(self._origin)
        self._piece = PIECE if self.weights.device.type == "cpu" else self.weights.numel()
        self._drift = torch.empty(self._piece, dtype=wide, device=self.weights.device)
        self._lock = Lock()

    @property
    def _is_exact(self) -> bool:
        return self._wire == torch.float64

    @property
    def bytes_a_round(self) -> int:
        """How many bytes all ranks hand to the all-reduce of a round; 0 in a world of one."""
        num_ranks = world_size()
        return num_ranks * self.weights.numel() * self._wire.itemsize if num_ranks > 1 else 0

    @property
    def nbytes(self) -> int:
        """How many bytes the weights and their sum take, without what the strategy keeps."""
        return self.weights.nbytes + self._sum.nbytes

    def send(self, replica: Tensor) -> None:
        """Overwrite a model's flat vector with the global weights."""
        replica.copy_(self.weights)

    def trained(self, device: torch.device) -> list[Tensor]:
        """Return the global weights that are trained, tensor by tensor, on `device`."""
        parts = self._trained.detach().to(device).split([shape.numel() for shape in self._trained_shapes])
        return [part.view(shape) for part, shape in zip(parts, self._trained_shapes, strict=True)]

    @torch.no_grad()
    def collect(self, replica: Tensor, share: Fraction | float) -> None:
        """Add a site's drift to the round's mean, or nothing if that is an error. Threads may call this at once.

        Args:
            replica: the flat vector of the site's trained model.
            share: the site's weight in the mean, its part of all examples; all sites' add up to 1 at most.

        Raises:
            FloatingPointError: a weight is not finite, or has moved by 128 or more.
        """
        replica = replica.to(self.weights.device)
        factor = _odd(float(share))
        pieces = list(zip(*(vector.split(self._piece) for vector in (self.weights, replica, self._sum)), strict=True))
        with self._lock:
            for number, (weights, local, total) in enumerate(pieces):
                drift = self._drift[: len(total)].copy_(weights).sub_(local)
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
            for weights, local, total in pieces:
                self._add(total, self._drift[: len(total)].copy_(weights).sub_(local), -factor)

    @torch.no_grad()
    def step(self) -> None:
        """Average the drifts that all ranks have collected, and move the global weights by their mean.

        Trained weights are moved by the strategy's optimiser, buffers to their mean. If nothing was collected,
        the mean is zero.
        """
        share = sum(Fraction(*pair) for pair in gather(self._share.as_integer_ratio()))
        if self._is_empty:
            self._sum.zero_()
        elif self._is_exact:
            self._sum -= self._origin
        self._is_empty, self._share = True, Fraction()
        scale = FLOAT16_SCALE if self._wire == torch.float16 else 1.0
        total = self._sum if scale == 1.0 else self._sum.mul_(scale)
        mean = self._narrow_(sum_(total.to(self._wire)))
        divisor = scale * float(share or 1)
        if divisor != 1.0:
            mean /= divisor
        self._trained.grad = mean[: self._trained.numel()]
        self._optimiser.step()
        self._trained.grad = None
        self._buffers -= mean[self._trained.numel() :]
        if self.weights.device.type != "cpu":
            torch.accelerator.synchronize()  # so that a clock outside sees what this took

    def _narrow_(self, total: Tensor) -> Tensor:
        """Return `total` as float32; a float64 one in the first half of its own memory."""
        if not self._is_exact:
            return total.to(torch.float32)
        mean = total.view(torch.float32)[: total.numel()]
        for wide, narrow in zip(total.split(self._piece), mean.split(self._piece), strict=True):
            narrow.copy_(wide.to(torch.float32))  # by way of a copy, as the first pieces overlap
        return mean

    def sha256(self) -> str:
        """Return the SHA-256 of the global weights' bytes."""
        return hashlib.sha256(self.weights.cpu().numpy().data).hexdigest()

    def state_dict(self) -> dict:
        """Return the global weights by name, and the optimiser's state."""
        parts = self.weights.split([shape.numel() for shape in self._shapes.values()])
        named = zip(self._shapes.items(), parts, strict=True)
        weights = {name: part.view(shape) for (name, shape), part in named}
        return {"weights": weights, "optimiser": self._optimiser.state_dict()}

    def load_state_dict(self, state: dict) -> None:
        """Take over a state.

        Raises:
            ValueError: it is of a model with other weights.
        """
        shapes = {name: weight.shape for name, weight in state["weights"].items()}
        for name in [*self._shapes, *shapes]:
            ours, theirs = self._shapes.get(name), shapes.get(name)
            if ours != theirs:
                raise ValueError(
                    f"the checkpoint is of another model: its {name} is "
                    f"{list(theirs) if theirs is not None else 'missing'}, "
                    f"this model's is {list(ours) if ours is not None else 'missing'}"
                )
        self.weights.copy_(torch.cat([weight.reshape(-1) for weight in state["weights"].values()]))
        self._optimiser.load_state_dict(state["optimiser"])


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

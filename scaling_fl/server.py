"""The global weights, their exact mean, and the optimiser that moves them.

There is no server process: every rank holds a `Server` and takes the same step on the same bits.
"""

import hashlib
from collections.abc import Callable, Iterable
from threading import Lock

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from scaling_fl.distributed import share_, sum_

# Adding and taking away GRID rounds a float64 below LIMIT to a multiple of 2**-44: GRID lies between
# 2**8 and 2**9, where neighbouring float64 numbers are 2**-44 apart. Sums of such multiples are exact
# in any order while they stay below 2**9, and a mean stays below the largest of its terms.
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
        self._sum = torch.empty_like(self.weights, dtype=torch.float64 if self._is_exact else torch.float32)
        self._is_empty = True  # nothing collected in this round
        self._piece = PIECE if self.weights.device.type == "cpu" else self.weights.numel()
        self._lock = Lock()

    @property
    def _is_exact(self) -> bool:
        return self._wire == torch.float64

    def send(self, replica: Tensor) -> None:
        """Overwrite a model's flat vector with the global weights."""
        replica.copy_(self.weights)

    def trained(self, device: torch.device) -> list[Tensor]:
        """Return the global weights that are trained, tensor by tensor, on `device`."""
        parts = self._trained.detach().to(device).split([shape.numel() for shape in self._trained_shapes])
        return [part.view(shape) for part, shape in zip(parts, self._trained_shapes, strict=True)]

    @torch.no_grad()
    def collect(self, replica: Tensor, share: float) -> None:
        """Add a site's drift to the round's mean. Threads may call this at once.

        Args:
            replica: the flat vector of the site's trained model.
            share: the site's part of the round's examples; over all sites they add up to 1.

        Raises:
            FloatingPointError: a weight is not finite, or has moved by 128 or more.
        """
        replica = replica.to(self.weights.device)
        pieces = (vector.split(self._piece) for vector in (self.weights, replica, self._sum))
        with self._lock:
            for weights, local, total in zip(*pieces, strict=True):
                drift = weights.to(total.dtype) - local
                # The root of the sum of squares bounds the largest, and takes a fraction of its time to find.
                is_small = torch.dot(drift, drift).item() < LIMIT**2
                if not is_small and not torch.linalg.vector_norm(drift, torch.inf).item() < LIMIT:
                    raise FloatingPointError(f"a weight is not finite, or moved by {LIMIT:g} or more")
                drift *= share
                if self._is_exact:
                    drift.add_(GRID).sub_(GRID)
                (total.copy_ if self._is_empty else total.add_)(drift)
            self._is_empty = False

    @torch.no_grad()
    def step(self) -> None:
        """Average the drifts over all ranks and move the global weights by them.

        Trained weights are moved by the strategy's optimiser, buffers to their mean.
        """
        if self._is_empty:
            self._sum.zero_()
        self._is_empty = True
        scale = FLOAT16_SCALE if self._wire == torch.float16 else 1.0
        total = self._sum if scale == 1.0 else self._sum.mul_(scale)
        mean = self._narrow_(sum_(total.to(self._wire)))
        if scale != 1.0:
            mean /= scale
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

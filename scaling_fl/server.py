"""The global weights, their exact mean, and the optimiser that moves them.

There is no server process: every rank holds a `Server` and takes the same step on the same bits.
"""

import hashlib
from collections.abc import Callable, Iterable
from fractions import Fraction

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from scaling_fl.averaging import Mean
from scaling_fl.distributed import share_, world_size


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
        self._mean = Mean(len(self.weights), comm_dtype, self.weights.device)

    @property
    def bytes_a_round(self) -> int:
        """How many bytes all ranks hand to each other for a round's mean."""
        return world_size() * self._mean.bytes_handed

    @property
    def nbytes(self) -> int:
        """How many bytes the weights and their mean take on this rank, without what the strategy keeps."""
        return self.weights.nbytes + self._mean.nbytes

    def send(self, replica: Tensor) -> None:
        """Overwrite a model's flat vector with the global weights."""
        replica.copy_(self.weights)

    def trained(self, device: torch.device) -> list[Tensor]:
        """Return the global weights that are trained, tensor by tensor, on `device`."""
        parts = self._trained.detach().to(device).split([shape.numel() for shape in self._trained_shapes])
        return [part.view(shape) for part, shape in zip(parts, self._trained_shapes, strict=True)]

    @torch.no_grad()
    def check(self, replica: Tensor) -> None:
        """Find out whether a site can be collected, before a part of it is.

        Args:
            replica: the flat vector of the site's trained model.

        Raises:
            FloatingPointError: a weight is not finite, or moved too far: less than 64 never is, 192 always.
        """
        self._mean.check(self.weights, replica.to(self.weights.device))

    @torch.no_grad()
    def collect(self, replica: Tensor, share: Fraction | float) -> None:
        """Add a site to the round's mean, and give its replica the global weights again.

        Threads may call this at once.

        Args:
            replica: the flat vector of the site's trained model.
            share: the site's weight in the mean, its part of all examples; all sites' add up to 1 at most.

        Raises:
            FloatingPointError: as for `check`. The round can not be finished then.
        """
        local = replica.to(self.weights.device)
        self._mean.add(self.weights, local, share)
        replica.copy_(local)  # which does nothing if they are the same

    @torch.no_grad()
    def step(self) -> None:
        """Average the drifts that all ranks have collected, and move the global weights by their mean.

        Trained weights are moved by the strategy's optimiser, buffers to their mean. If nothing was collected,
        the mean is zero.
        """
        mean = self._mean.take(self.weights)
        self._trained.grad = mean[: self._trained.numel()]
        self._optimiser.step()
        self._trained.grad = None
        self._buffers -= mean[self._trained.numel() :]
        if self.weights.device.type != "cpu":
            torch.accelerator.synchronize()  # so that a clock outside sees what this took

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

"""The global weights, their exact mean, and the optimiser that moves them.

There is no server process: every rank holds a `Server` and takes the same step on the same bits.
"""

import hashlib
from collections.abc import Callable, Iterable
from fractions import Fraction

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from scaling_fl.distributed.collectives import broadcast_, world_size
from scaling_fl.federation.aggregation import Mean
from scaling_fl.federation.buffers import BufferMean
from scaling_fl.models.flat import Slot, lay_out, pack, trained_weights


class GlobalModel:
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
        self._slots = lay_out(model)
        self._num_tensors = len(trained_weights(model))  # that are trained, the first of the slots
        num_trained = self._slots[self._num_tensors - 1].end
        self.weights = pack(model).to(device)
        broadcast_(self.weights)
        self._trained = nn.Parameter(self.weights[:num_trained])
        self._optimiser = make_optimiser([self._trained])
        self._mean = Mean(num_trained, comm_dtype, self.weights.device)
        self._buffers = BufferMean(self._slots[self._num_tensors :])

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
        weights = self._trained.detach().to(device)
        return [slot.view(weights) for slot in self._slots[: self._num_tensors]]

    @torch.no_grad()
    def check(self, replica: Tensor) -> None:
        """Find out whether a site can be collected, before a part of it is.

        Args:
            replica: the flat vector of the site's trained model.

        Raises:
            FloatingPointError: a weight is not finite, or moved too far: less than 64 never is, 192 always.
            ValueError: a buffer is not finite any more.
        """
        local = replica.to(self.weights.device)
        self._mean.check(self._trained.detach(), local[: len(self._trained)])
        self._buffers.check(self.weights, local)

    @torch.no_grad()
    def collect(self, replica: Tensor, share: Fraction | float) -> None:
        """Add a site to the round's mean, and give its replica the global weights again.

        Threads may call this at once.

        Args:
            replica: the flat vector of the site's trained model.
            share: the site's weight in the mean, its part of all examples; all sites' add up to 1 at most.

        Raises:
            FloatingPointError, ValueError: as for `check`. The round can not be finished then.
        """
        local = replica.to(self.weights.device)
        self._mean.add(self._trained.detach(), local[: len(self._trained)], share)
        self._buffers.add(self.weights, local, share)
        replica.copy_(local)  # which does nothing if they are the same

    @torch.no_grad()
    def step(self) -> None:
        """Average the drifts that all ranks have collected, and move the global weights by their mean.

        Trained weights are moved by the strategy's optimiser, buffers to their mean. If nothing was collected,
        the mean is zero.

        Raises:
            ValueError: what was collected is too small a share of all examples. All ranks raise it.
        """
        self._trained.grad = self._mean.take(self._trained.detach())
        self._optimiser.step()
        self._trained.grad = None
        self._buffers.take(self.weights)
        if self.weights.device.type != "cpu":
            torch.accelerator.synchronize()  # so that a clock outside sees what this took

    def sha256(self) -> str:
        """Return the SHA-256 of the global weights' bytes."""
        return hashlib.sha256(self.weights.cpu().numpy().data).hexdigest()

    def state_dict(self) -> dict:
        """Return the global weights and buffers by name, and the optimiser's state."""
        views = {slot.name: slot.view(self.weights) for slot in self._slots}
        # torch saves no two types of numbers in one memory.
        weights = {name: view if view.dtype == torch.float32 else view.clone() for name, view in views.items()}
        return {"weights": weights, "optimiser": self._optimiser.state_dict()}

    def load_state_dict(self, state: dict) -> None:
        """Take over a state.

        Raises:
            ValueError: it is of a model with other weights, or of a version that saved not all buffers.
        """
        saved, own = state["weights"], {slot.name: slot for slot in self._slots}
        for name in [*own, *saved]:
            ours, theirs = own.get(name), saved.get(name)
            if theirs is None and own[name].dtype != torch.float32:
                raise ValueError(
                    f"the checkpoint: expected the buffer {name}, got none. Older versions averaged and saved "
                    "float32 buffers only: start again with another checkpoints_dir"
                )
            if _form(ours) != _form(theirs):
                raise ValueError(
                    f"the checkpoint is of another model: its {name} is {_form(theirs)}, this model's is {_form(ours)}"
                )
        for slot in self._slots:
            slot.view(self.weights).copy_(saved[slot.name])
        self._optimiser.load_state_dict(state["optimiser"])


def _form(tensor: Slot | Tensor | None) -> str:
    """Return the shape of a tensor in words, and its type if it is not the usual one."""
    if tensor is None:
        return "missing"
    return f"{list(tensor.shape)}" + (f" of {tensor.dtype}" if tensor.dtype != torch.float32 else "")

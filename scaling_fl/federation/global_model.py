"""The global weights, and the optimiser that moves them by the mean drift.

There is no server process: every rank holds a `GlobalModel` and takes the same step on the same bits.
"""

import hashlib
from collections.abc import Callable, Collection, Iterable, Sequence
from fractions import Fraction

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from scaling_fl.distributed.collectives import broadcast_, world_size
from scaling_fl.federation.aggregation import Mean, make_mean
from scaling_fl.federation.buffers import BufferMean
from scaling_fl.federation.strategies import takes_mean
from scaling_fl.federation.turns import divide
from scaling_fl.models.flat import Slot, lay_out, pack, trained_weights


class GlobalModel:
    """The global weights, a flat vector, and the optimiser that moves them, the same on every rank.

    Args:
        model: gives the first weights, of which rank 0's are used everywhere, and their names.
        make_optimiser: a strategy; the gradient of its optimiser is the mean drift of the sites, global minus local
            weights.
        comm_dtype: a key of COMM_DTYPES.
        device: where the global weights are and are averaged.
        turns: names of weights, of which only those of one entry move in a round: in round r, those of entry r - 1
            modulo their number. Weights in no entry move in each round. The strategy must keep no state.
    """

    def __init__(
        self,
        model: nn.Module,
        make_optimiser: Callable[[Iterable[Tensor]], Optimizer],
        comm_dtype: str = "exact",
        device: torch.device | None = None,
        turns: Sequence[Collection[str]] = ((),),
    ) -> None:
        self._slots = lay_out(model)
        num_trained = len(trained_weights(model))  # which are the first of the slots
        self.weights = pack(model, self._slots).to(device)
        if not self.weights.is_meta:  # as of a plan of sizes alone
            broadcast_(self.weights)
        self._parts = divide(self._slots[:num_trained], turns)
        self._trained = [nn.Parameter(self.weights[part.where]) for part in self._parts]
        self._optimiser = make_optimiser(self._trained)
        self.num_moving = [  # trained weights in a round of each turn
            sum(len(weights) for part, weights in zip(self._parts, self._trained, strict=True) if turn in part.turns)
            for turn in range(len(turns))
        ]
        self._means = [make_mean(size, comm_dtype, self.weights.device) for size in self.num_moving]
        self._turn = 0
        self._buffers = BufferMean(self._slots[num_trained:])
        self._is_exact = comm_dtype == "exact"
        self._takes_site = False  # the round has one site, whose weights become the global ones
        self._is_in_round = False

    @property
    def bytes_a_round(self) -> int:
        """How many bytes all ranks hand to each other for the mean of the last round; before it, for several sites."""
        return self._count_bytes(self._takes_site)

    def count_bytes(self, num_sites: int) -> int:
        """Return how many bytes all ranks hand to each other for the mean of a round of so many sites."""
        return self._count_bytes(self._takes(num_sites))

    @property
    def nbytes(self) -> int:
        """How many bytes the weights and their mean take on this rank, without the strategy's state."""
        return self.weights.nbytes + sum(mean.nbytes for mean in self._means)

    @property
    def _mean(self) -> Mean:
        return self._means[self._turn]

    def _count_bytes(self, takes_site: bool) -> int:
        if takes_site:
            return self.num_moving[self._turn] * self.weights.itemsize if world_size() > 1 else 0
        return world_size() * self._mean.num_bytes_sent

    def _takes(self, num_sites: int | None) -> bool:
        """Tell whether the weights of a round's only site become the global ones."""
        return num_sites == 1 and self._is_exact and takes_mean(self._optimiser)

    def _moving(self, vector: Tensor) -> Tensor:
        """Return the trained weights that move in this round, out of a flat vector; a view of it if they are all."""
        pieces = [vector[part.where] for part in self._parts if self._turn in part.turns]
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces)

    def copy_to(self, vector: Tensor) -> None:
        """Overwrite a model's flat vector with the global weights."""
        vector.copy_(self.weights)

    def start_round(self, round_: int = 1, num_sites: int | None = None) -> None:
        """Note that sites are about to train. All ranks call it.

        Args:
            round_: the number of the round, from 1.
            num_sites: on all ranks; of a single one FedAvg takes the weights as they are, without a sum, so that one
                site is ordinary training, bit for bit. None: not known.

        Raises:
            ValueError: the last round's sites were not followed by a `step`.
        """
        if self._is_in_round:
            raise ValueError(
                "the global model: expected a step after each round, got another round. Call step(), which averages "
                "the sites of one round"
            )
        self._is_in_round = True
        self._turn = (round_ - 1) % len(self._means)
        self._takes_site = self._takes(num_sites)

    @torch.no_grad()
    def check(self, local_weights: Tensor) -> None:
        """Refuse a site that cannot be exchanged, before a part of it is.

        Args:
            local_weights: the flat vector of the site's trained model.

        Raises:
            FloatingPointError: a weight is not finite, or moved too far: less than 64 never is, 192 always.
            ValueError: a buffer is not finite any more.
        """
        local = local_weights.to(self.weights.device)
        self._mean.check(self._moving(self.weights), self._moving(local))
        self._buffers.check(self.weights, local)

    @torch.no_grad()
    def exchange(self, local_weights: Tensor, weight: Fraction) -> None:
        """Add a site's weights to the round's mean, and overwrite them with the global ones.

        Threads may call this at once.

        Args:
            local_weights: the flat vector of the site's trained model.
            weight: the site's fraction of all examples; the sites' weights add up to 1 at most.

        Raises:
            FloatingPointError, ValueError: as for `check`. The round cannot be finished then.
            ValueError: a weight has moved that does not in this round. Nothing of the site is in the mean then.
        """
        local = local_weights.to(self.weights.device)
        self._check_resting(local)
        if self._takes_site:
            self._mean.keep(self._moving(self.weights), self._moving(local))
        else:
            self._mean.add(self._moving(self.weights), self._moving(local), weight)
        self._buffers.add(self.weights, local, weight)
        if len(self._means) > 1:  # of which a copy was added
            local.copy_(self.weights)
        local_weights.copy_(local)  # which does nothing if they are the same

    @torch.no_grad()
    def step(self) -> None:
        """Average the drifts of the round's sites on all ranks, and move the global weights by their mean.

        Trained weights are moved by the strategy's optimiser, buffers to their mean. A round of no site leaves the
        weights and the optimiser's state as they were.

        Raises:
            ValueError: the sites' weights add up to more than 1, or to too little. All ranks raise it.
        """
        moving = [w for part, w in zip(self._parts, self._trained, strict=True) if self._turn in part.turns]
        sizes = [*map(len, moving)]
        if self._takes_site:
            if (only := self._mean.take()) is not None:
                for weights, piece in zip(moving, only.split(sizes), strict=True):
                    weights.copy_(piece)
        elif (drift := self._mean.finish(self._moving(self.weights))) is not None:
            if not takes_mean(self._optimiser):
                drift = drift.clone()  # which others may change, and other ranks read
            for weights, piece in zip(moving, drift.split(sizes), strict=True):
                weights.grad = piece  # others have none, so that the strategy leaves them out
            self._optimiser.step()
            for weights in self._trained:
                weights.grad = None
        self._buffers.finish(self.weights)
        self._is_in_round = False
        if self.weights.device.type != "cpu":
            torch.accelerator.synchronize()  # so that a clock outside sees what this took

    def _check_resting(self, local: Tensor) -> None:
        resting = (slot for part in self._parts if self._turn not in part.turns for slot in part.slots)
        for slot in resting:
            if not torch.equal(slot.view(local), slot.view(self.weights)):
                raise ValueError(
                    f"weight {slot.name}: expected to stay as it is in this round, got another value. Train weights "
                    "that require a gradient only"
                )

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
        """Overwrite the global weights and buffers and the optimiser's state with a checkpoint's.

        Raises:
            ValueError: it is of a model with other weights, or of a version that did not save all buffers.
        """
        saved, slots = state["weights"], {slot.name: slot for slot in self._slots}
        for name in [*slots, *saved]:
            expected, got = slots.get(name), saved.get(name)
            if got is None and slots[name].dtype != torch.float32:
                raise ValueError(
                    f"the checkpoint: expected the buffer {name}, got none. Older versions averaged and saved "
                    "float32 buffers only: start again with another checkpoints_dir"
                )
            if _form(expected) != _form(got):
                raise ValueError(
                    f"the checkpoint: expected this model's {name}, {_form(expected)}, got {_form(got)}. "
                    "It is of another model: use another checkpoints_dir"
                )
        for slot in self._slots:
            slot.view(self.weights).copy_(saved[slot.name])
        self._optimiser.load_state_dict(state["optimiser"])


def _form(tensor: Slot | Tensor | None) -> str:
    """Return the shape of a tensor in words, and its type if it is not float32."""
    if tensor is None:
        return "none"
    return f"{list(tensor.shape)}" + (f" of {tensor.dtype}" if tensor.dtype != torch.float32 else "")

"""The flat vector: the trained weights of a model and its buffers, end to end."""

import hashlib
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain, combinations
from types import SimpleNamespace

import numpy as np
import torch
from torch import Tensor, nn

from scaling_fl.models.quantised import find_factors

WORD = torch.float32.itemsize  # bytes
ALIGNMENT = torch.complex128.itemsize // WORD  # words from which a tensor of any type may start


@dataclass(frozen=True)
class Slot:
    """Where a shared tensor lies in the flat vector, which holds the bits of any type as float32 words."""

    name: str
    shape: torch.Size
    dtype: torch.dtype
    start: int  # in words

    @property
    def end(self) -> int:
        """The word behind it."""
        return self.start + -(-self.num_bytes // WORD)

    @property
    def num_bytes(self) -> int:
        """The bytes of the tensor."""
        return self.shape.numel() * self.dtype.itemsize

    def view(self, vector: Tensor) -> Tensor:
        """Return the tensor in a flat vector."""
        found = vector[self.start : self.end].view(torch.uint8)[: self.num_bytes]
        return found.view(self.dtype).view(self.shape)


def trained_weights(model: nn.Module) -> dict[str, Tensor]:
    """Return the weights that are trained, and so sent to other ranks, by name."""
    return {name: weight for name, weight in model.named_parameters() if weight.requires_grad}


def frozen_sha256(model: nn.Module) -> str | None:
    """Return the SHA-256 of the weights that are not trained, of their names and types; None if there are none."""
    frozen = {name: weight for name, weight in model.named_parameters() if not (weight.requires_grad or weight.is_meta)}
    digest = hashlib.sha256()
    for name, weight in (frozen | (find_factors(model) if frozen else {})).items():
        digest.update(f"{name} {tuple(weight.shape)} {weight.dtype} ".encode())
        digest.update(weight.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest() if frozen else None


def lay_out(model: nn.Module) -> list[Slot]:
    """Return the slots of the trained weights, then of the buffers that a saved model holds.

    Raises:
        ValueError: nothing is trained; or a trained weight is not float32; or a shared tensor is not dense, or shares
            memory with another tensor.
    """
    shared, trained = shared_tensors(model), trained_weights(model)
    if not trained:
        raise ValueError("the model: expected a weight that requires a gradient, got none. There is nothing to train")
    slots: list[Slot] = []
    for name, tensor in shared.items():
        if name in trained and tensor.dtype != torch.float32:
            raise ValueError(f"{name}: expected torch.float32, as of all trained weights, got {tensor.dtype}")
        if tensor.layout != torch.strided:
            raise ValueError(f"{name}: expected a dense tensor, got one of layout {tensor.layout}")
        start = slots[-1].end if slots else 0
        start += -start % (1 if tensor.dtype == torch.float32 else ALIGNMENT)
        slots.append(Slot(name, tensor.shape, tensor.dtype, start))
    _check_memory(model, shared)
    return slots


def pack(model: nn.Module, slots: Sequence[Slot]) -> Tensor:
    """Return a copy of the shared tensors, whose slots these are, as a float32 vector.

    Buffers of other types are in it bit by bit.
    """
    shared = shared_tensors(model)
    vector = torch.zeros(slots[-1].end, device=shared[slots[0].name].device)
    for slot in slots:
        slot.view(vector).copy_(shared[slot.name].detach())
    return vector


def flatten_(model: nn.Module) -> Tensor:
    """Lay the shared tensors of `model` end to end, as `pack` does, and make them views of the vector returned.

    Raises:
        ValueError: as for `lay_out`.
    """
    slots, shared = lay_out(model), shared_tensors(model)
    vector = pack(model, slots)
    for slot in slots:
        shared[slot.name].data = slot.view(vector)
    return vector


def shared_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return the shared tensors in their order: trained weights, float32 buffers, other buffers."""
    saved = model.state_dict().keys()
    buffers = [(name, buffer) for name, buffer in model.named_buffers(remove_duplicate=False) if name in saved]
    buffers.sort(key=lambda item: item[1].dtype != torch.float32)
    return _each_once([*trained_weights(model).items(), *buffers])


def _each_once(named: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
    """Return each tensor under the first of its names."""
    names: dict[int, str] = {}
    return {name: tensor for name, tensor in named if names.setdefault(id(tensor), name) == name}


def _check_memory(model: nn.Module, shared: dict[str, Tensor]) -> None:
    """Refuse shared tensors whose memory other tensors use, too, as moving them to a vector would separate them."""
    for name, tensor in shared.items():
        if tensor.requires_grad and not tensor.is_contiguous() and _repeats(tensor):
            raise ValueError(
                f"{name}: expected memory for each of its elements, got a view in which some are the same, such as an "
                "expanded tensor. A copy (.clone()) can be trained"
            )
    moved = {id(tensor) for tensor in shared.values()}
    by_storage: defaultdict[int, list[tuple[str, bool, np.ndarray]]] = defaultdict(list)
    for name, tensor in _each_once([*model.named_parameters(), *model.named_buffers()]).items():
        if tensor.layout == torch.strided and not tensor.is_meta:
            item = name, id(tensor) in moved, _addresses(tensor)
            by_storage[tensor.untyped_storage().data_ptr()].append(item)
    for before, after in chain.from_iterable(combinations(tensors, 2) for tensors in by_storage.values()):
        if (before[1] or after[1]) and np.shares_memory(before[2], after[2]):
            raise ValueError(
                f"{before[0]} and {after[0]}: expected the same tensor, or memory for each, got two tensors that share "
                "memory. To tie weights assign the parameter itself, not its .data; else make one a copy (.clone())"
            )


def _repeats(tensor: Tensor) -> bool:
    """Tell whether some elements of a tensor are the same memory."""
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    places = torch.arange(last + 1).as_strided(tensor.shape, tensor.stride())
    return len(places.unique()) < tensor.numel()


def _addresses(tensor: Tensor) -> np.ndarray:
    """Return an array at the tensor's addresses, which must not be read, as they may be another device's."""
    interface = {
        "version": 3,
        "typestr": f"|V{tensor.itemsize}",
        "data": (tensor.data_ptr(), True),
        "shape": tuple(tensor.shape),
        "strides": tuple(stride * tensor.itemsize for stride in tensor.stride()),
    }
    return np.asarray(SimpleNamespace(__array_interface__=interface))

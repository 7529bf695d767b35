"""Layers that take the memory of quantised ones where no weights are, or tensors only have shapes."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from scaling_fl.models.quantised import num_bytes_of

SMALL = {"Linear8bitLt": 8, "Linear4bit": 4}  # layers of bitsandbytes, which need not be installed here


class StandIn(nn.Module):
    """A quantised layer without its weights.

    Args:
        bits: of a weight.
        num_out: the rows of its weight.
        num_in: the columns.
        bias: its bias, if it has one.
        compute: the type of its products.
    """

    def __init__(self, bits: int, num_out: int, num_in: int, bias: Any, compute: torch.dtype) -> None:
        super().__init__()
        self.bias, self.num_out, self.num_bytes = bias, num_out, num_bytes_of(bits, num_out, num_in)
        self._compute, self._keeps_input = compute, bits == 8

    def forward(self, x: Tensor, *_: Any, **__: Any) -> Tensor:
        """Return a tensor like the layer's output, by way of tensors like its own."""
        output = _Product.apply(x, self.num_out, self._compute, self._keeps_input)
        return output if self.bias is None else output + self.bias


class _Product(torch.autograd.Function):
    """A product with weights that are written out for it, forward and backward, and not kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, num_out: int, compute: torch.dtype, keeps_input: bool) -> Tensor:
        ctx.compute, ctx.shape, ctx.kept = compute, (num_out, x.shape[-1]), x if keeps_input else None
        weight = torch.empty(ctx.shape, dtype=compute, device=x.device)
        return (x.to(compute) @ weight.t()).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        (gradient,) = gradients
        weight = torch.empty(ctx.shape, dtype=ctx.compute, device=gradient.device)
        return (gradient.to(ctx.compute) @ weight).to(gradient.dtype), None, None, None


def stand_in_for(layer: Any) -> StandIn | None:
    """Return what stands in for a quantised layer; None for any other."""
    bits = SMALL.get(type(layer).__name__)
    if bits is None or not isinstance(layer, nn.Linear):  # peft has layers of these names, too
        return None
    compute: Any = torch.float16 if bits == 8 else layer.compute_dtype
    return StandIn(bits, layer.out_features, layer.in_features, layer.bias, compute)


@contextmanager
def stand_ins(model: nn.Module) -> Iterator[None]:
    """Have stand-ins in the place of a model's quantised layers."""
    places = [(module, name, child) for module in model.modules() for name, child in module.named_children()]
    made = {(module, name): (child, found) for module, name, child in places if (found := stand_in_for(child))}
    for (module, name), (_, found) in made.items():
        module._modules[name] = found
    try:
        yield
    finally:
        for (module, name), (child, _) in made.items():
            module._modules[name] = child


def put_stand_ins_(model: Any, layers: dict[int, nn.Module], bits: int, compute: torch.dtype) -> None:
    """Put stand-ins in the place of layers of a model without weights, for good.

    Args:
        model: with an adapter.
        layers: those to be replaced, by their identity.
        bits: of a weight.
        compute: the type of products with weights of 4 bits.
    """
    places = [(module, name, child) for module in model.modules() for name, child in module.named_children()]
    for module, name, child in places:
        if id(child) in layers:
            num_in, num_out = (
                (child.in_features, child.out_features) if isinstance(child, nn.Linear) else child.weight.shape
            )
            type_ = torch.float16 if bits == 8 else compute
            module._modules[name] = StandIn(bits, num_out, num_in, child.bias, type_)


def num_bytes_of_stand_ins(model: nn.Module) -> int:
    """Return the bytes of the weights that a model's stand-ins are without."""
    return sum(module.num_bytes for module in model.modules() if isinstance(module, StandIn))

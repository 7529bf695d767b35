"""Layers that take the memory of quantised ones where no weights are, or tensors only have shapes."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from scaling_fl.models.quantised import bits_of


class StandIn(nn.Module):
    """A quantised layer without its weights.

    Args:
        num_out: the rows of its weight.
        bias: its bias, if it has one.
        compute: the type of its products.
        keeps_input: until the backward pass, though it has no use for it.
    """

    def __init__(self, num_out: int, bias: Any, compute: torch.dtype, keeps_input: bool) -> None:
        super().__init__()
        self.bias, self._num_out, self._compute, self._keeps_input = bias, num_out, compute, keeps_input

    def forward(self, x: Tensor, *_: Any, **__: Any) -> Tensor:
        """Return a tensor like the layer's output, by way of tensors like its own."""
        output = _Product.apply(x, self._num_out, self._compute, self._keeps_input)
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
    bits = bits_of(layer)
    if bits is None:
        return None
    return StandIn(layer.out_features, layer.bias, torch.float16 if bits == 8 else layer.compute_dtype, bits == 8)


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

"""Estimate the memory of training without computing: tensors that only have shapes pass through the model."""

import logging
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.optim import Optimizer
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from scaling_fl.models.flat import trained_weights
from scaling_fl.models.quantised import bits_of, measure

Batch = dict[str, Tensor]  # the model's keyword arguments
DEVICE_OF = torch.ops.prim.device.default  # the operator that returns the device of a tensor


class Meter(TorchDispatchMode):
    """Measures the peak of the bytes of new tensors.

    Args:
        known: existing tensors, whose views are not counted.
    """

    def __init__(self, known: Iterable[Tensor]) -> None:
        super().__init__()
        self.peak = self._now = 0
        self._seen = {tensor.untyped_storage()._cdata for tensor in known}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call an operator of torch, and count the bytes of its result."""
        # More than half of all calls ask a fake tensor for its device, which allocates nothing.
        if function is DEVICE_OF and hasattr(args[0], "fake_device"):
            return args[0].fake_device
        output = function(*args, **(kwargs or {}))
        tree_map_only(Tensor, self._count, output)
        return output

    def _count(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage._cdata not in self._seen:
            self._seen.add(storage._cdata)
            self._now += storage.nbytes()
            self.peak = max(self.peak, self._now)
            weakref.finalize(storage, self._release, storage._cdata, storage.nbytes())

    def _release(self, key: int, num_bytes: int) -> None:
        self._seen.discard(key)
        self._now -= num_bytes


def estimate_bytes(
    model: nn.Module,
    training: Batch | None,
    testing: Batch | None,
    make_optimiser: Callable[[list[Tensor]], Optimizer],
    *,
    accumulates: bool = False,
    autocast: torch.dtype | None = None,
) -> int:
    """Return the most bytes that a device needs to train and evaluate a model.

    Args:
        model: on the CPU, or without values on the device `meta`. The kernels of other devices may need more or less.
        training: the largest training batch, None if there is none.
        testing: the largest evaluation batch, None if there is none.
        make_optimiser: of the trained weights.
        accumulates: a step has several training batches, so that the gradients of the first stay in memory.
        autocast: what matrix products are computed in when it trains; None: the type of the weights.
    """
    num_trained = sum(weight.numel() for weight in trained_weights(model).values())
    held = measure(model)[1] + sum(buffer.nbytes for buffer in model.buffers())
    with stand_ins(model):
        passes = [
            activation_bytes(model, batch, is_training, accumulates=accumulates, autocast=autocast)
            for batch, is_training in ((training, True), (testing, False))
            if batch is not None
        ]
    return held + state_bytes(make_optimiser, num_trained) + max(passes, default=0)


@contextmanager
def stand_ins(model: nn.Module) -> Iterator[None]:
    """Have stand-ins, which take the memory of quantised layers, in the place of these."""
    children = [(module, name, child) for module in model.modules() for name, child in module.named_children()]
    quantised = [place for place in children if bits_of(place[-1]) is not None]
    for module, name, layer in quantised:
        module._modules[name] = StandIn(layer)
    try:
        yield
    finally:
        for module, name, layer in quantised:
            module._modules[name] = layer


class StandIn(nn.Module):
    """A quantised layer without its weights, as there are none, or they only have shapes."""

    def __init__(self, layer: Any) -> None:
        super().__init__()
        has_8_bits = bits_of(layer) == 8
        self.bias = layer.bias
        # With 8 bits it keeps its input until the backward pass, though it has no use for it.
        self._how = layer.out_features, torch.float16 if has_8_bits else layer.compute_dtype, has_8_bits

    def forward(self, x: Tensor) -> Tensor:
        """Return a tensor like the layer's output, by way of tensors like its own."""
        output = _Product.apply(x, *self._how)
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


class Step(nn.Module):
    """The passes of a batch through a model, forward and, in training, backward, as one pass.

    So `functional_call` has other tensors in the model in both.
    """

    def __init__(self, model: nn.Module, num_passes: int, autocast: torch.dtype | None) -> None:
        super().__init__()
        self.model, self._num_passes, self._autocast = model, num_passes, autocast

    def forward(self, batch: Batch) -> None:
        """Pass a batch."""
        for _ in range(self._num_passes):
            with torch.autocast("cpu", dtype=self._autocast, enabled=self._autocast is not None):
                output = self.model(**batch)
            if self.model.training:
                output.loss.backward()


def activation_bytes(
    model: nn.Module,
    batch: Batch,
    is_training: bool,
    *,
    accumulates: bool = False,
    autocast: torch.dtype | None = None,
) -> int:
    """Return the peak bytes of activations, and in training of gradients, for a batch, or for a later one of a step."""
    from torch._subclasses import fake_tensor  # takes a second to import

    fake_tensor.log.setLevel(logging.CRITICAL)  # it logs the stack of each error that it raises
    fakes = fake_tensor.FakeTensorMode()
    named = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    tensors: dict[str, Tensor] = {name: _fake(fakes, tensor) for name, tensor in named.items()}
    fake_batch = {name: fakes.from_tensor(tensor) for name, tensor in batch.items()}
    step = Step(model.train(is_training), 1 + (is_training and accumulates), autocast if is_training else None)
    # functional_call leaves the fakes in a module that the model has at two places, as the embeddings of prompt tuning.
    held: list[dict[str, Any]] = [of for module in model.modules() for of in (module._parameters, module._buffers)]
    before = [(of, {**of}) for of in held]
    try:
        with fakes, torch.set_grad_enabled(is_training), Meter([*tensors.values(), *fake_batch.values()]) as meter:
            functional_call(step, {f"model.{name}": tensor for name, tensor in tensors.items()}, (fake_batch,))
    finally:
        for of, had in before:
            of.update(had)
    return meter.peak


def _fake(fakes: Any, tensor: Tensor) -> Tensor:
    """Return a tensor that only has a shape, as if it were on the CPU, whose kernels take less memory than none."""
    if not tensor.is_meta:
        return fakes.from_tensor(tensor)
    with fakes:
        return torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu", requires_grad=tensor.requires_grad)


def state_bytes(make_optimiser: Callable[[list[Tensor]], Optimizer], num_weights: int) -> int:
    """Return the bytes of an optimiser's state for so many weights, measured on the fewest that have one in 8 bits."""
    weights, optimiser = _take_step(make_optimiser)
    states = [value for value in optimiser.state[weights].values() if isinstance(value, Tensor)]
    return sum(value.element_size() * num_weights for value in states if value.shape == weights.shape)


def make_state(make_optimiser: Callable[[list[Tensor]], Optimizer]) -> dict[str, Any]:
    """Return the state of an optimiser of some weights after a step; none if that has left no state."""
    weights, optimiser = _take_step(make_optimiser)
    before, after = (made.state_dict() for made in (make_optimiser([weights]), optimiser))
    return after if after["state"] or after != before else {}


def _take_step(make_optimiser: Callable[[list[Tensor]], Optimizer]) -> tuple[Tensor, Optimizer]:
    """Return some weights and their optimiser after a step."""
    weights = nn.Parameter(torch.ones(4_096))
    weights.grad = torch.ones_like(weights)
    optimiser = make_optimiser([weights])
    optimiser.step()
    return weights, optimiser

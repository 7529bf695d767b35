"""The model of a device, which the sites of the device use one after another."""

from collections.abc import Iterator
from contextlib import contextmanager
from fractions import Fraction
from threading import Event
from typing import Any

from torch import Tensor, nn

from scaling_fl.federation.global_model import GlobalModel
from scaling_fl.models.flat import flatten_, shared_tensors, trained_weights


class Replica:
    """The model of a device, which each site finds with the global weights, whatever the last site left in it.

    After a reset or an exchange it is in training mode.

    Args:
        model: its shared tensors become views of one flat vector.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model.train()
        self.vector = flatten_(model)
        self.is_reset = False  # in this round
        self._weights = {name: weight.data_ptr() for name, weight in trained_weights(model).items()}
        self._parameters = list(model.parameters())
        self._shared = {id(tensor): name for name, tensor in shared_tensors(model).items()}
        self._views = [(tensor, tensor.data, tensor.requires_grad) for tensor in shared_tensors(model).values()]
        self._unshared = [(buffer, buffer.clone()) for buffer in model.buffers() if id(buffer) not in self._shared]
        self._shared_places = [
            (module, key, buffer)
            for module in model.modules()
            for key, buffer in module._buffers.items()
            if buffer is not None and id(buffer) in self._shared
        ]
        # A model may put another tensor in the place of a buffer, and register more; a site's function leaves hooks,
        # wrappers of `forward` and changes of the configuration.
        self._attributes = [(found, found.copy()) for found in _attributes(model)]
        known = {id(tensor) for tensor in (*model.parameters(), *model.buffers())}
        values = (value for found, _ in self._attributes for value in found.values() if isinstance(value, Tensor))
        self._unshared += [(tensor, tensor.detach().clone()) for tensor in values if id(tensor) not in known]

    def reset(self, global_model: GlobalModel, *, has_weights: bool = False) -> None:
        """Load the global weights, unless the model has them, and restore all else that may have changed in it."""
        if not has_weights or self._shared_places:
            global_model.copy_to(self.vector)
        self._restore()

    def exchange(self, global_model: GlobalModel, weight: Fraction, *, check_first: bool) -> None:
        """Hand a site's weights to the global model, and be as after a reset.

        Args:
            global_model: whose weights the site trained.
            weight: the site's fraction of all examples.
            check_first: refuse the site before a part of it is in the mean.

        Raises:
            FloatingPointError, ValueError: as for `GlobalModel.check`; or a weight is another tensor than before the
                training, or a buffer has another shape or type.
        """
        self._check_weights()
        self._collect_buffers()
        if check_first:
            global_model.check(self.vector)
        global_model.exchange(self.vector, weight)
        self._restore()
        self.is_reset = True

    @contextmanager
    def stopped_by(self, is_ending: Event) -> Iterator[None]:
        """Let the model raise a RuntimeError at its next pass once `is_ending` is set."""

        def check(*_: object) -> None:
            if is_ending.is_set():
                raise RuntimeError("the run is ending")

        handle = self.model.register_forward_pre_hook(check)
        try:
            yield
        finally:
            handle.remove()

    @contextmanager
    def unchanged(self) -> Iterator[None]:
        """Restore the buffers after an evaluation, as some models change theirs whenever they compute."""
        before = [(holder, dict(holder)) for holder in (module._buffers for module in self.model.modules())]
        values = [(buffer, buffer.clone()) for buffer in self.model.buffers()]
        try:
            yield
        finally:
            for holder, found in before:
                holder.update(found)
            for buffer, value in values:
                buffer.copy_(value)

    def release(self) -> nn.Module:
        """Return the model in evaluation mode, with copies of the shared buffers, as torch saves one type a memory."""
        copies = {id(buffer): buffer.clone() for _, _, buffer in self._shared_places}
        for module, key, buffer in self._shared_places:
            module._buffers[key] = copies[id(buffer)]
        return self.model.eval()

    def _check_weights(self) -> None:
        """Refuse weights that are no views of the flat vector any more, as after `model.half()`."""
        found = {name: weight.data_ptr() for name, weight in trained_weights(self.model).items()}
        for name, place in self._weights.items():
            if found.get(name) != place:
                raise ValueError(
                    f"weight {name}: expected to be trained in place, got another tensor, or one without a gradient. "
                    "Change no type, device or requires_grad of the model that a site trains"
                )

    def _collect_buffers(self) -> None:
        """Copy tensors that the model has put in the place of shared buffers into these."""
        for module, key, buffer in self._shared_places:
            found = module._buffers.get(key)
            if _form(found) != _form(buffer):
                name = self._shared[id(buffer)]
                raise ValueError(f"buffer {name}: expected {_form(buffer)} after training, got {_form(found)}")
            if found is not None and found is not buffer:
                buffer.copy_(found)

    def _restore(self) -> None:
        for found, before in self._attributes:
            if found or before:  # most are empty, such as a module's dicts of hooks
                found.clear()
                found.update(before)
        for tensor, view, requires_grad in self._views:
            if tensor.data_ptr() != view.data_ptr():
                tensor.data = view
            tensor.requires_grad_(requires_grad)
        for weight in self._parameters:
            weight.grad = None
        for tensor, first in self._unshared:
            tensor.detach().copy_(first)


def _attributes(model: nn.Module) -> Iterator[dict[str, Any]]:
    """Yield the attributes of a model's modules and configurations, and those of them that are dicts, such as hooks.

    A change inside another object, such as a list, is not undone.
    """
    modules = list(model.modules())
    found = (getattr(module, name, None) for module in modules for name in ("config", "generation_config"))
    configurations = {id(value): value for value in found if hasattr(value, "__dict__")}
    for holder in (*modules, *configurations.values()):
        yield vars(holder)
        yield from (value for value in vars(holder).values() if isinstance(value, dict))


def _form(tensor: Tensor | None) -> str:
    """Return the shape and type of a tensor in words."""
    return "none" if tensor is None else f"{list(tensor.shape)} of {tensor.dtype}"

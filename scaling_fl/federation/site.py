"""A device's model, which the sites of that device take turns to train."""

from fractions import Fraction

from torch import Tensor, nn

from scaling_fl.federation.global_model import GlobalModel
from scaling_fl.models.flat import flatten_, shared_tensors, trained_weights


class Replica:
    """A model that each site finds as the server has it, whatever the site before has left in it.

    Args:
        model: its shared tensors become views of one vector.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.trained = list(trained_weights(model).values())
        self.vector = flatten_(model)
        self.is_clean = False  # as after a reset in this round
        self._shared = {id(tensor): name for name, tensor in shared_tensors(model).items()}
        self._own = [(buffer, buffer.clone()) for buffer in model.buffers() if id(buffer) not in self._shared]
        # A model may put another tensor in the place of a buffer, and register more.
        self._places = [(module, dict(module._buffers)) for module in model.modules()]

    def reset(self, server: GlobalModel) -> None:
        """Take the global weights, and forget what else a site may have left in the model."""
        server.send(self.vector)
        self._forget()

    def hand_over(self, server: GlobalModel, share: Fraction, *, check_first: bool) -> None:
        """Let the server collect what a site has trained, and be as after a reset.

        Args:
            server: that sent the weights.
            share: the site's part of all examples.
            check_first: find out whether the site can be collected before a part of it is.

        Raises:
            FloatingPointError, ValueError: as for `Server.check`; or a buffer has another shape or type.
        """
        self._take_in()
        if check_first:
            server.check(self.vector)
        server.collect(self.vector, share)
        self._forget()
        self.is_clean = True

    def release(self) -> nn.Module:
        """Return the model, with buffers that no longer lie in the vector: torch saves no two types in one memory."""
        copies = {id(buffer): buffer.clone() for _, _, buffer in self._shared_places()}
        for module, key, buffer in self._shared_places():
            module._buffers[key] = copies[id(buffer)]
        return self.model

    def _take_in(self) -> None:
        """Write what the model has put in the place of shared buffers into these."""
        for module, key, buffer in self._shared_places():
            found = module._buffers.get(key)
            if _form(found) != _form(buffer):
                name = self._shared[id(buffer)]
                raise ValueError(f"buffer {name}: expected {_form(buffer)} after training, got {_form(found)}")
            if found is not None and found is not buffer:
                buffer.copy_(found)

    def _shared_places(self) -> list[tuple[nn.Module, str, Tensor]]:
        return [
            (module, key, buffer)
            for module, buffers in self._places
            for key, buffer in buffers.items()
            if buffer is not None and id(buffer) in self._shared
        ]

    def _forget(self) -> None:
        for module, buffers in self._places:
            module._buffers.clear()
            module._buffers.update(buffers)
        for buffer, first in self._own:
            buffer.copy_(first)


def _form(tensor: Tensor | None) -> str:
    """Return the shape and type of a tensor in words."""
    return "none" if tensor is None else f"{list(tensor.shape)} of {tensor.dtype}"

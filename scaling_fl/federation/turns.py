"""Groups of weights that train in turn, one of them in each round."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from torch import nn

from scaling_fl.federation.site import Site, SiteFunction, leaves_nothing
from scaling_fl.models.flat import Slot, trained_weights


@dataclass(frozen=True)
class Part:
    """A part of the trained weights that move in the same turns, and where in the flat vector it is."""

    slots: Sequence[Slot]
    turns: frozenset[int]

    @property
    def where(self) -> slice:
        """The slice of the flat vector."""
        return slice(self.slots[0].start, self.slots[-1].end)


def divide(slots: Sequence[Slot], turns: Sequence[Collection[str]]) -> list[Part]:
    """Divide the trained weights into parts, each as long as can be; weights in no group move in each turn."""
    always = frozenset(range(len(turns)))

    def turns_of(slot: Slot) -> frozenset[int]:
        return frozenset(turn for turn in always if slot.name in turns[turn]) or always

    return [Part(tuple(of_part), found) for found, of_part in groupby(slots, turns_of)]


@dataclass(frozen=True)
class InTurn:
    """A `SiteFunction` that trains as another one does, with all groups but that of the round frozen.

    Args:
        train_site: the other one.
        turns: the names of the weights of each group, as `GlobalModel` has them.
    """

    train_site: SiteFunction
    turns: Sequence[Collection[str]]

    @property
    def leaves_nothing(self) -> bool:
        """As the other one."""
        return leaves_nothing(self.train_site)

    def __call__(self, model: nn.Module, site: Site, round_: int) -> Mapping[str, Any]:
        """Train the model on the data of a site."""
        moving = self.turns[(round_ - 1) % len(self.turns)]
        others = {name for group in self.turns for name in group} - set(moving)
        frozen = [weight for name, weight in trained_weights(model).items() if name in others]
        for weight in frozen:
            weight.requires_grad_(False)
        try:
            return self.train_site(model, site, round_)
        finally:
            for weight in frozen:
                weight.requires_grad_(True)

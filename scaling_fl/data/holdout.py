"""Cut the data of a site into what it trains on and what it does not."""

import math
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from scaling_fl.data.examples import Examples
from scaling_fl.training.seeds import derive_seed


@dataclass(frozen=True)
class HoldOut:
    """How the data of each site is cut. None holds out nothing, or takes all.

    Args:
        test_fraction: of a site's examples, rounded up, if it has no test examples already.
        validation_fraction: of the examples that are left.
        max_train: the most examples that a site trains on, at random out of those that are left then.
        max_test: the most examples that a site is tested on, at random.
        seed: of all this, which depends on nothing else but the site's number.
    """

    test_fraction: float | None = None
    validation_fraction: float | None = None
    max_train: int | None = None
    max_test: int | None = None
    seed: int = 0

    def cut(self, examples: Examples, site: int, *, has_test: bool) -> dict[str, np.ndarray]:
        """Return the indices of a site's examples to train on, for validation and, unless it has others, for the test.

        Equal texts, and those of a group, are on one side of a cut, and one text or more is left to train on: a site of
        few texts may have nothing held out. Indices are in the order of the examples.
        """
        left = np.arange(len(examples))
        test_fraction = None if has_test else self.test_fraction
        left, test = self._hold_out(examples, left, test_fraction, "test", site)
        left, validation = self._hold_out(examples, left, self.validation_fraction, "validation", site)
        train = left[self._sample(len(left), self.max_train, "train", site)]
        return {"train": train, "validation": validation, "test": test[self.sample_test(len(test), site)]}

    def sample_test(self, num_examples: int, site: int) -> np.ndarray:
        """Return the indices of the test examples that a site uses."""
        return self._sample(num_examples, self.max_test, "test sample", site)

    def _sample(self, num_examples: int, most: int | None, purpose: str, site: int) -> np.ndarray:
        if most is None or most >= num_examples:
            return np.arange(num_examples)
        random = np.random.default_rng(derive_seed(self.seed, purpose, site))
        return np.sort(random.permutation(num_examples)[:most])

    def _hold_out(
        self, examples: Examples, among: np.ndarray, fraction: float | None, purpose: str, site: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return the indices that are left, and those that are held out."""
        if fraction is None:
            return among, among[:0]
        room = min(math.ceil(Fraction(str(fraction)) * len(among)), len(among) - 1)  # as written: 0.07 of 100 are 7
        random = np.random.default_rng(derive_seed(self.seed, purpose, site))
        groups: dict[bytes, list[int]] = {}
        for index in random.permutation(among).tolist():
            groups.setdefault(examples.group(index), []).append(index)
        held: list[int] = []
        for group in groups.values():
            if len(held) + len(group) <= room:
                held += group
        is_held = np.isin(among, held)
        return among[~is_held], among[is_held]

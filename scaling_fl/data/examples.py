"""Tokenised texts, and the batches made of them."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch

from scaling_fl.training.loop import Batch


@dataclass(frozen=True)
class SiteSize:
    """How much a site trains on."""

    num_examples: int
    num_tokens: int
    label_counts: tuple[int, ...]  # how many examples each class has


@dataclass(frozen=True)
class Examples:
    """Tokenised texts laid end to end: text i is `columns[name][starts[i] : starts[i] + lengths[i]]`."""

    columns: dict[str, np.ndarray]  # the tokenizer's outputs but for the attention mask, each (num_tokens,)
    starts: np.ndarray  # (num_examples,)
    lengths: np.ndarray  # (num_examples,)
    labels: np.ndarray  # (num_examples,)
    padding: dict[str, int]  # a value for each column
    pad_left: bool = False
    width: int | None = None  # of all batches; None takes that of a batch's longest text

    def __len__(self) -> int:
        return len(self.labels)

    def sha256(self) -> str:
        """Return the SHA-256 of all tokens, lengths and labels. A selection has all tokens, so ask the whole."""
        digest = hashlib.sha256()
        for array in (*self.columns.values(), self.lengths, self.labels):
            digest.update(np.ascontiguousarray(array).data)
        return digest.hexdigest()

    def select(self, indices: np.ndarray) -> "Examples":
        """Return some of the examples, which share the columns with the others."""
        starts, lengths, labels = (array[indices] for array in (self.starts, self.lengths, self.labels))
        return replace(self, starts=starts, lengths=lengths, labels=labels)

    def text(self, index: int) -> bytes:
        """Return the tokens of a text, by which it equals another."""
        start = self.starts[index]
        return next(iter(self.columns.values()))[start : start + self.lengths[index]].tobytes()

    def size(self, num_labels: int) -> SiteSize:
        """Return how many examples, tokens and examples of each label there are."""
        counts = np.bincount(self.labels, minlength=num_labels)
        return SiteSize(len(self), int(self.lengths.sum()), tuple(counts.tolist()))

    def batch(self) -> Batch:
        """Return all examples as one batch, padded to `width` or the longest of them, attention mask included."""
        lengths = self.lengths[:, None]
        width = self.width or lengths.max()
        position = np.arange(width)[None, :]
        if self.pad_left:
            position = position - (width - lengths)
        is_token = (position >= 0) & (position < lengths)
        where = np.where(is_token, self.starts[:, None] + position, 0)
        arrays = {name: np.where(is_token, column[where], self.padding[name]) for name, column in self.columns.items()}
        arrays |= {"attention_mask": is_token, "labels": self.labels}
        return {name: torch.from_numpy(array.astype(np.int64)) for name, array in arrays.items()}

    def shuffled_batches(self, batch_size: int, seed: int, start: int = 0) -> Iterator[Batch]:
        """Yield one epoch in the order of `seed`, but for the first `start` batches; the last batch may be smaller."""
        order = np.random.default_rng(seed).permutation(len(self))
        for first in range(start * batch_size, len(order), batch_size):
            yield self.select(order[first : first + batch_size]).batch()

    def fixed_batches(self, batch_size: int) -> list["Examples"]:
        """Return the examples of batches of even sizes up to `batch_size`, the longest first."""
        return [self.select(indices) for indices in np.array_split(self._longest_first(), -(-len(self) // batch_size))]

    def longest_batch(self, batch_size: int) -> Batch:
        """Return the batch that takes the most memory."""
        return self.select(self._longest_first()[:batch_size]).batch()

    def _longest_first(self) -> np.ndarray:
        return np.argsort(-self.lengths, kind="stable")

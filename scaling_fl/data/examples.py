"""Tokenised texts, and the batches made of them."""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch

from scaling_fl.training.loop import Batch


@dataclass(frozen=True)
class Examples:
    """Tokenised texts laid end to end: text i is `columns[name][starts[i] : starts[i] + lengths[i]]`."""

    columns: dict[str, np.ndarray]  # the tokenizer's outputs but for the attention mask, each (num_tokens,)
    lengths: np.ndarray  # (num_examples,)
    labels: np.ndarray  # (num_examples,)
    padding: dict[str, int]  # a value for each column
    pad_left: bool = False
    width: int | None = None  # of all batches; None takes that of a batch's longest text
    starts: np.ndarray = field(init=False)  # (num_examples,)

    def __post_init__(self) -> None:
        object.__setattr__(self, "starts", np.cumsum(self.lengths) - self.lengths)

    def __len__(self) -> int:
        return len(self.labels)

    def sha256(self) -> str:
        """Return the SHA-256 of all tokens, lengths and labels."""
        digest = hashlib.sha256()
        for array in (*self.columns.values(), self.lengths, self.labels):
            digest.update(np.ascontiguousarray(array).data)
        return digest.hexdigest()

    def with_labels(self, names: Sequence[str], new_names: Sequence[str]) -> "Examples":
        """Return the examples with labels that are indices into `new_names`, the same names in another order."""
        return replace(self, labels=np.array([new_names.index(name) for name in names])[self.labels])

    def batch(self, indices: np.ndarray) -> Batch:
        """Return the examples as one batch, padded to `width` or the longest of them, attention mask included."""
        lengths = self.lengths[indices][:, None]
        width = self.width or lengths.max()
        position = np.arange(width)[None, :]
        if self.pad_left:
            position = position - (width - lengths)
        is_token = (position >= 0) & (position < lengths)
        where = np.where(is_token, self.starts[indices][:, None] + position, 0)
        arrays = {name: np.where(is_token, column[where], self.padding[name]) for name, column in self.columns.items()}
        arrays |= {"attention_mask": is_token, "labels": self.labels[indices]}
        return {name: torch.from_numpy(array.astype(np.int64)) for name, array in arrays.items()}

    def shuffled_batches(self, indices: np.ndarray, batch_size: int, seed: int) -> Iterator[Batch]:
        """Yield one epoch over `indices` in the order of `seed`; the last batch may be smaller."""
        order = np.random.default_rng(seed).permutation(indices)
        for start in range(0, len(order), batch_size):
            yield self.batch(order[start : start + batch_size])

    def fixed_batches(self, batch_size: int) -> Sequence[np.ndarray]:
        """Return the indices of batches over all examples, of even sizes up to `batch_size`, longest first."""
        longest_first = np.argsort(-self.lengths, kind="stable")
        return np.array_split(longest_first, -(-len(self) // batch_size))

"""Tokenised texts, and the batches made of them."""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch

from scaling_fl.training.loop import NOT_TRAINED, Batch

if TYPE_CHECKING:  # it takes half a second to import
    from datasets import Dataset


@dataclass(frozen=True)
class SiteSize:
    """How much a site trains on."""

    num_examples: int
    num_tokens: int
    label_counts: tuple[int, ...]  # how many examples each class has
    num_trained_tokens: int = 0  # of a language model: those that have a label, but for the first of each example


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
    num_trained: np.ndarray | None = None  # (num_examples,) tokens that a language model is to predict
    groups: np.ndarray | None = None  # (num_examples,) those of one number belong together; None: equal texts do
    is_packed: bool = False  # lay the texts of a batch end to end

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
        groups, num_trained = (None if array is None else array[indices] for array in (self.groups, self.num_trained))
        return replace(self, starts=starts, lengths=lengths, labels=labels, groups=groups, num_trained=num_trained)

    def group(self, index: int) -> bytes:
        """Return what a text has in common with those that must be on its side of a split: its group, or its tokens."""
        if self.groups is not None:
            return self.groups[index].tobytes()
        start = self.starts[index]
        return next(iter(self.columns.values()))[start : start + self.lengths[index]].tobytes()

    def with_groups(self, names: Sequence[str]) -> "Examples":
        """Return the examples in groups: those of one name belong together, unless it is "", and equal texts."""
        first: dict[object, int] = {}
        above = list(range(len(self)))

        def find(index: int) -> int:
            while above[index] != index:
                above[index] = index = above[above[index]]
            return index

        for index, name in enumerate(names):
            for key in (self.group(index), name or None):
                if key is not None:
                    above[find(index)] = find(first.setdefault(key, index))
        return replace(self, groups=np.array(list(map(find, range(len(self)))), np.int64))

    def size(self, num_labels: int) -> SiteSize:
        """Return how many examples, tokens and examples of each label there are."""
        counts = np.bincount(self.labels, minlength=num_labels)
        num_trained = 0 if self.num_trained is None else int(self.num_trained.sum())
        return SiteSize(len(self), int(self.lengths.sum()), tuple(counts.tolist()[:num_labels]), num_trained)

    def batch(self) -> Batch:
        """Return all examples as one batch, padded to `width` or the longest of them, attention mask included.

        With `is_packed` it has one row, positions that start again with each text, and no attention mask.
        """
        if self.is_packed:
            return self._packed_batch()
        lengths = self.lengths[:, None]
        width = self.width or lengths.max()
        position = np.arange(width)[None, :]
        if self.pad_left:
            position = position - (width - lengths)
        is_token = (position >= 0) & (position < lengths)
        where = np.where(is_token, self.starts[:, None] + position, 0)
        arrays = {name: np.where(is_token, column[where], self.padding[name]) for name, column in self.columns.items()}
        arrays = arrays | {"attention_mask": is_token, "labels": arrays.get("labels", self.labels)}
        return {name: torch.from_numpy(array.astype(np.int64)) for name, array in arrays.items()}

    def questions(self) -> list[tuple[list[int], list[int]]]:
        """Return the tokens before the last answer of each example, and those of that answer, its end token included.

        An answer is a run of trained tokens: the examples are those of a language model, and their prompts untrained.
        """
        found = []
        for start, length in zip(self.starts, self.lengths, strict=True):
            ids, labels = (self.columns[name][start : start + length] for name in ("input_ids", "labels"))
            end = np.flatnonzero(labels != NOT_TRAINED).max() + 1
            first = np.flatnonzero(labels[:end] == NOT_TRAINED).max(initial=-1) + 1
            found.append((ids[:first].tolist(), ids[first:end].tolist()))
        return found

    def _packed_batch(self) -> Batch:
        """Return all examples as one row. Models tell the texts apart by their positions if there is no mask."""
        positions = np.concatenate([np.arange(length) for length in self.lengths])
        where = np.repeat(self.starts, self.lengths) + positions
        arrays = {name: column[where] for name, column in self.columns.items()} | {"position_ids": positions}
        arrays["labels"] = np.where(positions == 0, NOT_TRAINED, arrays["labels"])  # no text predicts the next
        return {name: torch.from_numpy(array.astype(np.int64))[None] for name, array in arrays.items()}

    def shuffled_batches(self, batch_size: int, seed: int, start: int = 0) -> Iterator[Batch]:
        """Yield one epoch in the order of `seed`, but for the first `start` batches; the last batch may be smaller."""
        for examples in self.shuffled(batch_size, seed, start):
            yield examples.batch()

    def shuffled(self, batch_size: int, seed: int, start: int = 0) -> Iterator["Examples"]:
        """Yield the examples of each of these batches."""
        order = np.random.default_rng(seed).permutation(len(self))
        for first in range(start * batch_size, len(order), batch_size):
            yield self.select(order[first : first + batch_size])

    def fixed_batches(self, batch_size: int) -> list["Examples"]:
        """Return the examples of batches of even sizes up to `batch_size`, the longest first."""
        return [self.select(indices) for indices in np.array_split(self._longest_first(), -(-len(self) // batch_size))]

    def longest_batch(self, batch_size: int) -> Batch:
        """Return the batch that takes the most memory."""
        return self.select(self._longest_first()[:batch_size]).batch()

    def _longest_first(self) -> np.ndarray:
        return np.argsort(-self.lengths, kind="stable")


def join(parts: Sequence[Examples]) -> Examples:
    """Return the examples of one or more parts of one task and tokenizer; selections go on to share their columns."""
    first = parts[0]
    if all(part.columns is first.columns for part in parts):
        columns, offsets = first.columns, [0] * len(parts)
    else:
        columns = {name: np.concatenate([part.columns[name] for part in parts]) for name in first.columns}
        ends = np.cumsum([len(next(iter(part.columns.values()))) for part in parts])
        offsets = [0, *ends[:-1].tolist()]

    def all_of(name: str) -> np.ndarray | None:
        arrays = [getattr(part, name) for part in parts]
        return None if any(array is None for array in arrays) else np.concatenate(arrays)

    starts = np.concatenate([part.starts + offset for part, offset in zip(parts, offsets, strict=True)])
    of_each = {name: all_of(name) for name in ("lengths", "labels", "num_trained")}
    return replace(first, columns=columns, starts=starts, groups=None, **of_each)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Encoded:
    """Tokenised rows, and what was lost of them."""

    examples: Examples
    kept: np.ndarray  # (num_examples,) the index of each example among the rows
    lost: dict[str, int]  # how many rows were left out, and of how many a part was cut off


Encode = Callable[["Dataset", Sequence[str]], Encoded]  # takes rows and the names of the labels

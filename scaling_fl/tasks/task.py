"""What is learned: labelled texts, their tokens, and the score of a model on them."""

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from scaling_fl.cache import mapped
from scaling_fl.metrics import Means
from scaling_fl.training import Batch


@dataclass(frozen=True)
class Corpus:
    """Labelled texts as read: columns `text` (string) and `label` (index into `label_names`)."""

    train: Dataset
    test: Dataset
    label_names: tuple[str, ...]


@dataclass(frozen=True)
class Source:
    """A task: how its rows are read, what labels there may be, and the configuration that suits it.

    Rows have a `text` and a `label`. The columns that they are read from may be None, for the task's own.
    """

    read: Callable[[str, str, str | None, str | None], Dataset] | None = None  # path, "train" or "test", columns
    read_own: Callable[[str | None, str | None], tuple[Dataset, Dataset]] | None = None  # of the task that has its own
    is_whole: Callable[[str], bool] = lambda path: False  # one path stands for both, train and test
    labels: Mapping[str, str] | None = None  # label -> name; None takes those of the data
    defaults: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Examples:
    """Tokenised texts laid end to end: text i is `columns[name][starts[i] : starts[i] + lengths[i]]`."""

    columns: dict[str, np.ndarray]  # the tokenizer's outputs but for the attention mask, each (num_tokens,)
    lengths: np.ndarray  # (num_examples,)
    labels: np.ndarray  # (num_examples,)
    padding: dict[str, int]  # a value for each column
    pad_left: bool = False
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

    def batch(self, indices: np.ndarray) -> Batch:
        """Return the examples as one batch, padded to the longest of them, attention mask included."""
        lengths = self.lengths[indices][:, None]
        width = lengths.max()
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


def encode(texts: Dataset, tokenizer: PreTrainedTokenizerBase, max_seq_len: int) -> Examples:
    """Tokenise `texts` once (datasets caches the result on disk), cut to `max_seq_len` tokens.

    Raises:
        ValueError: a text has no token at all.
    """
    names = [name for name in tokenizer.model_input_names if name != "attention_mask"]
    tokens = mapped(
        texts,
        _tokenise,
        batched=True,
        fn_kwargs={"tokenizer": tokenizer, "max_seq_len": max_seq_len, "names": names},
        remove_columns=texts.column_names,
        desc=None,
    )
    ragged = {name: _column(tokens, name) for name in names}
    lengths = ragged[names[0]].value_lengths().to_numpy(zero_copy_only=False)
    if len(lengths) and lengths.min() == 0:
        number = int(lengths.argmin()) + 1
        raise ValueError(f"text {number} of the {len(lengths)} in use has no token: leave its row out")
    return Examples(
        columns={name: column.flatten().to_numpy(zero_copy_only=False) for name, column in ragged.items()},
        lengths=lengths.astype(np.int64),
        labels=_column(texts, "label").to_numpy(zero_copy_only=False).astype(np.int64),
        padding={
            name: tokenizer.pad_token_id
            if name == "input_ids"
            else getattr(tokenizer, "pad_token_type_id", 0)
            if name == "token_type_ids"
            else 0
            for name in names
        },
        pad_left=tokenizer.padding_side == "left",
    )


def _tokenise(
    rows: dict[str, list[str]], *, tokenizer: PreTrainedTokenizerBase, max_seq_len: int, names: list[str]
) -> dict[str, list[list[int]]]:
    tokens = tokenizer(rows["text"], truncation=True, max_length=max_seq_len)
    return {name: tokens[name] for name in names}


def _column(dataset: Dataset, name: str) -> Any:
    return dataset.with_format("arrow")[:][name].combine_chunks()


def score_classes(output: Any, batch: Batch, means: Means) -> None:
    """Add a batch's loss (cross-entropy, summed over its examples) and its number of right answers."""
    count = len(batch["labels"])
    means.add("loss", output.loss.detach().double() * count, count)
    means.add("accuracy", (output.logits.argmax(-1) == batch["labels"]).sum(), count)

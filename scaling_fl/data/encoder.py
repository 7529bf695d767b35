"""How texts become tokens."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from datasets import Dataset
from datasets.fingerprint import Hasher
from transformers import PreTrainedTokenizerBase

from scaling_fl.data.cache import mapped
from scaling_fl.data.examples import Encoded, Examples

VERSION = 1  # of how texts are tokenised: another one ignores the tokens in the cache
LONG = 32  # a text with more characters for each of max_seq_len is long


@dataclass(frozen=True)
class TextEncoder:
    """How texts become the numbers that a model takes.

    Args:
        tokenizer: pads on the side that the model needs.
        max_seq_len: longer texts are cut to so many tokens.
        num_ids: ids of tokens are below it; None if the model has no such limit.
        width: what all batches are padded to; None pads to the longest text of a batch.
        end_id: a token of which all texts must have the same number, one or more; None if there is none.
    """

    tokenizer: PreTrainedTokenizerBase
    max_seq_len: int
    num_ids: int | None = None
    width: int | None = None
    end_id: int | None = None
    fingerprint: str = field(init=False)  # of what tokens depend on
    names: list[str] = field(init=False)  # of the tokenizer's outputs, without the attention mask

    def __post_init__(self) -> None:
        # Once for all files: to pickle a tokenizer takes datasets a third of a second.
        object.__setattr__(self, "fingerprint", Hasher.hash((VERSION, self.tokenizer, self.max_seq_len)))
        returned = self.tokenizer("").keys() - {"attention_mask"}  # model_input_names may name more
        object.__setattr__(self, "names", [name for name in self.tokenizer.model_input_names if name in returned])

    def encode(self, texts: Dataset, label_names: Sequence[str]) -> Encoded:
        """Tokenise texts once (datasets caches the result on disk), and number their labels.

        Args:
            texts: rows of `text` and `label`.
            label_names: in the order of the classes.

        Raises:
            ValueError: a text has no token at all, or tokens that the model does not take.
        """
        tokens = tokenise_once(texts, self._tokenise, self.fingerprint)
        columns, starts, lengths = read_tokens(tokens, self.names)
        self._check(texts, columns[self.names[0]], starts, lengths)
        labels = read_column(texts, "label").dictionary_encode()
        numbers = np.array([label_names.index(label) for label in labels.dictionary.to_pylist()], np.int64)
        examples = Examples(
            columns=columns,
            starts=starts,
            lengths=lengths,
            labels=numbers[labels.indices.to_numpy(zero_copy_only=False)],
            padding={name: self._padding(name) for name in self.names},
            pad_left=self.tokenizer.padding_side == "left",
            width=self.width,
        )
        return Encoded(examples, np.arange(len(texts)), {})

    def _tokenise(self, rows: dict[str, list[str]]) -> dict[str, list[list[int]]]:
        texts = [self._cut(text) for text in rows["text"]]
        tokens = self.tokenizer(texts, truncation=True, max_length=self.max_seq_len)
        return {name: tokens[name] for name in self.names}

    def _cut(self, text: str) -> str:
        """Return the beginning of a long text (or its end) that has the tokens that are left after truncation.

        A tokenizer takes 200 times the memory of a text. The part that is cut off changes none of those tokens, as it
        begins at a word, and at least `max_seq_len` other tokens lie between.
        """
        cuts_end = self.tokenizer.truncation_side == "right"
        size = LONG * self.max_seq_len
        while size < len(text):
            words = text[:size].rsplit(maxsplit=1) if cuts_end else text[-size:].split(maxsplit=1)
            if len(words) == 2:
                piece = words[0 if cuts_end else 1]
                ids = self.tokenizer(piece, truncation=True, max_length=2 * self.max_seq_len)["input_ids"]
                if len(ids) == 2 * self.max_seq_len:
                    return piece
            size *= 4
        return text

    def _check(self, texts: Dataset, ids: np.ndarray, starts: np.ndarray, lengths: np.ndarray) -> None:
        """Check that the model takes all tokens. Errors name the row, never its text."""
        if (lengths == 0).any():
            raise ValueError(
                f"{name_row(texts, int(lengths.argmin()))}: expected a token or more, got none. Leave the row out"
            )
        check_ids(self.num_ids, texts, ids, starts)
        if self.end_id is not None:
            counts = np.add.reduceat(ids == self.end_id, starts, dtype=np.int64)
            usual = int(np.median(counts))
            token = self.tokenizer.convert_ids_to_tokens(self.end_id)
            if usual == 0:
                raise ValueError(
                    f"model: expected a tokenizer that ends each text with {token!r}, from which the model reads its "
                    "answer, got one that does not"
                )
            if (counts != usual).any():
                index = int((counts != usual).argmax())
                raise ValueError(
                    f"{name_row(texts, index)}: expected {usual} end token {token!r}, from which this model reads its "
                    f"answer, got {counts[index]}. Remove it from the text, or leave the row out"
                )

    def _padding(self, name: str) -> int:
        if name == "input_ids":
            return self.tokenizer.pad_token_id
        return getattr(self.tokenizer, "pad_token_type_id", 0) if name == "token_type_ids" else 0


def tokenise_once(rows: Dataset, tokenise: Callable[[Any], dict[str, list[Any]]], fingerprint: str) -> Dataset:
    """Return what a function returns for batches of rows, which datasets keeps on disk.

    Args:
        rows: of any columns.
        tokenise: takes a batch of them.
        fingerprint: of all else that the result depends on.
    """
    return mapped(
        rows,
        tokenise,
        batched=True,
        remove_columns=rows.column_names,
        new_fingerprint=Hasher.hash((rows._fingerprint, fingerprint)),
        desc=None,
    )


def check_ids(num_ids: int | None, texts: Dataset, ids: np.ndarray, starts: np.ndarray) -> None:
    """Check that a model has an embedding of each token, if it has a limit."""
    if num_ids is not None and ids.max(initial=0) >= num_ids:
        where = int(ids.argmax())
        index = int(np.searchsorted(starts, where, side="right")) - 1  # of the text that has the token
        raise ValueError(
            f"{name_row(texts, index)}: expected ids of tokens below {num_ids}, the number of the model's embeddings, "
            f"got {ids[where]}. The tokenizer, or vocab_size in config.json, is of another model"
        )


def name_row(texts: Dataset, index: int) -> str:
    """Return which text it is; of a sample also its row in the file."""
    place = f"text {index + 1} of the {len(texts)} in use"
    indices = texts._indices
    return place if indices is None else f"{place} (row {indices.column(0)[index].as_py() + 1} as read)"


def read_tokens(tokens: Dataset, names: Sequence[str]) -> tuple[dict[str, np.ndarray], np.ndarray, np.ndarray]:
    """Return columns of lists laid end to end, and the start and the length of each list, which all columns share."""
    ragged = {name: read_column(tokens, name) for name in names}
    lengths = ragged[names[0]].value_lengths().to_numpy(zero_copy_only=False).astype(np.int64)
    columns = {name: column.flatten().to_numpy(zero_copy_only=False) for name, column in ragged.items()}
    return columns, np.cumsum(lengths) - lengths, lengths


def read_column(dataset: Dataset, name: str) -> Any:
    """Return a column as one array of Arrow."""
    return dataset.with_format("arrow")[:][name].combine_chunks()

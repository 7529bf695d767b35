"""The part of a fast tokenizer that finds the tokens of a text, for texts that may spell its control tokens."""

import json
import re
from dataclasses import dataclass

import numpy as np
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

from scaling_fl.data.templates import control_tokens

OPEN, CLOSE = "\U0010fff4", "\U0010fff5"  # around the number of a control token, in place of its name


@dataclass(frozen=True)
class Backend:
    """A copy of a fast tokenizer that knows its control tokens by other names.

    A text that spells a control token stays a text there: it is as if the tokenizer had been trained with other names.
    """

    tokenizer: Tokenizer
    names: dict[str, str]  # the other name of each control token
    ids: np.ndarray  # of the tokenizer, by those of the copy
    named_ids: np.ndarray  # of the control tokens in the copy
    control_ids: np.ndarray  # of the control tokens in the tokenizer

    def rename(self, text: str) -> str:
        """Return a text of a template with the other names of its control tokens."""
        pattern = "|".join(map(re.escape, self.names)) or "(?!)"  # re keeps the last patterns
        return re.sub(pattern, lambda found: self.names[found[0]], text)

    def encode(self, text: str) -> tuple[list[int], np.ndarray]:
        """Return the ids of the tokens of a text with the other names, and the place of the first letter of each.

        Raises:
            ValueError: a control token was not found, or the text spells one that the tokenizer takes for it.
        """
        encoding = self.tokenizer.encode(text, add_special_tokens=False)
        found = np.array(encoding.ids, np.int64)
        is_named = np.isin(found, self.named_ids)
        if is_named.sum() != text.count(OPEN):
            raise ValueError("expected a tokenizer that finds its control tokens in any text, got one that does not")
        ids = self.ids[found]
        if (np.isin(ids, self.control_ids) & ~is_named).any():
            raise ValueError("expected texts that are no control tokens of the tokenizer, got one. Leave the row out")
        return ids.tolist(), np.array([start for start, _ in encoding.offsets], np.int64)


def make_backend(tokenizer: PreTrainedTokenizerBase) -> Backend:
    """Return the backend of a fast tokenizer."""
    spec = json.loads(tokenizer.backend_tokenizer.to_str())
    spec |= {"post_processor": None, "truncation": None, "padding": None}
    controls = control_tokens(tokenizer)
    names = {token: f"{OPEN}{number}{CLOSE}" for number, token in enumerate(controls)}
    # Templates do not write the unknown token, and a text that does is a text.
    spec["added_tokens"] = [
        token
        for token in spec["added_tokens"]
        if token["content"] in names or not (token["special"] or token["content"] == tokenizer.unk_token)
    ]
    of_copy = [(token["id"], names.get(token["content"], token["content"])) for token in spec["added_tokens"]]
    for token in spec["added_tokens"]:
        if token["content"] in names:
            token |= {"content": names[token["content"]], "normalized": False, "single_word": False}
    if isinstance(spec["model"]["vocab"], list):  # in which Unigram finds any text
        hidden = names | {tokenizer.unk_token: OPEN + CLOSE}
        spec["model"]["vocab"] = [[hidden.get(piece, piece), score] for piece, score in spec["model"]["vocab"]]
    copy = Tokenizer.from_str(json.dumps(spec))
    ids = np.arange(max(copy.get_vocab().values()) + 1)
    for id_, content in of_copy:
        ids[copy.token_to_id(content)] = id_
    named = [copy.token_to_id(name) for name in names.values()]
    return Backend(
        copy,
        names,
        ids,
        np.array([id_ for id_ in named if id_ is not None], np.int64),
        np.array([tokenizer.convert_tokens_to_ids(token) for token in controls], np.int64),
    )


def find_start_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the tokens that the tokenizer puts before a text.

    Raises:
        ValueError: it changes the text's own tokens.
    """
    with_special, without = (tokenizer("a", add_special_tokens=adds)["input_ids"] for adds in (True, False))
    for start in range(len(with_special) - len(without) + 1):
        if with_special[start : start + len(without)] == without:
            return list(with_special[:start])
    raise ValueError("model: expected a tokenizer that puts tokens around a text, got one that changes it")

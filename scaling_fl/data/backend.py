"""The part of a fast tokenizer that finds the tokens of a text, for texts that may spell its control tokens."""

import json

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

from scaling_fl.data.templates import control_tokens


def make_backend(tokenizer: PreTrainedTokenizerBase) -> tuple[Tokenizer, dict[str, str], dict[int | None, int]]:
    """Return a copy of a fast tokenizer that knows its control tokens by other names.

    A text that spells a control token stays a text there. It is as if the tokenizer had been trained with other names.

    Returns:
        The copy, the other name of each control token, and the ids of the tokenizer by those of the copy.
    """
    spec = json.loads(tokenizer.backend_tokenizer.to_str())
    spec |= {"post_processor": None, "truncation": None, "padding": None}
    controls = set(control_tokens(tokenizer))
    stand_ins: dict[str, str] = {}
    for token in spec["added_tokens"]:
        if token["content"] in controls:
            stand_ins[token["content"]] = f"\U0010fff4{token['id']}\U0010fff5"
            token["content"] = stand_ins[token["content"]]
    backend = Tokenizer.from_str(json.dumps(spec))
    return backend, stand_ins, {backend.token_to_id(token["content"]): token["id"] for token in spec["added_tokens"]}


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

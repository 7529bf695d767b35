"""Load the parts of a pretrained model that tokenising needs: its tokenizer, and the limits of its input."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import AutoModel, AutoTokenizer, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import is_protobuf_available, is_sentencepiece_available

from scaling_fl.models.adapter_files import SavedAdapter, read_adapter
from scaling_fl.models.loading import find_file, lacks_weights, load, load_config, make_parts, path_of, read_file

# Families whose classifier reads the last position, so that every text must end there.
PADDED_LEFT = {"xlnet"}
# Families that do not mask padding everywhere, so that a text's result depends on its padding, and families that
# train only on multiples of some width. All their batches have one width, max_seq_len.
PADDED_TO_MAX = {"canine", "convbert", "fnet", "funnel", "mobilebert", "mra", "nystromformer", "reformer", "yoso"}
PADDED_TO_MAX |= {"big_bird", "bigbird_pegasus"}  # whose attention is another one for narrow batches
# Families whose classifier reads the last end token, and refuses batches of texts with different numbers of it.
READ_AT_END = {"bart", "bigbird_pegasus", "mbart", "mt5", "mvp", "plbart", "t5", "umt5"}
SENTENCEPIECE_FILES = ("spiece.model", "sentencepiece.bpe.model", "tokenizer.model", "spm.model", "source.spm")


@dataclass(frozen=True)
class Pretrained:
    """A pretrained model without its weights.

    Args:
        name: the setting `model`.
        base: the model with the weights, which is another one if `name` is an adapter.
        config: with the padding token of the batches.
        tokenizer: pads on the side that the family needs.
        backbone: the names of the weights of the model without a head.
        num_ids: ids of tokens are below it; None if the model has no token embedding.
        width: of all batches; None pads to the longest text of a batch.
        end_id: a token that all texts must contain equally often, at least once; None if there is none.
        has_weights: they can be loaded; otherwise all are newly initialised.
        is_empty: its weights are missing, and are made from tensors that only have shapes.
        adapter: that `name` is, if it is one.
    """

    name: str
    base: str
    config: PreTrainedConfig
    tokenizer: PreTrainedTokenizerBase
    backbone: frozenset[str]
    num_ids: int | None = None
    width: int | None = None
    end_id: int | None = None
    has_weights: bool = True
    is_empty: bool = False
    adapter: SavedAdapter | None = None


@dataclass(frozen=True)
class LoadedModel:
    """A model that is to be trained.

    Args:
        model: in float32, but for what an adapter is put beside.
        new: the names of the newly initialised weights.
        note: a remark about the weights for the user; may be empty.
    """

    model: PreTrainedModel
    new: list[str]
    note: str = ""


def load_pretrained(model: str, max_seq_len: int, *, generates: bool = False, may_be_empty: bool = False) -> Pretrained:
    """Load a model's configuration and its tokenizer.

    Args:
        model: the setting.
        max_seq_len: the setting.
        generates: it is a language model, which needs no padding token, and whose tokenizer pads as it did.
        may_be_empty: a folder without weights is one, too.

    Raises:
        ValueError: the model cannot be found, has no vocabulary or padding token, or `max_seq_len` is out of its range.
    """
    made = make_parts(model)
    adapter = None if made else read_adapter(model)
    base = model if adapter is None else adapter.base
    is_complete = adapter is None or read_file(model, "config.json")
    config, tokenizer = made or _load_parts(model if is_complete else base, generates=generates)
    _check_tokenizer(model, tokenizer)
    text_config = config.get_text_config()
    num_ids = getattr(text_config, "vocab_size", None)
    if not generates:
        _settle_padding(model, tokenizer, text_config, num_ids)
    model_without_head = _make_empty(config) if made else load(base, lambda *_, **__: _make_empty(config))
    num_positions, padding = _find_positions(model_without_head)
    if padding is None and not generates:
        # Other models find the end of a text by it. Models like RoBERTa count positions from it: theirs stays.
        text_config.pad_token_id = tokenizer.pad_token_id
    limits = tokenizer.model_max_length, getattr(config, "max_position_embeddings", None), num_positions
    longest = min(limit for limit in limits if limit and limit > 0)
    shortest = tokenizer.num_special_tokens_to_add() + 1
    if max_seq_len > longest:
        raise ValueError(f"max_seq_len: expected at most {longest} for model={model!r}, got {max_seq_len}")
    if max_seq_len < shortest:
        raise ValueError(f"max_seq_len: expected at least {shortest} for model={model!r}, got {max_seq_len}")
    kind = config.model_type
    is_empty = may_be_empty and made is None and lacks_weights(base)
    return Pretrained(
        name=model,
        base=base,
        config=config,
        tokenizer=tokenizer,
        backbone=frozenset(name for name, _ in model_without_head.named_parameters()),
        num_ids=_num_embeddings(model_without_head),
        width=max_seq_len if kind in PADDED_TO_MAX else None,
        end_id=getattr(text_config, "eos_token_id", None) if kind in READ_AT_END else None,
        has_weights=made is None and not is_empty,
        is_empty=is_empty,
        adapter=adapter,
    )


def make_unloaded(pretrained: Pretrained, config: PreTrainedConfig, auto_class: Any, dtype: Any) -> LoadedModel:
    """Make a model without pretrained weights: newly initialised ones in float32, or, if it is empty, of this type."""
    if pretrained.is_empty:
        with torch.device("meta"):
            return LoadedModel(auto_class.from_config(config, dtype=dtype), [], "no weights, a configuration alone")
    model = auto_class.from_config(config, dtype=torch.float32)
    return LoadedModel(model, [name for name, _ in model.named_parameters()])


def _load_parts(model: str, *, generates: bool) -> tuple[PreTrainedConfig, PreTrainedTokenizerBase]:
    config = load_config(model)
    side = {} if generates else {"padding_side": "left" if config.model_type in PADDED_LEFT else "right"}
    try:
        return config, load(model, AutoTokenizer.from_pretrained, config=config, **side)
    except ValueError as error:
        _check_sentencepiece(model)
        raise error from error.__cause__


def _check_tokenizer(model: str, tokenizer: PreTrainedTokenizerBase) -> None:
    # Without files of a tokenizer, transformers makes one without words, to which every text is unknown.
    if len(tokenizer) <= len(tokenizer.all_special_ids):
        _check_sentencepiece(model)
        raise ValueError(f"model={model!r}: expected a tokenizer with a vocabulary, got none. Add its tokenizer.json")


def _settle_padding(
    model: str, tokenizer: PreTrainedTokenizerBase, config: PreTrainedConfig, num_ids: int | None
) -> None:
    """Give a tokenizer and a configuration the same padding token.

    Raises:
        ValueError: there is none, or the model has no embedding of it.
    """
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if tokenizer.pad_token is None:
        raise ValueError(
            f"model={model!r}: expected a padding token, got none. Set pad_token in its tokenizer_config.json"
        )
    if num_ids is not None and tokenizer.pad_token_id >= num_ids:
        raise ValueError(
            f"model={model!r}: expected a padding token with an id below {num_ids}, the vocab_size of its config.json, "
            f"got {tokenizer.pad_token!r} with id {tokenizer.pad_token_id}. Its tokenizer has more tokens than it has "
            "embeddings"
        )
    pad_id = getattr(config, "pad_token_id", None)
    if pad_id is None or pad_id < 0 or (num_ids is not None and pad_id >= num_ids):
        config.pad_token_id = tokenizer.pad_token_id


def _check_sentencepiece(model: str) -> None:
    """Refuse a SentencePiece tokenizer whose packages are missing; transformers would name another package."""
    packages = {"sentencepiece": is_sentencepiece_available(), "protobuf": is_protobuf_available()}
    missing = [name for name, is_available in packages.items() if not is_available]
    files = (name for name in SENTENCEPIECE_FILES if find_file(path_of(model), name, local_files_only=True))
    if missing and (file := next(files, None)):
        raise ValueError(
            f"model={model!r}: expected the package {' and '.join(missing)} for its tokenizer, which is the "
            f"SentencePiece file {file}. EXTRAS=sentencepiece for run-local.sh, or pip install sentencepiece "
            "protobuf, installs it"
        )


def _make_empty(config: PreTrainedConfig) -> PreTrainedModel:
    """Make the model of a configuration, without a head, from tensors that only have shapes."""
    with torch.device("meta"):
        return AutoModel.from_config(config)


def _find_positions(model: nn.Module) -> tuple[int | None, int | None]:
    """Return how many tokens a model's position embedding fits, and its padding; None where it has none.

    In I-BERT it is not an nn.Embedding. Models like RoBERTa reserve its first rows for padding.
    """
    for name, module in model.named_modules():
        if name.rpartition(".")[2] == "position_embeddings" and hasattr(module, "padding_idx"):
            padding: Any = module.padding_idx
            return len(module.weight) - (0 if padding is None else padding + 1), padding
    return None, None


def _num_embeddings(model: PreTrainedModel) -> int | None:
    try:
        weight = getattr(model.get_input_embeddings(), "weight", None)
    except (AttributeError, NotImplementedError):  # CANINE hashes characters
        return None
    return None if weight is None else len(weight)

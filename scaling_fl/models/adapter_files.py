"""What is saved of a model with an adapter: peft's configuration and the weights, in a folder."""

import json
import os
from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn
from transformers import AutoConfig

from scaling_fl.errors import one_line
from scaling_fl.models.adapters import add_adapter, import_peft
from scaling_fl.models.loading import read_file
from scaling_fl.models.quantised import find_whole, quantise_

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"


@dataclass(frozen=True)
class SavedAdapter:
    """An adapter in peft's format.

    Args:
        config: peft's configuration.
        weights: by peft's names.
        base: the folder or hub id of the model beside which it was trained.
    """

    config: dict[str, Any]
    weights: dict[str, Tensor]
    base: str


def read_adapter(model: str) -> SavedAdapter | None:
    """Read the adapter of a folder or hub id, None if it has none.

    Raises:
        ValueError: the model cannot be found, or a file of the adapter is missing or damaged.
    """
    content = read_file(model, CONFIG)
    if content is None:
        return None
    config = _parse_config(content, f"{model}/{CONFIG}")
    base, revision = config.get("base_model_name_or_path"), config.get("revision")
    if not base:
        raise ValueError(f"{model}/{CONFIG}: expected a model as base_model_name_or_path, got none")
    if revision not in (None, "main"):
        raise ValueError(
            f"{model}/{CONFIG}: expected no revision of the model in base_model_name_or_path, got {revision!r}. Give "
            "the path of a folder with that revision there"
        )
    try:
        weights = safetensors.torch.load(read_file(model, WEIGHTS) or b"")
    except Exception as error:
        raise ValueError(f"{model}/{WEIGHTS}: expected the weights of an adapter, got {one_line(error)}") from error
    return SavedAdapter(config, weights, base)


def read_config(place: str) -> dict[str, Any]:
    """Read peft's configuration from a file, or from the folder that it is in.

    Raises:
        ValueError: there is none.
    """
    path = os.path.join(place, CONFIG) if os.path.isdir(place) else place
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        raise ValueError(f"{path}: expected a configuration of peft, got {one_line(error)}") from error
    return _parse_config(content, path)


def _parse_config(content: bytes, place: str) -> dict[str, Any]:
    try:
        found = json.loads(content)
        if "peft_type" not in found:
            raise ValueError("JSON without peft_type")
    except (TypeError, ValueError) as error:
        raise ValueError(f"{place}: expected a configuration of peft, got {one_line(error)}") from error
    return found


def load_saved(
    folder: str, loader: Callable[..., Any], quantise: int | None = None, dtype: torch.dtype = torch.float32
) -> Any:
    """Return the model of a folder, with its adapter if it has one, in evaluation mode.

    Args:
        folder: as a run leaves it.
        loader: `from_pretrained` of a class of transformers.
        quantise: the bits of the frozen linear layers beside an adapter; None: they have `dtype`.
        dtype: of the other frozen weights.

    Raises:
        ValueError: the weights are not those of the adapter.
    """
    saved = read_adapter(folder)
    if saved is None:
        return loader(folder)
    has_config = os.path.isfile(os.path.join(folder, "config.json"))  # that of a language model has none
    config = AutoConfig.from_pretrained(folder if has_config else saved.base)
    first = dtype if quantise is None else "auto"
    model = loader(saved.base, config=config, dtype=first, ignore_mismatched_sizes=True)
    if quantise is not None:
        quantise_(model, quantise, find_whole(saved.config, model), dtype)
    adapted = add_adapter(model, saved.config)
    load_weights_(adapted, saved.weights, folder)
    return adapted.eval()


def load_weights_(model: Any, weights: Mapping[str, Tensor], place: str) -> None:
    """Overwrite the weights of an adapter with saved ones.

    Raises:
        ValueError: they are not those of this adapter, all of them and no others.
    """
    peft = import_peft()
    ours = {name: tuple(weight.shape) for name, weight in adapter_state(model).items()}
    theirs = {name: tuple(weight.shape) for name, weight in weights.items()}
    for name in sorted({*ours, *theirs}):
        if ours.get(name) != theirs.get(name):
            raise ValueError(
                f"model={place!r}: expected {name} of shape {_say(ours.get(name))}, got {_say(theirs.get(name))}. The "
                "adapter is of another model, or its head of other labels: a merged model (merge=True) can be trained "
                "on those"
            )
    peft.set_peft_model_state_dict(model, dict(weights))


def adapter_state(model: Any) -> dict[str, Tensor]:
    """Return the weights that belong to the adapter, trained or not, by peft's names."""
    return import_peft().get_peft_model_state_dict(model, save_embedding_layers=False)


def saved_weights(model: Any) -> dict[str, Tensor]:
    """Return the weights that the files of a result have: of a model with an adapter, those of the adapter alone."""
    return adapter_state(model) if is_adapted(model) else model.state_dict()


def is_adapted(model: nn.Module) -> bool:
    """Tell whether a model has an adapter."""
    return hasattr(model, "peft_config")


def merge(model: Any) -> Any:
    """Return a copy of the model in which the adapter is added to the weights, of the class that it had without one."""
    return deepcopy(model).merge_and_unload(safe_merge=True)


def describe_config(model: Any) -> dict[str, Any]:
    """Return the configuration of an adapter by name, in JSON's types, without what depends on the machine."""
    found = model.peft_config["default"].to_dict()
    for name in ("base_model_name_or_path", "revision", "inference_mode", "auto_mapping", "peft_version"):
        found.pop(name, None)
    return json.loads(json.dumps(found, default=lambda value: sorted(value) if isinstance(value, set) else str(value)))


def _say(shape: tuple[int, ...] | None) -> str:
    return "none" if shape is None else str(list(shape))

"""What is saved of a model with an adapter: peft's configuration and the weights, in a folder."""

import json
import os
from collections.abc import Callable, Mapping
from copy import deepcopy
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoConfig

from scaling_fl.errors import one_line
from scaling_fl.models.adapters import add_adapter, import_peft

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"


def is_adapter(folder: str) -> bool:
    """Tell whether a folder has an adapter."""
    return os.path.isfile(os.path.join(folder, CONFIG))


def read_config(place: str) -> dict[str, Any]:
    """Read peft's configuration from a file, or from the folder that it is in.

    Raises:
        ValueError: there is none.
    """
    path = os.path.join(place, CONFIG) if os.path.isdir(place) else place
    try:
        with open(path, encoding="utf-8") as file:
            found = json.load(file)
        if "peft_type" not in found:
            raise ValueError("JSON without peft_type")
    except (OSError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: expected a configuration of peft, got {one_line(error)}") from error
    return found


def base_of(folder: str) -> str:
    """Return the folder or hub id of the model beside which an adapter was trained.

    Raises:
        ValueError: its configuration does not name it.
    """
    base = read_config(folder).get("base_model_name_or_path")
    if not base:
        raise ValueError(f"{folder}/{CONFIG}: expected a model as base_model_name_or_path, got none")
    return base


def read_weights(folder: str) -> dict[str, Tensor]:
    """Return the weights of an adapter by peft's names.

    Raises:
        ValueError: it has none, or they are damaged.
    """
    path = os.path.join(folder, WEIGHTS)
    try:
        return load_file(path)
    except Exception as error:
        raise ValueError(f"{path}: expected the weights of an adapter, got {one_line(error)}") from error


def load_adapted(folder: str, loader: Callable[..., Any]) -> Any:
    """Return the model of a folder with an adapter, and of a classifier also its configuration, in evaluation mode.

    Args:
        folder: as a run leaves it.
        loader: `from_pretrained` of a class of transformers.

    Raises:
        ValueError: the weights are not those of the adapter.
    """
    has_config = os.path.isfile(os.path.join(folder, "config.json"))
    config = AutoConfig.from_pretrained(folder if has_config else base_of(folder))
    model = loader(base_of(folder), config=config, dtype=torch.float32, ignore_mismatched_sizes=True)
    adapted = add_adapter(model, read_config(folder))
    load_weights_(adapted, read_weights(folder), folder)
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


def describe_config(model: Any) -> str:
    """Return the configuration of an adapter as JSON in a fixed order, without what depends on the machine."""
    found = model.peft_config["default"].to_dict()
    for name in ("base_model_name_or_path", "revision", "inference_mode", "auto_mapping", "peft_version"):
        found.pop(name, None)
    return json.dumps(
        found, sort_keys=True, default=lambda value: sorted(value) if isinstance(value, set) else str(value)
    )


def _say(shape: tuple[int, ...] | None) -> str:
    return "none" if shape is None else str(list(shape))

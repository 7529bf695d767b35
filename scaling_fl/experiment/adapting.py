"""The adapter of a run: which one it is, and what ranks and a resumed run must have alike about it."""

import os
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from scaling_fl.experiment.checks import expect
from scaling_fl.experiment.objectives import LABELS, find_dtype, find_objective
from scaling_fl.experiment.parameters import bind
from scaling_fl.experiment.settings import Settings
from scaling_fl.models.adapter_files import SavedAdapter, describe_config, is_adapted, load_weights_, read_config
from scaling_fl.models.adapters import MEANS, add_adapter, find_other_factor, has_lora, import_peft, turns
from scaling_fl.models.classifier import find_head, labels_of
from scaling_fl.models.flat import frozen_sha256
from scaling_fl.models.loading import path_of
from scaling_fl.models.memory import state_bytes
from scaling_fl.models.pretrained import LoadedModel, Pretrained
from scaling_fl.models.quantised import find_whole, quantise_
from scaling_fl.storage import host_path
from scaling_fl.training.seeds import derive_seed

CPU = torch.device("cpu")
FROZEN = "SHA-256 of the frozen weights"


def adapt(
    settings: Settings,
    pretrained: Pretrained,
    loaded: LoadedModel,
    labels: Sequence[str],
    device: torch.device = CPU,
) -> LoadedModel:
    """Put the adapter of a run beside its model, if it has one, whose frozen weights get the bits of the settings.

    Args:
        settings: of the run.
        pretrained: the model.
        loaded: its weights, on the CPU; it is changed.
        labels: of a classifier.
        device: on which it will compute.

    Raises:
        ValueError: it does not fit the model, the labels or the other settings.
    """
    saved = pretrained.adapter
    given = _find_config(settings, saved)
    if given is None:
        return loaded
    objective = find_objective(settings)
    if objective is LABELS and saved is not None and (of_head := labels_of(pretrained.config)) != list(labels):
        raise ValueError(
            f"model={settings.model!r}: expected an adapter with the labels {', '.join(labels)}, got one with "
            f"{', '.join(of_head)}. A merged model (merge=True) can be trained on other labels"
        )
    given |= {"task_type": objective.peft_task}
    base = path_of(pretrained.base)
    full = {*loaded.new, *(find_head(pretrained, loaded.model) if objective is LABELS else ())}
    if settings.quantise is not None:
        compute = torch.float32 if device.type == "cpu" else torch.bfloat16
        whole = full | find_whole(given, loaded.model)
        quantise_(loaded.model, settings.quantise, whole, find_dtype(settings), compute)
    loaded.model.name_or_path = os.path.abspath(base) if os.path.isdir(base) else base
    model = add_adapter(
        loaded.model,
        given,
        full=full,
        seed=derive_seed(settings.seed, "adapter"),
        freeze_a=settings.lora_mean == "freeze_a",
    )
    _check_kind(settings, model, given["peft_type"], device)
    if saved is None:
        return replace(loaded, model=model)
    load_weights_(model, saved.weights, settings.model)
    return replace(loaded, model=model, new=[])


def _check_kind(settings: Settings, model: Any, kind: str, device: torch.device) -> None:
    """Check that an adapter is of a kind for which the other settings are."""
    if not has_lora(model):
        expect(settings, f"{kind} is not LoRA", lora_mean=None)
    factor = find_other_factor(model)
    if settings.lora_mean in MEANS[1:] and factor is not None:
        raise ValueError(
            f"lora_mean: expected ab, as {factor} is a third factor of BA, with which no mean is exact, got "
            f"{settings.lora_mean!r}"
        )
    if settings.quantise == 8 and device.type == "cpu" and "lora_magnitude" in (factor or ""):
        raise ValueError("quantise: expected 4 or None with DoRA on a CPU, where peft loses the factors, got 8")
    if not hasattr(model.base_model, "merge_and_unload"):
        expect(settings, f"{kind} cannot be merged", merge=False)


def _find_config(settings: Settings, saved: SavedAdapter | None) -> dict[str, Any] | None:
    """Return peft's configuration of the adapter of a run; None if it has none."""
    if saved is not None:
        reason = f"model={settings.model!r} is an adapter, which trains on"
        expect(settings, reason, adapter=None, adapter_config=None)
        return dict(saved.config)
    if settings.adapter is not None:
        return bind("adapter", vars(settings))()
    if isinstance(settings.adapter_config, str):
        return read_config(host_path(settings.adapter_config))
    if settings.adapter_config is not None:
        return dict(settings.adapter_config)
    of_adapters = {"lora_mean": None, "merge": False, "quantise": None, "base_dtype": None}
    expect(settings, "there is no adapter", ". Set adapter=lora", **of_adapters)
    return None


def find_turns(settings: Settings, model: Any) -> tuple[frozenset[str], ...]:
    """Return the names of the weights that train in turn; one group without names if all train in each round."""
    return turns(model) if settings.lora_mean == "alternate" else (frozenset(),)


def identity_of_adapter(settings: Settings, model: Any) -> dict[str, Any]:
    """Return what the weights of a round depend on: the frozen weights, the adapter's configuration, peft's version."""
    sha256 = frozen_sha256(model)
    found: dict[str, Any] = {} if sha256 is None else {FROZEN: sha256}
    if is_adapted(model):
        found["version of peft"] = import_peft().__version__
        if settings.adapter is None:
            found |= {f"{name} of the adapter": value for name, value in describe_config(model).items()}
    return found


def check_turns(settings: Settings) -> None:
    """Check on a rank that the strategy can move other weights in each round: its optimiser takes a step.

    Raises:
        ValueError: it cannot.
    """
    if settings.lora_mean == "alternate" and state_bytes(bind("strategy", vars(settings)), 1_000):
        raise ValueError(
            "strategy: expected one without a state, as lora_mean='alternate' moves other weights in each round, got "
            f"{settings.strategy!r}. Use strategy=fedavg"
        )

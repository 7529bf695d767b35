"""The memory that a run would take, from the configuration of its model alone: without weights, data and devices."""

from dataclasses import replace
from typing import Any

import torch
from transformers import PreTrainedConfig

from scaling_fl.experiment.adapting import find_config
from scaling_fl.experiment.build import server_optimiser
from scaling_fl.experiment.local_training import find_autocast, local_optimiser, prepare_model
from scaling_fl.experiment.objectives import ANSWERS, find_dtype, find_objective
from scaling_fl.experiment.settings import Settings
from scaling_fl.federation.aggregation import COMM_DTYPES
from scaling_fl.models.adapters import add_adapter
from scaling_fl.models.flat import trained_weights
from scaling_fl.models.memory import Batch, estimate_bytes, state_bytes
from scaling_fl.models.quantised import find_layers
from scaling_fl.models.stand_ins import put_stand_ins_


def estimate(settings: Settings, config: PreTrainedConfig) -> int:
    """Return how many bytes the tensors of a GPU take at batches of the longest texts, however many sites it has.

    Args:
        settings: of the run of a language model; its `model` is not looked at.
        config: of the model.

    Raises:
        ValueError: the settings do not fit the model, or it is no language model.
    """
    if find_objective(settings) is not ANSWERS:
        raise ValueError(f"task_name: expected 'instruct', as a head needs the labels, got {settings.task_name!r}")
    model = _make_model(settings, config)
    prepare_model(replace(settings, force_autocast=settings.autocast is not None), model, torch.device("cuda"))
    num_trained = sum(weight.numel() for weight in trained_weights(model).values())
    of_site = estimate_bytes(
        model,
        _make_batch(settings.batch_size, settings.max_seq_len),
        _make_batch(settings.val_batch_size, settings.max_seq_len),
        local_optimiser(settings),
        accumulates=settings.gradient_accumulation > 1,
        autocast=find_autocast(settings),
    )
    of_mean = num_trained * (torch.float32.itemsize + COMM_DTYPES[settings.comm_dtype].itemsize)
    return of_site + of_mean + state_bytes(server_optimiser(settings), num_trained)


def _make_model(settings: Settings, config: PreTrainedConfig) -> Any:
    """Return the model of a run from tensors that only have shapes, with its adapter."""
    with torch.device("meta"):
        model = ANSWERS.auto_class.from_config(config, dtype=find_dtype(settings))
    model.config.use_cache = False
    given = find_config(settings, None)
    if given is None:
        return model
    layers = {id(layer): layer for layer in find_layers(model).values()} if settings.quantise is not None else {}
    model = add_adapter(model, given | {"task_type": ANSWERS.peft_task}, freeze_a=settings.lora_mean == "freeze_a")
    if settings.quantise is not None:
        setattr(model.get_base_model(), f"is_loaded_in_{settings.quantise}bit", True)
        put_stand_ins_(model, layers, settings.quantise, torch.bfloat16)
    return model


def _make_batch(size: int, length: int) -> Batch:
    ids = torch.ones(size, length, dtype=torch.long)
    return {"input_ids": ids, "attention_mask": ids.clone(), "labels": ids.clone()}

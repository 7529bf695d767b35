"""The models that a run leaves: the one that was trained, and the one with the adapter added to its weights."""

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch

from scaling_fl.data.examples import Examples
from scaling_fl.data.sites import SiteData
from scaling_fl.experiment.build import Job
from scaling_fl.experiment.objectives import find_objective
from scaling_fl.experiment.settings import Settings
from scaling_fl.models.adapter_files import load_saved, merge
from scaling_fl.models.loading import OF_BASE, REMEMBERED, TRAINED
from scaling_fl.records import console
from scaling_fl.records.export import MERGED, save_model
from scaling_fl.records.rounds import Record

LOSS_TOLERANCE = 0.01  # nats between two losses; a user is told of more


def save_models(settings: Settings, job: Job, record: Record, model: Any, name: str) -> dict[str, str]:
    """Save a model into the folder `name` of the record, and merged beside it if asked for; return the paths by name.

    Where the base has few bits, the adapter is added to the weights of its files in float32, and the record gets the
    loss of both models.
    """
    save = partial(save_model, str(record.folder), tokenizer=job.encoder.tokenizer)
    known = {key: value for key in REMEMBERED if (value := getattr(settings, key)) is not None}
    saved, of_merged = {name: save(model, name=name, beside={TRAINED: known} if known else {})}, f"{name}{MERGED}"
    if not settings.merge:
        return saved
    known = {key: value for key, value in known.items() if key not in OF_BASE}
    save = partial(save, name=of_merged, beside={TRAINED: known} if known else {})
    if settings.quantise is None and settings.base_dtype in (None, "float32"):
        return saved | {of_merged: save(merge(model))}
    objective, parts = find_objective(settings), _find_parts(job.data)
    merged = load_saved(saved[name], objective.auto_class.from_pretrained).merge_and_unload(safe_merge=True)
    if merged.can_generate():
        merged.generation_config = model.generation_config
    saved[of_merged] = save(merged)
    if parts:
        found, trained = (
            objective.summarise(objective.evaluate(each, (part.batch() for part in parts)))["loss"]
            for each in (_place(merged, next(model.parameters()).device), model)
        )
        record.add_info({of_merged: {"loss": found, "loss_of_trained": trained}})
        console.print_once(_compare(settings, saved[of_merged], found, trained))
    return saved


def _find_parts(data: SiteData) -> list[Examples]:
    """Return the examples of this rank by which `validation.*` is measured."""
    by_place: Mapping[Any, list[Examples]] = data.common or data.test.batches
    if data.validation.counts:
        by_place = data.validation.batches
    return [part for parts in by_place.values() for part in parts]


def _compare(settings: Settings, path: str, merged: float, trained: float) -> str:
    bits = "bfloat16" if settings.quantise is None else f"{settings.quantise} bits"
    advice = f", by more than {LOSS_TOLERANCE}. To use what was trained, load the adapter, with its base in {bits}"
    return (
        f"merged    {path}: a loss of {merged:.4f}; {trained:.4f} of the adapter beside a base in {bits}, which is the "
        f"model that was trained and evaluated. They differ{advice if abs(merged - trained) > LOSS_TOLERANCE else ''}"
    )


def _place(model: Any, device: torch.device) -> Any:
    """Return a model on a device, if it fits there beside another one, else where it is."""
    size = sum(weight.nbytes for weight in model.parameters())
    has_room = device.type != "cuda" or 1.5 * size < torch.cuda.mem_get_info(device)[0]
    return model.to(device) if has_room else model

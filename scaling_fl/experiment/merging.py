"""The model with the adapter added to its weights, and how far it is from the one that was trained."""

import os
from collections.abc import Callable, Mapping
from typing import Any

import torch

from scaling_fl.data.examples import Examples
from scaling_fl.data.sites import SiteData
from scaling_fl.experiment.evaluation import Evaluation
from scaling_fl.experiment.objectives import find_objective
from scaling_fl.experiment.settings import Settings
from scaling_fl.models.adapter_files import load_saved, merge
from scaling_fl.records.export import MERGED
from scaling_fl.training.metrics import Means, Metrics

APART = 0.01  # nats between two losses, from which a user is warned


def has_narrow_base(settings: Settings) -> bool:
    """Tell whether the frozen weights of a run have less than float32."""
    return settings.quantise is not None or settings.base_dtype not in (None, "float32")


def save_merged(
    settings: Settings, data: SiteData, path: str, model: Any, evaluation: Evaluation, save: Callable[..., str]
) -> tuple[str, dict[str, float]]:
    """Save a model with the adapter added to its weights in float32.

    Args:
        settings: of the run.
        data: of the run.
        path: the folder with the adapter, which is saved already.
        model: with the adapter; it is left as it was.
        evaluation: of this rank.
        save: saves a model in the folder `name`, and returns its path.

    Returns:
        The path of the folder, and, where the adapter was trained beside fewer bits, what both models score on the
        examples of this rank.
    """
    name = f"{os.path.basename(path)}{MERGED}"
    if not has_narrow_base(settings):
        return save(merge(model), name=name), {}
    merged = load_saved(path, find_objective(settings).auto_class.from_pretrained).merge_and_unload(safe_merge=True)
    if merged.can_generate():
        merged.generation_config = model.generation_config
    saved = save(merged, name=name)
    merged.config.use_cache = False
    parts = find_parts(data)
    losses = {
        name: Means.of(evaluation.score(of, parts)).result().get("loss")
        for name, of in (("merged.trained_loss", model), ("merged.loss", _place(merged, model)))
    }
    return saved, {name: loss for name, loss in losses.items() if loss is not None}


def find_parts(data: SiteData) -> list[Examples]:
    """Return the examples of this rank by which `validation.*` is measured."""
    by_place: Mapping[Any, Any] = data.test.batches
    if data.validation.counts:
        by_place = data.validation.batches
    elif data.common:
        by_place = data.common
    return [part for parts in by_place.values() for part in parts]


def describe_merged(settings: Settings, path: str, losses: Metrics) -> list[str]:
    """Return a line on what a merged model scores beside the one that was trained, if that is another one."""
    if not losses:
        return []
    merged, trained = losses["merged.loss"], losses["merged.trained_loss"]
    bits = "bfloat16" if settings.quantise is None else f"{settings.quantise} bits"
    warning = f", by more than {APART}. To use what was trained, load model/, with its base in {bits}"
    return [
        f"merged    {path}: a loss of {merged:.4f}; {trained:.4f} of the adapter beside a base in {bits}, which is the "
        f"model that was trained and evaluated. They differ{warning if abs(merged - trained) > APART else ''}"
    ]


def _place(merged: Any, model: Any) -> Any:
    """Return a model on the device of another one, if it fits beside it, else on the CPU."""
    device = next(model.parameters()).device
    size = sum(weight.nbytes for weight in merged.parameters())
    if device.type == "cuda" and 1.5 * size > torch.cuda.mem_get_info(device)[0]:
        return merged.eval()
    return merged.eval().to(device)

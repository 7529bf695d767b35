"""How the sites of a run train: what the settings say of it, as functions."""

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from scaling_fl.experiment.objectives import find_objective
from scaling_fl.experiment.parameters import bind
from scaling_fl.experiment.settings import Settings
from scaling_fl.federation.local_training import LocalTraining
from scaling_fl.federation.site import TRAINERS, Site, SiteFunction
from scaling_fl.federation.step_log import StepLog
from scaling_fl.models.compute import check_bfloat16, checkpoint_activations, set_attention
from scaling_fl.training.loop import Batch
from scaling_fl.training.optimisers import OptimiserStates


def make_training(
    settings: Settings,
    batches: Callable[[Site, int, int], Iterable[Batch]],
    step_log: StepLog | None = None,
    states: OptimiserStates | None = None,
) -> SiteFunction:
    """Return what trains a site.

    Args:
        settings: of the run.
        batches: of a site, as `LocalTraining` takes them.
        step_log: collects losses and rates by steps.
        states: of the optimisers, if they are kept.
    """
    if settings.trainer != "default":
        return TRAINERS[settings.trainer]
    return LocalTraining(
        local_optimiser(settings),
        batches,
        find_objective(settings).score,
        settings.seed,
        proximal_mu=settings.proximal_mu,
        deadline_s=settings.site_deadline_s,
        max_grad_norm=settings.max_grad_norm,
        schedule=bind("lr_schedule", vars(settings))(),
        autocast=find_autocast(settings),
        step_log=step_log,
        states=states,
    )


def make_step_log(settings: Settings) -> StepLog | None:
    """Return what collects losses and rates by steps; None if that is not asked for."""
    every = settings.log_every_steps
    return None if every is None else StepLog(every, with_sites=settings.log_sites_by_step)


def local_optimiser(settings: Settings) -> Callable[[Iterable[Tensor]], Optimizer]:
    """Return what makes the optimiser of a site."""
    return partial(bind("optimiser", vars(settings)), lr=settings.learning_rate)


def find_autocast(settings: Settings) -> torch.dtype | None:
    """Return what the matrix products of training are computed in; None: the type of the weights."""
    return None if settings.autocast is None else getattr(torch, settings.autocast)


def prepare_model(settings: Settings, model: Any, device: torch.device) -> None:
    """Let a model compute as the settings say.

    Raises:
        ValueError: it, or the device, cannot.
    """
    if settings.attn_implementation is not None:
        set_attention(model, settings.attn_implementation)
    if settings.activation_checkpointing:
        checkpoint_activations(model)
    if settings.autocast is not None and not settings.force_autocast:
        check_bfloat16(device)

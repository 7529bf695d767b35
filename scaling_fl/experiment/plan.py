"""What would run where, its memory and bytes, found out without training."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from scaling_fl.data.sites import SiteData
from scaling_fl.distributed.collectives import all_gather, local_rank, rank, world_size
from scaling_fl.experiment.build import (
    Job,
    build,
    find_largest,
    largest_training_batch,
    make_evaluation,
    make_federation,
    server_optimiser,
)
from scaling_fl.experiment.centralised import find_unused, without_federation
from scaling_fl.experiment.evaluation import describe_evaluation
from scaling_fl.experiment.local_training import find_autocast, local_optimiser
from scaling_fl.experiment.parameters import find_arguments
from scaling_fl.experiment.schedule import count_steps
from scaling_fl.experiment.settings import Settings, of_site, of_training
from scaling_fl.federation.cohorts import Cohorts
from scaling_fl.models.adapter_files import is_adapted, saved_weights
from scaling_fl.models.adapters import has_lora
from scaling_fl.models.flat import trained_weights
from scaling_fl.models.memory import estimate_bytes, state_bytes
from scaling_fl.records import console, export


def plan(settings: Settings, folder: str | None = None) -> dict[str, Any]:
    """Build a run as if to train, print what it is, and return that, as one of its ranks.

    Args:
        settings: of the run.
        folder: where the record of the run would be; None has none.

    Returns:
        `labels`; `sites`, a dict for each with `rank` and `device` (None: any), `examples`, `tokens`, `steps` of a
        round, `labels` (examples by label), `trained_tokens` of a language model, and `name`, if sites have names;
        `devices`, a dict for each with `rank`, `device` and `bytes` (None: unknown); and `weights` and `bytes` that
        a round sends, `num_test`, `newly_initialised`, `resumed_after` (a round), and `state_bytes` of a site's
        optimiser that is kept and `node_state_bytes`, the most on the disk of the first node.

    Raises:
        ValueError: something of the run would be refused.
    """
    unused, settings = find_unused(settings), without_federation(settings)
    job = build(settings)
    check_output(settings, job, folder)
    memory = all_gather({str(device): estimate_memory(settings, job, device) for device in job.topology.devices})
    make_federation(settings, job, console.Progress(), make_evaluation(settings, job, console.Progress()))  # tries it
    labels = job.data.label_names
    planned: dict[str, Any] = {
        "labels": list(labels),
        "num_test": job.data.num_test,
        "newly_initialised": list(job.loaded.new),
        "weights": job.global_model.weights.numel(),
        "bytes": job.global_model.bytes_a_round,
        "sites": [
            site
            | {
                "steps": count_steps(site["examples"], of_site(settings, number)),
                "labels": dict(zip(labels, site["labels"], strict=True)),
            }
            for number, site in enumerate(job.data.describe_sites(job.topology))
        ],
        "devices": [
            {"rank": number, "device": device, "bytes": size}
            for number, of_rank in enumerate(memory)
            for device, size in of_rank.items()
        ],
        "resumed_after": len(job.history) - 1 if job.history else None,
        "state_bytes": job.states and job.states.site_bytes,
        "node_state_bytes": job.states and job.states.node_bytes,
    }
    console.print_once(
        *describe(settings, job, unused),
        f"round     {planned['weights']:,} weights shared, {planned['bytes'] * 1e-6:.1f} MB sent by all ranks",
        *console.site_table(planned["sites"]),
        *console.device_table(planned["devices"]),
        "the plan holds: nothing of it would be refused",
    )
    return planned


def estimate_memory(settings: Settings, job: Job, device: torch.device) -> int | None:
    """Return how many bytes a device of this rank takes at its largest batches; None if its model does not tell."""
    training = largest_training_batch(settings, job, device)
    testing = find_largest(part.batch() for part in job.data.test_on(device, job.topology))
    accumulates = any(
        of_site(settings, site)["gradient_accumulation"] > 1 for site in (None, *(settings.site_settings or ()))
    )
    make_optimiser = local_optimiser(settings)
    try:
        num_bytes = estimate_bytes(
            job.loaded.model,
            training,
            testing,
            make_optimiser,
            accumulates=accumulates,
            autocast=find_autocast(settings),
        )
    except Exception:  # some models look at the values of their tensors, and there are none
        return None
    if device == job.topology.devices[0]:
        num_bytes += job.global_model.nbytes + state_bytes(server_optimiser(settings), job.global_model.weights.numel())
    return num_bytes


def check_output(settings: Settings, job: Job, folder: str | None) -> list[export.SpaceNeeded]:
    """Check before training whether the files of the run can be written; return what they need on rank 0.

    Raises:
        ValueError: they cannot.
    """
    of_states = job.states.space if job.states else []
    if rank() != 0:
        if local_rank() == 0:  # of another node
            export.check_disks(of_states)
        return []
    weights = job.global_model.weights
    beside = 256 * len(job.global_model.state_dict()["weights"])  # their names and places in the file
    size = weights.nbytes + state_bytes(server_optimiser(settings), weights.numel()) + beside
    num_rounds = settings.num_rounds - max(len(job.history) - 1, 0)
    needs = export.space_for_checkpoints(job.checkpoints_dir, size, num_rounds, settings.keep_checkpoints)
    needs += of_states
    keeps_best = settings.best_metric is not None
    if keeps_best and job.checkpoints_dir is not None:
        of_best = export.space_for_checkpoints(
            job.checkpoints_dir, weights.nbytes + beside, min(num_rounds, 1), keep=None
        )
        needs += [replace(need, purpose="best.pt") for need in of_best]
    num_copies = 2 + keeps_best * (1 if job.checkpoints_dir else 2)  # model/, final_model.pt, best/ and best.pt
    num_merged = settings.merge * (1 + keeps_best)
    model = job.loaded.model
    # Layers may share a weight, which is saved once.
    saved, all_ = (
        sum({tensor.data_ptr(): tensor.nbytes + 256 for tensor in weights.values()}.values())
        for weights in (saved_weights(model), model.state_dict())
    )
    return export.check(
        needs,
        folder,
        settings.model,
        model,
        job.encoder.tokenizer,
        num_bytes=num_copies * saved + num_merged * (all_ - saved),
        num_folders=1 + keeps_best + num_merged,
    )


def describe(settings: Settings, job: Job, unused: Sequence[str] = ()) -> list[str]:
    """Return lines on what is about to run.

    Args:
        settings: of the run.
        job: what it is made of.
        unused: names of settings that were given and do nothing.
    """
    loaded = job.loaded
    weights = trained_weights(loaded.model)
    num_trained = sum(weight.numel() for weight in weights.values())
    num_weights = sum(weight.numel() for weight in loaded.model.parameters())
    new = "all" if weights.keys() <= set(loaded.new) else ", ".join(loaded.new) or "none"
    sizes = [size.num_examples for size in job.data.sizes]
    return [
        f"model     {settings.model}: {num_weights:,} weights ({num_weights * 4e-6:.1f} MB), "
        f"newly initialised: {new}" + f" ({loaded.note})" * bool(loaded.note),
        *describe_adapter(settings, job, num_trained, num_weights),
        *describe_training(settings),
        f"data      {settings.task_name}: {sum(sizes):,} examples to train on{describe_tokens(settings, job.data)}",
        *(describe_pool(settings, job, unused) if settings.centralised else describe_federation(settings, job)),
        *([job.states.describe()] if job.states else []),
        f"evaluated {describe_evaluation(settings, job.data)}",
        *([f"resumed   after round {len(job.history) - 1}, from {settings.checkpoints_dir}"] if job.history else []),
    ]


def describe_federation(settings: Settings, job: Job) -> list[str]:
    """Return lines on the sites and how they are averaged."""
    topology, sizes = job.topology, [size.num_examples for size in job.data.sizes]
    parameters = ", ".join(f"{key} {value:g}" for key, value in find_arguments("strategy", vars(settings)).items())
    how = settings.partition if settings.site_paths is None else "of their own"
    where = f"{topology.num_devices} device{'s' * (topology.num_devices > 1)} ({topology.devices[0].type})"
    where += f" of {world_size()} rank{'s' * (world_size() > 1)}"
    return [
        f"sites     {topology.num_sites} with {min(sizes):,} to {max(sizes):,} examples each ({how}), on {where}",
        f"strategy  {settings.strategy} ({parameters}), weighted by {settings.weight_by}, "
        f"sent as {settings.comm_dtype}",
        f"cohorts   {describe_cohorts(settings, job.schedule.cohorts)}",
    ]


def describe_pool(settings: Settings, job: Job, unused: Sequence[str]) -> list[str]:
    """Return lines on the training without a federation."""
    return [
        f"sites     none: centralised, on the examples of {job.topology.num_sites} sites together, on "
        f"{job.topology.devices[0]}",
        *([f"unused    {', '.join(unused)}, which are of a federation alone"] if unused else []),
        f"rounds    {settings.num_rounds}, each of {describe_amount(settings)}",
    ]


def describe_adapter(settings: Settings, job: Job, num_trained: int, num_weights: int) -> list[str]:
    """Return a line on the adapter, if there is one."""
    model = job.loaded.model
    if not is_adapted(model):
        return []
    kind = model.peft_config["default"].peft_type.value
    mean = f", lora_mean {settings.lora_mean or 'ab'}" if has_lora(model) else ""
    moving = job.global_model.num_moving
    in_turn = f", of which {' and '.join(f'{many:,}' for many in moving)} in turn" if len(moving) > 1 else ""
    return [
        f"adapter   {kind}{mean}: {num_trained:,} weights ({num_trained * 4e-6:.3f} MB) trained and shared{in_turn}, "
        f"{100 * num_trained / num_weights:.2f} % of all"
    ]


def describe_training(settings: Settings) -> list[str]:
    """Return a line for each setting that is another one than the model says it was trained with."""
    trained = of_training(settings.model)
    return [
        f"{name:<9} {getattr(settings, name)}, but {settings.model} was trained with {value}"
        for name, value in trained.items()
        if getattr(settings, name) not in (None, value)
    ]


def describe_tokens(settings: Settings, data: SiteData) -> str:
    """Return in words how many tokens a language model learns to predict, and what was left out of its data."""
    num_tokens = sum(size.num_trained_tokens for size in data.sizes)
    lost = [f"{count:,} {name.replace('_', ' ')}" for name, count in data.lost.items() if count]
    tokens = f", {num_tokens:,} tokens to predict, template {settings.template}" * bool(num_tokens)
    return tokens + f" ({', '.join(lost)})" * bool(lost)


def describe_cohorts(settings: Settings, cohorts: Cohorts) -> str:
    """Return in words how many sites take part in a round, and how much they train."""
    many = len(cohorts.eligible)
    sampled = f"{cohorts.num_sites:,} of " if cohorts.are_sampled else "all "
    sites = f"{sampled}{many:,} {'' if settings.eligible_sites is None else 'eligible '}site{'s' * (many > 1)}"
    given = settings.sites_per_round
    minimum = f"min_sites {settings.min_sites}"
    limits = [f"sites_per_round {given}", minimum] if isinstance(given, float) else []
    limits = limits or [minimum] * (settings.on_site_failure == "skip")
    of_limits = f" ({', '.join(limits)})" * bool(limits)
    rounds = f"{settings.num_rounds} round{'s' * (settings.num_rounds != 1)}"
    others = ", but for sites in site_settings" * any(
        name in own for own in (settings.site_settings or {}).values() for name in ("local_steps", "num_local_epochs")
    )
    return f"{sites}{of_limits} in each of {rounds}, for {describe_amount(settings)}{others}"


def describe_amount(settings: Settings) -> str:
    """Return in words how much a site trains in a round."""
    count, unit = (settings.local_steps, "step") if settings.local_steps else (settings.num_local_epochs, "epoch")
    return f"{count} {unit}{'s' * (count > 1)}"

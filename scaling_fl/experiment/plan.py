"""What would run where, its memory and bytes, found out without training."""

from dataclasses import replace
from typing import Any

import torch

from scaling_fl.distributed.collectives import all_gather, local_rank, rank
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
from scaling_fl.experiment.header import describe
from scaling_fl.experiment.local_training import find_autocast, local_optimiser
from scaling_fl.experiment.messages import count_traffic, describe_traffic
from scaling_fl.experiment.schedule import count_steps
from scaling_fl.experiment.settings import Settings, of_site
from scaling_fl.models.adapter_files import saved_weights
from scaling_fl.models.memory import estimate_bytes, state_bytes
from scaling_fl.models.quantised import measure
from scaling_fl.records import console, export


def plan(settings: Settings, folder: str | None = None) -> dict[str, Any]:
    """Build a run as if to train, print what it is, and return that, as one of its ranks.

    Args:
        settings: of the run.
        folder: where the record of the run would be; None has none.

    Returns:
        `labels`; `sites`, a dict for each with `rank` and `device` (None: any), `examples`, `tokens`, `steps` of a
        round, `labels` (examples by label), `trained_tokens` of a language model, and `name`, if sites have names;
        `devices`, a dict for each with `rank`, `device` and `bytes` (None: unknown); `weights` and `bytes` that a
        round sends, `message` (its tensors, and bytes before and after `comm_dtype`), `budget`, the bytes of all sites
        and rounds, both ways; `num_test`, `newly_initialised`, `resumed_after` (a round), and `state_bytes` of a
        site's optimiser that is kept and `node_state_bytes`, the most on the disk of the first node.

    Raises:
        ValueError: something of the run would be refused.
    """
    unused, settings = find_unused(settings), without_federation(settings)
    job = build(settings, may_be_empty=True)
    is_empty = job.global_model.weights.is_meta
    memory = all_gather({str(device): estimate_memory(settings, job, device) for device in job.topology.devices})
    if not is_empty:
        check_output(settings, job, folder)
        evaluation = make_evaluation(settings, job, console.Progress())
        make_federation(settings, job, console.Progress(), evaluation)  # tries it
    planned: dict[str, Any] = {
        "labels": list(job.data.label_names),
        "num_test": job.data.num_test,
        "newly_initialised": list(job.loaded.new),
        **count_traffic(settings, job),
        "sites": list_sites(settings, job),
        "devices": [
            {"rank": number, "device": device, "bytes": size}
            for number, of_rank in enumerate(memory)
            for device, size in of_rank.items()
        ],
        "resumed_after": len(job.history) - 1 if job.history else None,
        "state_bytes": job.states and job.states.site_bytes,
        "node_state_bytes": job.states and job.states.node_bytes,
    }
    without_weights = f"the plan is of sizes alone: {settings.model} has no weights, and nothing was computed"
    console.print_once(
        *describe(settings, job, unused),
        *describe_traffic(settings, job, planned),
        *console.site_table(planned["sites"]),
        *console.device_table(planned["devices"]),
        without_weights if is_empty else "the plan holds: a run with these settings would not be refused",
    )
    return planned


def list_sites(settings: Settings, job: Job) -> list[dict[str, Any]]:
    """Return what is known of each site of the federation before it trains."""
    return [
        site
        | {
            "steps": count_steps(site["examples"], of_site(settings, number)),
            "labels": dict(zip(job.data.label_names, site["labels"], strict=True)),
        }
        for number, site in enumerate(job.data.describe_sites(job.topology))
    ]


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
    saved = sum({tensor.data_ptr(): tensor.nbytes + 256 for tensor in saved_weights(model).values()}.values())
    merged = torch.float32.itemsize * measure(model)[0]
    return export.check(
        needs,
        folder,
        settings.model,
        model,
        job.encoder.tokenizer,
        num_bytes=num_copies * saved + num_merged * merged,
        num_folders=1 + keeps_best + num_merged,
    )

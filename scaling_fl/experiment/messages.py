"""What sites and ranks send each other, in words and in bytes."""

from typing import Any

from torch import nn

from scaling_fl.experiment.build import Job
from scaling_fl.experiment.settings import Settings
from scaling_fl.federation import int8
from scaling_fl.federation.aggregation import COMM_DTYPES
from scaling_fl.models.flat import trained_weights

MIB = 2.0**20
NUM_WAYS = 2  # to a site and back


def count_message(model: nn.Module, comm_dtype: str) -> dict[str, int]:
    """Return how many trained weights a model has, and how many bytes they are sent in.

    Args:
        model: may be without memory, on the device `meta`.
        comm_dtype: a key of COMM_DTYPES.

    Returns:
        `tensors`, where tied ones count once, their `bytes` as float32 and `bytes_sent` as `comm_dtype`; and
        `named_tensors` and `named_bytes`, where tied ones count each time that the model names them.
    """
    weights = list(trained_weights(model).values())
    named = [weight for _, weight in model.named_parameters(remove_duplicate=False) if weight.requires_grad]
    size, named_size = (sum(weight.numel() for weight in some) for some in (weights, named))
    return {
        "tensors": len(weights),
        "bytes": count_bytes(size, "float32"),
        "bytes_sent": count_bytes(size, comm_dtype),
        "named_tensors": len(named),
        "named_bytes": count_bytes(named_size, "float32"),
    }


def count_bytes(size: int, comm_dtype: str) -> int:
    """Return the bytes of so many weights as `comm_dtype`, a key of COMM_DTYPES."""
    return int8.count_bytes(size) if comm_dtype == "int8" else size * COMM_DTYPES[comm_dtype].itemsize


def describe_message(model: nn.Module, comm_dtype: str) -> list[str]:
    """Return a line on the bytes before and after, where messages are smaller than the weights."""
    message = count_message(model, comm_dtype)
    if message["bytes_sent"] >= message["bytes"]:
        return []
    is_tied = message["named_tensors"] > message["tensors"]
    twice = (
        f"; tied weights count once: by their names they are {message['named_tensors']:,} tensors of "
        f"{message['named_bytes']:,} bytes"
    )
    return [
        f"messages  {message['tensors']:,} tensors, {message['bytes']:,} bytes before and {message['bytes_sent']:,} "
        f"after rounding to {comm_dtype}" + twice * is_tied
    ]


def count_traffic(settings: Settings, job: Job) -> dict[str, Any]:
    """Return what a round and a run send, as `plan` returns it."""
    num_sites = job.schedule.cohorts.num_sites
    budget = count_budget(job.global_model.num_moving, settings.comm_dtype, num_sites, settings.num_rounds)
    return {
        "weights": job.global_model.weights.numel(),
        "bytes": job.global_model.count_bytes(num_sites),
        "message": count_message(job.loaded.model, settings.comm_dtype),
        "budget": 0 if settings.centralised else budget,
    }


def count_budget(num_moving: list[int], comm_dtype: str, num_sites: int, num_rounds: int) -> int:
    """Return the bytes of all messages between a server and its sites, both ways, as FlowerTune counts them.

    Args:
        num_moving: weights in a round of each turn.
        comm_dtype: a key of COMM_DTYPES; of `exact` a site's weights are float32, as only sums are wider.
        num_sites: of a round.
        num_rounds: of the run.
    """
    of_message = "float32" if comm_dtype == "exact" else comm_dtype
    sizes = (num_moving[round_ % len(num_moving)] for round_ in range(num_rounds))
    return NUM_WAYS * num_sites * sum(count_bytes(size, of_message) for size in sizes)


def describe_traffic(settings: Settings, job: Job, traffic: dict[str, Any]) -> list[str]:
    """Return lines on what a round and a run send, given what `count_traffic` returned."""
    num_sites, num_rounds = job.schedule.cohorts.num_sites, settings.num_rounds
    budget = (
        f"budget    {traffic['budget'] / MIB:,.1f} MiB between a server and its sites, as FlowerTune counts: "
        f"{num_sites} site{'s' * (num_sites > 1)} x {num_rounds} round{'s' * (num_rounds != 1)} x both ways, of "
        f"{'float32' if settings.comm_dtype == 'exact' else settings.comm_dtype}"
    )
    return [
        f"round     {traffic['weights']:,} weights shared, {traffic['bytes'] * 1e-6:.1f} MB sent by all ranks",
        *([] if settings.centralised else [budget]),
    ]

"""Ranks, and what they tell each other."""

import os
import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")

# A collective waits for the slowest site of the federation, and that one may need hours.
TIMEOUT = timedelta(hours=24)

_bytes_sent = 0


@contextmanager
def world() -> Iterator[None]:
    """Join the ranks that the environment names; an unlaunched process is a world of one.

    The environment is that of torchrun (`RANK`, `WORLD_SIZE`, `MASTER_ADDR`, `MASTER_PORT`). A rank
    computes with one CPU thread unless `OMP_NUM_THREADS` says otherwise: one thread a rank is the
    fastest way to fill a machine, and another number gives other bits.
    """
    torch.set_num_threads(num_threads())
    if accelerator() is not None:
        # Some kernels add in no fixed order otherwise, and a resumed run would end with other bits.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True, warn_only=True)
    if launched():
        dist.init_process_group(timeout=TIMEOUT)
    else:
        dist.init_process_group(timeout=TIMEOUT, store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


def launched() -> bool:
    """Tell whether a launcher started this process as one rank of several."""
    return "RANK" in os.environ


def num_threads() -> int:
    """Return the number of CPU threads that this rank computes with.

    Raises:
        ValueError: OMP_NUM_THREADS is not a whole number from 1.
    """
    return whole_number("OMP_NUM_THREADS", "1")


def rank() -> int:
    """Return this process's number among all ranks."""
    return dist.get_rank()


def bytes_sent() -> int:
    """Return how many bytes this rank has handed to collectives so far (0 in a world of one)."""
    return _bytes_sent


def _count(num_bytes: int) -> None:
    global _bytes_sent
    if dist.get_world_size() > 1:
        _bytes_sent += num_bytes


def gather(value: T) -> list[T]:
    """Return every rank's `value`, in the order of the ranks, on every rank."""
    _count(len(pickle.dumps(value)))
    values: list = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def share(value: T) -> T:
    """Return rank 0's `value` on every rank."""
    values = [value]
    _count(len(pickle.dumps(value)) if rank() == 0 else 0)
    dist.broadcast_object_list(values)
    return values[0]


def share_(tensor: Tensor) -> Tensor:
    """Overwrite `tensor` with rank 0's, which has the same shape and type."""
    _count(tensor.nbytes if rank() == 0 else 0)
    dist.broadcast(tensor, 0)
    return tensor


def sum_(tensor: Tensor) -> Tensor:
    """Overwrite `tensor` with its sum over all ranks."""
    _count(tensor.nbytes)
    dist.all_reduce(tensor)
    return tensor


def share_state(state: object) -> object:
    """Return rank 0's nest of dicts, lists and tensors on every rank, its tensors sent one by one."""

    def skeleton(value: object) -> object:
        if isinstance(value, Tensor):
            return value.to("meta")
        if isinstance(value, dict):
            return {key: skeleton(item) for key, item in value.items()}
        return [skeleton(item) for item in value] if isinstance(value, list) else value

    def fill(value: object, own: object) -> object:
        if isinstance(value, Tensor):
            return share_(own.contiguous() if isinstance(own, Tensor) else torch.empty(value.shape, dtype=value.dtype))
        if isinstance(value, dict):
            return {key: fill(item, own[key] if isinstance(own, dict) else None) for key, item in value.items()}
        if isinstance(value, list):
            return [fill(item, own[i] if isinstance(own, list) else None) for i, item in enumerate(value)]
        return value

    return fill(share(skeleton(state)), state if rank() == 0 else None)


def together(work: Callable[[], T]) -> T:
    """Return `work()` once it has succeeded on every rank.

    Raises on every rank what was raised on any: the `ValueError` of the first rank that has one, or
    else a `RuntimeError` that names the rank. So no rank is left waiting in a collective.
    """
    result, error = None, None
    try:
        result = work()
    except Exception as raised:
        error = raised
    outcomes = gather(None if error is None else (isinstance(error, ValueError), f"{type(error).__name__}: {error}"))
    failures = [(number, outcome) for number, outcome in enumerate(outcomes) if outcome is not None]
    if error is not None:
        raise error
    for number, (is_refusal, message) in failures:
        if is_refusal:
            raise ValueError(f"rank {number}: {message.removeprefix('ValueError: ')}")
        raise RuntimeError(f"rank {number} failed with {message}")
    return result  # type: ignore[return-value]


def first_of_node_first(work: Callable[[], T]) -> T:
    """Call `work` on each node's first rank, then on the others, which find its caches filled."""
    is_first = local_rank() == 0
    first = together(work if is_first else lambda: None)
    rest = together(work if not is_first else lambda: None)
    return first if is_first else rest  # type: ignore[return-value]


def local_rank() -> int:
    """Return this rank's number within its node."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def accelerator() -> str | None:
    """Return the kind of accelerator here; MPS does not count, as the exact mean needs float64."""
    device = torch.accelerator.current_accelerator(check_available=True)
    return None if device is None or device.type == "mps" else device.type


def whole_number(name: str, default: str) -> int:
    """Return a variable of the environment that is a number from 1.

    Raises:
        ValueError: it is not.
    """
    value = os.environ.get(name) or default
    if not value.isdecimal() or int(value) < 1:
        raise ValueError(f"{name}={value!r} was given: a whole number from 1 would do")
    return int(value)

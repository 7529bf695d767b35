"""What a site's function finds in the process, and what it may change there: nothing that others see.

A function such as `transformers.Trainer` takes the process for its own. It reads the launcher's variables, would wrap
the model for all ranks and wait for them, seeds the global generators, and sets flags of torch.
"""

import os
import random
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import backends

from scaling_fl.distributed.world import without_process_group
from scaling_fl.federation.site import Site
from scaling_fl.training.seeds import derive_seed, seed_device

# Of torchrun, accelerate and MPI, by which libraries tell that they are one rank of several.
LAUNCHER = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT")
LAUNCHERS = ("TORCHELASTIC_", "ROLE_", "ACCELERATE_", "OMPI_COMM_WORLD_", "MV2_COMM_WORLD_", "PMI_")

Access = tuple[Callable[[], Any], Callable[[Any], object]]  # reads something of the whole process, and sets it


def _attribute(module: Any, name: str) -> Access:
    return partial(getattr, module, name), partial(setattr, module, name)


GENERATORS: tuple[Access, ...] = (
    (random.getstate, random.setstate),
    (np.random.get_state, np.random.set_state),
    (torch.get_rng_state, torch.set_rng_state),
)
FLAGS: tuple[Access, ...] = (  # on which the bits depend
    (torch.get_num_threads, torch.set_num_threads),
    (torch.get_default_dtype, torch.set_default_dtype),
    # None for the CPU, as a default device that is set takes time at each call.
    (torch.get_default_device, lambda device: torch.set_default_device(None if device.type == "cpu" else device)),
    (torch.get_deterministic_debug_mode, torch.set_deterministic_debug_mode),
    (torch.is_grad_enabled, torch.set_grad_enabled),
    _attribute(backends, "fp32_precision"),
    (torch.get_float32_matmul_precision, torch.set_float32_matmul_precision),
    _attribute(backends.cudnn, "deterministic"),
    _attribute(backends.cudnn, "benchmark"),
)


@contextmanager
def isolated() -> Iterator[None]:
    """Hide the launcher's variables and the process group during the body, then leave the process as it was.

    That is its variables, its global generators on the CPU, torch's flags and current device, and the state of
    accelerate, which the body finds as in a new process.
    """
    environment = dict(os.environ)
    generators, flags = [get() for get, _ in GENERATORS], [_read(get) for get, _ in FLAGS]
    index = torch.accelerator.current_device_index() if torch.accelerator.is_available() else None
    states = [dict(state) for state in _accelerate_states()]
    for name in environment:
        if name in LAUNCHER or name.startswith(LAUNCHERS):
            del os.environ[name]
    for state in _accelerate_states():
        state.clear()
    try:
        with without_process_group():
            yield
    finally:
        for number, state in enumerate(_accelerate_states()):
            state.clear()
            state.update(states[number] if states else {})
        for name in os.environ.keys() - environment.keys():
            del os.environ[name]
        os.environ.update({name: value for name, value in environment.items() if os.environ.get(name) != value})
        if index is not None:
            torch.accelerator.set_device_index(index)
        for (get, set_), before in zip(FLAGS, flags, strict=True):
            if _read(get) != before:
                set_(before)
        for (_, set_), before in zip(GENERATORS, generators, strict=True):
            set_(before)


def seed_site(seed: int, round_: int, site: Site, *, is_alone: bool) -> None:
    """Seed the generators that a site's function uses.

    Args:
        seed: of all randomness in training.
        round_: the round's number.
        site: which trains.
        is_alone: no other device of this rank trains at the same time, so that the generators of the process, too, are
            the site's.
    """
    if is_alone:
        derived = derive_seed(seed, "dropout on the CPU", round_, site.number)
        torch.default_generator.manual_seed(derived)
        random.seed(derived)
        np.random.seed(derived % 2**32)
    seed_device(site.device, derive_seed(seed, "dropout", round_, site.number))


def _read(get: Callable[[], Any]) -> Any:
    """Return a flag; None if torch does not tell, as where a program has set it in an old way and in a new one."""
    with suppress(RuntimeError):
        return get()


def _accelerate_states() -> list[dict[str, Any]]:
    """Return what accelerate, if it is in use, has found out about the process."""
    state = sys.modules.get("accelerate.state")
    kinds = () if state is None else (state.PartialState, state.AcceleratorState, state.GradientState)
    return [kind._shared_state for kind in kinds]

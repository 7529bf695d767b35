"""What a site's function finds in the process, and what it may change there: nothing that others see.

A function such as `transformers.Trainer` takes the process for its own: it reads the launcher's variables, would wrap
the model for all ranks, and seeds the global generators.
"""

import os
import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

from scaling_fl.federation.site import Site
from scaling_fl.training.seeds import derive_seed, seed_device

# Of torchrun, by which libraries tell that they are one rank of several.
LAUNCHER = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT")


@contextmanager
def isolated() -> Iterator[None]:
    """Hide the launcher's variables during the body, then restore all variables and the global generators."""
    environment = dict(os.environ)
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    for name in environment:
        if name in LAUNCHER or name.startswith(("TORCHELASTIC_", "ROLE_")):
            del os.environ[name]
    _reset_accelerate()
    try:
        yield
    finally:
        _reset_accelerate()
        os.environ.clear()
        os.environ.update(environment)
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])


def seed_site(seed: int, round_: int, site: Site, *, is_alone: bool) -> None:
    """Seed the generators that a site's training uses.

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


def _reset_accelerate() -> None:
    """Let accelerate, if it is in use, find out anew whether it runs on several ranks."""
    state = sys.modules.get("accelerate.state")
    if state is not None:
        state.AcceleratorState._reset_state(reset_partial_state=True)

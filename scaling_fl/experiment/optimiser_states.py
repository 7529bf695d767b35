"""The states of the sites' optimisers that a run keeps: where they are, and how many bytes they take."""

import logging
import os
import secrets
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import nn

from scaling_fl.distributed.collectives import is_one_node, local_rank, world_size
from scaling_fl.distributed.placement import Topology, gather_on_node
from scaling_fl.distributed.signals import PeerLost
from scaling_fl.errors import one_line
from scaling_fl.experiment.local_training import local_optimiser
from scaling_fl.experiment.schedule import Schedule
from scaling_fl.experiment.settings import Settings
from scaling_fl.models.flat import trained_weights
from scaling_fl.models.memory import make_state, state_bytes
from scaling_fl.records.checkpoint import History
from scaling_fl.records.checksum import sha256
from scaling_fl.records.export import SpaceNeeded
from scaling_fl.records.site_states import SiteStates, local_folder, try_to_keep

log = logging.getLogger(__name__)

OVERHEAD_BYTES = 1_000  # of a file for each weight tensor, in addition to its numbers


@dataclass(frozen=True)
class KeptStates:
    """The states of the optimisers of this node's sites.

    Args:
        files: that have them.
        site_bytes: of a file, estimated; None: unknown.
        node_bytes: the most on the disk of this node, likewise.
        space: that they need there, if it is known.
    """

    files: SiteStates
    site_bytes: int | None
    node_bytes: int | None
    space: list[SpaceNeeded]

    def describe(self) -> str:
        """Return a line on how many bytes they take."""
        if self.site_bytes is None or self.node_bytes is None:
            return f"states    of unknown size, in {self.files.folder}"
        site, node = (f"{size * 1e-6:,.1f} MB" for size in (self.site_bytes, self.node_bytes))
        return f"states    {site} for a site's optimiser, at most {node} on this node, in {self.files.folder}"


def check_states(settings: Settings) -> None:
    """Check that there are states to keep, and where. Ranks call it, as it computes, and what forks must not.

    Raises:
        ValueError: the optimiser has no state, or the checkpoints of a centralised run are elsewhere.
    """
    if settings.optimiser_state == "reset":
        return
    if settings.centralised and settings.checkpoints_dir and local_folder(settings.checkpoints_dir) is None:
        raise ValueError(
            "checkpoints_dir: expected a folder of this machine, as a centralised run keeps the state of its optimiser "
            f"there, got {settings.checkpoints_dir!r}"
        )
    state = _make_state(settings)
    reason = f"optimiser={settings.optimiser!r} has no state" * (not state)
    try:
        try_to_keep(state)
    except ValueError as error:
        reason = str(error)
    if reason:
        raise ValueError(f"optimiser_state: expected 'reset', as {reason}, got 'keep'")


def keeps_state(settings: Settings) -> bool:
    """Tell whether the optimiser of a site has a state after a step, as far as that is known."""
    return bool(_make_state(settings))


def _make_state(settings: Settings) -> dict[str, Any]:
    try:
        return make_state(local_optimiser(settings))
    except Exception:  # of an optimiser that has other needs than a vector of weights
        return {"is known": False}  # it is taken for a state that can be kept


def keep_states(
    schedule: Schedule, model: nn.Module, history: History, identity: Mapping[str, Any], checkpoints_dir: str | None
) -> KeptStates | None:
    """Return what keeps the states of the optimisers, if the settings say so. All ranks call it.

    Args:
        schedule: of the run.
        model: that the sites train.
        history: of the rounds that are done, to which the run adds.
        identity: of the run.
        checkpoints_dir: as this machine knows it.

    Raises:
        ValueError: sites do not stay on their nodes, the folder cannot be written to, or a state is missing with which
            a site of a resumed run goes on.
    """
    settings, topology, cohorts = schedule.settings, schedule.topology, schedule.cohorts
    if settings.optimiser_state == "reset":
        return None
    folder = _find_folder(topology, checkpoints_dir)
    files = SiteStates(folder, history, sha256(dict(identity)), is_temporary=checkpoints_dir is None)
    files.check(topology.sites)
    num_sites = sum(gather_on_node(len({*cohorts.eligible} & {*topology.sites})))
    size = _measure_state(settings, model)
    if size is None:
        return KeptStates(files, None, None, [])
    num_rounds = settings.num_rounds - max(len(history) - 1, 0)
    need = files.measure(size, num_sites, min(cohorts.num_sites, num_sites), num_rounds)
    return KeptStates(files, size, need.peak + files.num_files * size, [need] if need.peak else [])


@contextmanager
def closing(states: KeptStates | None) -> Iterator[None]:
    """Remove temporary states after the body.

    They stay if a rank of another node was lost: that node may have saved the weights, and the resumed run needs them.
    """
    try:
        yield
    except PeerLost:
        if states is not None and states.files.is_temporary and local_rank() == 0 and not is_one_node():
            log.warning("%s", states.files.leave())
        raise
    finally:
        if states is not None:
            states.files.close()


def _find_folder(topology: Topology, checkpoints_dir: str | None) -> str:
    """Return the folder of states, which can be written to and is the same on all ranks of a node."""
    if not topology.is_fixed and world_size() > 1 and not is_one_node():
        raise ValueError(
            "optimiser_state: expected 'reset', as the sites of num_sites or site_column train on any node, got "
            "'keep'. Give each site an entry in the site_ids of its node"
        )
    if checkpoints_dir is None:
        name = f"scaling_fl-optimisers-{secrets.token_hex(8)}"
        folder = gather_on_node(os.path.join(tempfile.gettempdir(), name))[0]
        os.makedirs(folder, mode=0o700, exist_ok=True)  # here alone, so that a rank that ends late makes none
        return folder
    folder = str(local_folder(checkpoints_dir))
    try:
        os.makedirs(folder, mode=0o700, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise ValueError(
            f"checkpoints_dir: expected a folder that can be written to, got {folder!r} ({one_line(error)})"
        ) from error
    return folder


def _measure_state(settings: Settings, model: nn.Module) -> int | None:
    """Return about how many bytes the file of a state has; None if it does not tell."""
    weights = trained_weights(model).values()
    num_weights = sum(weight.numel() for weight in weights)
    try:
        return state_bytes(local_optimiser(settings), num_weights) + OVERHEAD_BYTES * len(weights)
    except Exception:  # as of an optimiser that takes matrices alone
        return None

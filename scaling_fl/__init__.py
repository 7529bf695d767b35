"""Federated fine-tuning of language models in plain PyTorch.

What is named here is imported when it is first used, so that `import scaling_fl` takes no time.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from scaling_fl.data.label_skew import by_label, dirichlet, dirichlet_sites, few_labels, shards
    from scaling_fl.data.partition import PARTITIONERS, by_size, iid, natural, partition_indices
    from scaling_fl.data.tasks import TASKS
    from scaling_fl.data.tasks.task import Task
    from scaling_fl.distributed.collectives import rank
    from scaling_fl.distributed.heartbeat import PeerError
    from scaling_fl.distributed.launch import launch
    from scaling_fl.distributed.placement import Topology, place_sites
    from scaling_fl.distributed.world import world
    from scaling_fl.experiment.result import Run
    from scaling_fl.experiment.settings import Settings
    from scaling_fl.experiment.start import plan, train
    from scaling_fl.federation.cohorts import Cohorts
    from scaling_fl.federation.global_model import GlobalModel
    from scaling_fl.federation.local_training import LocalTraining
    from scaling_fl.federation.round import Federation
    from scaling_fl.federation.site import TRAINERS, Site
    from scaling_fl.federation.strategies import STRATEGIES, make_strategy
    from scaling_fl.models.loading import MODELS, Nickname
    from scaling_fl.training.optimisers import OPTIMISERS

_MODULES = {
    "data.label_skew": ("by_label", "dirichlet", "dirichlet_sites", "few_labels", "shards"),
    "data.partition": ("PARTITIONERS", "by_size", "iid", "natural", "partition_indices"),
    "data.tasks": ("TASKS",),
    "data.tasks.task": ("Task",),
    "distributed.collectives": ("rank",),
    "distributed.heartbeat": ("PeerError",),
    "distributed.launch": ("launch",),
    "distributed.placement": ("Topology", "place_sites"),
    "distributed.world": ("world",),
    "experiment.result": ("Run",),
    "experiment.settings": ("Settings",),
    "experiment.start": ("plan", "train"),
    "federation.cohorts": ("Cohorts",),
    "federation.global_model": ("GlobalModel",),
    "federation.round": ("Federation",),
    "federation.local_training": ("LocalTraining",),
    "federation.site": ("TRAINERS", "Site"),
    "federation.strategies": ("STRATEGIES", "make_strategy"),
    "models.loading": ("MODELS", "Nickname"),
    "training.optimisers": ("OPTIMISERS",),
}
_HOMES = {name: module for module, names in _MODULES.items() for name in names}

__all__ = list(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'scaling_fl' has no attribute {name!r}")
    return getattr(import_module(f"scaling_fl.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return __all__

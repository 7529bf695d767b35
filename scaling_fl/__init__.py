"""Federated fine-tuning of language models in plain PyTorch."""

from importlib import import_module
from typing import Any

NAMES = {
    "launch": "distributed.launch",
    "world": "distributed.world",
    "place_sites": "distributed.placement",
    "Federation": "federation.round",
    "GlobalModel": "federation.global_model",
    "Site": "federation.site",
    "make_strategy": "federation.strategies",
    "partition_indices": "data.partition",
    "dirichlet": "data.partition",
    "iid": "data.partition",
}


def __getattr__(name: str) -> Any:
    if name not in NAMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{NAMES[name]}"), name)

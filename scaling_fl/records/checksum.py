"""The checksum of a state that is saved."""

import hashlib
import json
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

SHA256 = "sha256"  # its key in the state


def sign(state: dict[str, Any]) -> dict[str, Any]:
    """Return a state with its checksum, which `checkpoint.load` compares.

    Raises:
        TypeError: it has something else than tensors, numbers, texts, lists and dicts.
    """
    return state | {SHA256: sha256(state)}


def sha256(state: dict) -> str:
    """Return the SHA-256 of a state, with the bytes of its tensors."""
    digest = hashlib.sha256()

    def parts(value: Any) -> Iterator[bytes | memoryview]:
        if isinstance(value, Tensor):
            yield f"{value.dtype}{tuple(value.shape)}".encode()
            yield value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
        elif isinstance(value, dict) and all(isinstance(item, float | int) for item in value.values()):
            yield json.dumps(list(value.items())).encode()  # a number for each of many sites
        elif isinstance(value, list) and value and all(isinstance(item, list | float | int | None) for item in value):
            yield json.dumps(value).encode()  # the confusions of many labels, or points by step
        elif isinstance(value, dict):
            yield f"dict of {len(value)}".encode()
            for key, item in value.items():
                yield repr(key).encode()
                yield from parts(item)
        elif isinstance(value, list | tuple):
            yield f"list of {len(value)}".encode()
            for item in value:
                yield from parts(item)
        else:
            yield f"{json.dumps(value)} ".encode()

    for part in parts(state):
        digest.update(part)
    return digest.hexdigest()

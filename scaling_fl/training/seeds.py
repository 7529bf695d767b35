"""All randomness is derived: a seed is a function of what it is for."""

import hashlib

import torch


def derive_seed(seed: int, *purpose: str | int) -> int:
    """Return a seed that depends on all its arguments: 63 bits of a hash."""
    digest = hashlib.sha256(repr((seed, *purpose)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def seed_device(device: torch.device, seed: int) -> None:
    """Seed one device's own generator, so that a thread of another device is not disturbed."""
    if device.type == "cpu":
        torch.default_generator.manual_seed(seed)
    else:
        with torch.accelerator.device_index(device.index):
            torch.get_device_module(device).manual_seed(seed)

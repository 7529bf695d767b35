"""Assign the sites to ranks and devices."""

import os
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TypeVar

import torch

from scaling_fl.distributed.collectives import all_gather, local_rank, rank
from scaling_fl.distributed.world import accelerator

T = TypeVar("T")


@dataclass(frozen=True)
class Topology:
    """The sites of this rank and their devices. Only this module uses GPU ids."""

    sites: dict[int, torch.device]  # of this rank: site number in the federation -> device
    num_sites: int  # of the federation
    devices: tuple[torch.device, ...]  # of this rank, each once; never empty
    first_device: int  # number of this rank's first device among those of all ranks
    num_devices: int  # of all ranks
    entries: dict[int, int]  # of this rank: site number -> index in the node's site_ids
    num_entries: int  # of the site_ids of all nodes
    is_fixed: bool = True  # else a site may run on any device, wherever it is in `sites`

    def slice_of(self, device: torch.device) -> slice:
        """Return the slice for a device of this rank when a list is distributed evenly to all devices."""
        return slice(self.first_device + self.devices.index(device), None, self.num_devices)

    def find_device(self, number: int) -> torch.device | None:
        """Return the device of this rank with a number among those of all ranks; None if another rank has it."""
        index = number - self.first_device
        return self.devices[index] if 0 <= index < len(self.devices) else None

    @property
    def hosted(self) -> Collection[int]:
        """The sites that this rank may train."""
        return self.sites if self.is_fixed else range(self.num_sites)

    def renumber(self, numbers: dict[int, int]) -> "Topology":
        """Return a fixed topology in which each site has a new number. `numbers`: old -> new, of all ranks."""
        sites = {numbers[site]: device for site, device in self.sites.items()}
        entries = {numbers[site]: entry for site, entry in self.entries.items()}
        return replace(self, sites=sites, entries=entries, is_fixed=True)


def place_sites(site_ids: Sequence[int], num_sites: int | None = None) -> Topology:
    """Assign the sites to the entries of the nodes' `site_ids`, and each node's sites to its ranks by device.

    Sites are numbered through the nodes' lists in the order of the ranks, so a site's number does not depend on the
    number of ranks of its node. Without an accelerator all sites run on the CPU, and the ids only group them.

    Args:
        site_ids: the device id of each entry of this node.
        num_sites: of the federation, assigned to the entries round-robin, but not fixed. None: one site for each entry.

    Raises:
        ValueError: `site_ids` names a missing GPU, or there are more ranks than GPUs.
    """
    kind = accelerator()
    _check_devices(site_ids, kind)
    nodes: list[tuple[int, list[int]]] = all_gather((local_rank(), list(site_ids)))
    assignments = assign_sites(nodes, num_sites)
    entries = assignments[rank()]
    ids_of_sites = {site: site_ids[entry] for site, entry in entries.items()}
    if kind is None:
        sites = dict.fromkeys(ids_of_sites, torch.device("cpu"))
        devices: tuple[torch.device, ...] = (torch.device("cpu"),)
    else:
        # A rank without a site has a device, too: there are no more ranks than devices.
        device_ids = sorted(set(ids_of_sites.values())) or [sorted(set(site_ids))[local_rank()]]
        sites = {site: torch.device(kind, gpu) for site, gpu in ids_of_sites.items()}
        devices = tuple(torch.device(kind, gpu) for gpu in device_ids)
        torch.accelerator.set_device_index(device_ids[0])
    num_devices = all_gather(len(devices))
    return Topology(
        sites=sites,
        num_sites=sum(map(len, assignments)),
        devices=devices,
        first_device=sum(num_devices[: rank()]),
        num_devices=sum(num_devices),
        entries=entries,
        num_entries=sum(len(node_ids) for local_rank_, node_ids in nodes if local_rank_ == 0),
        is_fixed=num_sites is None,
    )


def gather_on_node(value: T) -> list[T]:
    """Return the values of the ranks of this rank's node. All ranks call it."""
    values = all_gather((local_rank(), value))
    (node,) = (ranks for ranks in _ranks_of_nodes(values) if rank() in ranks)
    return [values[number][1] for number in node]


def assign_sites(nodes: Sequence[tuple[int, Sequence[int]]], num_sites: int | None = None) -> list[dict[int, int]]:
    """Return the sites of each rank, as site number -> index in its node's list.

    Args:
        nodes: for each rank its number within its node, and its node's list of device ids.
        num_sites: assigned to the entries round-robin; None: one site for each entry.
    """
    assignments: list[dict[int, int]] = [{} for _ in nodes]
    places = [(ranks, entry) for ranks in _ranks_of_nodes(nodes) for entry in range(len(nodes[ranks.start][1]))]
    num_assigned = Counter[range]()  # to ranks that have the same device id
    for site in range(len(places) if num_sites is None else num_sites):
        ranks, entry = places[site % len(places)]
        site_ids = nodes[ranks.start][1]
        device_ids = sorted(set(site_ids))
        # With fewer device ids than ranks, on CPUs only, several ranks have the same id and its sites go round-robin.
        owners = ranks[device_ids.index(site_ids[entry]) % len(ranks) :: len(device_ids)]
        assignments[owners[num_assigned[owners] % len(owners)]][site] = entry
        num_assigned[owners] += 1
    return assignments


def _ranks_of_nodes(values: Sequence[tuple[int, object]]) -> list[range]:
    """Return the ranks of each node. The first value of each rank is its number within its node."""
    starts = [number for number, (of_node, _) in enumerate(values) if of_node == 0]
    return [range(start, end) for start, end in pairwise([*starts, len(values)])]


def _check_devices(site_ids: Sequence[int], kind: str | None) -> None:
    if kind is None:
        return
    count = torch.accelerator.device_count()
    missing = sorted(set(site_ids) - set(range(count)))
    if missing:
        raise ValueError(f"site_ids: expected GPU ids from 0 to {count - 1}, got {missing}. This node has {count} GPUs")
    num_ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    num_gpus = len(set(site_ids))
    if num_ranks > num_gpus:
        raise ValueError(
            f"RANKS: expected at most one rank a GPU, got {num_ranks} for {num_gpus} in site_ids. Set RANKS={num_gpus}"
        )

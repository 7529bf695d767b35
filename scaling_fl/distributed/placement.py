"""Where sites run."""

import os
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import torch

from scaling_fl.distributed.collectives import all_gather, local_rank, rank
from scaling_fl.distributed.world import accelerator


@dataclass(frozen=True)
class Topology:
    """Where this rank's sites run. After it nobody sees a GPU id."""

    sites: dict[int, torch.device]  # of this rank: number in the federation -> device
    num_sites: int  # in the whole federation
    devices: tuple[torch.device, ...]  # of this rank, each once; never empty
    first_device: int  # this rank's first, counted over all ranks
    num_devices: int  # of all ranks
    entries: dict[int, int]  # this rank's sites -> their entry in the node's site_ids
    num_slots: int  # the entries of all nodes' site_ids

    def turn(self, device: torch.device) -> slice:
        """Return which of many things a device of this rank takes, if all devices take turns."""
        return slice(self.first_device + self.devices.index(device), None, self.num_devices)

    def renumber(self, numbers: dict[int, int]) -> "Topology":
        """Give each site, of all ranks, the number that belongs to its old one."""
        sites = {numbers[site]: device for site, device in self.sites.items()}
        return replace(self, sites=sites, entries={numbers[site]: entry for site, entry in self.entries.items()})


def place_sites(site_ids: Sequence[int], num_sites: int | None = None) -> Topology:
    """Share the sites out to the nodes' lists of `site_ids`, and each node's to its ranks: by device, then by turn.

    Site numbers count through the nodes' lists in the order of the ranks, so a site's number does
    not depend on how many ranks its node runs. Without an accelerator the ids name CPU slots.

    Args:
        site_ids: the device id of each site of this node.
        num_sites: of the federation. None takes one for each entry of the nodes' lists; of another number the
            entries take one after the other in turn.

    Raises:
        ValueError: `site_ids` names a GPU that is not here, or there are more ranks than GPUs.
    """
    kind = accelerator()
    _check_devices(site_ids, kind)
    nodes: list[tuple[int, list[int]]] = all_gather((local_rank(), list(site_ids)))
    assignments = assign_sites(nodes, num_sites)
    entries = assignments[rank()]
    mine = {site: site_ids[entry] for site, entry in entries.items()}
    device_ids = sorted(set(mine.values()))
    if kind is None:
        sites = dict.fromkeys(mine, torch.device("cpu"))
        devices: tuple[torch.device, ...] = (torch.device("cpu"),)
    else:
        sites = {site: torch.device(kind, gpu) for site, gpu in mine.items()}
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
        num_slots=sum(len(of_node) for local_rank_, of_node in nodes if local_rank_ == 0),
    )


def assign_sites(nodes: Sequence[tuple[int, Sequence[int]]], num_sites: int | None = None) -> list[dict[int, int]]:
    """Return each rank's sites, as site number -> entry in its node's list.

    Args:
        nodes: for each rank its number within its node, and its node's list of device ids.
        num_sites: how many sites take the entries in turn; None gives each entry one.
    """
    starts = [index for index, (local_rank, _) in enumerate(nodes) if local_rank == 0] + [len(nodes)]
    assignments: list[dict[int, int]] = [{} for _ in nodes]
    slots = [(start, end, entry) for start, end in pairwise(starts) for entry in range(len(nodes[start][1]))]
    turns: defaultdict[tuple[int, int], int] = defaultdict(int)
    for site in range(len(slots) if num_sites is None else num_sites):
        start, end, entry = slots[site % len(slots)]
        site_ids, num_ranks = nodes[start][1], end - start
        device_ids = sorted(set(site_ids))
        position = device_ids.index(site_ids[entry])
        # With fewer devices than ranks (CPU slots only), the ranks of a device take turns.
        owners = range(position % num_ranks, num_ranks, len(device_ids))
        assignments[start + owners[turns[start, position] % len(owners)]][site] = entry
        turns[start, position] += 1
    return assignments


def _check_devices(site_ids: Sequence[int], kind: str | None) -> None:
    if kind is None:
        return
    count = torch.accelerator.device_count()
    missing = sorted(set(site_ids) - set(range(count)))
    if missing:
        raise ValueError(f"site_ids names GPUs {missing}, but this node has {count}: ids 0 to {count - 1} would do")
    num_ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if num_ranks > len(set(site_ids)):
        raise ValueError(
            f"{num_ranks} ranks were started for the {len(set(site_ids))} GPUs that site_ids names: "
            f"at most one rank a GPU would do (RANKS={len(set(site_ids))})"
        )

"""Which rank hosts which site, and on which device."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from scaling_fl.distributed import placement
from scaling_fl.distributed.launch import launch
from scaling_fl.distributed.placement import Topology, assign_sites, place_sites
from scaling_fl.distributed.world import world


def node(num_ranks: int, site_ids: list[int]) -> list[tuple[int, list[int]]]:
    return [(local_rank, site_ids) for local_rank in range(num_ranks)]


@pytest.mark.parametrize(
    ("ranks", "assignments"),
    [
        (node(1, [0, 0, 1, 1]), [{0: 0, 1: 1, 2: 2, 3: 3}]),
        (node(2, [0, 0, 1, 1]), [{0: 0, 1: 1}, {2: 2, 3: 3}]),
        (node(2, [1, 0, 1, 0]), [{1: 1, 3: 3}, {0: 0, 2: 2}]),
        (node(2, [0, 1, 2]), [{0: 0, 2: 2}, {1: 1}]),
        (node(2, [0, 0, 0]), [{0: 0, 2: 2}, {1: 1}]),
        (node(3, [0, 0, 1]), [{0: 0}, {2: 2}, {1: 1}]),
        (node(3, [7]), [{0: 0}, {}, {}]),
        (node(2, [0, 1]) + node(1, [0, 0]), [{0: 0}, {1: 1}, {2: 0, 3: 1}]),
        # Managed platforms that start one process per machine set no local rank.
        (node(1, [0]) + node(1, [0, 1]) + node(1, [0]), [{0: 0}, {1: 0, 2: 1}, {3: 0}]),
    ],
)
def test_sites_are_assigned_by_device_and_then_round_robin(ranks: list, assignments: list[dict[int, int]]) -> None:
    assert assign_sites(ranks) == assignments


def test_other_numbers_of_sites_are_assigned_to_the_entries_round_robin() -> None:
    two_nodes = node(2, [0, 1]) + node(1, [0])
    assert assign_sites(two_nodes, 7) == [{0: 0, 3: 0, 6: 0}, {1: 1, 4: 1}, {2: 0, 5: 0}]
    assert assign_sites(two_nodes, 3) == assign_sites(two_nodes)
    assert assign_sites(two_nodes, 2) == [{0: 0}, {1: 1}, {}]
    assert assign_sites(node(2, [0]), 5) == [{0: 0, 2: 0, 4: 0}, {1: 0, 3: 0}], "two ranks of one id"


site_id_lists = st.lists(st.integers(0, 5), min_size=1, max_size=9)


@given(st.lists(st.tuples(st.integers(1, 4), site_id_lists), min_size=1, max_size=3), st.none() | st.integers(1, 30))
def test_every_site_has_one_rank_and_its_number_depends_only_on_the_lists(
    nodes: list[tuple[int, list[int]]], num_sites: int | None
) -> None:
    ranks = [rank for count, site_ids in nodes for rank in node(count, site_ids)]
    assignments = assign_sites(ranks, num_sites)
    merged = {site: ranks[i][1][entry] for i, sites in enumerate(assignments) for site, entry in sites.items()}
    entries = [device for _, site_ids in nodes for device in site_ids]
    assert sum(map(len, assignments)) == len(merged) == (num_sites or len(entries))
    assert all(merged[site] == entries[site % len(entries)] for site in range(len(merged)))


@given(st.integers(1, 4), site_id_lists)
def test_a_gpu_belongs_to_one_rank_where_there_are_enough(num_ranks: int, site_ids: list[int]) -> None:
    if num_ranks <= len(set(site_ids)):
        devices = [{site_ids[entry] for entry in sites.values()} for sites in assign_sites(node(num_ranks, site_ids))]
        assert sum(map(len, devices)) == len(set(site_ids))
        assert all(devices)


def test_without_an_accelerator_all_sites_run_on_the_cpu() -> None:
    def topology() -> Topology:
        with world():
            return place_sites([5, 5, 9])

    cpu = torch.device("cpu")
    assert launch(topology, num_ranks=2, fork=True) == [
        Topology({0: cpu, 1: cpu}, 3, (cpu,), 0, 2, {0: 0, 1: 1}, 3),
        Topology({2: cpu}, 3, (cpu,), 1, 2, {2: 2}, 3),
    ]


def test_a_rank_without_a_site_has_a_gpu_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(placement, "accelerator", lambda: "cuda")
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)
    monkeypatch.setattr(torch.accelerator, "set_device_index", lambda number: None)

    def topology() -> Topology:
        with world():
            return place_sites([0, 1], num_sites=1)

    first, second = (torch.device("cuda", number) for number in (0, 1))
    assert launch(topology, num_ranks=2, fork=True) == [
        Topology({0: first}, 1, (first,), 0, 2, {0: 0}, 2, is_fixed=False),
        Topology({}, 1, (second,), 1, 2, {}, 2, is_fixed=False),
    ]


def test_a_missing_gpu_and_two_ranks_on_one_gpu_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(placement, "accelerator", lambda: "cuda")
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)
    with world():
        with pytest.raises(ValueError, match=r"^site_ids: expected GPU ids from 0 to 1, got \[2, 7\]\. This node"):
            place_sites([0, 7, 2])
        monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
        with pytest.raises(ValueError, match=r"^RANKS: expected at most one rank a GPU, got 2 for 1 in .* RANKS=1$"):
            place_sites([0, 0])

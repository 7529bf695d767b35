"""The data of the sites, and how one data set becomes that: it is partitioned, and some is held out."""

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from scaling_fl.data.examples import Examples, SiteSize
from scaling_fl.data.holdout import HoldOut
from scaling_fl.data.partition import Partitioner, hash_parts, name_sites, partition_indices
from scaling_fl.distributed.collectives import all_gather_items, rank
from scaling_fl.distributed.placement import Topology


@dataclass(frozen=True)
class Held:
    """Examples of single sites that they do not train on."""

    batches: dict[int, list[Examples]] = field(default_factory=dict)  # of each site of this rank
    counts: dict[int, int] = field(default_factory=dict)  # examples of each site of the federation that has some


@dataclass(frozen=True)
class SiteData:
    """The data of the sites and devices of this rank, and the size of all data."""

    label_names: tuple[str, ...]
    train: dict[int, Examples]  # of each site of this rank
    sizes: list[SiteSize]  # of what each site of the federation trains on
    sha256: dict[str, str]  # of the data of all sites
    names: tuple[str, ...] = ()  # of the sites of the federation, if they have any
    common: dict[torch.device, list[Examples]] = field(default_factory=dict)  # batches of a common test set
    num_common: int = 0  # examples in it
    lost: dict[str, int] = field(default_factory=dict)  # rows of all sites that were left out or cut
    test: Held = Held()
    validation: Held = Held()
    is_pooled: bool = False  # site 0 trains on the examples of all sites

    @property
    def num_test(self) -> int:
        """The number of all test examples."""
        return self.num_common or sum(self.test.counts.values())

    def name_of(self, site: int) -> str:
        """Return the name of a site that trains, "" if it has none."""
        if self.is_pooled:
            return "all sites"
        return self.names[site] if self.names else ""

    def test_on(self, device: torch.device, topology: Topology) -> list[Examples]:
        """Return all batches that a device may be evaluated on."""
        batches = list(self.common.get(device, ()))
        for held in (self.test, self.validation):
            for site, of_site in held.batches.items():
                if not topology.is_fixed or topology.sites[site] == device:
                    batches += of_site
        return batches

    def describe_sites(self, topology: Topology) -> list[dict[str, Any]]:
        """Return for each site of the federation its rank and device, if they are fixed, and how much it trains on."""
        own = {site: {"rank": rank(), "device": str(device)} for site, device in topology.sites.items()}
        places: dict[int, dict[str, Any]] = all_gather_items(own if topology.is_fixed else {})
        return [
            {
                **({"name": name} if (name := self.name_of(site)) else {}),
                **places.get(site, {"rank": None, "device": None}),
                "examples": size.num_examples,
                "tokens": size.num_tokens,
                **({"trained_tokens": size.num_trained_tokens} if size.num_trained_tokens else {}),
                "test_examples": sum(self.test.counts.values()) if self.is_pooled else self.test.counts.get(site, 0),
                "labels": list(size.label_counts),
            }
            for site, size in enumerate(self.sizes)
        ]


def partition_examples(
    train: Examples,
    test: Examples | None,
    label_names: tuple[str, ...],
    topology: Topology,
    partitioner: Partitioner,
    seed: int,
    val_batch_size: int,
    min_examples: int,
    owners: Sequence[str] | None,
    hold_out: HoldOut,
    *,
    is_central: bool,
) -> SiteData:
    """Partition a training set, which every rank has, over the sites, and the batches of a test set over the devices.

    Args:
        train: the training set.
        test: the common test set; None if there is none.
        label_names: in the order of the classes.
        topology: where the sites run.
        partitioner: returns the indices of each site.
        seed: of the partitioner.
        val_batch_size: most examples in a batch of the test set.
        min_examples: the fewest that a site may have before some are held out.
        owners: of each example, after which sites are named; None: sites have no names.
        hold_out: how the data of each site is cut. A site without held-out test examples gets a sample of the common
            test set if `hold_out.max_test` is given.
        is_central: evaluate on the whole common test set.
    """
    indices = partition_indices(train.labels, topology.num_sites, partitioner, seed, min_examples)
    trained, held = _cut(train, test, indices, hold_out)
    batches = test.fixed_batches(val_batch_size) if test is not None and is_central else []
    return SiteData(
        label_names=label_names,
        train={site: train.select(trained[site]) for site in topology.hosted},
        sizes=[train.select(of_site).size(len(label_names)) for of_site in trained],
        sha256={
            "training data (SHA-256)": train.sha256(),
            **({} if test is None else {"test data (SHA-256)": test.sha256()}),
            "partition (SHA-256)": hash_parts(trained),
        },
        names=name_sites(owners, indices) if owners is not None else (),
        common={device: batches[topology.slice_of(device)] for device in topology.devices} if batches else {},
        num_common=sum(map(len, batches)),
        test=hold(held["test"], topology.hosted, val_batch_size),
        validation=hold(held["validation"], topology.hosted, val_batch_size),
    )


def _cut(
    train: Examples, test: Examples | None, indices: Sequence[np.ndarray], hold_out: HoldOut
) -> tuple[list[np.ndarray], dict[str, dict[int, Examples]]]:
    """Return the indices that each site trains on, and its test and validation examples."""
    cuts = [hold_out.cut(train.select(part), site, has_test=False) for site, part in enumerate(indices)]
    trained = [part[cut["train"]] for part, cut in zip(indices, cuts, strict=True)]
    held = {
        split: {site: train.select(indices[site][cut[split]]) for site, cut in enumerate(cuts)}
        for split in ("test", "validation")
    }
    if test is not None and hold_out.max_test is not None and hold_out.test_fraction is None:
        held["test"] = {site: test.select(hold_out.sample_test(len(test), site)) for site in range(len(indices))}
    return trained, held


def hold(by_site: Mapping[int, Examples], hosted: Collection[int], val_batch_size: int) -> Held:
    """Return the examples of each site that has some, and the batches of the sites of this rank."""
    counts = {site: len(examples) for site, examples in sorted(by_site.items()) if len(examples)}
    return Held({site: by_site[site].fixed_batches(val_batch_size) for site in counts if site in hosted}, counts)


def add_counts(counts: Iterable[Mapping[str, int]]) -> dict[str, int]:
    """Return the sum of each count."""
    total: Counter[str] = Counter()
    for of in counts:
        total.update(of)
    return dict(total)

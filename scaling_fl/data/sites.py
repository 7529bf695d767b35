"""The data of the sites: parts of one data set, or files of each site."""

import hashlib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import astuple, dataclass, field
from typing import Any, TypeVar

import torch
from datasets import Dataset

from scaling_fl.data.examples import Examples, SiteSize
from scaling_fl.data.labels import settle_labels
from scaling_fl.data.partition import Partitioner, hash_parts, name_sites, partition_indices
from scaling_fl.data.reader import SPLITS, GivenColumns, read_file
from scaling_fl.data.tasks import name_labels
from scaling_fl.distributed.collectives import all_gather, is_one_node, rank
from scaling_fl.distributed.heartbeat import hide_from_peers
from scaling_fl.distributed.placement import Topology

K = TypeVar("K")
V = TypeVar("V")
W = TypeVar("W")
Encode = Callable[[Dataset, Sequence[str]], Examples]
MAX_LABELS = 1_000  # of a file whose labels other ranks see: the column of labels may be that of texts
ROW = re.compile(r"(?:: )?((?:row|line|text) [0-9]+)\b")  # how errors of files begin
SitePaths = Sequence[str | Sequence[str]]  # an entry a site: its training file, or that and its test file


@dataclass(frozen=True)
class SiteFile:
    """A file of a site of this rank."""

    site: str  # in words
    split: str
    path: str

    def use(self, work: Callable[..., V], *arguments: object) -> V:
        """Return `work(*arguments)`. Of an error other nodes learn only in which file and row it is."""
        try:
            return work(*arguments)
        except Exception as error:
            if not is_one_node():
                row = ROW.match(str(error).removeprefix(repr(self.path)))
                where = f"{row[1]} of the" if row else "the"
                reason = f"{where} {self.split} file of {self.site} is refused: its node prints the reason"
                hide_from_peers(error, reason)
            raise


@dataclass(frozen=True)
class SiteData:
    """The data of the sites and devices of this rank, and the size of all data."""

    label_names: tuple[str, ...]
    train: dict[int, Examples]  # of each site of this rank
    test: dict[torch.device, list[Examples]]  # the batches of a common test set for each device of this rank
    sizes: list[SiteSize]  # of each site of the federation
    num_test: int  # examples in all
    sha256: dict[str, str]  # of the data of all sites
    test_of: dict[int, list[Examples]] = field(default_factory=dict)  # or else the batches of each site of this rank
    num_test_of: dict[int, int] = field(default_factory=dict)  # examples of each site that has some
    names: tuple[str, ...] = ()  # of the sites of the federation, if they have any

    def name_of(self, site: int) -> str:
        """Return the name of a site, "" if it has none."""
        return self.names[site] if self.names else ""

    def test_on(self, device: torch.device, topology: Topology) -> list[Examples]:
        """Return all batches that a device may be evaluated on."""
        sites = [site for site in self.test_of if topology.sites[site] == device]
        return [*self.test[device], *(batch for site in sites for batch in self.test_of[site])]

    def describe_sites(self, topology: Topology) -> list[dict[str, Any]]:
        """Return for each site of the federation its rank and device, if they are fixed, and how much it trains on."""
        by_rank = all_gather(
            {site: str(device) for site, device in topology.sites.items()} if topology.is_fixed else {}
        )
        places: dict[int, tuple[int, str] | tuple[None, None]] = dict.fromkeys(range(topology.num_sites), (None, None))
        places |= _merge({site: (rank, of_rank[site]) for site in of_rank} for rank, of_rank in enumerate(by_rank))
        return [
            {
                **({"name": self.names[site]} if self.names else {}),
                "rank": places[site][0],
                "device": places[site][1],
                "examples": size.num_examples,
                "tokens": size.num_tokens,
                "labels": list(size.label_counts),
            }
            for site, size in enumerate(self.sizes)
        ]


def partition_examples(
    train: Examples,
    test: Examples,
    label_names: tuple[str, ...],
    topology: Topology,
    partitioner: Partitioner,
    seed: int,
    val_batch_size: int,
    min_examples: int = 1,
    owners: Sequence[str] | None = None,
) -> SiteData:
    """Partition a training set, which every rank has, over the sites, and the batches of a test set over the devices.

    Args:
        train: the training set.
        test: the test set.
        label_names: in the order of the classes.
        topology: where the sites run.
        partitioner: returns the indices of each site.
        seed: of the partitioner.
        val_batch_size: most examples in a batch of the test set.
        min_examples: the fewest that a site may have.
        owners: of each example, after which sites are named; None: sites have no names.
    """
    indices = partition_indices(train.labels, topology.num_sites, partitioner, seed, min_examples)
    batches = test.fixed_batches(val_batch_size)
    return SiteData(
        label_names=label_names,
        train={site: train.select(indices[site]) for site in topology.hosted},
        test={device: batches[topology.slice_of(device)] for device in topology.devices},
        sizes=[train.select(of_site).size(len(label_names)) for of_site in indices],
        num_test=len(test),
        sha256={
            "training data (SHA-256)": train.sha256(),
            "test data (SHA-256)": test.sha256(),
            "partition (SHA-256)": hash_parts(indices),
        },
        names=name_sites(owners, indices) if owners is not None else (),
    )


def read_site_files(
    task_name: str,
    site_paths: SitePaths,
    columns: GivenColumns,
    labels: Sequence[object] | None,
    topology: Topology,
    encode: Encode,
    val_batch_size: int,
) -> tuple[SiteData, Topology]:
    """Read the files of each site of this rank. Other ranks learn their labels, counts and SHA-256, nothing else.

    An error in a file is printed on its node; other nodes learn which file it is, and which row.

    Sites are numbered by the SHA-256 of their files, so that a site keeps its number, and with it its random
    numbers, whichever nodes come first. The topology returned has the new numbers.

    Args:
        task_name: a key of TASKS, of a task that takes files.
        site_paths: the files of each site of this node.
        columns: of the texts and of the labels; None takes the task's.
        labels: the possible labels, in the order of the classes; None takes the task's, or those of the data.
        topology: where the sites run, in the order of the nodes.
        encode: tokenises rows, given the names of the labels.
        val_batch_size: most examples in a batch of a test set.

    Raises:
        ValueError: a file is missing or not as it should be, or no site has a test file, or sites disagree on labels.
    """
    known = name_labels(task_name, labels)
    names = {site: f"site_paths[{entry}] on rank {rank()}" for site, entry in topology.entries.items()}
    paths = {site: zip(SPLITS, files_of(site_paths[entry]), strict=False) for site, entry in topology.entries.items()}
    files = {site: {split: SiteFile(names[site], split, path) for split, path in paths[site]} for site in paths}
    rows = _each(lambda file: (file, file.use(read_file, task_name, file.path, file.split, columns, known)), files)
    found = _each(lambda of: of[0].use(labels_to_send, of[1], known), rows)
    all_found = _merge(all_gather({names[site]: of_site for site, of_site in found.items()}))
    if not any("test" in of_site for of_site in all_found.values()):
        raise ValueError("site_paths: expected [training file, test file] of one site or more, got no test file")
    by_file = [(site, split, of_file) for site, of_site in all_found.items() for split, of_file in of_site.items()]
    label_names = settle_labels(by_file, known, may_lack=labels is not None)
    examples = _each(lambda of: of[0].use(encode, of[1], label_names), rows)
    return _number_sites(examples, label_names, topology, val_batch_size)


def _number_sites(
    examples: dict[int, dict[str, Examples]], label_names: tuple[str, ...], topology: Topology, val_batch_size: int
) -> tuple[SiteData, Topology]:
    all_sums = _merge(all_gather(_each(lambda encoded: (encoded.sha256(), len(encoded)), examples)))
    sizes = {site: astuple(of_site["train"].size(len(label_names))) for site, of_site in examples.items()}
    all_sizes = _merge(all_gather(sizes))
    order = sorted(all_sums, key=lambda site: (sorted(all_sums[site].items(), reverse=True), site))
    numbers = {site: number for number, site in enumerate(order)}
    everything = repr([all_sums[site] for site in order])
    num_test_of = {numbers[site]: of["test"][1] for site, of in all_sums.items() if "test" in of}
    data = SiteData(
        label_names=label_names,
        train={numbers[site]: of_site["train"] for site, of_site in examples.items()},
        test={device: [] for device in topology.devices},
        test_of={
            numbers[site]: of_site["test"].fixed_batches(val_batch_size)
            for site, of_site in examples.items()
            if "test" in of_site
        },
        num_test_of={site: num_test_of[site] for site in sorted(num_test_of)},
        sizes=[SiteSize(*all_sizes[site]) for site in order],
        num_test=sum(num_test_of.values()),
        sha256={"the sites' data (SHA-256)": hashlib.sha256(everything.encode()).hexdigest()},
    )
    return data, topology.renumber(numbers)


def labels_to_send(rows: Dataset, known: Mapping[str, str] | None) -> list[str]:
    """Return the labels of a file before they are sent to other ranks.

    Raises:
        ValueError: there are so many that they may be texts.
    """
    labels = sorted(rows.unique("label"))
    if known is None and len(labels) > MAX_LABELS:
        raise ValueError(f"label_column: expected at most {MAX_LABELS:,} different labels, got {len(labels):,}")
    return labels


def files_of(entry: str | Sequence[str]) -> list[str]:
    """Return the paths that an entry of `site_paths` names: the training file, and perhaps the test file."""
    return [entry] if isinstance(entry, str) else list(entry)


def _each(function: Callable[[V], W], files: dict[int, dict[str, V]]) -> dict[int, dict[str, W]]:
    """Return the result of a function for each file of each site."""
    return {site: {split: function(value) for split, value in of_site.items()} for site, of_site in files.items()}


def _merge(dicts: Iterable[dict[K, V]]) -> dict[K, V]:
    return {key: value for of_rank in dicts for key, value in of_rank.items()}

"""What the sites hold: parts of one data set that is dealt to them, or files of their own."""

import hashlib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from datasets import Dataset

from scaling_fl.data.corpus import agree_on_labels, check_labels, index_labels
from scaling_fl.data.examples import Examples
from scaling_fl.data.partition import Partitioner, partition_indices
from scaling_fl.data.source import Corpus
from scaling_fl.data.tasks import read_rows
from scaling_fl.distributed.collectives import all_gather, is_one_node, rank
from scaling_fl.distributed.heartbeat import hide_from_peers
from scaling_fl.distributed.placement import Topology
from scaling_fl.training.loop import Batch

K = TypeVar("K")
V = TypeVar("V")
W = TypeVar("W")
Encode = Callable[[Dataset], Examples]
OrderLabels = Callable[[tuple[str, ...]], tuple[str, ...]]
SPLITS = ("train", "test")
ROW = re.compile(r"(?: cannot be read as \w+: )?((?:row|line|text) [0-9]+)\b")  # how errors of files begin
SitePaths = Sequence[str | Sequence[str]]  # an entry a site: its training file, or that and its test file


@dataclass(frozen=True)
class SiteSize:
    """How much a site trains on."""

    num_examples: int
    num_tokens: int
    label_counts: tuple[int, ...]  # how many examples each class has


@dataclass(frozen=True)
class Part:
    """Some of the examples that there are."""

    examples: Examples
    indices: np.ndarray

    @classmethod
    def whole(cls, examples: Examples) -> "Part":
        """Return all of some examples."""
        return cls(examples, np.arange(len(examples)))

    def __len__(self) -> int:
        return len(self.indices)

    def extent(self, num_labels: int) -> SiteSize:
        """Return how much there is of them."""
        counts = np.bincount(self.examples.labels[self.indices], minlength=num_labels)
        return SiteSize(len(self), int(self.examples.lengths[self.indices].sum()), tuple(counts.tolist()))

    def batch(self) -> Batch:
        """Return all of them as one batch."""
        return self.examples.batch(self.indices)

    def longest_batch(self, batch_size: int) -> Batch:
        """Return the batch of them that takes the most memory."""
        longest_first = np.argsort(-self.examples.lengths[self.indices], kind="stable")
        return self.examples.batch(self.indices[longest_first[:batch_size]])

    def shuffled_batches(self, batch_size: int, seed: int) -> Iterator[Batch]:
        """Yield one epoch of them in the order of `seed`; the last batch may be smaller."""
        return self.examples.shuffled_batches(self.indices, batch_size, seed)


@dataclass(frozen=True)
class SiteFile:
    """A file of a site of this rank."""

    site: str  # in words
    split: str
    path: str

    def use(self, work: Callable[..., V], *arguments: object) -> V:
        """Return what `work` makes of it. Other nodes hear of an error only in which file and row it is."""
        try:
            return work(*arguments)
        except Exception as error:
            if not is_one_node():
                row = ROW.match(str(error).removeprefix(repr(self.path)))
                where = f"{row[1]} of the" if row else "the"
                hide_from_peers(error, f"{where} {self.split} file of {self.site} is refused: its node says why")
            raise


@dataclass(frozen=True)
class SiteData:
    """What the sites of this rank train on, what its devices evaluate on, and what all know of it."""

    topology: Topology
    label_names: tuple[str, ...]
    train: dict[int, Part]  # of each site of this rank
    test: dict[torch.device, list[Part]]  # the batches of each device of this rank
    extents: list[SiteSize]  # of each site of the federation
    num_test: int  # examples in all
    sha256: dict[str, str]  # of the data of all sites

    def describe_sites(self) -> list[dict[str, Any]]:
        """Return for each site of the federation its rank and device, and how much it trains on."""
        by_rank = all_gather({site: str(device) for site, device in self.topology.sites.items()})
        places = _merge({site: (rank, of_rank[site]) for site in of_rank} for rank, of_rank in enumerate(by_rank))
        return [
            {
                "rank": places[site][0],
                "device": places[site][1],
                "examples": extent.num_examples,
                "tokens": extent.num_tokens,
                "labels": list(extent.label_counts),
            }
            for site, extent in enumerate(self.extents)
        ]


def partition_corpus(
    corpus: Corpus,
    topology: Topology,
    encode: Encode,
    order_labels: OrderLabels,
    partitioner: Partitioner,
    seed: int,
    val_batch_size: int,
) -> SiteData:
    """Deal the examples of a corpus, which every rank has, to the sites; and its test set to the devices.

    Args:
        corpus: what every rank has.
        topology: where the sites run.
        encode: tokenises.
        order_labels: returns the labels in the order in which the model numbers them.
        partitioner: how the training set is dealt.
        seed: of the dealing.
        val_batch_size: most examples in a batch of the test set.
    """
    names = order_labels(corpus.label_names)
    train, test = (encode(rows).with_labels(corpus.label_names, names) for rows in (corpus.train, corpus.test))
    dealt = partition_indices(train.labels, topology.num_sites, partitioner, seed)
    parts = [Part(train, indices) for indices in dealt]
    batches = [Part(test, indices) for indices in test.fixed_batches(val_batch_size)]
    return SiteData(
        topology=topology,
        label_names=names,
        train={site: parts[site] for site in topology.sites},
        test={device: batches[topology.slice_of(device)] for device in topology.devices},
        extents=[part.extent(len(names)) for part in parts],
        num_test=len(test),
        sha256={"training data (SHA-256)": train.sha256(), "test data (SHA-256)": test.sha256()},
    )


def read_site_files(
    task_name: str,
    site_paths: SitePaths,
    columns: tuple[str | None, str | None],
    known: Mapping[str, str] | None,
    topology: Topology,
    encode: Encode,
    order_labels: OrderLabels,
    val_batch_size: int,
) -> SiteData:
    """Read the files of each site of this rank. Of them other ranks learn the labels, counts and SHA-256, nothing else.

    What is wrong with a file is said on its node; others hear which file it is, and of which row.

    Sites are numbered by the SHA-256 of their files, so that a site keeps its number, and with it its random
    numbers, whichever nodes come first.

    Args:
        task_name: a key of TASKS, of a task that takes files.
        site_paths: the files of each site of this node.
        columns: of the texts and of the labels; None takes the task's own.
        known: the name of each label that there may be; None takes those that sites have in common.
        topology: where the sites run, in the order of the nodes.
        encode: tokenises.
        order_labels: returns the labels in the order in which the model numbers them.
        val_batch_size: most examples in a batch of a test set.

    Raises:
        ValueError: a file is missing or not what it should be, or no site has a test file, or sites disagree on labels.
    """
    names = {site: f"site_paths[{entry}] on rank {rank()}" for site, entry in topology.entries.items()}
    files = {
        site: {
            split: SiteFile(names[site], split, path)
            for split, path in zip(SPLITS, files_of(site_paths[entry]), strict=False)
        }
        for site, entry in topology.entries.items()
    }
    rows = _each(lambda file: (file, file.use(read_rows, task_name, file.path, file.split, *columns)), files)
    labels = _each(lambda of: of[0].use(check_labels, of[1], known), rows)
    all_labels = _merge(all_gather({names[site]: of_site for site, of_site in labels.items()}))
    label_names = order_labels(agree_on_labels(all_labels, known))
    examples = _each(lambda of: of[0].use(encode, index_labels(of[1], label_names, known)), rows)
    all_sums = _merge(all_gather(_each(lambda encoded: (encoded.sha256(), len(encoded)), examples)))
    train = {site: Part.whole(of_site["train"]) for site, of_site in examples.items()}
    extents = _merge(all_gather({site: astuple(part.extent(len(label_names))) for site, part in train.items()}))
    order = sorted(all_sums, key=lambda site: (sorted(all_sums[site].items(), reverse=True), site))
    numbers = {site: number for number, site in enumerate(order)}
    everything = repr([all_sums[site] for site in order])
    batches = {
        site: [Part(of_site["test"], indices) for indices in of_site["test"].fixed_batches(val_batch_size)]
        for site, of_site in examples.items()
        if "test" in of_site
    }
    return SiteData(
        topology=topology.renumber(numbers),
        label_names=label_names,
        train={numbers[site]: part for site, part in train.items()},
        test={
            device: [batch for site in batches if topology.sites[site] == device for batch in batches[site]]
            for device in topology.devices
        },
        extents=[SiteSize(*extents[site]) for site in order],
        num_test=sum(of["test"][1] for of in all_sums.values() if "test" in of),
        sha256={"the sites' data (SHA-256)": hashlib.sha256(everything.encode()).hexdigest()},
    )


def files_of(entry: str | Sequence[str]) -> list[str]:
    """Return the paths that an entry of `site_paths` names: the training file, and perhaps the test file."""
    return [entry] if isinstance(entry, str) else list(entry)


def _each(function: Callable[[V], W], files: dict[int, dict[str, V]]) -> dict[int, dict[str, W]]:
    """Return what a function makes of each file of each site."""
    return {site: {split: function(value) for split, value in of_site.items()} for site, of_site in files.items()}


def _merge(dicts: Iterable[dict[K, V]]) -> dict[K, V]:
    return {key: value for of_rank in dicts for key, value in of_rank.items()}

"""The data of sites that have files of their own."""

import hashlib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import astuple, dataclass, replace
from typing import TypeVar

from datasets import Dataset

from scaling_fl.data.examples import Encode, Encoded, Examples, SiteSize
from scaling_fl.data.holdout import HoldOut
from scaling_fl.data.labels import settle_labels
from scaling_fl.data.reader import SPLITS, GivenColumns, read_file
from scaling_fl.data.sites import Held, SiteData, add_counts, hold
from scaling_fl.data.tasks import is_generative, name_labels
from scaling_fl.distributed.collectives import all_gather, all_gather_items, is_one_node, rank
from scaling_fl.distributed.heartbeat import hide_from_peers
from scaling_fl.distributed.placement import Topology

V = TypeVar("V")
W = TypeVar("W")
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


def read_site_files(
    task_name: str,
    site_paths: SitePaths,
    columns: GivenColumns,
    labels: Sequence[object] | None,
    topology: Topology,
    encode: Encode,
    val_batch_size: int,
    hold_out: HoldOut,
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
        hold_out: how the data of each site is cut; a site with a test file has it as its test examples.

    Raises:
        ValueError: a file is missing or not as it should be, or there is nothing to evaluate on, or sites disagree on
            labels.
    """
    known = name_labels(task_name, labels)
    names = {site: f"site_paths[{entry}] on rank {rank()}" for site, entry in topology.entries.items()}
    paths = {site: zip(SPLITS, files_of(site_paths[entry]), strict=False) for site, entry in topology.entries.items()}
    files = {site: {split: SiteFile(names[site], split, path) for split, path in paths[site]} for site in paths}
    rows = _each(lambda file: (file, file.use(read_file, task_name, file.path, file.split, columns, known)), files)
    has_labels = not is_generative(task_name)
    found = _each(lambda of: of[0].use(labels_to_send, of[1], known) if has_labels else [], rows)
    all_found = all_gather_items({names[site]: of_site for site, of_site in found.items()})
    holds_out = hold_out.test_fraction is not None or hold_out.validation_fraction is not None
    if not holds_out and not any("test" in of_site for of_site in all_found.values()):
        raise ValueError(
            "site_paths: expected [training file, test file] of one site or more, got no test file. site_test_fraction "
            "holds out a part of each site's training file"
        )
    by_file = [(site, split, of_file) for site, of_site in all_found.items() for split, of_file in of_site.items()]
    label_names = settle_labels(by_file, known, may_lack=labels is not None) if has_labels else ()
    encoded = _each(lambda of: of[0].use(encode, of[1], label_names), rows)
    return _number_sites(encoded, label_names, topology, val_batch_size, hold_out)


def _number_sites(
    encoded: dict[int, dict[str, Encoded]],
    label_names: tuple[str, ...],
    topology: Topology,
    val_batch_size: int,
    hold_out: HoldOut,
) -> tuple[SiteData, Topology]:
    examples = _each(lambda of: of.examples, encoded)
    all_sums = all_gather_items(_each(lambda of: (of.sha256(), len(of)), examples))
    order = sorted(all_sums, key=lambda site: (sorted(all_sums[site].items(), reverse=True), site))
    numbers = {site: number for number, site in enumerate(order)}
    cut = {numbers[site]: _cut_files(of_site, numbers[site], hold_out) for site, of_site in examples.items()}
    sizes = {site: astuple(of_site["train"].size(len(label_names))) for site, of_site in cut.items()}
    all_sizes = all_gather_items(sizes)
    held = {split: _hold_of_all(cut, split, val_batch_size) for split in ("test", "validation")}
    everything = repr([all_sums[site] for site in order])
    data = SiteData(
        label_names=label_names,
        train={site: of_site["train"] for site, of_site in cut.items()},
        sizes=[SiteSize(*all_sizes[site]) for site in range(len(order))],
        sha256={"the sites' data (SHA-256)": hashlib.sha256(everything.encode()).hexdigest()},
        test=held["test"],
        validation=held["validation"],
        lost=add_counts(all_gather(add_counts(of.lost for of_site in encoded.values() for of in of_site.values()))),
    )
    return data, topology.renumber(numbers)


def _hold_of_all(cut: Mapping[int, Mapping[str, Examples]], split: str, val_batch_size: int) -> Held:
    """Return the examples of a split of the sites of this rank, and how many all sites have."""
    held = hold({site: of_site[split] for site, of_site in cut.items()}, cut, val_batch_size)
    return replace(held, counts=dict(sorted(all_gather_items(held.counts).items())))


def _cut_files(files: Mapping[str, Examples], site: int, hold_out: HoldOut) -> dict[str, Examples]:
    """Return what a site trains on, its test and its validation examples, given its files."""
    cut = hold_out.cut(files["train"], site, has_test="test" in files)
    examples = {split: files["train"].select(indices) for split, indices in cut.items()}
    if "test" in files:
        examples["test"] = files["test"].select(hold_out.sample_test(len(files["test"]), site))
    return examples


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

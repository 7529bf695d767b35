"""The data of a run, out of the settings."""

from dataclasses import dataclass, replace
from functools import partial

from datasets import Dataset

from scaling_fl.data.examples import Encode, Encoded
from scaling_fl.data.holdout import HoldOut
from scaling_fl.data.reader import read_task, sample
from scaling_fl.data.site_files import files_of, read_site_files
from scaling_fl.data.sites import SiteData, add_counts, partition_examples
from scaling_fl.distributed.collectives import local_first
from scaling_fl.distributed.placement import Topology
from scaling_fl.experiment.parameters import bind
from scaling_fl.experiment.settings import Settings
from scaling_fl.storage import host_path


@dataclass(frozen=True)
class Rows:
    """The rows of a data set that is to be partitioned."""

    used: dict[str, Dataset]  # of "train" and, if it is used, "test"
    label_names: tuple[str, ...]
    owners: list[str] | None  # the name of the site of each row to train on, if the data has them


def read_rows(settings: Settings) -> Rows:
    """Read the rows of the task's data set that are used."""
    train_path, test_path = (path and host_path(path) for path in (settings.train_path, settings.test_path))
    columns = settings.text_column, settings.label_column, settings.site_column
    holds_out = settings.site_test_fraction is not None or settings.validation_fraction is not None
    draws = settings.max_test_examples_per_site is not None and settings.site_test_fraction is None
    uses_test = settings.central_evaluation or draws  # each site's test examples out of the common test set
    rows, names = read_task(
        settings.task_name,
        train_path,
        test_path if uses_test else None,
        columns,
        settings.labels,
        needs_test=draws or (settings.central_evaluation and not holds_out),
    )
    if not uses_test:
        rows.pop("test", None)
    counts = {"train": settings.max_train_examples, "test": settings.max_test_examples}
    used = {split: sample(of_split, counts[split], settings.data_seed) for split, of_split in rows.items()}
    owners = None if settings.site_column is None else used["train"]["site"][:]
    return Rows(used, names, owners)


def read_data(settings: Settings, topology: Topology, encode: Encode, rows: Rows | None) -> tuple[SiteData, Topology]:
    """Read the data of the sites: of one data set that is partitioned, or of files of each site, without `rows`.

    The topology returned numbers the sites as the data does.
    """
    if rows is not None:
        data = local_first(partial(partition_rows, settings, topology, encode, rows))
    else:
        data, topology = read_files(settings, topology, encode)
    train = {site: replace(examples, is_packed=settings.pack) for site, examples in data.train.items()}
    return replace(data, train=train), topology


def read_files(settings: Settings, topology: Topology, encode: Encode) -> tuple[SiteData, Topology]:
    """Read the files of the sites of this rank."""
    if settings.num_sites not in (None, topology.num_entries):
        raise ValueError(
            f"num_sites: expected {topology.num_entries}, the number of sites in the site_paths of all nodes, got "
            f"{settings.num_sites}. A site's data stays on its node, so start all nodes"
        )
    site_paths = [list(map(host_path, files_of(entry))) for entry in settings.site_paths or ()]
    columns = settings.text_column, settings.label_column
    data, topology = read_site_files(
        settings.task_name,
        site_paths,
        columns,
        settings.labels,
        topology,
        encode,
        settings.val_batch_size,
        make_hold_out(settings),
    )
    for site, entry in sorted(topology.entries.items()):
        print(f"site {site:<4} {' and '.join(site_paths[entry])}, {data.sizes[site].num_examples:,} examples")
    return data, topology


def partition_rows(settings: Settings, topology: Topology, encode: Encode, rows: Rows) -> SiteData:
    """Tokenise the rows, and partition them over the sites."""
    encoded: dict[str, Encoded] = {}
    for split, of_split in rows.used.items():
        try:
            encoded[split] = encode(of_split, rows.label_names)
        except ValueError as error:
            raise ValueError(f"the {'training' if split == 'train' else split} data: {error}") from error
    partitioner = bind("partition", vars(settings))
    owners = None if rows.owners is None else [rows.owners[index] for index in encoded["train"].kept]
    if owners is not None:
        if emptied := {*(rows.owners or ())} - {*owners}:
            raise ValueError(
                f"skip_long: expected a row left of each value of site_column, got none of {min(emptied)!r}. Leave its "
                "rows out"
            )
        partitioner = partial(partitioner, owners=owners)
    data = partition_examples(
        encoded["train"].examples,
        encoded["test"].examples if "test" in encoded else None,
        rows.label_names,
        topology,
        partitioner,
        settings.data_seed,
        settings.val_batch_size,
        settings.min_examples,
        owners,
        make_hold_out(settings),
        is_central=settings.central_evaluation,
    )
    return replace(data, lost=add_counts(of.lost for of in encoded.values()))


def make_hold_out(settings: Settings) -> HoldOut:
    """Return how the data of each site is cut."""
    return HoldOut(
        settings.site_test_fraction,
        settings.validation_fraction,
        settings.max_train_examples_per_site,
        settings.max_test_examples_per_site,
        settings.data_seed,
    )

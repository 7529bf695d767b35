"""Sites that a column of the data names: their names are texts, and stand wherever a site does."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from datasets import Dataset
from helpers import WORDS, Command, refusal, succeed, weights_hash

from scaling_fl.data.reader import pick, read_file, read_task
from scaling_fl.distributed.world import world
from scaling_fl.experiment.build import Job, build
from scaling_fl.experiment.settings import Settings
from scaling_fl.federation.site import Site, describe_failure
from scaling_fl.report.findings import site_name
from scaling_fl.report.runs import read

COLUMNS = ("text", "label", "site")
NAMES = ["007", "7", " b ", "1e3", "nan", "Zoe\u0308"]  # as a file may write them
READ = ["007", "7", "b", "1e3", "nan", "Zo\u00eb"]


def put(path: Path, names: list[Any], column: str = "site") -> str:
    """Write rows with these sites into a file, in the format that its name promises."""
    rows = [{"text": f"{WORDS[row % 9]} here", "label": "ab"[row % 2], column: name} for row, name in enumerate(names)]
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows))
    elif path.suffix == ".jsonl":
        path.write_text("\n".join(map(json.dumps, rows)))
    else:
        separator = "\t" if path.suffix == ".tsv" else ","
        lines = [separator.join(("" if value is None else str(value)) for value in row.values()) for row in rows]
        path.write_text("\n".join([separator.join(rows[0]), *lines]) + "\n")
    return str(path)


@pytest.mark.parametrize("name", ["t.csv", "t.tsv", "t.jsonl", "t.json", "t.parquet"])
def test_names_keep_their_letters_in_all_formats(name: str, tmp_path: Path) -> None:
    path = put(tmp_path / name, NAMES)
    rows = read_file("text", path, "train", COLUMNS)
    assert rows["site"][:] == READ
    assert rows["label"][:] == ["a", "b"] * 3
    assert read_file("text", path, "test", COLUMNS).column_names == ["text", "label"], "the test set is not partitioned"


@pytest.mark.parametrize("name", ["t.csv", "t.tsv", "t.jsonl", "t.json", "t.parquet"])
@pytest.mark.parametrize("missing", [None, ""])
def test_a_row_without_a_site_is_named(name: str, missing: str | None, tmp_path: Path) -> None:
    path = put(tmp_path / name, ["x", "x", missing, "y", None])
    assert refusal(lambda: read_file("text", path, "train", COLUMNS)) == (
        f"{path!r}: row 3: expected a value in 'site', got none. Leave the row out"
    )


@pytest.mark.parametrize("name", ["t.jsonl", "t.parquet"])
def test_numbers_are_names_as_people_write_them(name: str, tmp_path: Path) -> None:
    rows = read_file("text", put(tmp_path / name, [7, 10, 2**60, 10]), "train", COLUMNS)
    assert rows["site"][:] == ["7", "10", str(2**60), "10"]
    path = put(tmp_path / f"none{name}", [7, None, 3])  # which pandas would make 7.0, NaN, 3.0
    assert "row 2: expected a value in 'site', got none" in refusal(lambda: read_file("text", path, "train", COLUMNS))


def test_a_column_that_names_no_sites_is_refused(tmp_path: Path) -> None:
    for name in ("l.jsonl", "l.parquet"):
        path = put(tmp_path / name, [[1], [2]])
        sentence = refusal(lambda path=path: read_file("text", path, "train", COLUMNS))
        assert "site_column='site': expected texts or numbers, got l" in sentence
    path = put(tmp_path / "t.csv", NAMES)
    for column, says in (
        ("user", f"site_column: expected a column of {path!r} ('text', 'label', 'site'), got 'user'"),
        ("label", "label_column, site_column: expected two columns, got 'label' for both"),
    ):
        assert refusal(lambda column=column: read_task("text", path, path, ("text", "label", column))) == says
    lists = Dataset.from_dict({"text": ["a"], "label": ["b"], "site": [["c"]]})
    assert "'hub': site_column='site': expected texts alone" in refusal(lambda: pick(lists, "hub", COLUMNS))


@pytest.fixture
def build_of(tmp_path: Path, small_run: dict[str, Any]) -> Callable[..., Job]:
    """Builds a run of the sites named, row by row."""

    def build_of(names: list[str], column: str = "site", **settings: Any) -> Job:
        path = put(tmp_path / "sites.csv", names, column)
        given = small_run | {"train_path": path, "test_path": path, "partition": "natural", "site_column": column}
        with world():
            return build(Settings(**given | settings))

    return build_of


def test_each_value_is_a_site_in_the_order_of_the_names(build_of: Callable[..., Job]) -> None:
    names = ["9", "10", "a", "9", "10", "9"]
    job = build_of(names)
    assert job.data.names == ("10", "9", "a")
    assert job.topology.sites.keys() == {0, 1, 2}
    assert [size.num_examples for size in job.data.sizes] == [2, 3, 1]
    assert build_of(names[::-1]).data.names == ("10", "9", "a")
    assert build_of(names, num_sites=2).data.names == ("10, a", "9")
    sentence = refusal(lambda: build_of(names, num_sites=4))
    assert sentence.startswith("num_sites, site_ids: expected at most 3 sites, the number of values of site_column")
    assert "expected numbers of sites from 0 to 2, got 3" in refusal(
        lambda: build_of(names, site_settings={3: {"batch_size": 1}})
    )


def test_another_column_or_other_names_are_another_partition_of_the_same_tokens(build_of: Callable[..., Job]) -> None:
    identities = [
        build_of(["a", "b", "a", "b"]).identity,
        build_of(["a", "b", "b", "b"]).identity,
        build_of(["a", "a", "b", "b"], "user", partition="iid", site_column=None, num_sites=2, data_seed=5).identity,
        build_of(["a", "a", "b", "b"], "user").identity,
    ]
    assert len({identity["training data (SHA-256)"] for identity in identities}) == 1
    assert len({identity["partition (SHA-256)"] for identity in identities}) == 4


@pytest.mark.long(seconds=7)
def test_a_run_that_is_resumed_has_the_same_partition(command: Command, tmp_path: Path) -> None:
    given = {"partition": "natural", "site_column": "site", "test_path": "s.csv", "train_path": "s.csv"}
    given |= {"checkpoints_dir": "checkpoints", "num_rounds": 1}
    put(tmp_path / "s.csv", ["a", "b<i>", "c", "b<i>", "a", "c", "a", "a"])
    planned = succeed(command("plan", **given))
    table = planned[planned.index("site |") :].splitlines()[:4]
    assert [line[:11] for line in table] == ["site | name", "   0 | a   ", "   1 | b<i>", "   2 | c   "]
    assert "sites     3 with 2 to 4 examples each (natural), on 1 device" in planned
    bits = weights_hash(succeed(command(**given, report=True)))
    folder = tmp_path / "runs" / "1"
    assert [site["name"] for site in json.loads((folder / "info.json").read_text())["sites"]] == ["a", "b<i>", "c"]
    assert site_name(read([str(folder)])[0], 1) == "site 1 (b<i>)"
    assert "<td>b&lt;i&gt;</td>" in (folder / "report.html").read_text()
    assert weights_hash(succeed(command(**given | {"checkpoints_dir": None}, ranks=2))) == bits
    put(tmp_path / "s.csv", ["a", "b<i>", "c", "b<i>", "a", "c", "c", "a"])
    status, output = command(**given | {"num_rounds": 2})
    assert status == 1
    assert "got 'checkpoints', where partition (SHA-256) was '" in output


def test_an_error_at_a_site_has_its_name() -> None:
    site = Site(3, torch.device("cpu"), 5, name="St. Mary's\n")
    assert describe_failure(site, 2, ValueError("no")) == "site 3 (St. Mary's\\n) failed in round 2: no"
    assert describe_failure(replace(site, name=""), 2, KeyError("k")) == "site 3 failed in round 2 with KeyError: 'k'"

"""Paths in a container's data folder lead to the same files outside of it."""

import shutil
from pathlib import Path

import pytest
from helpers import Command, succeed, weights_hash

from scaling_fl.storage import host_path

DATA = "/proc/no/data"  # for /workspace/data, which exists if the tests run in a container


@pytest.fixture(autouse=True)
def mount(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that a container mounts as its data folder, and an empty working directory."""
    folder = tmp_path / "my disk"
    folder.mkdir()
    (folder / "there.csv").touch()
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setattr("scaling_fl.storage.CONTAINER_DATA", DATA)
    monkeypatch.setenv("DATA_MOUNT_DIR", str(folder))
    return folder


@pytest.mark.parametrize(
    ("path", "found"),
    [
        ("/proc/no/data/a/b.csv", "{mount}/a/b.csv"),
        ("/proc/no/data/", "{mount}/"),
        ("/proc/no/data", "{mount}"),
        ("file:///proc/no/data/b.csv", "file://{mount}/b.csv"),
        ("zip://b.csv::/proc/no/data/c.zip", "zip://b.csv::{mount}/c.zip"),
        ("data/there.csv", "{mount}/there.csv"),
        ("./data/there.csv", "{mount}/there.csv"),
        ("data/not-there", "data/not-there"),  # may be on the hub
        ("/proc/no/database/b.csv", "/proc/no/database/b.csv"),
        ("/else/proc/no/data/b.csv", "/else/proc/no/data/b.csv"),
        ("s3://nowhere/data/b.csv", "s3://nowhere/data/b.csv"),
        ("proc/no/data/b.csv", "proc/no/data/b.csv"),
        ("/data/there.csv", "/data/there.csv"),
    ],
)
def test_a_container_path_is_translated_to_the_mounted_folder(path: str, found: str, mount: Path) -> None:
    assert host_path(path) == found.format(mount=mount)


@pytest.mark.parametrize(("given", "folder"), [("", "{here}/data"), ("../x", "{here}/../x"), ("~/x", "{home}/x")])
def test_the_folder_is_the_one_that_run_local_mounts(
    given: str, folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DATA_MOUNT_DIR", given)
    expected = Path(folder.format(here=tmp_path / "here", home=Path.home())).resolve()
    assert host_path("/proc/no/data/b.csv") == f"{expected}/b.csv"


def test_a_path_whose_folder_exists_is_unchanged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """This is the case in a container."""
    monkeypatch.setattr("scaling_fl.storage.CONTAINER_DATA", str(tmp_path / "data"))
    for folder in (tmp_path / "data", Path("data")):
        folder.mkdir()
        assert host_path(f"{folder}/there.csv") == f"{folder}/there.csv"


def test_a_run_finds_all_its_paths_in_the_mounted_folder(
    command: Command, mount: Path, tiny_model: str, corpus: tuple[Path, Path]
) -> None:
    plain = succeed(command("--unobserved", num_rounds=1))
    shutil.copytree(tiny_model, mount / "model")
    for path, name in zip(corpus, ("train.csv", "test.csv"), strict=True):
        shutil.copy(path, mount / name)
    paths = {"train_path": f"{DATA}/train.csv", "test_path": "data/test.csv", "model": f"{DATA}/model"}
    output = succeed(command("--unobserved", num_rounds=1, checkpoints_dir=f"{DATA}/job", **paths))
    assert weights_hash(output) == weights_hash(plain)
    assert (mount / "job" / "round-1.pt").exists()
    site_paths = f"[['{DATA}/train.csv','data/test.csv']]"
    separate = {"train_path": None, "test_path": None, "site_paths": site_paths, "site_ids": "[0]"}
    assert f"{mount}/train.csv and {mount}/test.csv, " in succeed(command("plan", **separate))


@pytest.mark.parametrize("key", ["train_path", "site_paths", "checkpoints_dir", "model"])
def test_an_error_names_the_given_path_and_the_path_on_this_machine(command: Command, mount: Path, key: str) -> None:
    (mount / "a file").touch()
    given = f"{DATA}/a file/none.csv"
    settings = {key: f"['{given}']" if key == "site_paths" else given}
    if key == "site_paths":
        settings |= {"site_ids": "[0]", "train_path": None, "test_path": None}
    status, output = command("--unobserved", **settings)
    (sentence,) = output.splitlines()
    assert (status, sentence[:7]) == (1, "error: ")
    assert given in sentence
    assert f"{mount}/a file/none.csv" in sentence

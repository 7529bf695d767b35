"""Checkpoints are complete or absent, and a run resumes only from checkpoints of the same run."""

import logging
import pickle
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from fsspec.implementations.local import LocalFileSystem
from helpers import history
from torch import nn

from scaling_fl.distributed.world import world
from scaling_fl.experiment.build import restore_
from scaling_fl.federation.global_model import GlobalModel
from scaling_fl.federation.strategies import make_strategy
from scaling_fl.records import checkpoint
from scaling_fl.storage import WriteError


@pytest.fixture(autouse=True)
def _alone() -> Iterator[None]:
    with world():
        yield


def make_server(strategy: str = "fedadam", num_weights: int = 5, rounds: int = 0) -> GlobalModel:
    torch.manual_seed(0)
    server = GlobalModel(nn.Linear(1, num_weights), make_strategy(strategy))
    for _ in range(rounds):
        server.exchange(server.weights - 0.1, Fraction(1))
        server.step()
    return server


SETTINGS = {"seed": 1, "strategy": "fedadam", "betas": None}


@pytest.mark.parametrize(
    "place", ["{tmp_path}/a/b", "{tmp_path}/a/", "file://{tmp_path}/a", "memory://checkpoints", "memory://more/"]
)
def test_a_checkpoint_is_restored_from_any_file_system(place: str, tmp_path: Path) -> None:
    directory = place.format(tmp_path=tmp_path)
    assert not checkpoint.exists(directory)
    saved = make_server(rounds=2)
    checkpoint.save(directory, saved.state_dict(), history(2), SETTINGS, keep=None)
    assert checkpoint.exists(directory)
    restored = make_server()
    assert restore_(restored, directory, SETTINGS) == history(2)
    for server in (saved, restored):
        server.exchange(server.weights - 0.3, Fraction(1))
        server.step()
    assert restored.sha256() == saved.sha256(), "the server optimiser went on too"


def test_nothing_is_saved_or_restored_without_a_directory() -> None:
    checkpoint.save(None, make_server().state_dict(), history(0), SETTINGS, keep=None)
    assert restore_(make_server(), None, SETTINGS) == []
    assert not checkpoint.exists(None)


def test_a_file_contains_named_weights_that_torch_loads_without_running_code(tmp_path: Path) -> None:
    server = make_server(rounds=1)
    checkpoint.save(str(tmp_path), server.state_dict(), history(1), SETTINGS, keep=None)
    state = torch.load(tmp_path / "round-1.pt", weights_only=True)
    assert {name: tuple(weight.shape) for name, weight in state["server"]["weights"].items()} == {
        "weight": (5, 1),
        "bias": (5,),
    }
    assert (state["round"], state["history"], state["settings"]) == (1, history(1), SETTINGS)
    assert (tmp_path / "round-1.pt").stat().st_size < 20_000


def test_only_the_last_checkpoints_stay_and_other_files_are_not_touched(tmp_path: Path) -> None:
    (tmp_path / "round-2.pt.bak").write_text("mine")
    (tmp_path / "best.pt").write_text("mine")
    for rounds in range(1, 12):
        checkpoint.save(str(tmp_path), make_server().state_dict(), history(rounds), SETTINGS, keep=3)
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"round-9.pt", "round-10.pt", "round-11.pt", "round-2.pt.bak", "best.pt"}
    assert len(restore_(make_server(), str(tmp_path), SETTINGS)) == 12, "by number, not by name"


def test_a_failed_write_adds_no_checkpoint_and_does_not_damage_the_last_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint.save(str(tmp_path), make_server().state_dict(), history(1), SETTINGS, keep=None)

    def fail_midway(disk: LocalFileSystem, path: str, data: bytes) -> None:
        Path(path).write_bytes(data[: len(data) // 2])
        raise OSError("no space left on device")

    monkeypatch.setattr(LocalFileSystem, "pipe_file", fail_midway)
    with pytest.raises(WriteError, match=r"/round-2.pt: expected a disk that can be written to, got no space left"):
        checkpoint.save(str(tmp_path), make_server().state_dict(), history(2), SETTINGS, keep=1)
    assert len(restore_(make_server(), str(tmp_path), SETTINGS)) == 2
    assert [path.name for path in tmp_path.iterdir()] == ["round-1.pt"]


def test_a_checkpoint_gets_its_name_after_it_is_complete(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint.save(str(tmp_path), make_server().state_dict(), history(1), SETTINGS, keep=None)
    seen: list[tuple[list[str], int]] = []  # what a process that is killed now leaves, and the rounds restored from it

    def look_midway(disk: LocalFileSystem, path: str, data: bytes) -> None:
        Path(path).write_bytes(data[: len(data) // 2])
        names = sorted(path.name for path in tmp_path.glob("round-*"))
        seen.append((names, len(restore_(make_server(), str(tmp_path), SETTINGS))))
        Path(path).write_bytes(data)

    monkeypatch.setattr(LocalFileSystem, "pipe_file", look_midway)
    checkpoint.save(str(tmp_path), make_server().state_dict(), history(2), SETTINGS, keep=None)
    assert seen == [(["round-1.pt"], 2)]
    assert len(restore_(make_server(), str(tmp_path), SETTINGS)) == 3


def damage(path: Path, how: str) -> None:
    data = bytearray(path.read_bytes())
    if how == "cut":
        data = data[: len(data) // 2]
    elif how == "empty":
        data = bytearray()
    elif how == "a flipped bit in a weight":
        where = data.index(make_server(rounds=2).weights[:5].numpy().tobytes())
        data[where] ^= 1
    elif how == "a pickle that runs code":
        data = bytearray(pickle.dumps(Trap()))
    elif how == "something else that torch loads":
        torch.save({"epoch": 3}, path)
        return
    path.write_bytes(data)


class Trap:
    """Unpickling it would run code."""

    def __reduce__(self) -> tuple:
        return (print, ("the trap was sprung",))


@pytest.mark.parametrize(
    "how", ["cut", "empty", "a flipped bit in a weight", "a pickle that runs code", "something else that torch loads"]
)
def test_a_damaged_last_checkpoint_is_skipped_with_a_warning_and_a_single_damaged_one_is_an_error(
    how: str, tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    for rounds in (1, 2):
        checkpoint.save(str(tmp_path), make_server(rounds=rounds).state_dict(), history(rounds), SETTINGS, keep=None)
    damage(tmp_path / "round-2.pt", how)
    server = make_server()
    with caplog.at_level(logging.WARNING):
        assert restore_(server, str(tmp_path), SETTINGS) == history(1)
    assert "round-2.pt, which is damaged" in caplog.text
    assert server.sha256() == make_server(rounds=1).sha256()
    (tmp_path / "round-1.pt").unlink()
    with pytest.raises(
        ValueError, match=r"^checkpoints_dir: expected a checkpoint .* got damaged files only in .* round 2\."
    ):
        restore_(make_server(), str(tmp_path), SETTINGS)
    assert "sprung" not in capsys.readouterr().out


def test_other_settings_and_another_model_are_refused_by_name(tmp_path: Path) -> None:
    checkpoint.save(str(tmp_path), make_server().state_dict(), history(1), SETTINGS, keep=None)
    with pytest.raises(ValueError, match=r"got .*, where seed was 1 and is 2; alpha was None and is 3"):
        restore_(make_server(), str(tmp_path), SETTINGS | {"seed": 2, "alpha": 3})
    with pytest.raises(
        ValueError, match=r"expected this model's weight, \[6, 1\], got \[5, 1\]\. It is of another model"
    ):
        restore_(make_server(num_weights=6), str(tmp_path), SETTINGS)

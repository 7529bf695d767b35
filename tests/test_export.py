"""Saving is tested before training; a later disk error ends the run with a sentence and loses no weights."""

import contextlib
import datetime
import io
import json
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from fsspec.implementations.local import LocalFileSystem
from helpers import Command, history, make_bert, refusal, succeed, weights_hash
from sacred import SETTINGS
from sacred.observers import FileStorageObserver
from tokenizers.pre_tokenizers import PreTokenizer
from torch import nn
from transformers import BertTokenizerFast, GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast, modeling_utils

from scaling_fl.distributed.world import world
from scaling_fl.experiment.build import restore_
from scaling_fl.federation.global_model import GlobalModel
from scaling_fl.federation.strategies import make_strategy
from scaling_fl.records import checkpoint, console, export, observers
from scaling_fl.records.rounds import Record
from scaling_fl.storage import WriteError

Disk = Callable[[int], Path]  # bytes -> where a disk of so many is mounted


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    mounted: list[Path] = []

    def mount(size: int) -> Path:
        place = tmp_path / f"disk-{len(mounted)}"
        place.mkdir()
        done = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", place], capture_output=True, text=True
        )
        if done.returncode:
            pytest.skip(f"no small disk can be mounted here: {done.stderr.strip()}")
        mounted.append(place)
        return place

    yield mount
    for place in mounted:
        subprocess.run(["umount", "--lazy", place], check=True)


def fill(place: Path) -> None:
    with contextlib.suppress(OSError), (place / "filler").open("wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))


def make_read_only(place: Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro", place], check=True)


def block(file: Path) -> None:
    """Replace a file by a folder, although another thread writes the file repeatedly."""
    while not file.is_dir():
        file.unlink(missing_ok=True)
        with contextlib.suppress(FileExistsError):
            file.mkdir()


def before_call(patch: pytest.MonkeyPatch, owner: Any, name: str, number: int, work: Callable[[], object]) -> None:
    """Call `work` before the `number`-th call of a library function."""
    call, calls = getattr(owner, name), iter(range(1, 1_000_000))

    def called(*args: Any, **options: Any) -> Any:
        if next(calls) == number:
            work()
        return call(*args, **options)

    patch.setattr(owner, name, called)


def error_line(result: tuple[int, str]) -> str:
    """Return the error line, which is the last one."""
    status, output = result
    assert status == 1, output
    (line,) = re.findall(r"^error: .*$", output, re.MULTILINE)
    assert output.endswith(f"{line}\n"), output
    assert "Traceback" not in output
    return line


@pytest.mark.parametrize("keep", [None, 1, 2, 3])
def test_the_estimated_space_of_checkpoints_is_their_size(tmp_path: Path, keep: int | None) -> None:
    for num_before in range(5):
        (tmp_path / f"round-{num_before}.pt").touch()  # one more each time
        for num_rounds in range(1, 6):
            files, most = num_before + 1, 0
            for _ in range(num_rounds):
                most = max(most, files + 1)
                files = min(files + 1, keep or 100)
            (need,) = export.space_for_checkpoints(str(tmp_path), 10, num_rounds, keep)
            assert (need.peak, need.final) == (10 * (most - num_before - 1), 10 * (files - num_before - 1))


def test_checkpoints_that_are_off_or_not_on_a_disk_need_no_space(tmp_path: Path) -> None:
    assert export.space_for_checkpoints(None, 10, 3, None) == []
    assert export.space_for_checkpoints(str(tmp_path), 10, 0, None) == []
    assert export.space_for_checkpoints("memory://checkpoints", 10, 3, None) == []


def test_space_is_compared_for_each_disk_and_removed_files_free_space(disk: Disk) -> None:
    one, two = disk(1_000_000), disk(1_000_000)
    free = shutil.disk_usage(one).free

    def need(place: Path, peak: int, final: int) -> export.SpaceNeeded:
        return export.SpaceNeeded(str(place), "somewhere", "something", peak, final)

    export.check_disks([need(one, free, free), need(two, free, free)])
    export.check_disks([need(one, free, 10), need(one, free - 10, free - 10)])
    export.check_disks([need(one, 10, -20), need(one, free + 20, free + 20)])
    for needs in (
        [need(one, free, free), need(two, free + 1, free + 1)],
        [need(one, free, 10), need(one, free - 9, free - 9)],
        [need(one, free + 1, -10), need(one, 5, 5)],
    ):
        assert "somewhere: expected 1.1 MB free for something" in refusal(lambda needs=needs: export.check_disks(needs))


def test_a_model_that_cannot_be_saved_is_refused_and_leaves_no_file(tmp_path: Path, tiny_model: str) -> None:
    tokenizer = BertTokenizerFast.from_pretrained(tiny_model)

    def sentence(model: nn.Module, tokenizer: PreTrainedTokenizerFast) -> str:
        return refusal(lambda: export.check([], str(tmp_path), "mine", model, tokenizer))

    export.check([], str(tmp_path), "mine", make_bert(), tokenizer)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=50, n_embd=8, n_layer=1, n_head=1))
    export.check([], str(tmp_path), "mine", model, tokenizer)
    model.generation_config.num_return_sequences = 3  # of greedy search, which has one
    assert "model='mine': expected a configuration and a tokenizer that can be saved" in sentence(model, tokenizer)
    tokenizer.backend_tokenizer.pre_tokenizer = PreTokenizer.custom(SimpleNamespace())
    assert "Custom PreTokenizer cannot be serialized" in sentence(make_bert(), tokenizer)
    assert "no/folder: expected a folder that can be written to" in refusal(
        lambda: export._try_model("no/folder", "mine", make_bert(), tokenizer)
    )
    assert not [*tmp_path.iterdir()]


def test_a_run_whose_model_cannot_be_saved_is_refused_before_training(
    command: Command, disk: Disk, tiny_model: str, tmp_path: Path
) -> None:
    model = shutil.copytree(tiny_model, tmp_path / "model")
    config = json.loads((model / "config.json").read_text()) | {"output_attentions": True}
    (model / "config.json").write_text(json.dumps(config))
    place = disk(400_000)
    checkpoints = {"checkpoints_dir": place / "checkpoints", "num_rounds": 5}
    both = rf"error: checkpoints_dir='{place}/checkpoints': expected \d.\d MB free for 5 more checkpoints and best.pt"
    refused: list[tuple[tuple[str, ...], dict[str, Any], str]] = [
        ((), {"model": model}, "expected a configuration and a tokenizer that can be saved, got 'The `output_attentio"),
        (("plan",), {"model": model, "ranks": 2}, "the `attn_implementation` set to sdpa. Please set it to 'eager'"),
        (
            ("plan",),
            {"env": {"SACRED_RUNS_DIR": str(place / "runs")}},
            "0.5 MB free for the final model, got 0.4 MB$",
        ),
        (("--unobserved",), checkpoints, both + ", got 0.[34] MB$"),
        (("plan",), {**checkpoints, "env": {"SACRED_RUNS_DIR": str(place / "runs")}}, both + " and the final model, "),
    ]
    for options, settings, sentence in refused:
        result = command(*options, **settings)
        assert re.search(sentence, error_line(result)), result
        assert " |" not in result[1], "nothing is trained or shown"
    assert [*(place / "checkpoints").iterdir()] == []
    assert [path.name for path in (tmp_path / "runs/1").iterdir() if "model" in path.name] == []
    succeed(command("--unobserved", **checkpoints, keep_checkpoints=1))
    succeed(command("--unobserved", **{**checkpoints, "num_rounds": 6}))  # there is space for one more


@pytest.mark.long
@pytest.mark.parametrize(("ranks", "number", "name", "round_"), [(1, 5, "round-2.pt", 2), (2, 3, "best.pt", 1)])
def test_a_full_disk_at_a_checkpoint_loses_no_round(
    command: Command,
    disk: Disk,
    ranks: int,
    number: int,
    name: str,
    round_: int,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    whole = succeed(command("--unobserved"))
    place = disk(1_000_000)
    folder = place / "checkpoints"
    with monkeypatch.context() as patch:
        before_call(patch, LocalFileSystem, "pipe_file", number, lambda: fill(place))  # the first tries the folder
        line = error_line(command(ranks=ranks, checkpoints_dir=folder))
    assert line == (
        f"error: {folder}/{name}: expected a disk that can be written to, got [Errno 28] No space left on device. "
        f"The weights of round {round_} are in runs/1/checkpoints/round-{round_}.pt. Run the same command with "
        "checkpoints_dir=runs/1/checkpoints to resume"
    )
    found = sorted(path.name for path in folder.iterdir())
    assert found == ["best.pt", "round-1.pt"][:round_], "the last whole ones, and no part"
    assert all(checkpoint.read(str(folder / name))["round"] == 1 for name in found if round_ == 2)
    resumed = succeed(command(checkpoints_dir="runs/1/checkpoints"))
    assert f"resumed   after round {round_}, from runs/1/checkpoints" in resumed
    assert (tmp_path / "runs/2/best").is_dir(), "the weights of the best round are saved, too"
    assert weights_hash(resumed) == weights_hash(whole)
    assert json.loads((tmp_path / "runs/1/run.json").read_text())["status"] == "FAILED"


@pytest.mark.parametrize(
    ("owner", "name", "number", "failed"),
    [(modeling_utils, "safe_save_file", 1, "model"), (LocalFileSystem, "mv", 4, "rounds.jsonl")],
    ids=["model", "round"],
)
def test_a_read_only_disk_at_the_end_loses_no_weights(
    command: Command,
    disk: Disk,
    owner: Any,
    name: str,
    number: int,
    failed: str,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    runs = disk(1_000_000)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    settings: dict[str, Any] = {"checkpoints_dir": "saved"} if failed == "rounds.jsonl" else {}
    with monkeypatch.context() as patch:
        before_call(patch, owner, name, number, lambda: make_read_only(runs))
        line = error_line(command(**settings, env={"SACRED_RUNS_DIR": str(runs)}))
    assert line.startswith(f"error: {runs}/1/{failed}: expected a disk that can be written to, got ")
    found = re.search(
        r"The weights of round 2 are in (.*)/round-2.pt. Run the same command (with \S+ )?to resume$", line
    )
    assert found, line
    assert (found[1] == "saved") == (failed == "rounds.jsonl")
    assert "model  " in succeed(command(checkpoints_dir=found[1]))


def test_a_record_that_cannot_be_written_ends_the_run_and_one_that_cannot_be_closed_fails_it(
    command: Command, disk: Disk, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    runs = disk(1_000_000)
    with monkeypatch.context() as patch:
        before_call(patch, FileStorageObserver, "completed_event", 1, lambda: fill(runs))
        line = error_line(command(env={"SACRED_RUNS_DIR": str(runs)}))
    assert line.startswith(f"error: {runs}/1: expected a disk that can be written to, got [Errno 28]")
    assert (runs / "1/model/model.safetensors").exists()
    modes = {path.stat().st_mode & 0o777 for path in (runs / "1/model").iterdir()}
    assert modes == {(runs / "1").stat().st_mode & 0o666}
    with monkeypatch.context() as patch:
        patch.setattr(SETTINGS, "DEFAULT_BEAT_INTERVAL", 0.01)  # seconds
        before_call(patch, LocalFileSystem, "mv", 2, lambda: block(tmp_path / "runs/1/info.json"))
        line = error_line(command(num_rounds=300, checkpoints_dir="saved"))
    assert re.search(
        r"error: runs/1: expected .* The weights of round \d+ are in saved/round-\d+.pt. Run the same", line
    )


def test_weights_go_to_the_first_disk_with_space_and_replace_no_files(
    disk: Disk, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    full, lent = disk(4096), tmp_path / "here"
    lent.mkdir()
    monkeypatch.chdir(lent)
    monkeypatch.setattr(tempfile, "tempdir", str(full))
    fill(full)
    with world():
        server = GlobalModel(nn.Linear(100, 100), make_strategy("fedavg"))

        def place(saved: str | None = None, rounds: int = 3, folder: Path = full) -> str:
            return export.save_elsewhere(saved, server.state_dict(), history(rounds), {"seed": 1}, str(folder), None)

        assert place(rounds=0) == "No round is lost"
        assert "are in /a/b/round-3.pt. Run the same command to resume" in place(saved="/a/b")
        assert "could not be saved on another disk either" in place()
        (lent / "checkpoints").mkdir()
        names = [
            re.findall(r"are in (.*)/round-3.pt. Run the same command with checkpoints_dir=(.*) to resume", place())
        ]
        names.append(
            re.findall(r"are in (.*)/round-3.pt. Run the same command with checkpoints_dir=(.*) to resume", place())
        )
        ((first,), (second,)) = names
        assert first[0] == first[1] != second[0]
        for directory in (first[0], second[0]):
            assert directory.startswith("checkpoints/")
            restored = GlobalModel(nn.Linear(100, 100), make_strategy("fedavg"))
            assert restore_(restored, directory, {"seed": 1}) == history(3)
            assert torch.equal(restored.weights, server.weights)
        assert f"are in {lent}/runs/1/checkpoints/round-3.pt" in place(folder=lent / "runs/1")


def test_a_record_on_a_full_disk_stays_readable_and_reports_an_error(disk: Disk) -> None:
    runs = disk(200_000)
    now = datetime.datetime.now()
    files = observers.Files(runs)
    run = SimpleNamespace(observers=[files])
    start = {"ex_info": {"base_dir": ".", "sources": []}, "command": "train", "host_info": {}, "config": {"seed": 1}}
    files.started_event(**start, start_time=now, meta_info={}, _id=None)
    observers.check_record(run)
    fill(runs)
    metrics = {"loss": {"values": [0.1] * 1000, "steps": [*range(1000)], "timestamps": [now] * 1000}}
    files.log_metrics(metrics, {})
    files.heartbeat_event(info={"labels": ["x" * 5000]}, captured_out="x" * 5000, beat_time=now, result=None)
    files.failed_event(now, ["x" * 5000])
    for path in (runs / "1").glob("*.json"):
        json.loads(path.read_text())
    assert not [*(runs / "1").glob(".*")]
    with pytest.raises(WriteError, match=rf"^{runs}/1: expected a disk that can be written to, got .* No space left"):
        observers.check_record(run)
    with pytest.raises(SystemExit, match="expected a disk that can be written to"):
        files.started_event(**start, start_time=now, meta_info={}, _id=None)
    files.failed_event(now, [])
    assert not (runs / "2").exists()


def test_a_round_is_written_as_a_whole_line_or_not_at_all(disk: Disk) -> None:
    place = disk(40_000)
    metrics: dict[str, Any] = {"site.loss": dict.fromkeys(range(400), 0.1)}

    def write_rounds() -> None:
        for round_ in range(100):
            Record(str(place)).add_round(round_, metrics)

    with pytest.raises(WriteError, match=r"rounds.jsonl: expected a disk that can be written to"):
        write_rounds()
    lines = (place / "rounds.jsonl").read_text().splitlines()
    assert [json.loads(line)["round"] for line in lines] == [*range(len(lines))]
    assert len(lines) > 3


def test_a_record_without_disk_space_is_refused_at_the_start(disk: Disk, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = disk(200_000)
    monkeypatch.setenv("SACRED_RUNS_DIR", str(runs))
    observers.check_files()
    fill(runs)
    assert refusal(observers.check_files).endswith(": expected 0.1 MB free for a record, got 0.00 MB")


def test_a_full_standard_output_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    with world(), open("/dev/full", "wb", buffering=0) as full:
        monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(full, write_through=True))
        with pytest.raises(WriteError, match=r"^the standard output: expected a disk that can be written"):
            console.print_once("a line")

"""The main job on its command line, from a folder of the user."""

import contextlib
import fcntl
import json
import operator
import os
import pty
import re
import signal
import struct
import sys
import termios
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from fsspec.implementations.local import LocalFileSystem
from helpers import LABELS, ROOT, SCRIPT, Command, accuracies, succeed, wait_for_exit, weights_hash
from sacred.metrics_logger import MetricsLogger
from sacred.observers import FileStorageObserver
from torch.optim import AdamW
from transformers import AutoModelForSequenceClassification, AutoTokenizer, modeling_utils

from scaling_fl.command.experiment import configure, experiment
from scaling_fl.distributed import signals
from scaling_fl.distributed.collectives import check_equal, rank
from scaling_fl.distributed.launch import launch
from scaling_fl.distributed.world import world
from scaling_fl.experiment.settings import FIELDS
from scaling_fl.records import checkpoint


def test_a_run_learns_and_saves_its_record_and_a_loadable_model(command: Command, tmp_path: Path) -> None:
    output = succeed(command(ranks=2, num_rounds=12, site_ids="[0,0,1,1]", author="somebody", report=True))
    assert "4 with 15 to 16 examples each" in output
    assert len(accuracies(output)) == 13
    assert accuracies(output)[-1] > 0.9

    (run,) = [folder for folder in (tmp_path / "runs").iterdir() if folder.name.isdecimal()]
    assert json.loads((run / "run.json").read_text())["status"] == "COMPLETED"
    assert json.loads((run / "config.json").read_text())["author"] == "somebody"
    assert output.strip() == (run / "cout.txt").read_text().strip(), "what was printed is on record"
    metrics = json.loads((run / "metrics.json").read_text())
    assert metrics["validation.accuracy"]["steps"] == list(range(13))
    assert [round(value, 4) for value in metrics["validation.accuracy"]["values"]] == accuracies(output)
    for name in ("train.loss", "train.accuracy", "time.train_s", "time.aggregate_s"):
        assert metrics[name]["steps"] == list(range(1, 13))
    for name in ("validation.loss", "time.round_s", "time.evaluate_s", "comm.bytes"):
        assert metrics[name]["steps"] == list(range(13))
    seconds = {
        name: metrics[f"time.{name}_s"]["values"] for name in ("round", "setup", "train", "aggregate", "evaluate")
    }
    assert metrics["time.setup_s"]["steps"] == [0]
    parts = (sum(seconds[name]) for name in ("setup", "train", "aggregate", "evaluate"))
    assert sum(parts) == pytest.approx(sum(seconds["round"]))
    assert len(rounds(run)) == 13
    assert best_line(output) == max(accuracies(output))
    assert f"report    {Path('runs') / '1' / 'report.html'}\n" in output
    page = (run / "report.html").read_text()
    assert "completed" in page
    assert all(label in page for label in LABELS)
    assert not [*run.glob("report-*.png")], "drawing them takes longer than the page"
    assert json.loads((run / "run.json").read_text())["artifacts"] == ["rounds.jsonl", "report.html"]

    model = AutoModelForSequenceClassification.from_pretrained(run / "model")
    assert model.config.id2label == dict(enumerate(sorted(LABELS)))
    tokens = AutoTokenizer.from_pretrained(run / "model")(["goal match team", "bread salt soup"], return_tensors="pt")
    with torch.inference_mode():
        guesses = model.eval()(**tokens).logits.argmax(-1).tolist()
    assert [model.config.id2label[guess] for guess in guesses] == ["sport", "food"]


def rounds(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "rounds.jsonl").read_text().splitlines()]


def best_line(output: str) -> float:
    (found,) = re.findall(r"^best +validation accuracy ([\d.]+), loss .*, after round \d+, ", output, re.MULTILINE)
    return float(found)


def documented_columns() -> set[str]:
    """The columns that docs/metrics.md explains."""
    table = (ROOT / "docs" / "metrics.md").read_text()
    names: list[str] = []
    for line in re.findall(r"^\| (`.*?`) \|", table, re.MULTILINE):
        for name in re.findall(r"`(.*?)`", line):
            names.append(names[-1].rpartition(".")[0] + name if name.startswith(".") else name)
    (spread,) = re.findall(r"^`<name>` is one of (.*?)\.$", table, re.MULTILINE | re.DOTALL)
    quantities = re.findall("`(.*?)`", spread)
    return {name.replace("<name>", quantity) for name in names for quantity in quantities}


def test_every_column_of_a_round_matches_its_description(command: Command, tmp_path: Path) -> None:
    settings = {"site_ids": "[0,0,1]", "partition": "dirichlet", "num_local_epochs": 2, "on_site_failure": "skip"}
    settings |= {"site_test_fraction": 0.2, "validation_fraction": 0.2, "evaluate_local": True}
    settings |= {"log_every_steps": 2, "log_sites_by_step": True}
    output = succeed(command(ranks=2, checkpoints_dir=tmp_path / "checkpoints", **settings))
    run = tmp_path / "runs" / "1"
    zero, one, two = rounds(run)
    of_answers = {name for name in documented_columns() if re.search("perplexity|exact_match|answers", name)}
    always = documented_columns() - of_answers - {"site.name"}  # of sites with names
    assert set(zero) | set(one) == always
    assert not [
        name for name in zero if name.startswith(("train", "speed")) or re.match(r"sites?\.(?!test|validation)", name)
    ]
    assert set(one) == set(two) == always - {"time.setup_s"}
    info = json.loads((run / "info.json").read_text())
    assert info["labels"] == sorted(LABELS)
    assert [site["rank"] for site in info["sites"]] == [0, 0, 1]
    assert [sum(site["labels"]) for site in info["sites"]] == [*one["site.examples"].values()]
    assert [*one["site.examples"]] == ["0", "1", "2"], "keys of JSON are texts"
    total = sum(site["examples"] for site in info["sites"])
    assert sum(one["site.examples"].values()) == total
    assert {str(number): site["test_examples"] for number, site in enumerate(info["sites"])} == one[
        "site.test_examples"
    ]
    assert info["machine"]["torch"] == torch.__version__
    for line in (one, two):
        for name in ("loss", "accuracy"):
            weighted = sum(map(operator.mul, line[f"site.{name}"].values(), line["site.examples"].values())) / total
            assert weighted == pytest.approx(line[f"train.{name}"], rel=1e-12)
        assert line["sites.loss.worst"] == max(line["site.loss"].values())
        assert max(line["site.seconds"].values()) < line["time.train_s"]
        assert line["speed.examples_per_s"] * line["time.train_s"] == pytest.approx(2 * total)
        num_tokens = sum(site["tokens"] for site in info["sites"])
        assert line["speed.tokens_per_s"] * line["time.train_s"] == pytest.approx(2 * num_tokens)
        assert 0 < line["comm.bytes"] - line["comm.expected_bytes"] < 10_000
        assert all(50 < memory < 10_000 for memory in line["site.memory_mb"].values())
    assert f"results   {Path('runs') / '1'}, checkpoints in {tmp_path / 'checkpoints'}\n" in output
    alone = succeed(command(ranks=1, **settings))
    assert weights_hash(alone) == weights_hash(output)
    incidental = re.compile("time|comm|speed|seconds|memory|rank")
    for line, other in zip(rounds(run), rounds(tmp_path / "runs" / "2"), strict=True):
        for name in line:
            assert incidental.search(name) or line[name] == other[name]


@pytest.mark.long
def test_a_stopped_run_has_all_rounds_of_all_sites_in_its_last_record(command: Command, tmp_path: Path) -> None:
    settings = {"checkpoints_dir": tmp_path / "checkpoints"}
    succeed(command(num_rounds=1, **settings))
    succeed(command(num_rounds=2, ranks=2, **settings))
    first, last = (rounds(tmp_path / "runs" / run) for run in ("1", "2"))
    del first[1]["time.checkpoint_s"]  # which the checkpoint does not have of its own round
    assert last[:2] == first
    assert [line["round"] for line in last] == [0, 1, 2]


@pytest.mark.long
def test_progress_bars_appear_on_a_terminal_and_in_no_record(
    tiny_model: str, corpus: tuple[Path, Path], tmp_path: Path
) -> None:
    settings = (
        f"task_name=text train_path={corpus[0]} test_path={corpus[1]} model={tiny_model} num_rounds=1 report=False"
    )
    pid, terminal = pty.fork()
    if pid == 0:
        os.chdir(tmp_path)
        os.environ |= {"RANKS": "2", "TQDM_MININTERVAL": "0"}
        os.execv(sys.executable, [sys.executable, str(SCRIPT), "with", *settings.split(), "max_seq_len=32"])
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 120, 0, 0))
    shown = b""
    with contextlib.suppress(OSError):  # which is how a terminal ends
        while piece := os.read(terminal, 65536):
            shown += piece
    assert os.waitpid(pid, 0)[1] == 0, shown
    for bar in (b"round 0, evaluating: 100%", b"round 1, training:   0%", b"round 1, training: 100%"):
        assert shown.count(bar) == 1, "from one rank, and once"
    assert b"examples/s]" in shown
    record = (tmp_path / "runs" / "1" / "cout.txt").read_text()
    assert "%" not in record
    assert len(accuracies(record)) == 2


def test_every_byte_that_ranks_send_is_recorded(command: Command, tmp_path: Path) -> None:
    succeed(command(ranks=2, num_rounds=1))
    sent = json.loads((tmp_path / "runs" / "1" / "metrics.json").read_text())["comm.bytes"]["values"][1]
    num_weights = AutoModelForSequenceClassification.from_pretrained(tmp_path / "runs" / "1" / "model").num_parameters()
    assert 2 * 8 * num_weights < sent < 2 * 8 * num_weights + 5_000, "float64 from two ranks, and the metrics"
    succeed(command(ranks=1, num_rounds=1))
    alone = json.loads((tmp_path / "runs" / "2" / "metrics.json").read_text())["comm.bytes"]["values"]
    assert alone == [0, 0], "a world of one sends nothing"


@pytest.mark.long
def test_the_number_of_ranks_changes_no_bit(command: Command) -> None:
    settings = {"site_ids": "[0,0,1,1,0]", "strategy": "fedadam", "proximal_mu": 0.1, "partition": "dirichlet"}
    outputs = [succeed(command(ranks=ranks, **settings)) for ranks in (1, 2, 3)]
    assert len({weights_hash(output) for output in outputs}) == 1
    assert len({tuple(accuracies(output)) for output in outputs}) == 1


@pytest.mark.long(seconds=12)
def test_every_training_setting_has_an_effect(command: Command) -> None:
    changes: list[dict[str, object]] = [
        {},
        {"seed": 2},
        {"data_seed": 2},
        {"batch_size": 5},
        {"num_local_epochs": 2},
        {"learning_rate": 2e-3},
        {"max_seq_len": 4},
        {"optimiser": "sgd"},
        {"strategy": "fedavgm"},
        {"strategy": "fedavgm", "server_momentum": 0.5},
        {"strategy": "fedyogi"},
        {"strategy": "fedyogi", "server_beta2": 0.5},
        {"strategy": "fedyogi", "server_tau": 0.1},
        {"server_learning_rate": 0.5},
        {"proximal_mu": 1.0},
        {"iid_split": False},
        {"partition": "dirichlet"},
        {"partition": "dirichlet", "dirichlet_alpha": 5},
        {"max_train_examples": 50},
        {"comm_dtype": "bfloat16"},
        {"site_ids": "[0,0,0]"},
        {"sites_per_round": 2},
        {"eligible_sites": "[0,1,2]"},
        {"weight_by": "sites"},
        {"local_steps": 3},
    ]
    hashes = [weights_hash(succeed(command("--unobserved", **change))) for change in changes]
    assert len(set(hashes)) == len(changes), [change for i, change in enumerate(changes) if hashes[i] in hashes[:i]]


@pytest.mark.long
def test_evaluation_settings_change_no_weight(command: Command) -> None:
    outputs = [
        succeed(command("--unobserved", **change))
        for change in ({}, {"val_batch_size": 3}, {"max_test_examples": 7}, {"partition": "iid", "iid_split": False})
    ]
    assert len({weights_hash(output) for output in outputs}) == 1
    assert accuracies(outputs[0]) == accuracies(outputs[1])


@pytest.mark.long
def test_a_resumed_run_ends_with_the_weights_of_the_uninterrupted_run(command: Command, tmp_path: Path) -> None:
    whole = succeed(command(ranks=1, num_rounds=4, strategy="fedadam"))
    settings = {"strategy": "fedadam", "checkpoints_dir": tmp_path / "checkpoints"}
    succeed(command(ranks=2, num_rounds=1, **settings))
    succeed(command(ranks=1, num_rounds=3, **settings))
    resumed = succeed(command(ranks=3, num_rounds=4, keep_checkpoints=2, **settings))
    assert weights_hash(resumed) == weights_hash(whole)
    assert accuracies(resumed) == accuracies(whole), "the table of a resumed run is whole"
    files = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert files == ["best.pt", "round-3.pt", "round-4.pt"]
    first, last = (json.loads((tmp_path / "runs" / run / "metrics.json").read_text()) for run in ("1", "4"))
    assert last["validation.loss"]["values"] == first["validation.loss"]["values"]
    assert last["train.loss"]["steps"] == [1, 2, 3, 4]


def test_a_finished_run_that_is_started_again_prints_its_result(command: Command, tmp_path: Path) -> None:
    outputs = [succeed(command(checkpoints_dir=tmp_path / "checkpoints")) for _ in range(2)]
    assert weights_hash(outputs[0]) == weights_hash(outputs[1])
    assert accuracies(outputs[0]) == accuracies(outputs[1])


@pytest.mark.parametrize(
    ("key", "values"), [("learning_rate", (0.001, 0.002)), ("num_rounds", (1, 2)), ("max_train_examples", (30, 31))]
)
def test_nodes_with_different_settings_do_not_train(key: str, values: tuple) -> None:
    def node() -> str:
        with world():
            try:
                check_equal({"seed": 1, key: values[rank()]})
            except ValueError as error:
                return str(error)
            return "agreed"

    sentence = f"{key}: expected the same on all ranks, got {values[0]!r} on rank 0 and {values[1]!r} on rank 1"
    assert launch(node, num_ranks=2, fork=True) == [sentence] * 2


# tests/test_bad_settings.py has the settings that are refused before the ranks start.
REFUSED = {
    "site_ids="
    + str([0] * 62).replace(" ", ""): "site_ids, num_sites: expected at most 61 sites for 61 training examples, got 62",
    "text_column=body": "text_column: expected a column of ",
    "max_seq_len=65": "max_seq_len: expected at most 64 for model=",
    "learning_rate=1e30": "diverged in round 1: ",
    "checkpoints_dir=/proc/no/folder": "checkpoints_dir: expected a folder that can be written to, got ",
    "min_sites=5 on_site_failure=skip": "min_sites: expected at most 4, the number of eligible sites, got 5",
    "server_learning_rate=1e30": "the global model diverged: ",
    "learning_rat=1": "'learning_rat': expected the name of a setting, got an unknown one. Did you mean learning_rate?",
}


# Settings that the ranks themselves refuse, and one that is refused before they start.
REFUSED_BY_RANKS = ["learning_rate=1e30", "server_learning_rate=1e30", "text_column=body", "learning_rat=1"]


@pytest.mark.parametrize(
    ("setting", "ranks"), [*((setting, 1) for setting in REFUSED), *((setting, 2) for setting in REFUSED_BY_RANKS)]
)
def test_an_impossible_setting_is_one_clear_sentence(command: Command, setting: str, ranks: int) -> None:
    settings = dict(part.split("=", 1) for part in setting.split(" "))
    status, output = command("--unobserved", ranks=ranks, **settings)
    head = re.compile(r"(model|data|sites|strategy|cohorts|evaluated|results) |round \|| +0 \|")
    lines = [line for line in output.splitlines() if not head.match(line)]
    assert status == 1
    assert len(lines) == 1, output
    assert lines[0].startswith("error: ")
    assert REFUSED[setting] in lines[0]


PLANNED = {"ranks": 2, "site_ids": "[0,0,1]", "partition": "dirichlet", "num_local_epochs": 2, "strategy": "fedadam"}


def test_a_plan_prints_what_the_run_does_and_trains_nothing(command: Command, tmp_path: Path) -> None:
    planned = succeed(command("plan", **PLANNED))
    assert not [*(tmp_path / "runs").iterdir()]
    assert "strategy  fedadam (learning_rate 0.01, momentum 0.9, beta2 0.99, tau 0.001), weighted by" in planned
    table = [line.split("|") for line in planned.splitlines() if "|" in line]
    succeed(command(**PLANNED))
    info = json.loads((tmp_path / "runs" / "1" / "info.json").read_text())
    sites = [
        {
            "rank": int(row[1]),
            "device": row[2].strip(),
            "examples": int(row[3]),
            "tokens": int(row[4]),
            "test_examples": 0,
            "labels": [int(count) for count in re.findall(r"\d+", row[6])],
        }
        for row in table[1:4]
    ]
    assert sites == info["sites"]
    assert [int(row[5]) for row in table[1:4]] == [2 * -(-site["examples"] // 4) for site in sites]
    last = rounds(tmp_path / "runs" / "1")[-1]
    assert f"{last['comm.expected_bytes'] * 1e-6:.1f} MB sent by all ranks" in planned
    assert [(int(row[0]), row[1].strip()) for row in table[5:]] == [(0, "cpu"), (1, "cpu")]
    assert planned.endswith("the plan holds: a run with these settings would not be refused\n")


def test_a_plan_of_a_resumed_run_says_so_and_changes_no_file(command: Command, tmp_path: Path) -> None:
    settings = {"checkpoints_dir": tmp_path / "checkpoints"}
    succeed(command("--unobserved", num_rounds=1, **settings))
    before = {path.name: path.read_bytes() for path in (tmp_path / "checkpoints").iterdir()}
    assert "resumed   after round 1, from " in succeed(command("plan", num_rounds=3, **settings))
    status, output = command("plan", num_rounds=3, learning_rate=1e-4, **settings)
    assert (status, "learning_rate was 0.003 and is 0.0001" in output) == (1, True)
    assert {path.name: path.read_bytes() for path in (tmp_path / "checkpoints").iterdir()} == before


def test_all_wrong_settings_are_reported_at_once(command: Command) -> None:
    status, output = command("plan", batch_size=0, optimiser="lion", learning_rat=1)
    assert (status, len(output.splitlines())) == (1, 3)
    env = {"OMP_NUM_THREADS": "x", "LOST_AFTER": "0", "SACRED_HOST": "mongodb://"}
    status, output = command("plan", env=env, server_momentum=0.9)
    assert (status, len(output.splitlines())) == (1, 4)
    assert all(line.startswith("error: ") for line in output.splitlines())
    status, output = command("plan", text_column="body")
    assert (status, "text_column: expected a column of" in output) == (1, True)


def test_a_bad_setting_creates_no_run_folder(command: Command, tmp_path: Path) -> None:
    assert command(optimiser="lion")[0] == 1
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_diverged_run_is_recorded_as_failed_with_its_reason(command: Command, tmp_path: Path, ranks: int) -> None:
    assert command(ranks=ranks, learning_rate=1e30)[0] == 1
    record = json.loads((tmp_path / "runs" / "1" / "run.json").read_text())
    assert len(accuracies((tmp_path / "runs" / "1" / "cout.txt").read_text())) == 1, "the round before is not forgotten"
    assert record["artifacts"] == ["rounds.jsonl"]
    assert record["status"] == "FAILED"
    assert "site 0 diverged in round 1" in "".join(record["fail_trace"])


def test_a_changed_setting_or_another_model_is_not_resumed(command: Command, tmp_path: Path) -> None:
    settings = {"checkpoints_dir": tmp_path / "checkpoints", "num_rounds": 1}
    succeed(command(**settings))
    before = (tmp_path / "checkpoints" / "round-1.pt").read_bytes()
    changes = {
        "learning_rate": (1e-4, "learning_rate was 0.003 and is 0.0001"),
        "site_ids": ("[0,0]", "number of sites was 4 and is 2"),
        "max_train_examples": (30, "training data (SHA-256) was"),
        "seed": (5, "seed was 1 and is 5"),
    }
    for key, (value, sentence) in changes.items():
        status, output = command("--unobserved", **{**settings, "num_rounds": 2, key: value})
        assert status == 1
        assert sentence in output
    assert (tmp_path / "checkpoints" / "round-1.pt").read_bytes() == before
    status, output = command("--unobserved", env={"OMP_NUM_THREADS": "2"}, **settings)
    assert "OMP_NUM_THREADS was 1 and is 2" in output


def test_fewer_rounds_than_completed_are_refused(command: Command, tmp_path: Path) -> None:
    settings = {"checkpoints_dir": tmp_path / "checkpoints"}
    succeed(command(num_rounds=2, **settings))
    status, output = command(num_rounds=1, **settings)
    assert status == 1
    assert "num_rounds: expected at least 2, which are done, got 1" in output


def test_a_damaged_last_checkpoint_is_skipped_with_a_warning(command: Command, tmp_path: Path) -> None:
    settings = {"checkpoints_dir": tmp_path / "checkpoints"}
    whole = succeed(command(num_rounds=3, **settings))
    last = tmp_path / "checkpoints" / "round-3.pt"
    last.write_bytes(last.read_bytes()[:1000])
    resumed = succeed(command(num_rounds=3, **settings))
    assert "round-3.pt, which is damaged" in resumed
    assert weights_hash(resumed) == weights_hash(whole)
    assert checkpoint.read(str(last))["round"] == 3, "and it is written again"


@pytest.mark.parametrize(
    ("number", "status", "ranks"),
    [
        (signal.SIGTERM, 143, 2),
        (signal.SIGINT, 130, 1),
        pytest.param(signal.SIGTERM, 143, 1, marks=pytest.mark.long),
        pytest.param(signal.SIGINT, 130, 2, marks=pytest.mark.long),
    ],
)
def test_a_signal_ends_a_run_at_once_and_is_recorded(
    start: Callable[..., tuple[int, Path]], tmp_path: Path, ranks: int, number: signal.Signals, status: int
) -> None:
    pid, output = start(ranks=ranks, num_rounds=100_000)
    os.setpgid(pid, pid)
    while not re.search(r"^ +2 \|", output.read_text(), re.MULTILINE):
        assert os.waitpid(pid, os.WNOHANG)[0] == 0, output.read_text()
        time.sleep(0.02)
    asked = time.monotonic()
    (os.killpg if number == signal.SIGINT else os.kill)(pid, number)  # as a terminal does
    assert wait_for_exit(pid) == status, output.read_text()
    assert time.monotonic() - asked < 30
    assert "Traceback" not in output.read_text()
    assert json.loads((tmp_path / "runs" / "1" / "run.json").read_text())["status"] == "INTERRUPTED"


SWALLOW, PASS = (BaseException,), ()
# In the order of a run: the library function before which the signal comes, the exceptions caught there, the rounds,
# and the ranks.
MOMENTS = {
    "the record is opened": (FileStorageObserver, "save_sources", PASS, 1, 1),
    "the tokenizer is loaded": (AutoTokenizer, "from_pretrained", SWALLOW, 1, 1),
    "the model is loaded": (AutoModelForSequenceClassification, "from_pretrained", SWALLOW, 1, 1),
    "the model is tried": (torch.Tensor, "backward", SWALLOW, 1, 1),
    "a batch is trained": (AdamW, "step", SWALLOW, 100_000, 2),
    "a checkpoint is half written": (LocalFileSystem, "mv", PASS, 100_000, 2),
    "metrics are recorded": (MetricsLogger, "log_scalar_metric", SWALLOW, 100_000, 1),
    "the model is half saved": (modeling_utils, "safe_save_file", PASS, 1, 1),
    "the record is closed": (FileStorageObserver, "completed_event", PASS, 1, 1),
}


def ask_for_the_end(call: Callable, swallowed: tuple[type[BaseException], ...]) -> Callable:
    """Send SIGTERM before the first call of a function."""
    asked: list[bool] = []

    def called(*args: Any, **options: Any) -> Any:
        if not asked:
            asked.append(True)
            with contextlib.suppress(*swallowed):
                os.kill(os.getpid(), signal.SIGTERM)
        return call(*args, **options)

    return called


@pytest.mark.long
def test_a_signal_at_any_moment_ends_a_run_and_leaves_no_partial_file(
    start: Callable[..., tuple[int, Path]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(signals, "RETRY_SECONDS", 1e9)  # working ranks check it as well
    runs = {}
    for moment, (owner, name, swallowed, num_rounds, ranks) in MOMENTS.items():
        folder = tmp_path / moment
        folder.mkdir()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(owner, name, ask_for_the_end(getattr(owner, name), swallowed))
            runs[moment] = start(ranks=ranks, folder=folder, num_rounds=num_rounds, checkpoints_dir="checkpoints")
    for moment, (pid, output) in runs.items():
        status, text = wait_for_exit(pid), output.read_text()
        assert (status, text.splitlines().count("interrupted by SIGTERM")) == (143, 1), (moment, text)
        assert "Traceback" not in text, (moment, text)
        files = {path.name for path in output.parent.rglob("*")}
        assert not [name for name in files if ".part" in name], moment
        assert ("model" in files) == (moment == "the record is closed"), moment
        assert ("round |" in text) == (list(MOMENTS).index(moment) > 2), (
            f"{moment}: nothing checks for signals before it"
        )
        statuses = [json.loads(path.read_text())["status"] for path in output.parent.glob("runs/1/run.json")]
        assert statuses == (["INTERRUPTED"] if moment != "the record is opened" else []), moment
        assert ("1" in files) == (moment != "the record is opened")


def test_print_config_explains_every_setting(command: Command) -> None:
    output = succeed(command("print_config", ranks=2))
    lines = re.findall(r"^  (\w+) = .*# (.+)$", re.sub(r"\x1b\[\d*m", "", output), re.MULTILINE)
    assert {name for name, _ in lines} == set(FIELDS)
    assert all(len(text) > 15 for _, text in lines)
    assert "or adamw8bit (with a state in 8 bits)" in dict(lines)["optimiser"]
    assert "as in [3,1,1,1]; None" in dict(lines)["sizes"]


def test_task_and_model_have_defaults_that_the_command_line_overrides(command: Command) -> None:
    def config(*updates: str) -> dict[str, object]:
        run = experiment._create_run(config_updates=dict(update.split("=") for update in updates))
        return dict(run.config)

    default, plain = config(), config("task_name=agnews", "model=distilbert")
    assert (default["max_train_examples"], default["optimiser"]) == (480, "adamw")
    assert (plain["max_train_examples"], plain["optimiser"], plain["learning_rate"]) == (None, "sgd", 2e-5)
    assert (plain["num_local_epochs"], plain["batch_size"], plain["val_batch_size"], plain["max_seq_len"]) == (
        2,
        32,
        64,
        128,
    )
    assert config("optimiser=sgd")["optimiser"] == "sgd"


def test_print_config_marks_the_values_that_are_not_the_default_of_the_task_and_model() -> None:
    of_task = {"task_name": "agnews", "model": "distilbert", "optimiser": "sgd", "batch_size": 32}
    assert configure(of_task).modified == {"task_name", "model"}
    assert configure(of_task | {"model": "minilm"}).modified == {"task_name", "optimiser"}


def test_a_job_name_of_digits_stays_a_text(command: Command, tmp_path: Path) -> None:
    succeed(command(job_name="20261121_090000", num_rounds=0))
    assert json.loads((tmp_path / "runs" / "1" / "config.json").read_text())["job_name"] == "20261121_090000"

"""Sweeps: what makes a grid, what is refused before it starts, and how its runs are trained, skipped and compared."""

import fcntl
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from helpers import ROOT, Command, fork_script, refusal, wait_for_exit, weights_hash
from sacred.arg_parser import get_config_updates
from test_report import write_run
from waiting import wait_until

from scaling_fl.experiment.checks import quote_text
from scaling_fl.experiment.grid import find_done, find_grid_problems, make_grid, name_sweep, read_values
from scaling_fl.experiment.settings import Settings
from scaling_fl.experiment.sweep import OUTPUT, Outcome, _start, find_variables

SCRIPT = ROOT / "scripts" / "sweep.py"
Start = Callable[..., tuple[int, Path]]


@pytest.fixture
def begin(tmp_path: Path, small_run: dict[str, object], warm: None) -> Start:
    """Starts a sweep in a fork, whose runs are forks, too."""

    def begin(*options: str, env: dict[str, str] | None = None, **settings: object) -> tuple[int, Path]:
        given = {**small_run, "num_rounds": 1, **settings}
        words = [*options, "with", *(f"{name}={value}" for name, value in given.items())]
        output = tmp_path / "output.txt"
        return fork_script(SCRIPT, words, output, tmp_path, {"RANKS": "1", **(env or {})}), output

    return begin


@pytest.fixture
def sweep(begin: Start) -> Command:
    """Runs a sweep to its end."""

    def run(*options: str, **settings: Any) -> tuple[int, str]:
        pid, output = begin(*options, **settings)
        return wait_for_exit(pid), output.read_text()

    return run


@pytest.mark.parametrize(
    ("name", "text", "values"),
    [
        ("learning_rate", "1e-4,3e-4", [1e-4, 3e-4]),
        ("learning_rate", "1e-4, 3e-4 ", [1e-4, 3e-4]),
        ("site_ids", "[0,0,1,1]", [[0, 0, 1, 1]]),
        ("site_ids", "[0],[0,0]", [[0], [0, 0]]),
        ("site_paths", "[['a,b','c']],[['it],s','d']]", [[["a,b", "c"]], [["it],s", "d"]]]),
        (
            "site_settings",
            "{0:{'learning_rate':1e-5,'batch_size':1}},None",
            [{0: {"learning_rate": 1e-5, "batch_size": 1}}, None],
        ),
        ("text_column", "'a,b',c", ["a,b", "c"]),
        ("text_column", '"a\\",b",c', ['a",b', "c"]),
        ("text_column", "it's,theirs", ["it's", "theirs"]),
        ("job_name", "20261121_0900,None", ["20261121_0900", None]),
        ("model", "a", ["a"]),
        ("train_path", "/data/a(1.csv", ["/data/a(1.csv"]),
        ("sites_per_round", "1,1.0", [1, 1.0]),
        ("sizes", "linear,exponential", ["linear", "exponential"]),
    ],
)
def test_commas_outside_brackets_and_quotes_separate_values(name: str, text: str, values: list[object]) -> None:
    assert repr(read_values(name, text)) == repr(values)


@pytest.mark.parametrize(
    "word",
    [
        "learning_rate=1e-4",
        "learning_rate= 3",
        "seed=-1",
        "model=1e5",
        "site_ids=[0,1]",
        "pack=True",
        "pack=true",
        "job_name=2026_11",
        "site_settings={3:{'batch_size':2}}",
        "text_column='a'",
        "text_column=None",
        "train_path=a b'c",
        "labels=['a','b']",
    ],
)
def test_a_value_is_read_as_the_command_reads_it(word: str) -> None:
    (values,) = get_config_updates([quote_text(word)])[0].values()
    name, _, text = word.partition("=")
    assert json.dumps(read_values(name, text)) == json.dumps([values]), "but for keys, which Sacred makes texts"


@pytest.mark.parametrize(
    ("name", "text", "sentence"),
    [
        ("site_ids", "0,0,1,1", "site_ids: expected a list in brackets, got 0,0,1,1. Write site_ids=[0,0,1,1]"),
        (
            "eligible_sites",
            "north,3",
            "eligible_sites: expected a list in brackets, got north,3. Write eligible_sites=['north',3]",
        ),
        (
            "labels",
            "a,'b, c'",
            "labels: expected a list in brackets, got a,'b, c'. Write labels=['a','b, c']",
        ),
        ("sizes", "3,1", "sizes: expected a list in brackets, got 3,1. Write sizes=[3,1]"),
        ("seed", "1,,2", "seed: expected a value before and after each comma, got '1,,2'"),
        ("seed", "1,2,", "seed: expected a value before and after each comma, got '1,2,'"),
        ("learning_rate", "1e-4,0.0001", "learning_rate: expected different values, got 0.0001 twice"),
    ],
)
def test_values_that_cannot_be_told_apart_are_refused(name: str, text: str, sentence: str) -> None:
    assert refusal(lambda: read_values(name, text)) == sentence


@pytest.mark.parametrize("text", ["[0,0", "[0],0]", "'a,b", "('a,b)"])
def test_a_bracket_or_quote_without_its_end_is_refused(text: str) -> None:
    assert refusal(lambda: read_values("site_ids", text)).startswith(
        f"site_ids: expected a closing bracket and quote for each, got {text!r}"
    )


def test_all_combinations_are_runs_of_which_the_last_setting_changes_first() -> None:
    points = make_grid({"model": "a,b", "num_rounds": "2", "seed": "1,2,3"})
    assert [(point.swept["model"], point.swept["seed"]) for point in points] == [
        (m, s) for m in "ab" for s in (1, 2, 3)
    ]
    assert all(point.given == {**point.swept, "num_rounds": 2} for point in points)
    assert points[5].name == "model=b seed=3"
    assert len({point.folder for point in points}) == len({point.settings()["job_name"] for point in points}) == 6


def test_a_folder_stays_if_a_resumed_run_may_change_what_changes_and_if_values_are_added() -> None:
    def names(**changes: str) -> tuple[str, list[str]]:
        points = make_grid({"model": "a,b", "seed": "1,2", "num_rounds": "2", "batch_size": "4", **changes})
        return name_sweep(points), [point.folder for point in points]

    sweep, folders = names()
    assert names(num_rounds="3", author="me") == (sweep, folders)
    more = names(seed="3,1,2")
    assert more[0] == sweep
    assert set(folders) < set(more[1])
    other = names(batch_size="8")
    assert other[0] != sweep
    assert not set(folders) & set(other[1])
    assert len({*names(num_rounds="2,3")[1]}) == 8, "a value of its own is a run of its own"
    assert len({*names(test_path=f"{'x' * 90}1,{'x' * 90}2")[1]}) == 8, "of a long name, too"


def test_runs_have_names_and_places_for_checkpoints_of_their_own() -> None:
    points = make_grid({"seed": "1,2", "checkpoints_dir": "s3://bucket/a/", "job_name": "mine"})
    assert [point.settings()["job_name"] for point in points] == ["mine: seed=1", "mine: seed=2"]
    assert [point.settings()["checkpoints_dir"] for point in points] == [
        f"s3://bucket/a/{point.folder}" for point in points
    ]
    assert "checkpoints_dir" not in make_grid({"seed": "1,2"})[0].settings()
    long = {"test_path": f"{'x' * 90}1,{'x' * 90}2"}
    for given in (long, long | {"job_name": "mine"}):
        names = [point.settings()["job_name"] for point in make_grid(given)]
        assert names[0] != names[1]
        assert max(map(len, names)) < 105


def test_all_that_is_wrong_is_found_in_all_runs() -> None:
    (problem,) = find_grid_problems(make_grid({"lr": "1", "seed": "1,2"}))
    assert problem.startswith("'lr': expected the name of a setting, got an unknown one")
    assert "run" not in problem, "all have it"
    points = make_grid({"strategy": "fedavg,fedadam", "server_tau": "0.1", "seed": "1,2"})
    (problem,) = find_grid_problems(points)
    assert problem.startswith("server_tau: expected None")
    assert problem.endswith("(of the run strategy=fedavg seed=1, and 1 more)")
    (problem,) = find_grid_problems(make_grid({"batch_size": "4,0"}))
    assert problem == "batch_size: expected a whole number >= 1, got 0 (of the run batch_size=0)"
    assert find_grid_problems(make_grid({"batch_size": "4,8"})) == []


def test_a_run_is_done_if_the_last_one_of_its_settings_has_completed(tmp_path: Path) -> None:
    given = {"seed": 3, "site_settings": {1: {"batch_size": 2}}}
    (config,) = [{"seed": 3, "site_settings": {"1": {"batch_size": 2}}, "num_rounds": 3, "author": "another"}]

    def write(number: int, status: str, **changes: object) -> None:
        (tmp_path / str(number)).mkdir(exist_ok=True)
        (tmp_path / str(number) / "config.json").write_text(json.dumps({**config, **changes}))
        (tmp_path / str(number) / "run.json").write_text(json.dumps({"status": status}))

    assert find_done(tmp_path / "none", given) is None
    for number in (2, 10):
        write(number, "COMPLETED")
    write(11, "INTERRUPTED")
    write(12, "COMPLETED", num_rounds=4)
    assert find_done(tmp_path, given) == tmp_path / "10"
    (tmp_path / "10" / "run.json").write_text('{"status": "COMPL')
    assert find_done(tmp_path, given) == tmp_path / "2"
    write(2, "FAILED")
    assert find_done(tmp_path, given) is None
    assert find_done(tmp_path, {**given, "num_rounds": 4, "job_name": "x"}) == tmp_path / "12"


def runs_of(folder: Path) -> dict[str, dict[str, Any]]:
    """The records of a sweep's runs, by their places."""
    return {str(path.parent.relative_to(folder)): json.loads(path.read_text()) for path in folder.glob("*/*/run.json")}


def test_a_sweep_trains_what_the_command_trains_lists_failures_and_skips_what_is_done(
    sweep: Command, command: Command, tmp_path: Path, corpus: tuple[Path, Path]
) -> None:
    grid = {"train_path": f"{corpus[0]},later.csv", "seed": "1,2"}
    status, output = sweep(**grid)
    assert status == 1
    (folder,) = tmp_path.glob("runs/sweep-seed-train_path-*")
    failed = output[output.index("error: ") :].splitlines()
    assert [line.partition(": expected")[0] for line in failed] == [
        f"error: train_path=later.csv seed={seed}: 'later.csv'" for seed in (1, 2)
    ]
    first = runs_of(folder)
    assert sorted(run["status"] for run in first.values()) == ["COMPLETED", "COMPLETED", "FAILED", "FAILED"]
    times = sorted((run["start_time"], run["stop_time"]) for run in first.values())
    assert all(ended <= started for (_, ended), (started, _) in pairwise(times)), "one at a time"
    assert not [*folder.glob("report*")], "report=False"

    (tmp_path / "later.csv").write_text(corpus[0].read_text())
    status, output = sweep(**grid, author="another")
    assert (status, output.count("done before")) == (0, 2)
    second = runs_of(folder)
    assert first.items() <= second.items()
    assert len(second) == 6
    rows = [line.split(" | ") for line in output.splitlines() if " | " in line]
    assert [cell.strip() for cell in rows[0][:2]] == ["train_path", "seed"]
    assert [cell.strip() for row in rows[1:] for cell in row[:2]] == [
        cell for path in (str(corpus[0]), "later.csv") for seed in "12" for cell in (path, seed)
    ]

    status, alone = command(seed=2, num_rounds=1)
    assert status == 0
    places = [Path(row[-1].strip()) for row in rows[1:]]
    hashes = [json.loads((tmp_path / place / "info.json").read_text())["sha256"] for place in places]
    assert hashes[1] == hashes[3] == weights_hash(alone) != hashes[0]
    column = [cell.strip() for cell in rows[0]].index("validation loss")
    lines = [json.loads(line) for line in (tmp_path / places[1] / "rounds.jsonl").read_text().splitlines()]
    best = min(line["validation.loss"] for line in lines)
    assert rows[2][column].strip(" *") == f"{best:.4f}"
    losses = [row[column].strip() for row in rows[1:]]
    least = min(losses, key=lambda loss: float(loss.strip("*")))
    assert ["*" in loss for loss in losses] == [loss.strip("*") == least.strip("*") for loss in losses]


@pytest.mark.long
def test_runs_that_are_done_are_compared_in_one_report(tmp_path: Path) -> None:
    points = make_grid({"seed": "1,2", "task_name": "bbcnews"})
    for number, point in enumerate(points):
        config = json.loads(json.dumps(vars(Settings(**point.settings()))))
        write_run(tmp_path / "here" / point.folder / "1", num_rounds=2, seed=number, config=config)
    pid = fork_script(
        SCRIPT, ["with", "seed=1,2", "task_name=bbcnews", "--folder", "here"], tmp_path / "o", tmp_path, {}
    )
    assert wait_for_exit(pid) == 0
    page = (tmp_path / "here" / "report.html").read_text()
    assert "2 runs side by side" in page
    assert all(f"<b>{point.settings()['job_name']}</b>" in page for point in points)
    assert "report    here/report.html" in (tmp_path / "o").read_text()


def test_nothing_starts_if_a_setting_of_any_run_is_wrong(sweep: Command, tmp_path: Path) -> None:
    status, output = sweep("--parallel=0", batch_size="4,0", site_ids="0,0", lr=1)
    assert status == 1
    assert all(line.startswith("error: ") for line in output.splitlines())
    assert "site_ids=[0,0]" in output
    assert "--parallel: expected a whole number >= 1, got 0" in output
    status, output = sweep(batch_size="4,0", lr=1)
    assert status == 1
    assert "'lr': expected the name of a setting" in output
    assert "batch_size: expected a whole number >= 1, got 0 (of the run batch_size=0)" in output
    status, output = sweep("--parallel=two")
    assert (status, output) == (
        1,
        "error: argument --parallel: invalid int value: 'two'. `scaling-fl sweep --help` explains the options\n",
    )
    assert not (tmp_path / "runs").exists()


def test_a_run_that_another_process_trains_is_left_to_it(sweep: Command, tmp_path: Path) -> None:
    status, _ = sweep("--folder=here", train_path="none.csv,no.csv")
    assert status == 1
    busy, other = sorted(tmp_path.glob("here/train_path*"))
    with (busy / "output.txt").open("ab") as output:
        fcntl.flock(output, fcntl.LOCK_EX)
        status, printed = sweep("--folder=here", train_path="none.csv,no.csv")
    assert status == 1
    assert f"expected no other process that trains it, got one, which writes here/{busy.name}/output.txt" in printed
    assert [len(runs_of(tmp_path / "here")), (busy / "2").exists(), (other / "2").exists()] == [3, False, True]


def test_a_run_that_another_sweep_has_trained_meanwhile_is_not_started(tmp_path: Path) -> None:
    (point,) = make_grid({"seed": "1", "task_name": "bbcnews"})
    write_run(tmp_path / "1", num_rounds=2, config=json.loads(json.dumps(vars(Settings(**point.settings())))))
    outcome = Outcome(point)
    assert _start(outcome, "[1/1]", tmp_path, 1) is None
    assert (outcome.record, outcome.problem) == (tmp_path / "1", "")
    assert (tmp_path / OUTPUT).read_text() == ""


def test_a_sweep_whose_output_is_closed_ends_its_runs(
    small_run: dict[str, Any], tmp_path: Path, warm: None, corpus: tuple[Path, Path]
) -> None:
    given = small_run | {"train_path": f"{corpus[0]},none.csv", "num_rounds": 2_000}
    words = ["--folder=here", "--parallel=2", "with", *(f"{name}={value}" for name, value in given.items())]
    command = [sys.executable, str(SCRIPT), *words]
    pipe, env = subprocess.PIPE, {**os.environ, "RANKS": "1"}
    with subprocess.Popen(command, stdout=pipe, stderr=pipe, cwd=tmp_path, env=env) as process:
        assert process.stdout is not None
        while b"[2/2]" not in process.stdout.readline():
            pass
        process.stdout.close()  # before it prints that the second run has failed
        _, errors = process.communicate(timeout=60)
    assert errors.decode() == "error: the standard output: expected a reader, got one that has closed it\n"
    assert process.returncode == 1
    for path in tmp_path.glob("here/*/output.txt"):
        with path.open("ab") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # no process has it open


def test_a_signal_ends_all_runs_and_the_same_command_goes_on_with_them(
    begin: Start, sweep: Command, tmp_path: Path
) -> None:
    grid = {"seed": "1,2,3", "checkpoints_dir": "saved", "keep_checkpoints": 2}
    pid, output = begin("--parallel=2", "--folder=here", **grid, num_rounds=2_000)
    rounds = "here/*/1/rounds.jsonl"
    wait_until(lambda: sum(path.read_text().count("\n") > 2 for path in tmp_path.glob(rounds)) == 2)
    assert len([*tmp_path.glob("here/seed=*")]) == 2, "the third waits"
    os.kill(pid, signal.SIGINT)
    assert wait_for_exit(pid) == 128 + signal.SIGINT
    printed = output.read_text()
    assert "stopped   0 of 3 runs are done. The same command skips these and goes on with the others" in printed
    assert "interrupted by SIGINT" in printed
    for path in tmp_path.glob("here/seed=*/output.txt"):
        with path.open("ab") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # no process has it open
    assert {run["status"] for run in runs_of(tmp_path / "here").values()} == {"INTERRUPTED"}
    last = max(int(path.stem.partition("-")[2]) for path in tmp_path.glob("saved/*/round-*.pt"))
    status, printed = sweep("--parallel=2", "--folder=here", **grid, num_rounds=last + 1)
    assert status == 0, printed
    runs = runs_of(tmp_path / "here")
    assert sorted(run["status"] for run in runs.values()) == ["COMPLETED"] * 3 + ["INTERRUPTED"] * 2
    resumed = [path.read_text() for path in tmp_path.glob("here/*/output.txt")]
    assert sum("resumed   after round" in text for text in resumed) == 2


@pytest.mark.parametrize("parallel", [1, 2, 64])
def test_runs_at_a_time_share_the_cores(parallel: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANKS", "auto")
    alone, shared = (int(find_variables({"site_ids": [0] * 64}, each)["RANKS"]) for each in (1, parallel))
    assert shared == max(1, alone // parallel)
    monkeypatch.setenv("RANKS", "3")
    assert "RANKS" not in find_variables({"site_ids": [0] * 64}, parallel)

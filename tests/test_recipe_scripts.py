"""The scripts of recipes/, run as a user runs them, offline with what recipes/make_toy.py makes."""

import math
import os
import re
import shutil
import subprocess
import sys
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import flower_quickstart
import pytest
import torch
from helpers import ROOT, weights_hash
from recipe_project import RECIPES, Project
from test_readme import commands_of
from transformers import AutoConfig, AutoModelForSequenceClassification, BertConfig, BertForSequenceClassification

from scaling_fl import Run
from scaling_fl.command.arguments import read_file
from scaling_fl.data.tasks import TASKS

NAMES = "flower_quickstart", "huggingface_blog", "scaling_fl"
SCRIPTS = sorted(path.stem for path in RECIPES.glob("*.sh"))
COLUMNS = TASKS["agnews"].columns
MAY_WRITE = {"runs", "data", "checkpoints"}


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_trains_with_what_follows_it_and_leaves_a_model(
    name: str, project: Project, network: dict[str, str]
) -> None:
    given = {"num_rounds": 1, "learning_rate": 0.0123, "report": False, "model": "./data/toy/model"}
    given |= {"checkpoints_dir": "checkpoints/mine"}
    status, outputs = project.run(name, *(f"{key}={value}" for key, value in given.items()), **network)
    assert status == 0, outputs
    run = project.load()
    recipe = read_file(str(RECIPES / f"{name}.yaml"))
    values = {key: value for key, value in recipe.items() if key not in ("train_path", "test_path")} | given
    assert {key: getattr(run.settings, key) for key in values} == values
    assert len(run.history) == 2

    after = project.files()
    assert {path.parts[0] for path in after.keys() - project.before} <= MAY_WRITE
    assert {path: after[path] for path in project.before} == project.before

    config = AutoConfig.from_pretrained(f"{run.folder}/model")
    model = AutoModelForSequenceClassification.from_config(config)
    model.load_state_dict(torch.load(f"{run.folder}/final_model.pt", weights_only=True), strict=True)
    assert all(map(torch.equal, model.state_dict().values(), run.model.state_dict().values()))


@pytest.mark.long
@pytest.mark.parametrize("name", SCRIPTS)
def test_a_recipe_fails_as_its_program_does(name: str, project: Project, network: dict[str, str]) -> None:
    status, outputs = project.run(name, "num_rounds=-1", **network)
    assert status == 1
    assert outputs[-1].startswith("error: num_rounds: expected")
    assert {path for path in project.files().keys() - project.before if path.parts[0] != "data"} == set()


@pytest.mark.long
def test_flowers_figures_are_printed_beside_those_of_the_run(project: Project) -> None:
    status, outputs = project.run("flower_quickstart", "report=False")
    assert status == 0, outputs
    run = project.load()
    rows = dict(re.findall(r"^(\S.*?)  +(\S.*)$", outputs[-1], re.MULTILINE))
    table = {name: tuple(map(float, values.split())) for name, values in rows.items()}
    size = sum(weight.numel() for weight in run.model.parameters()) * 4 / 2**20
    assert table["size of the model, MiB"] == (16.74, pytest.approx(size, abs=0.005))
    assert table["seconds, all rounds"][0] == 151.02
    for round_, accuracy in enumerate((0.5024, 0.5176, 0.5042), 1):
        metrics = run.history[round_]
        assert table[f"validation accuracy, round {round_}"] == (
            accuracy,
            pytest.approx(metrics["validation.accuracy"], abs=5e-5),
        )
        mean = table[f"validation loss, round {round_}"]
        assert mean[1] == pytest.approx(metrics["validation.loss"], abs=5e-5)
        for wrong, right in zip(table[f"the same as Flower prints it, round {round_}"], mean, strict=True):
            assert right / wrong == pytest.approx(31.25, rel=3e-3)
        assert metrics["sites.cohort"] == 5
        assert len(metrics["site.test_examples"]) == 10
        assert sum(metrics["site.test_examples"].values()) == pytest.approx(320 * 0.2, abs=10)
        assert metrics["sites.test_accuracy.weighted"] == pytest.approx(metrics["validation.accuracy"], rel=1e-12)


@pytest.mark.long
def test_the_commands_of_the_page_work(project: Project) -> None:
    make, train = commands_of("docs/coming_from.md")
    shutil.rmtree(project.folder / "data")
    for command in (make, f"{train} report=False"):
        status, outputs = project.start(["bash", "-c", command], cwd=project.folder)
        assert status == 0, outputs
    assert project.files().keys() >= project.before.keys()
    run = project.load()
    assert len(run.history) == 6
    assert run.history[-1]["sites.cohort"] == 2


def test_flowers_mb_are_mib() -> None:
    """Its figure is that of bert-tiny's shape, and of what NumPy writes before each of 41 arrays."""
    shape = {"hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 512}
    model = BertForSequenceClassification(BertConfig(vocab_size=30_522, **shape))
    _, theirs, ours = next(flower_quickstart.compare(SimpleNamespace(model=model, history=[])))
    assert float(theirs) == pytest.approx(float(ours) + len(model.state_dict()) * 128 / 2**20, abs=0.005)


def test_flowers_losses_are_too_small_by_the_examples_of_a_batch() -> None:
    examples = 25_000 // 10 // 5  # of IMDB, of a site, of its test part
    assert examples / math.ceil(examples / 32) == flower_quickstart.TO_MEAN


@pytest.mark.long
def test_the_blogs_sites_are_processes_with_examples_of_their_own(project: Project, network: dict[str, str]) -> None:
    status, (installs, *ranks) = project.run("huggingface_blog", "report=False", **network)
    assert status == 0, ranks
    assert installs == ""
    assert sorted("round |" in output for output in ranks) == [False, True]
    last = project.load().history[-1]
    assert last["site.examples"] == last["site.test_examples"] == {0: 100, 1: 100}
    assert last["site.rank"] == {0: 0, 1: 1}

    one_process = {"WORLD_SIZE": "1", "RANK": "0", **network}
    status, outputs = project.run("huggingface_blog", "report=False", "site_ids=[0,0]", **one_process)
    assert status == 0, outputs
    assert len(outputs) == 1
    assert weights_hash(outputs[0]) == project.load(1).sha256


@pytest.mark.long
def test_the_papers_job_continues_under_its_name(project: Project) -> None:
    for rounds in (1, 2):
        status, outputs = project.run("scaling_fl", f"num_rounds={rounds}", "report=False", JOB_NAME="20261126_0900")
        assert status == 0, outputs
    checkpoints = project.folder / "checkpoints" / "20261126_0900"
    assert {path.name for path in checkpoints.glob("round-*.pt")} == {"round-1.pt", "round-2.pt"}
    assert project.load(2).settings.job_name == "20261126_0900"
    assert "time.setup_s" in project.load(2).history[2], "it started after round 1"


def test_ag_news_can_be_read_by_http(toy: Path) -> None:
    folder = toy / "agnews"
    serve = partial(SimpleHTTPRequestHandler, directory=str(folder))
    with ThreadingHTTPServer(("127.0.0.1", 0), serve) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            found = TASKS["agnews"].read(f"http://127.0.0.1:{server.server_port}/train.csv", "train", COLUMNS)
        finally:
            server.shutdown()
            thread.join()
    assert found[:] == TASKS["agnews"].read(str(folder / "train.csv"), "train", COLUMNS)[:]


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not here")
def test_shellcheck_reports_nothing() -> None:
    subprocess.run(["shellcheck", *RECIPES.glob("*.sh")], check=True)


@pytest.mark.long(seconds=25)
@pytest.mark.parametrize("name", ["huggingface_blog", "flowertune_nlp"])  # for the others see above
def test_a_recipe_runs_by_run_local(name: str, toy: Path, tmp_path: Path, network: dict[str, str]) -> None:
    if Path(sys.prefix) != ROOT / ".venv":
        pytest.skip("run-local.sh makes another virtual environment: the tests were not started by it")
    if name.startswith("flowertune") and os.environ.get("EXTRAS") != "quantise":
        pytest.skip("run-local.sh would install other extras while tests run: EXTRAS=quantise starts the tests with it")
    place = {"TOY": str(toy), "SACRED_RUNS_DIR": str(tmp_path / "runs"), "RUNTIME": "venv", **network}
    command = [RECIPES / f"{name}.sh", "num_rounds=2", f"checkpoints_dir={tmp_path}/checkpoints"]
    done = subprocess.run(command, cwd=tmp_path, env={**os.environ, **place}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert Run.load(tmp_path / "runs" / "1").status == "COMPLETED"

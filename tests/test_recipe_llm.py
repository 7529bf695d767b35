"""The recipes of language models: FlowerTune's baselines and first README, and NVFlare's example with SFTTrainer."""

import json
import re
import shlex
import shutil
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import nvflare_sft
import pytest
import table
import torch
from helpers import SCRIPT, fork_script, long_but, succeed, wait_for_exit
from last_runs import last_runs
from peft import PeftConfig
from recipe_project import RECIPES, Project
from safetensors.torch import load_file
from test_readme import commands_of
from transformers import MistralConfig, MistralForCausalLM

from scaling_fl import Run, Settings
from scaling_fl.command.sweep import read_points
from scaling_fl.experiment.checks import check
from scaling_fl.experiment.contradictions import find_contradictions
from scaling_fl.experiment.messages import MIB, count_budget, count_message
from scaling_fl.experiment.parameters import bind
from scaling_fl.models.adapters import add_adapter

RECIPE_NAMES = sorted({path.stem for path in RECIPES.glob("*.sh")} | {"nvflare_peft"})
# The data, sites and sites of a round that FlowerTune publishes, and the budget in MiB that follows with 200 rounds.
BASELINES = {
    "nlp": ("alpaca-gpt4", 20, 2, 41_600),
    "finance": ("fingpt-sentiment-train", 50, 5, 104_000),
    "medical": ("medical-meadow-medical-flashcards", 20, 2, 41_600),
    "code": ("code-alpaca-20k", 10, 2, 41_600),
}
FLOWERTUNE = [*(f"flowertune_{name}" for name in BASELINES), "flowertune_openllama"]
OTHERS = FLOWERTUNE[1:4]
ONE_SITE = "The weights of the centralised run and of the one site are the same, bit for bit."


def settings_of(recipe: str, **changes: Any) -> Settings:
    return Settings(**table.settings_of(recipe) | changes)


def in_float32() -> list[str]:
    """The setting without which a run needs bitsandbytes, where it is not installed."""
    return [] if find_spec("bitsandbytes") else ["quantise=None"]


@pytest.mark.parametrize("recipe", RECIPE_NAMES)
def test_the_settings_of_a_recipe_fit_each_other(recipe: str) -> None:
    values = table.settings_of(recipe)
    if values.get("quantise"):
        pytest.importorskip("bitsandbytes")
    check(values)
    assert find_contradictions(Settings(**values)) == []


@pytest.mark.parametrize("name", BASELINES)
def test_a_flowertune_baseline_has_the_budget_that_flower_publishes(name: str) -> None:
    """Which follows from the rank, the layers with an adapter, the cohorts and the rounds."""
    data, num_sites, cohort, budget = BASELINES[name]
    settings = settings_of(f"flowertune_{name}")
    assert (settings.train_path, settings.num_sites) == (f"flwrlabs/{data}", num_sites)
    assert settings.sites_per_round * num_sites == cohort
    with torch.device("meta"):
        model = add_adapter(MistralForCausalLM(MistralConfig()), bind("adapter", vars(settings))())
    num_weights = count_message(model, "float32")["bytes"] // 4
    assert num_weights == 13_631_488
    assert count_budget([num_weights], settings.comm_dtype, cohort, settings.num_rounds) == budget * MIB


@pytest.mark.long(seconds=10)
def test_the_plan_of_a_baseline_prints_its_budget(toy: Path, tmp_path: Path) -> None:
    """From the configuration of its model, and no weights."""
    *_, cohort, budget = BASELINES["finance"]
    shutil.copytree(toy / "llm", tmp_path / "mistral", ignore=shutil.ignore_patterns("*.safetensors"))
    MistralConfig(architectures=["MistralForCausalLM"]).save_pretrained(tmp_path / "mistral")
    files = [str(RECIPES / f"{file}.yaml") for file in ("flowertune", "flowertune_finance")]
    data = toy / "instruct" / "finance.parquet"
    words = ["plan", "with", *files, "model=mistral", f"train_path={data}", *in_float32()]
    pid = fork_script(SCRIPT, words, tmp_path / "output", tmp_path, {"RANKS": "1"})
    output = succeed((wait_for_exit(pid), (tmp_path / "output").read_text()))
    assert f"budget    {budget:,}.0 MiB" in output
    assert f"{cohort} sites x 200 rounds x both ways, of float32" in output


@pytest.mark.parametrize("recipe", FLOWERTUNE)
def test_flowertunes_rate_falls_over_the_rounds_and_its_sites_take_ten_steps_of_sixteen(recipe: str) -> None:
    settings = settings_of(recipe)
    schedule = bind("lr_schedule", vars(settings))()
    num_rounds = 100 if recipe == "flowertune_openllama" else 200
    assert settings.num_rounds == num_rounds
    quarter = 1e-6 + 4.9e-5 * (1 + 0.5**0.5) / 2
    for round_, rate in ((0, 5e-5), (num_rounds // 4, quarter), (num_rounds // 2, 2.55e-5), (num_rounds, 1e-6)):
        for step in (0, 9):
            found = schedule.rate(settings.learning_rate, 1 + round_, step, settings.local_steps)
            assert found == pytest.approx(rate), "the same in all of a round"
    assert (settings.local_steps, settings.batch_size, settings.gradient_accumulation) == (10, 16, 1)
    assert (settings.max_seq_len, settings.quantise, settings.template) == (512, 4, "flowertune")
    assert settings.lora_alpha / settings.lora_rank == 2


def points_of(run: Run, name: str) -> list[float]:
    return [value for metrics in run.history for value in metrics.get(name, ())]


@pytest.mark.parametrize("recipe", long_but(FLOWERTUNE[0], FLOWERTUNE[:4]))
def test_a_recipe_of_flowertune_trains_as_its_files_say_and_leaves_an_adapter(recipe: str, project: Project) -> None:
    base = in_float32() if recipe in OTHERS else ["quantise=None"]  # to import bitsandbytes takes seconds
    status, outputs = project.run(recipe, "num_rounds=2", "report=False", "log_every_steps=5", *base)
    assert status == 0, outputs
    run = project.load()
    changed = {"model", "train_path", "num_rounds=2", "lr_schedule_rounds=2", "log_every_steps=5", *base}
    assert set(table.find_changed(recipe, run).split(", ")) == changed
    num_sites, cohort = BASELINES.get(recipe.removeprefix("flowertune_"), ("", 20, 2, 0))[1:3]
    assert len(run.history[-1]["site.validation_examples"]) == num_sites
    assert [metrics["sites.cohort"] for metrics in run.history[1:]] == [cohort] * 2
    assert points_of(run, "step.number") == [5, 10, 15, 20]
    assert points_of(run, "step.learning_rate") == pytest.approx([5e-5, 5e-5, 2.55e-5, 2.55e-5])
    adapter = PeftConfig.from_pretrained(f"{run.folder}/model")
    assert (adapter.r, adapter.lora_alpha, adapter.target_modules) == (32, 64, {"q_proj", "v_proj"})
    assert {path.parts[0] for path in project.files().keys() - project.before} == {"runs"}


@pytest.mark.long(seconds=10)
def test_the_first_readme_of_flowertune_ends_with_an_answer(project: Project) -> None:
    given = ["num_rounds=2", "report=False", *in_float32()]
    status, (trained, answer) = project.run("flowertune_openllama", *given, QUESTION="Which place comes first?")
    assert status == 0, trained + answer
    assert answer.strip() == project.load().ask("Which place comes first?", max_new_tokens=8).strip()
    ask = "./run-local.sh recipes/ask.py 'Which one?' --max-new-tokens 4 --output answers.jsonl"
    status, outputs = project.start(["bash", "-c", ask], cwd=project.folder)
    assert status == 0, outputs
    assert json.loads((project.folder / "answers.jsonl").read_text())["question"] == "Which one?"


def test_a_question_to_the_first_readmes_adapter_follows_its_training(project: Project) -> None:
    trained, asked = project.words("flowertune_openllama", QUESTION="Which?")
    files = ["recipes/flowertune.yaml", "recipes/flowertune_openllama.yaml"]
    assert trained == ["scripts/train_federated.py", "with", *files]
    assert asked == ["recipes/ask.py", "Which?"]


def put_run(folder: Path, status: str = "COMPLETED", sha256: str = "", losses: tuple[float, ...] = ()) -> None:
    folder.mkdir(parents=True)
    steps = {"step.number": [*range(1, len(losses) + 1)], "step.loss": losses} if losses else {}
    (folder / "rounds.jsonl").write_text(json.dumps({"round": 1, "validation.loss": 0.5, **steps}) + "\n")
    for name, content in {"config": {}, "run": {"status": status}, "info": {"sha256": sha256}}.items():
        (folder / f"{name}.json").write_text(json.dumps(content))


def test_the_last_runs_are_complete_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SACRED_RUNS_DIR", str(tmp_path / "runs"))
    with pytest.raises(SystemExit, match=r"^error: .*runs: expected at least 1 complete runs, got 0$"):
        last_runs(1)
    statuses = ["COMPLETED", "FAILED", "COMPLETED", "RUNNING", "COMPLETED", "INTERRUPTED", "RUNNING"]
    for number, status in enumerate(statuses, 7):
        put_run(tmp_path / "runs" / str(number), status)
    (tmp_path / "runs" / "14").mkdir()
    (tmp_path / "runs" / "_sources").mkdir()
    assert [Path(run.folder).name for run in last_runs(2)] == ["9", "11"], "by number, and 9 is before 11"


def test_losses_by_step_are_printed_where_each_run_has_them(tmp_path: Path) -> None:
    for name, losses in {"1": (3.0, 2.0, 1.0), "2": (3.5, 2.5), "3": (3.5, 2.25)}.items():
        put_run(tmp_path / name, sha256=name, losses=losses)
    put_run(tmp_path / "4", sha256="4")
    first, second, third, without = (Run.load(tmp_path / name) for name in "1234")
    assert list(nvflare_sft.compare([first, second, third]))[3:] == [
        f"{3:>10}{'1.0000':>15}{'-':>15}{'-':>15}",
        f"{'validation':>10}" + f"{'0.5000':>15}" * 3,
        ONE_SITE.replace("are the same", "are not the same"),
        "With half of the bytes in a message, no training loss changes by more than 2.5e-01.",
    ]
    assert list(nvflare_sft.compare([without] * 3))[2:] == [ONE_SITE]


def test_no_recipe_expands_an_empty_array() -> None:
    """Which ends a script with `set -u` in the bash of macOS, here after days of training."""
    scripts = {path.stem: path.read_text() for path in RECIPES.glob("*.sh")}
    assert {name for name, script in scripts.items() if "=()" in script} == {"huggingface_blog"}, "with its processes"


@pytest.mark.long(seconds=30)
@pytest.mark.usefixtures("warm")
def test_the_sweep_of_the_first_readme_has_eight_runs(project: Project) -> None:
    if not find_spec("bitsandbytes"):
        pytest.skip("bitsandbytes is not installed: EXTRAS=quantise installs it")
    status, (output,) = project.run("flowertune_openllama", "num_rounds=2", "local_steps=1", "report=False", SWEEP="1")
    assert status == 0, output
    runs = [Run.load(path.parent) for path in project.folder.glob("runs/sweep-*/*/1/run.json")]
    grid = {(run.settings.model, run.settings.quantise, run.settings.sites_per_round) for run in runs}
    assert grid == {(f"data/toy/{m}", b, f) for m in ("llm", "llm-small") for b in (8, 4) for f in (0.1, 0.2)}
    assert {run.status for run in runs} == {"COMPLETED"}


@pytest.mark.long(seconds=15)
@pytest.mark.parametrize("mode", ["sft", "peft"])
def test_one_site_is_the_centralised_run_and_half_messages_leave_the_curve(mode: str, project: Project) -> None:
    status, outputs = project.run("nvflare_sft", "report=False", MODE=mode)
    assert status == 0, outputs
    *prepared, centralised, alone, half, printed = outputs
    for name, output in zip(("dolly", "alpaca", "oasst1"), prepared, strict=True):
        for side in ("training", "validation"):
            path = f"data/nvflare-toy/{name}/{side}.jsonl"
            (count,) = re.findall(rf"^([\d,]+) rows in {path}$", output, re.MULTILINE)
            assert len((project.folder / path).read_text().splitlines()) == int(count)
    runs = [project.load(number) for number in (1, 2, 3)]
    for run, changed in zip(runs, (["centralised=True"], [], ["comm_dtype=float16"]), strict=True):
        differ = set(table.find_changed(f"nvflare_{mode}", run).split(", "))
        assert differ == {"model", "train_path", "test_path", "log_every_steps=1", *changed}
    assert runs[0].settings.centralised
    assert runs[0].sha256 == runs[1].sha256 != runs[2].sha256
    assert ONE_SITE in printed
    assert "messages " not in centralised + alone
    before, after = (
        int(number.replace(",", ""))
        for number in re.findall(r"([\d,]+) bytes before and ([\d,]+) after rounding to float16", half)[0]
    )
    assert before == 2 * after
    losses = [points_of(run, "step.loss") for run in runs]
    assert losses[1] == losses[0]
    assert losses[2] == pytest.approx(losses[1], rel=1e-4)
    assert losses[2] != losses[1]
    steps = 3 * -(-runs[1].history[1]["site.examples"][0] // 40)
    assert points_of(runs[1], "step.number") == [*range(1, steps + 1)]
    assert {*points_of(runs[1], "step.learning_rate")} == {5e-4}
    rows = re.findall(r"^ +(\d+)((?: +[\d.]+){3})$", printed, re.MULTILINE)
    assert [int(step) for step, _ in rows] == [*range(1, steps + 1)]
    for number, (_, cells) in enumerate(rows):
        assert [float(cell) for cell in cells.split()] == pytest.approx([of_run[number] for of_run in losses], abs=5e-5)


@pytest.mark.long(seconds=40)
def test_the_commands_of_the_page_work(project: Project) -> None:
    make, baseline, peft, openllama, table_ = commands_of("recipes/README.md")
    shutil.rmtree(project.folder / "data")
    few = " ".join(["num_rounds=2", "report=False", *in_float32()])
    for command in (make, f"{baseline} {few}", f"{peft} num_rounds=2 report=False", f"{openllama} {few}", table_):
        status, outputs = project.start(["bash", "-c", command], cwd=project.folder)
        assert status == 0, outputs
    header, _, row = (line.strip("|").split("|") for line in outputs[0].splitlines() if line.startswith("|"))
    cells = dict(zip((name.strip() for name in header), (cell.strip() for cell in row), strict=True))
    run = project.load(1)
    assert {"model", "train_path", "num_rounds=2"} <= set(cells["settings that differ"].split(", "))
    message = 4 * sum(weight.numel() for weight in load_file(f"{run.folder}/model/adapter_model.safetensors").values())
    assert cells["MB sent"] == f"{message * 2 * 2 * 2 / 1e6:.1f}", "2 sites, 2 rounds, both ways"
    assert cells["loss after"] == f"{run.history[-1]['validation.loss']:.4f}"
    assert (cells["recipe"], cells["rounds"], cells["machine"]) == ("flowertune_nlp", "2", "2 cores, 24 GB")


@pytest.mark.parametrize(("recipe", "weights"), [("nvflare_sft", (None,)), ("nvflare_peft", ("lora", 64, 16, 0.1))])
def test_nvflares_recipe_trains_as_its_script_does(recipe: str, weights: tuple[object, ...]) -> None:
    of = settings_of(recipe)
    assert (of.adapter, of.lora_rank, of.lora_alpha, of.lora_dropout)[: len(weights)] == weights
    assert (of.num_rounds, of.num_local_epochs, of.optimiser_state) == (3, 1, "keep")
    assert (of.optimiser, of.learning_rate, of.lr_schedule, of.weight_decay) == ("adamw", 5e-4, "constant", 0)
    assert (of.batch_size, of.gradient_accumulation, of.max_grad_norm, of.max_seq_len) == (4, 10, 0.3, 1_024)


@pytest.mark.parametrize("name", BASELINES)
def test_online_a_baseline_is_trained_with_its_own_files(name: str, project: Project) -> None:
    recipe = f"flowertune_{name}"
    files = ["recipes/flowertune.yaml", f"recipes/{recipe}.yaml"]
    calls = project.words(recipe, "num_rounds=5")
    assert calls == [["scripts/train_federated.py", "with", *files, "num_rounds=5"]]


def test_the_first_readme_has_two_of_twenty_sites_in_a_round() -> None:
    settings = settings_of("flowertune_openllama")
    assert (settings.num_sites, settings.sites_per_round * settings.num_sites) == (20, 2)
    assert (settings.train_path, settings.model) == ("vicgalle/alpaca-gpt4", "openlm-research/open_llama_7b_v2")


def test_the_sweep_of_flowertunes_first_readme_has_its_models_bits_and_fractions(project: Project) -> None:
    pytest.importorskip("bitsandbytes")
    ((script, *words),) = project.words("flowertune_openllama", "seed=3", SWEEP="1")
    assert script == "scripts/sweep.py"
    points = read_points([str(RECIPES.parent / word) if word.endswith(".yaml") else word for word in words], parallel=1)
    found = {(point.given["model"], point.given["quantise"], point.given["sites_per_round"]) for point in points}
    models = [f"openlm-research/open_llama_{size}_v2" for size in ("7b", "3b")]
    assert found == {(model, bits, fraction) for model in models for bits in (8, 4) for fraction in (0.1, 0.2)}
    assert len(points) == 8
    assert {point.given["seed"] for point in points} == {3}


def test_online_nvflares_three_data_sets_come_from_the_hub_once(project: Project) -> None:
    *prepared, centralised, alone, half, compare = project.words("nvflare_sft", MODE="peft")
    sources = [words[words.index("--source") + 1] for words in prepared]
    assert [source.split("/")[5] for source in sources] == ["databricks-dolly-15k", "alpaca", "oasst1"]
    assert all(source.startswith("https://huggingface.co/datasets/") for source in sources)
    files = ["with", "recipes/nvflare_sft.yaml", "recipes/nvflare_peft.yaml"]
    assert centralised == ["scripts/train_centralised.py", *files]
    assert alone == ["scripts/train_federated.py", *files]
    assert half == [*alone, "comm_dtype=float16"]
    assert compare == ["recipes/nvflare_sft.py"]
    for words in prepared:
        path = project.folder / words[words.index("--validation-path") + 1]
        path.parent.mkdir(parents=True)
        path.touch()
    assert project.words("nvflare_sft", MODE="peft") == [centralised, alone, half, compare]


def test_an_unknown_mode_is_refused_before_anything_is_prepared(project: Project, capfd: Any) -> None:
    status, outputs = project.run("nvflare_sft", MODE="lora")
    assert (status, outputs) == (1, [])
    assert capfd.readouterr().err == "error: MODE: expected sft or peft, got lora\n"


def test_what_their_pages_say_of_a_recipe_is_so() -> None:
    """Settings after `recipe` fit it, and those "in the recipe" have these values there."""
    pytest.importorskip("bitsandbytes")
    num_checked = 0
    for section in (RECIPES.parent / "docs" / "their_pages.md").read_text().split("\n## ")[2:]:
        (recipe,) = re.findall(r"^`recipe` is \[recipes/(\w+)\.sh\]", section, re.MULTILINE)
        assert (RECIPES / f"{recipe}.sh").exists()
        own = table.settings_of(recipe)
        for cell in re.findall(r"^\|.*\| (.*) \|$", section, re.MULTILINE):
            for words in re.findall(r"`(?:[A-Z_]+=\S+ )*recipe ([^`]+)`", cell):
                read_points(
                    ["with", *(f"{name}={value!r}" for name, value in own.items()), *shlex.split(words)], parallel=1
                )
                num_checked += 1
            for name, value in re.findall(r"(\w+)=([\w.]+)", cell) if "in the recipe" in cell else ():
                assert str(own[name]) == value
                num_checked += 1
    assert num_checked == 12

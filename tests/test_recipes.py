"""CONTRIBUTING's recipes, followed to the letter on a copy of the package."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
from helpers import ROOT, WORDS

EDIT = re.compile(
    r"""(?:In\s`(?P<path>[^`]+)`,\s(?P<how>after|before|in\splace\sof)\s`(?P<mark>[^`]+)`
       |A\snew\sfile,\s`(?P<new>[^`]+)`):\n\n```(?:python)?\n(?P<code>.*?)```""",
    re.DOTALL | re.VERBOSE,
)


class Edit(NamedTuple):
    """A step of a recipe."""

    path: str
    how: str | None  # None makes a file
    mark: str
    code: str


def recipes() -> dict[str, list[Edit]]:
    """The steps of each recipe, by its heading."""
    page = (ROOT / "CONTRIBUTING.md").read_text().partition("## Recipes")[2]
    return {
        section.partition("\n")[0]: [
            Edit(step["path"] or step["new"], step["how"], step["mark"], step["code"])
            for step in EDIT.finditer(section)
        ]
        for section in page.split("\n### ")[1:]
    }


def follow(edit: Edit, root: Path) -> None:
    file = root / edit.path
    if edit.how is None:
        assert not file.exists()
        file.write_text(edit.code)
        return
    lines = file.read_text().splitlines(keepends=True)
    (place,) = (number for number, line in enumerate(lines) if line.lstrip().startswith(edit.mark))
    start, end = {"after": (1, 1), "before": (0, 0)}.get(edit.how, (0, 1))
    lines[place + start : place + end] = [edit.code + ("\n\n" if edit.how == "before" else "")]  # two lines, as above
    file.write_text("".join(lines))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A copy of the package with all recipes in it."""
    shutil.copytree(ROOT / "scaling_fl", tmp_path / "scaling_fl", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    for edits in recipes().values():
        for edit in edits:
            follow(edit, tmp_path)
    return tmp_path


def test_each_recipe_is_read_whole() -> None:
    page = (ROOT / "CONTRIBUTING.md").read_text().partition("## Recipes")[2]
    assert [*recipes()] == [f"A {what}" for what in ("setting", "task", "model", "partition", "strategy", "metric")]
    assert sum(map(len, recipes().values())) == page.count("```") / 2


def test_the_recipes_are_code_as_ours(root: Path) -> None:
    for check in (["check"], ["format", "--check"]):
        command = [sys.executable, "-m", "ruff", *check, "scaling_fl"]
        done = subprocess.run(command, cwd=root, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout


@pytest.mark.long
def test_the_recipes_train(root: Path, tiny_model: str) -> None:
    for name in ("train", "test"):
        rows = [f"{row % 2 * 3 + 1},{WORDS[row % 9]} {WORDS[row % 7]}" for row in range(24)]
        (root / f"{name}.csv").write_text("\n".join(["stars,review", *rows]))
    given = (
        f"task_name=reviews partition=linear strategy=fedamsgrad local_momentum=0.5 optimiser=sgd model={tiny_model}"
    )
    command = f"with {given} train_path=train.csv test_path=test.csv site_ids=[0,0,0] num_rounds=1"
    code = (
        "from scaling_fl.models.loading import path_of; print(path_of('electra'))\n"
        "from scaling_fl.command.__main__ import main; main()"
    )
    run = [sys.executable, "-c", code, *command.split(), "report=False"]
    env = {**os.environ, "PYTHONPATH": str(root), "PYTHONSAFEPATH": "1"}
    done = subprocess.run(run, cwd=root, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.startswith("google/electra-small-discriminator\n")
    folder = root / "runs" / "1"
    settings = json.loads((folder / "config.json").read_text())
    assert (settings["local_momentum"], settings["max_seq_len"]) == (0.5, 64)
    assert json.loads((folder / "info.json").read_text())["labels"] == ["bad", "good"]
    last = json.loads((folder / "rounds.jsonl").read_text().splitlines()[-1])
    assert last["site.examples"] == {"0": 4, "1": 8, "2": 12}
    assert 0.5 <= last["validation.confidence"] <= 1
    assert last["sites.confidence.worst"] == max(last["site.confidence"].values())

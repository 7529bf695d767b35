"""`scaling-fl new` writes a project that trains as it is, and that pip installs."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from helpers import SCRIPT, fork_script, succeed, wait_for_exit

from scaling_fl.command import new
from scaling_fl.experiment.checks import check

Start = Callable[..., tuple[int, str]]


@pytest.fixture
def run(tmp_path: Path) -> Start:
    """Runs the command with words, in a folder."""

    def run(*words: str, folder: Path = tmp_path, ranks: int = 1) -> tuple[int, str]:
        output = tmp_path / "output.txt"
        return wait_for_exit(fork_script(SCRIPT, words, output, folder, {"RANKS": str(ranks)})), output.read_text()

    return run


def test_a_new_project_trains_and_resumes_and_what_is_typed_wins(run: Start, tmp_path: Path) -> None:
    assert "scaling-fl with settings.yaml" in succeed(run("new", "sub/my-reviews"))
    folder = tmp_path / "sub" / "my-reviews"
    given = ["with", "settings.yaml", "num_rounds=1", "report=False", "checkpoints_dir=checkpoints"]
    output = succeed(run(*given, folder=folder, ranks=2))
    assert "of 2 ranks\n" in output
    assert "\n    1 |" in output
    assert "\n    2 |" not in output
    output = succeed(run(*given, "num_rounds=2", folder=folder))
    assert "resumed   after round 1" in output
    assert "\n    2 |" in output
    sites = {0: {"batch_size": 3}}  # in place of those in the file, not beside them
    status, output = run(*given, f"site_settings={sites}", folder=folder)
    assert status == 1
    assert f"where site_settings was {{3: {{'num_local_epochs': 1}}}} and is {sites}" in output


def test_every_setting_of_the_file_is_one(tmp_path: Path) -> None:
    new.write_project(tmp_path / "reviews")
    values = yaml.safe_load((tmp_path / "reviews" / "settings.yaml").read_text())
    names = {"task_name": "text", "trainer": "default"}  # known once task.py is imported
    check({name: names.get(name, value) for name, value in values.items()})
    assert 'name = "reviews"' in (tmp_path / "reviews" / "pyproject.toml").read_text()
    assert (tmp_path / "reviews" / "README.md").read_text().startswith("# reviews\n")


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ((), "error: new: expected the name of a folder, got none\n"),
        (("a", "b"), "error: new: expected the name of a folder, got a b\n"),
        (("a b",), "error: new: expected a name of letters, digits, - and _, such as my_project, got 'a b'\n"),
        (("full",), "error: new: expected a folder that is new or empty, got 'full'\n"),
        (("full/file",), "error: new: expected a folder that is new or empty, got 'full/file'\n"),
        (("full/file/new",), "error: new: expected a folder that can be written, got 'full/file/new' (["),
    ],
    ids=lambda value: " and ".join(value) if isinstance(value, tuple) else "",
)
def test_what_cannot_be_made_is_one_sentence(run: Start, words: tuple[str, ...], says: str, tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("mine")
    status, output = run("new", *words)
    assert (status, output[: len(says)], output.count("\n")) == (1, says, 1)
    assert (tmp_path / "full" / "file").read_text() == "mine"


def test_help_writes_nothing(run: Start, tmp_path: Path) -> None:
    assert succeed(run("new", "--help")).startswith("usage: scaling-fl new DIR")
    assert [path.name for path in tmp_path.iterdir()] == ["output.txt"]


@pytest.mark.long
def test_pip_installs_a_new_project(tmp_path: Path) -> None:
    new.write_project(tmp_path / "reviews")
    options = ["--quiet", "--no-deps", "--no-build-isolation", "--target", str(tmp_path / "installed")]
    subprocess.run([sys.executable, "-m", "pip", "install", *options, str(tmp_path / "reviews")], check=True)
    code, folder = "import task; print(task.TASKS['reviews'].columns)", str(tmp_path / "installed")
    command = [sys.executable, "-c", f"import sys; sys.path.append({folder!r}); {code}"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout == "('review', 'stars')\n"

"""The command `scaling-fl`: its subcommands, its help, and what it says where something is missing."""

import gc
import re
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import ROOT, SCRIPT, fork_script, wait_for_exit
from test_report import write_run

from scaling_fl.command import __main__ as command
from scaling_fl.command.arguments import insert_files
from scaling_fl.command.experiment import experiment

HEAVY = {"torch", "datasets", "sacred", "transformers", "pymongo"}


def run_cold(*arguments: str) -> tuple[str, set[str]]:
    """Run the command in a fresh interpreter; return what it prints, and the modules that it imports."""
    code = "import sys; from scaling_fl.command.__main__ import main; main(); print('MODULES', *sys.modules)"
    done = subprocess.run([sys.executable, "-c", code, *arguments], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    output, _, modules = done.stdout.rpartition("MODULES")
    return output, set(modules.split())


def run(script: Path, folder: Path, *arguments: str) -> tuple[int, str]:
    pid = fork_script(script, arguments, folder / "output.txt", folder, {})
    return wait_for_exit(pid), (folder / "output.txt").read_text()


def test_a_setting_by_name_replaces_that_of_files_and_a_later_file_that_of_an_earlier_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a.yaml").write_text("seed: 1\nmodel: bert\nlearning_rate: 1.0e-3")
    Path("b.json").write_text('{"seed": 2, "model": "albert"}')
    for words in (["a.yaml", "b.json", "seed=3"], ["seed=3", "a.yaml", "b.json"], ["a.yaml", "seed=3", "b.json"]):
        settings = insert_files(["scaling-fl", "with", *words])[2:]
        assert dict(word.split("=") for word in settings) == {
            "seed": "3",
            "model": "'albert'",
            "learning_rate": "0.001",
        }
        assert settings[-1] == "seed=3", "Sacred takes the last"


@pytest.mark.parametrize("words", [["--help"], ["-h"], ["help"], ["plan", "--help"], ["help", "plan"], ["-u", "-h"]])
def test_help_is_one_screen_and_imports_nothing_that_takes_long(words: list[str]) -> None:
    output, modules = run_cold(*words)
    assert not modules & HEAVY
    for subcommand in command.SUBCOMMANDS.values():
        assert re.search(rf"scaling-fl {re.escape(subcommand.example)} +{re.escape(subcommand.meaning)}\n", output)
    lines = output.splitlines()
    assert len(lines) <= 24 - 1, "a terminal and its prompt"
    assert max(map(len, lines)) <= 120


def test_a_report_is_drawn_without_torch(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", num_rounds=0)
    output, modules = run_cold("report", folder)
    assert output.startswith(f"{folder}/report.html, and ")
    assert not modules & HEAVY


def test_the_examples_of_the_help_name_their_subcommands() -> None:
    for name, subcommand in command.SUBCOMMANDS.items():
        assert subcommand.example.split()[0] == name
        made = [[] for _ in range(100)]
        before = gc.get_freeze_count()
        assert callable(command.load(subcommand.module).main)
        assert gc.isenabled()
        assert gc.get_freeze_count() >= before + len(made), "collections visit the packages"


def test_every_command_of_sacred_is_known() -> None:
    ours = {name for name, subcommand in command.SUBCOMMANDS.items() if subcommand.module == command.TRAINING}
    assert dict(experiment.gather_commands()).keys() == (ours | command.OF_SACRED) - {"with", "centralised"}


@pytest.mark.parametrize(
    ("words", "got"), [(["trian", "with", "num_rounds=2"], "'trian'"), (["repo\nrt"], "'repo\\nrt'"), ([""], "''")]
)
def test_an_unknown_subcommand_is_one_sentence(tmp_path: Path, words: list[str], got: str) -> None:
    status, output = run(SCRIPT, tmp_path, *words)
    assert status == 1
    assert output == (
        f"error: subcommand: expected one of {', '.join(command.SUBCOMMANDS)}, got {got}. `scaling-fl --help` explains "
        "each\n"
    )


def test_with_may_come_without_settings(tmp_path: Path) -> None:
    assert run(SCRIPT, tmp_path, "print_config", "with") == run(SCRIPT, tmp_path, "print_config")


@pytest.mark.parametrize(
    ("missing", "package"), [("pkg_resources", '"setuptools<80.9"'), ("sacred", "sacred"), ("docopt", "docopt-ng")]
)
def test_a_missing_package_is_one_sentence(tmp_path: Path, missing: str, package: str) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        f"""
import sys
for name in [name for name in sys.modules if name.startswith(("sacred", "scaling_fl.command", "pkg_resources"))]:
    del sys.modules[name]
sys.modules[{missing!r}] = None
from scaling_fl.command.__main__ import main
main()
"""
    )
    assert run(script, tmp_path, "plan") == (
        1,
        f"error: {missing}: expected an installed module, got none. Type: python -m pip install {package}\n",
    )

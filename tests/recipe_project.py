"""Recipes in a folder of their own, run as a user runs them, offline with what recipes/make_toy.py makes.

Its fixtures are those of helpers.py, too.
"""

import os
import shutil
import socket
import subprocess
import time
from pathlib import Path

import make_toy
import pytest
from warm import fork_script

from scaling_fl import Run

ROOT = Path(__file__).parent.parent
RECIPES = ROOT / "recipes"
# In place of run-local.sh: passes its words and its environment to the test, which starts the program in a fork.
STAND_IN = """#!/usr/bin/env bash
call=$(mktemp -d "$CALLS/XXXXXX")
printf '%s\\0' "$@" >"$call/words"
env -0 >"$call/environment"
touch "$call/asks"
until [[ -e $call/status ]]; do sleep 0.02; done
cat "$call/output"
exit "$(<"$call/status")"
"""


@pytest.fixture(scope="session")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("toy")
    make_toy.make(folder)
    return folder


class Project:
    """A folder with the recipes, without anything of git or of other runs."""

    def __init__(self, folder: Path, toy: Path) -> None:
        self.folder, self.calls = folder / "project", folder / "calls"
        shutil.copytree(RECIPES, self.folder / "recipes", ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copytree(toy, self.folder / "data" / "toy")
        shutil.copytree(ROOT / "scripts", self.folder / "scripts", ignore=shutil.ignore_patterns("__pycache__"))
        self.calls.mkdir()
        (self.folder / "run-local.sh").write_text(STAND_IN)
        (self.folder / "run-local.sh").chmod(0o755)
        self.before = self.files()

    def files(self) -> dict[Path, bytes]:
        return {path.relative_to(self.folder): path.read_bytes() for path in self.folder.rglob("*") if path.is_file()}

    def run(self, recipe: str, *arguments: str, **environment: str) -> tuple[int, list[str]]:
        """Return the exit status of a recipe, and the output of each program that it started, in their order."""
        script = str(self.folder / "recipes" / f"{recipe}.sh")
        return self.start([script, *arguments], cwd="/", TOY="data/toy", **environment)

    def start(self, words: list[str], cwd: Path | str, **environment: str) -> tuple[int, list[str]]:
        env = {**os.environ, "CALLS": str(self.calls), **environment}
        script = subprocess.Popen(words, cwd=cwd, env=env)
        pids: dict[int, Path] = {}
        outputs = []
        while script.poll() is None or pids:
            for call in {path.parent for path in self.calls.glob("*/asks")}:
                (call / "asks").unlink()
                pids[self.fork(call)] = call
                outputs.append(call / "output")
            for pid in list(pids):
                done, status = os.waitpid(pid, os.WNOHANG)
                if done:
                    (pids.pop(pid) / "status").write_text(str(os.waitstatus_to_exitcode(status)))
            time.sleep(0.01)
        return script.returncode, [output.read_text() for output in outputs]

    def fork(self, call: Path) -> int:
        """Start what the stand-in was asked to start, where run-local.sh does. Returns its process id."""
        program, *arguments = (call / "words").read_text().split("\0")[:-1]
        variables = (call / "environment").read_text().split("\0")[:-1]
        environment = dict(variable.split("=", 1) for variable in variables)
        return fork_script(Path(program), arguments, call / "output", self.folder, environment)

    def words(self, recipe: str, *arguments: str, **environment: str) -> list[list[str]]:
        """Return the words of each program that a recipe would start, online, in their order."""
        log, program = self.folder.parent / "words", self.folder / "run-local.sh"
        stand_in = program.read_text()
        log.write_text("")
        program.write_text('#!/usr/bin/env bash\nprintf \'%s\\0\' "$@" >>"$WORDS"; echo >>"$WORDS"\n')
        script = [str(self.folder / "recipes" / f"{recipe}.sh"), *arguments]
        subprocess.run(script, env={**os.environ, "WORDS": str(log), **environment}, check=True)
        program.write_text(stand_in)
        return [line.split("\0")[:-1] for line in log.read_text().splitlines()]

    def load(self, number: int = 1) -> Run:
        return Run.load(self.folder / "runs" / str(number))


@pytest.fixture
def project(tmp_path: Path, toy: Path) -> Project:
    return Project(tmp_path, toy)


@pytest.fixture
def network() -> dict[str, str]:
    """The environment of ranks that meet on this machine."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return {"MASTER_PORT": str(free.getsockname()[1])}

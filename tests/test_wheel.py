"""What pip installs: every file of the package, the command, and nothing that only a clone has."""

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
from collections.abc import Callable
from pathlib import Path
from zipfile import ZipFile

import pytest
from helpers import LABELS, ROOT, weights_hash
from tiny_models import put_model

# Files that are no modules, as templates and pictures are.
DATA_FILES = ("scaling_fl/probe/settings.yaml", "scaling_fl/probe/deep/.hidden", "scaling_fl/report/probe.svg")
NOT_FOR_PIP = ("scaling_fl/__pycache__/old.cpython-311.pyc", "runs/1/run.json", "checkpoints/round-1.pt", ".env")


def tracked(*folders: str) -> list[str]:
    """The paths of the files that belong to the project, new ones too."""
    if not (ROOT / ".git").exists():
        pytest.skip("this is no clone: git does not know which files belong to the project")
    git = ["git", "ls-files", "--cached", "--others", "--exclude-standard", *folders]
    listed = subprocess.run(git, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    return [path for path in listed if (ROOT / path).is_file()]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the source distribution and the wheel that is built from it, without any package index."""
    source, output = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("dist")
    for path in tracked():
        (source / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / path, source / path)
    for path in DATA_FILES + NOT_FOR_PIP:
        (source / path).parent.mkdir(parents=True, exist_ok=True)
        (source / path).write_text("a probe\n")
    build = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(output), str(source)]
    done = subprocess.run(build, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return output


@pytest.fixture(scope="module")
def wheel(built: Path) -> Path:
    (wheel,) = built.glob("scaling_fl-*-py3-none-any.whl")
    return wheel


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the programs of a virtual environment with the wheel and what it needs.

    The packages that the wheel needs are those of this environment. The line of the .pth file adds their folder without
    reading the .pth files in it, by which the checkout is found here.
    """
    folder = tmp_path_factory.mktemp("environment")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    python = folder / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", "--no-deps", "--no-index"]
    subprocess.run([*pip, str(wheel)], check=True)
    ask = [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]
    packages = Path(subprocess.run(ask, capture_output=True, text=True, check=True).stdout.strip())
    (packages / "needed.pth").write_text("\n".join({sysconfig.get_path(name) for name in ("purelib", "platlib")}))
    return folder / "bin"


@pytest.fixture
def run(installed: Path, tmp_path: Path) -> Callable[..., str]:
    """Runs a program of that environment in an empty folder."""
    folder = tmp_path / "empty"
    folder.mkdir()
    env = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}

    def run(program: str, *arguments: str) -> str:
        done = subprocess.run(
            [installed / program, *arguments], cwd=folder, env=env | {"RANKS": "1"}, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout + done.stderr
        assert done.stderr == ""
        return done.stdout

    return run


def test_the_wheel_has_every_file_of_the_package_and_nothing_that_a_run_left(built: Path, wheel: Path) -> None:
    names = {name for name in ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert names == {*tracked("scaling_fl"), *DATA_FILES}
    (archive,) = built.glob("scaling_fl-*.tar.gz")
    with tarfile.open(archive) as file:
        names = {member.name.partition("/")[2] for member in file if member.isfile()}
    assert {"README.md", "LICENSE", "pyproject.toml", *tracked("scaling_fl")} <= names
    ours = {name for name in names if not name.startswith("scaling_fl.egg-info/")}
    assert ours - {"PKG-INFO", "setup.cfg"} <= {*tracked(), *DATA_FILES}


@pytest.mark.long
def test_the_wheel_works_from_an_empty_folder(run: Callable[..., str], installed: Path, tmp_path: Path) -> None:
    place = run("python", "-c", "import scaling_fl; print(scaling_fl.__file__)")
    assert place.startswith(str(installed.parent)), "the checkout hides what the wheel lacks"
    assert "scaling-fl report" in run("scaling-fl", "--help")

    model = put_model(tmp_path / "model", "bert")
    rows = [f"once upon a time there was {name},{name}" for name in LABELS * 4]
    (tmp_path / "texts.csv").write_text("\n".join(["text,label", *rows]))
    texts = str(tmp_path / "texts.csv")
    settings = [f"train_path={texts}", f"test_path={texts}", f"model={model}", "task_name=text", "max_seq_len=16"]
    output = run("scaling-fl", "with", *settings, "num_rounds=1")
    assert len(weights_hash(output)) == 64
    (tmp_path / "empty" / "runs" / "1" / "report.html").unlink()
    assert "report.html" in run("scaling-fl", "report", "runs/1")
    assert (tmp_path / "empty" / "runs" / "1" / "report.html").is_file()

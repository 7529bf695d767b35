"""run-local.sh in a copy of the files that it reads. Docker, pip and the user's name are stand-ins that log calls."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FILES = ["run-local.sh", "pyproject.toml", "constraints.txt", "demo-requirements.txt", "smollm2-requirements.txt"]
ODD_ARGUMENTS = ["a.py", "with", "a b", 'it\'s "so"', "$HOME `id` $(id)", "ids=[0,0,1]", "2\nlines", "", "*", "-x", "ü"]
PRINT_ENVIRONMENT = ["-c", "import json, os; print(json.dumps(dict(os.environ)))"]

# Logs each call with an effect, and its environment. A call that contains the word in FAIL fails.
DOCKER = f"""#!/bin/sh
case "$*" in
  info | "compose version") [ "${{*##* }}" != "$FAIL" ] ;;
  *) exec {sys.executable} -ISc '
import json, os, sys
with open(os.environ["CALLS"], "a") as calls:
    print(json.dumps([sys.argv[1:], dict(os.environ)]), file=calls)
print("from docker", sys.argv[1:])
sys.exit(9 if os.environ.get("FAIL") in sys.argv else 7 if "run" in sys.argv else 0)
' "$@" ;;
esac
"""
ID = """#!/bin/sh
case $1 in -un) echo "Jo.Doe" ;; -u) echo 1234 ;; -g) echo 567 ;; esac
"""
# The Python of a virtual environment, without pip.
VENV_PYTHON = f"""#!/bin/sh
if [ "$1 $2" = "-m pip" ]; then
  [ "$3" = --version ] || echo "$*" >>"$CALLS"
  [ "$FAIL" != pip ]
else
  exec "{sys.executable}" "$@"
fi
"""
PYTHON = """#!/bin/sh
[ "$1" != -m ] || { echo "$*" >>"$CALLS"; mkdir -p "$3/bin"; cp "$(dirname "$0")/venv-python" "$3/bin/python"; }
"""


class Project:
    """A copy of the project's files in a separate folder, and the stand-ins."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.bin, self.home = folder / "the project", folder / "bin", folder / "home"
        for made in (self.folder, self.bin, self.home):
            made.mkdir()
        for name in FILES:
            shutil.copy(ROOT / name, self.folder)
        for name, text in {"docker": DOCKER, "id": ID, "python": PYTHON, "venv-python": VENV_PYTHON}.items():
            (self.bin / name).write_text(text)
            (self.bin / name).chmod(0o755)
        self.calls_file = folder / "calls"
        self.environment = {
            "PATH": f"{self.bin}{os.pathsep}{os.environ['PATH']}",
            "HOME": str(self.home),
            "CALLS": str(self.calls_file),
            "PYTHON": str(self.bin / "python"),
        }

    def run(self, *arguments: str, **environment: str) -> subprocess.CompletedProcess:
        """Run run-local.sh from another folder."""
        command = [self.folder / "run-local.sh", *arguments]
        variables = self.environment | environment
        return subprocess.run(command, env=variables, cwd=self.home, capture_output=True, text=True, timeout=30)

    def calls(self) -> list[str]:
        """Return the new calls that the stand-ins logged."""
        lines = self.calls_file.read_text().splitlines() if self.calls_file.exists() else []
        self.calls_file.unlink(missing_ok=True)
        return lines

    def compose(self, *arguments: str, **environment: str) -> tuple[list[str], dict[str, str]]:
        """Run run-local.sh with Docker, and return the arguments and the environment of `docker compose ... run`."""
        self.run(*arguments, **environment)
        return json.loads(self.calls()[-1])

    def environment_of_run(self, **environment: str) -> dict[str, str]:
        """Return the environment in which a program runs in the virtual environment."""
        result = self.run(*PRINT_ENVIRONMENT, RUNTIME="venv", **environment)
        assert result.returncode == 0, result.stderr
        return json.loads(result.stdout)


@pytest.fixture
def project(tmp_path):
    return Project(tmp_path)


def project_name(argv: list[str]) -> str:
    return argv[argv.index("--project-name") + 1]


# In a container.


def test_arguments_reach_the_container_unchanged(project):
    argv, _ = project.compose(*ODD_ARGUMENTS)
    assert argv[argv.index("main") + 1 :] == ODD_ARGUMENTS


def test_an_empty_command_line_stays_empty(project):
    assert project.compose()[0][-1] == "main"


def test_a_run_in_a_container_publishes_its_ports_and_is_removed_afterwards(project):
    argv, _ = project.compose("a.py")
    assert argv[0] == "compose"
    assert argv[argv.index("run") :] == ["run", "--rm", "--service-ports", "main", "a.py"]


@pytest.mark.parametrize("network", ["host", "container:other"])
def test_a_container_on_the_host_network_publishes_no_ports_and_listens_on_loopback(project, network):
    argv, environment = project.compose("a.py", DOCKER_NETWORK=network, DEBUG="1", RANK="1", MASTER_ADDR="10.0.0.1")
    assert argv[argv.index("run") :] == ["run", "--rm", "--env", "DEBUG_HOST=127.0.0.1", "main", "a.py"]
    assert (environment["RANK"], environment["MASTER_ADDR"]) == ("1", "10.0.0.1")


def test_a_project_is_named_after_the_user_and_the_arguments(project):
    names = [project_name(project.compose(*arguments)[0]) for arguments in (["a", "b"], ["a b"], ["b", "a"], ["a"], [])]
    assert len(set(names)) == len(names)
    for name in names:
        assert re.fullmatch(r"[a-z0-9][a-z0-9_-]*", name)  # what Compose accepts
        assert "jodoe" in name
    assert project_name(project.compose("a", "b")[0]) == names[0]


def test_files_of_a_container_belong_to_the_user(project):
    _, environment = project.compose("a.py")
    assert (environment["HOST_UID"], environment["HOST_GID"]) == ("1234", "567")
    assert environment["HF_HOME"] == str(project.home / ".cache/huggingface")
    for folder in (project.folder / "runs", project.folder / "checkpoints", project.folder / "data"):
        assert folder.is_dir()
    assert Path(environment["HF_HOME"]).is_dir()


def test_two_users_of_one_engine_do_not_share_an_image(project):
    assert project.compose("a.py")[1]["IMAGE"].endswith(":1234")
    assert project.compose("a.py", IMAGE="mine")[1]["IMAGE"] == "mine"


def test_the_status_of_a_container_is_passed_on(project):
    assert project.run("a.py").returncode == 7


def test_a_failed_build_of_the_image_starts_no_run(project):
    assert project.run("a.py", FAIL="build").returncode == 9
    assert "build" in json.loads(project.calls()[-1])[0]


def test_the_output_of_a_program_is_separate_from_that_of_the_build(project):
    assert "'build'" not in project.run("a.py").stdout


def test_compose_does_not_read_env_itself(project):
    # Compose interprets the quotes and the dollar differently, and refuses the second line.
    (project.folder / ".env").write_text("SACRED_PASSWORD='p$w'\nOTHER=\"open\n")
    argv, environment = project.compose("a.py")
    assert argv[argv.index("--env-file") + 1] == "/dev/null"
    assert (environment["SACRED_PASSWORD"], environment["OTHER"]) == ("p$w", '"open')


def test_the_debug_overlay_sets_the_number_of_ranks(project):
    assert "RANKS" not in project.compose("a.py")[1]
    assert project.compose("a.py", RANKS="2")[1]["RANKS"] == "2"


def test_a_run_in_a_container_waits_for_a_debugger(project):
    both = "docker-compose.yaml:docker-compose.debug.yaml"
    assert "COMPOSE_FILE" not in project.compose("a.py", DEBUG="0")[1]
    assert project.compose("a.py", DEBUG="1")[1]["COMPOSE_FILE"] == both
    assert project.compose("a.py", DEBUG="1", COMPOSE_FILE="mine.yaml")[1]["COMPOSE_FILE"] == "mine.yaml"
    assert project.compose("a.py", COMPOSE_FILE=both)[1]["COMPOSE_FILE"] == both


# The dashboard.

MONGO = {"SACRED_USER": "me", "SACRED_PASSWORD": "p$w"}


def test_docker_starts_the_dashboard_with_its_database(project):
    argv, environment = project.compose("dashboard", **MONGO)
    assert argv == ["compose", "--env-file", "/dev/null", "--profile=dashboard", "up"]
    assert environment["SACRED_PASSWORD"] == "p$w"


@pytest.mark.parametrize("missing", MONGO)
def test_docker_starts_no_database_without_a_password(project, missing):
    result = project.run("dashboard", **{**MONGO, missing: ""})
    assert (result.returncode, project.calls()) == (1, [])
    assert "SACRED_USER and SACRED_PASSWORD are needed" in result.stderr


def test_npm_starts_the_dashboard_without_docker(project):
    (project.bin / "npm").write_text('#!/bin/sh\necho "$* $PORT $OMNIBOARD_CONFIG"\n')
    (project.bin / "npm").chmod(0o755)
    result = project.run("dashboard", RUNTIME="venv", SACRED_HOST="db", PATH=f"{project.bin}:/usr/bin:/bin")
    config = project.folder / "docker/omniboard.js"
    assert result.stdout == f"exec --yes --package=omniboard@2.16.1 -- omniboard 9000 {config}\n"
    assert project.calls() == [], "it needs no virtual environment"


@pytest.mark.parametrize(
    ("environment", "sentence"),
    [
        ({}, "SACRED_HOST is needed: the MongoDB whose runs are to be seen"),
        ({"SACRED_HOST": "db", "PATH": "{few}"}, "npm is needed for the dashboard, and not here: Node.js brings it"),
    ],
)
def test_a_dashboard_that_cannot_start_is_one_sentence(project, environment, sentence):
    few = project.folder / "few"  # of the commands
    few.mkdir()
    for name in ("bash", "dirname"):
        (few / name).symlink_to(shutil.which(name))
    given = {name: value.format(few=few) for name, value in environment.items()}
    result = project.run("dashboard", RUNTIME="venv", **given)
    assert (result.returncode, result.stderr) == (1, f"run-local: {sentence}\n")


# The choice between the two.


def test_one_line_states_where_a_program_runs(project):
    assert project.run("-c", "").stderr.count("\n") == 1 + 1  # and one of the build
    assert "in a container" in project.run("-c", "").stderr
    project.run("-c", "", RUNTIME="venv")
    stderr = project.run("-c", "", RUNTIME="venv").stderr
    assert stderr.count("\n") == 1
    assert "in the virtual environment" in stderr


@pytest.mark.parametrize("missing", ["info", "version"])
def test_without_an_engine_or_compose_a_program_runs_in_a_virtual_environment(project, missing):
    result = project.run("-c", "print(6 * 7)", FAIL=missing)
    assert result.stdout == "42\n"
    assert "in the virtual environment" in result.stderr


def test_runtime_venv_selects_a_virtual_environment(project):
    assert project.run("-c", "print(6 * 7)", RUNTIME="venv").stdout == "42\n"


# In a virtual environment.


def test_arguments_reach_the_virtual_environment_unchanged(project):
    result = project.run("-c", "import sys, json; print(json.dumps(sys.argv[1:]))", *ODD_ARGUMENTS, RUNTIME="venv")
    assert json.loads(result.stdout) == ODD_ARGUMENTS


def test_the_status_of_a_program_is_passed_on(project):
    assert project.run("-c", "import sys; sys.exit(41)", RUNTIME="venv").returncode == 41


def test_a_program_runs_in_the_folder_of_the_project(project):
    result = project.run("-c", "import os; print(os.getcwd())", RUNTIME="venv")
    assert Path(result.stdout.strip()).samefile(project.folder)


def test_the_default_number_of_ranks_is_the_number_of_cores(project):
    assert project.environment_of_run()["RANKS"] == "auto"
    assert project.environment_of_run(RANKS="")["RANKS"] == "auto"
    assert project.environment_of_run(RANKS="3")["RANKS"] == "3"
    (project.folder / ".env").write_text("RANKS=2")
    assert project.environment_of_run()["RANKS"] == "2"


def test_the_default_number_of_debugged_ranks_is_one(project):
    assert project.environment_of_run(DEBUG="1")["RANKS"] == "1"
    assert project.environment_of_run(DEBUG="1", RANKS="auto")["RANKS"] == "auto"
    assert project.environment_of_run(DEBUG="0")["RANKS"] == "auto"


OVERLAY = "docker-compose.debug.yaml"


@pytest.mark.parametrize(
    ("environment", "debug"),
    [
        ({"COMPOSE_FILE": f"docker-compose.yaml:{OVERLAY}"}, "1"),
        ({"COMPOSE_FILE": f"/the project/docker-compose.yaml:/the project/{OVERLAY}"}, "1"),
        ({"COMPOSE_FILE": f"{OVERLAY}:mine.yaml"}, "1"),
        ({"COMPOSE_FILE": f"a.yaml,./{OVERLAY}", "COMPOSE_PATH_SEPARATOR": ","}, "1"),
        ({"COMPOSE_FILE": f"a.yaml:{OVERLAY}", "DEBUG": ""}, "1"),
        ({"COMPOSE_FILE": f"a.yaml:{OVERLAY}", "DEBUG": "0"}, "0"),
        ({"COMPOSE_FILE": f"a.yaml:{OVERLAY}", "COMPOSE_PATH_SEPARATOR": ","}, None),
        ({"COMPOSE_FILE": f"a.yaml:{OVERLAY}.old:my-{OVERLAY}"}, None),
        ({"COMPOSE_FILE": "docker-compose.yaml"}, None),
        ({}, None),
    ],
)
def test_the_debug_overlay_has_the_same_effect_without_docker(project, environment, debug):
    found = project.environment_of_run(**environment)
    assert found.get("DEBUG") == debug
    assert found["RANKS"] == ("1" if debug == "1" else "auto")
    lines = [f"{name}={value}\n" for name, value in environment.items()]
    (project.folder / ".env").write_text("".join(lines))
    assert project.environment_of_run().get("DEBUG") == debug


def test_sigterm_reaches_the_program(project):
    project.run("-c", "", RUNTIME="venv")
    program = (
        "import signal, sys; signal.signal(signal.SIGTERM, lambda *_: sys.exit(5)); print(flush=True); signal.pause()"
    )
    command = [project.folder / "run-local.sh", "-c", program]
    with subprocess.Popen(command, env=project.environment | {"RUNTIME": "venv"}, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        process.terminate()
        assert process.wait(timeout=10) == 5


# Python compiles what it imports, unless it may keep nothing.
@pytest.mark.parametrize(("keeps_nothing", "compiles"), [("", "--no-compile "), ("1", "")])
def test_the_virtual_environment_is_created_once(project, keeps_nothing, compiles):
    project.environment["PYTHONDONTWRITEBYTECODE"] = keeps_nothing
    project.run("-c", "", RUNTIME="venv")
    made, *installed = project.calls()
    assert made == "-m venv .venv"
    assert [call.split(" install ")[1] for call in installed] == [
        f"{compiles}--constraint constraints.txt pip",
        f"{compiles}--constraint constraints.txt --editable .[dev]",
        f"{compiles}--no-deps --require-hashes --requirement demo-requirements.txt",
    ]
    project.run("-c", "", RUNTIME="venv")
    assert project.calls() == []


@pytest.mark.parametrize("changed", FILES[1:])
def test_a_changed_requirement_is_installed(project, changed):
    project.run("-c", "", RUNTIME="venv")
    project.calls()
    with (project.folder / changed).open("a") as file:
        file.write("# changed\n")
    project.run("-c", "", RUNTIME="venv")
    assert len(project.calls()) == 3


def test_an_extra_is_installed(project):
    project.run("-c", "", RUNTIME="venv")
    project.calls()
    project.run("-c", "", RUNTIME="venv", EXTRAS="s3,llm")
    assert project.calls()[1].endswith("--editable .[dev,s3,llm]")


def test_an_extra_may_have_packages_that_are_installed_without_what_they_ask_for(project):
    project.run("-c", "", RUNTIME="venv", EXTRAS="s3,smollm2")
    assert [call.rpartition(" ")[2] for call in project.calls()[3:]] == [
        "demo-requirements.txt",
        "smollm2-requirements.txt",
    ]


def test_a_moved_project_is_installed_at_its_new_place(project):
    project.run("-c", "", RUNTIME="venv")
    project.calls()
    project.folder = project.folder.rename(project.folder.with_name("moved"))
    project.run("-c", "", RUNTIME="venv")
    assert len(project.calls()) == 3


def test_a_failed_installation_is_retried(project):
    failed = project.run("-c", "print('ran')", RUNTIME="venv", FAIL="pip")
    assert failed.returncode != 0
    assert failed.stdout == ""
    project.calls()
    assert project.run("-c", "print('ran')", RUNTIME="venv").stdout == "ran\n"
    assert len(project.calls()) == 3


def test_an_environment_without_its_python_is_created_again(project):
    project.run("-c", "", RUNTIME="venv")
    project.calls()
    (project.folder / ".venv/bin/python").unlink()
    (project.folder / ".venv/bin/python").symlink_to("/nowhere/python")
    assert project.run("-c", "print('ran')", RUNTIME="venv").stdout == "ran\n"
    assert project.calls()[0] == "-m venv .venv"


def test_an_existing_environment_needs_no_other_python(project):
    project.run("-c", "", RUNTIME="venv")
    assert project.run("-c", "", RUNTIME="venv", PYTHON="/nowhere/python").returncode == 0


@pytest.mark.parametrize("python", ["/nowhere/python3", "old-python"])
def test_an_unsuitable_python_is_one_clear_sentence(project, python):
    (project.bin / "old-python").write_text("#!/bin/sh\necho noise >&2\nexit 1\n")
    (project.bin / "old-python").chmod(0o755)
    result = project.run("-c", "", RUNTIME="venv", PYTHON=python)
    assert result.returncode == 1
    assert result.stderr.count("\n") == 1
    assert "PYTHON: expected Python 3.11 or newer, got" in result.stderr
    assert python in result.stderr
    assert not (project.folder / ".venv").exists()


# .env.

SETTINGS = {
    "PLAIN=value": "value",
    "EQUALS=a=b=c": "a=b=c",
    "URL=mongodb://u:p@h:27017/d?x=1&y=2": "mongodb://u:p@h:27017/d?x=1&y=2",
    "DOLLAR=p$HOME${HOME}$(id)`id`": "p$HOME${HOME}$(id)`id`",
    "BACKSLASH=a\\nb\\": "a\\nb\\",
    "SPACES=  a  b  ": "a  b",
    "COMMENT=value  # a comment": "value",
    "HASH=a#b": "a#b",
    "FIRST_HASH=#b": "#b",
    "NOTHING_BUT= # a comment": None,
    "EMPTY=": None,
    "EMPTY_QUOTED=''": None,
    "DOUBLE=\"a 'b' # c \"": "a 'b' # c ",
    "SINGLE='a \"b\" $c' # a comment": 'a "b" $c',
    "OPEN=it's": "it's",
    "STAR=*": "*",
    "UMLAUT=größe": "größe",
    "HOME_FOLDER=~/x": "{home}/x",
    "QUOTED_TILDE='~/x'": "~/x",
    "TILDE=a~/x": "a~/x",
    "  INDENTED=1": "1",
    "export EXPORTED=1": "1",
    "# COMMENTED=1": None,
    "LAST=1": "1",
}


@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_values_in_env_are_used_unchanged(project, newline):
    (project.folder / ".env").write_bytes((newline + newline.join(SETTINGS)).encode())
    environment = project.environment_of_run()
    for line, value in SETTINGS.items():
        name = line.partition("=")[0].split()[-1]
        assert environment.get(name) == (value and value.replace("{home}", str(project.home))), line


def test_a_value_in_env_may_contain_any_byte(project):
    (project.folder / ".env").write_bytes(b"SACRED_PASSWORD=gr\xf6\xdfe # \xff\n")
    result = project.run("-c", "import os; print(os.environb[b'SACRED_PASSWORD'])", RUNTIME="venv", LC_ALL="C.UTF-8")
    assert result.stdout == "b'gr\\xf6\\xdfe'\n"


def test_nothing_in_env_is_executed(project):
    (project.folder / ".env").write_text("A=$(touch proof)\nB=`touch proof`\nC=;touch proof\nD[$(touch proof)]=1\n")
    project.run("-c", "", RUNTIME="venv")
    assert not list(project.folder.parent.rglob("proof"))


def test_the_environment_overrides_env(project):
    (project.folder / ".env").write_text("A=file\nB=file\nRUNTIME=docker\n")
    environment = project.environment_of_run(A="environment", B="")
    assert (environment["A"], environment["B"]) == ("environment", "")


def test_env_can_select_the_virtual_environment(project):
    (project.folder / ".env").write_text("RUNTIME=venv\n")
    assert project.run("-c", "print(6 * 7)").stdout == "42\n"


@pytest.mark.parametrize("line", ["SACRED_PASSWORD = secret", "secret", "1A=secret", "A-B=secret"])
def test_an_invalid_line_of_env_is_an_error_that_shows_no_secret(project, line):
    (project.folder / ".env").write_text(f"# settings\n\n{line}\n")
    result = project.run("-c", "", RUNTIME="venv")
    assert result.returncode == 1
    assert result.stderr == "run-local: line 3 of .env is not KEY=value\n"


def test_a_plain_copy_of_the_template_changes_nothing(project):
    before = project.environment_of_run(), project.compose("a.py")
    shutil.copy(ROOT / ".env.template", project.folder / ".env")
    assert (project.environment_of_run(), project.compose("a.py")) == before


def test_every_line_of_the_template_can_be_used(project):
    template = (ROOT / ".env.template").read_text()
    settings = dict(re.findall(r"^# ([A-Z_]+)=(.*)$", template, re.M))
    (project.folder / ".env").write_text(re.sub(r"^# (?=[A-Z_]+=)", "", template, flags=re.M))
    environment = project.environment_of_run()
    assert len(settings) > 20
    for name in settings.keys() - {"RUNTIME", "PYTHON"}:
        assert environment[name].split("/")[-1] == settings[name].strip("'").split("/")[-1]


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not here")
def test_shellcheck_reports_nothing():
    subprocess.run(["shellcheck", ROOT / "run-local.sh", ROOT / "docker/check.sh"], check=True)

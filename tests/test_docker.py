"""The image and its Compose files, as far as they can be checked without an engine."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parent.parent
DOCKERFILE = (ROOT / "docker/Dockerfile").read_text()
# One instruction a line, without comments.
INSTRUCTIONS = re.sub(r"^#.*\n|\\\n\s*", "", DOCKERFILE, flags=re.M).split("\n")
COMPOSE_FILES = {name: (ROOT / name).read_text() for name in ("docker-compose.yaml", "docker-compose.debug.yaml")}
PLAN, OVERLAY = map(yaml.safe_load, COMPOSE_FILES.values())
SERVICES = PLAN["services"]
MAIN, MONGO, OMNIBOARD = SERVICES["main"], SERVICES["mongo"], SERVICES["omniboard"]
DEBUG = OVERLAY["services"]["main"]
TEMPLATE = (ROOT / ".env.template").read_text()
DISTRIBUTED = (ROOT / "docs/distributed.md").read_text()
RUN_LOCAL = (ROOT / "run-local.sh").read_text()
LIBRARY = "\n".join(path.read_text() for folder in ("scaling_fl", "scripts") for path in (ROOT / folder).rglob("*.py"))

# The image must contain neither the password nor the user's name and machine.
SECRET = re.compile(r"SACRED|PASSWORD|TOKEN|API_KEY|AWS|GOOGLE|SECRET|CREDENTIAL")
COMPOSE = next((command for command in (["docker", "compose"], ["docker-compose"]) if shutil.which(command[0])), None)
if COMPOSE and subprocess.run([*COMPOSE, "version"], capture_output=True).returncode != 0:
    COMPOSE = ["docker-compose"] if shutil.which("docker-compose") else None


def arguments(instruction: str) -> list[str]:
    """Return the arguments of each `instruction` of the Dockerfile."""
    return [line.partition(" ")[2] for line in INSTRUCTIONS if line.startswith(instruction + " ")]


# Secrets.


def test_the_compose_files_contain_no_credentials():
    passed = {name: value for service in (MAIN, DEBUG) for name, value in service["environment"].items()}
    secrets = {name for name in passed if SECRET.search(name)}
    assert {"SACRED_HOST", "SACRED_USER", "SACRED_PASSWORD", "SACRED_DATABASE", "HF_TOKEN"} <= secrets
    assert {passed[name] for name in secrets} == {None}


def test_the_image_is_built_without_credentials():
    settings = arguments("ARG") + arguments("ENV") + list(MAIN["build"]["args"])
    assert len(settings) > 5
    assert not [setting for setting in settings if SECRET.search(setting)]
    assert not {"environment", "secrets"} & MAIN["build"].keys()


def test_the_image_contains_neither_env_nor_the_git_history():
    assert {".env", ".git"} <= set((ROOT / ".dockerignore").read_text().split())


def test_the_template_sets_nothing():
    assert all(line.startswith("#") for line in TEMPLATE.splitlines() if line)


# Variables.


def test_the_template_explains_exactly_the_variables_that_are_read():
    interpolated = set(re.findall(r"\$\{([A-Z_]+)", "".join(COMPOSE_FILES.values())))
    passed = {name for name, value in MAIN["environment"].items() if value is None}
    script = set(re.findall(r"\$\{([A-Z_]+):-", RUN_LOCAL))
    library = set(re.findall(r"""env(?:iron)?(?:\.get)?[(\[]["']([A-Z_]+)""", LIBRARY))
    sacred = {name for name in library if name.startswith("SACRED_")}
    assert {"SACRED_HOST", "SACRED_RUNS_DIR"} <= sacred
    explained = re.findall(r"^# ([A-Z_]+)=", TEMPLATE, re.M)
    assert len(set(explained)) == len(explained)
    assert set(explained) - {"COMPOSE_FILE"} <= interpolated | passed | script | library
    assert (interpolated | passed | script | sacred) - {"USER", "PYTHONDONTWRITEBYTECODE"} <= set(explained)


def test_the_container_passes_on_the_variables_of_the_library():
    read = r"""env(?:iron(?:ment)?)?(?:\.get)?[(\[]["']((?:SACRED_|RANK|LOCAL_|LOST_|OMP_|USER)[A-Z_]*)"""
    library = set(re.findall(read, LIBRARY))
    assert len(library) >= 11
    # The folder of the runs is mounted where the library looks without the variable.
    assert library - {"SACRED_RUNS_DIR"} <= MAIN["environment"].keys()
    assert {"source": "${SACRED_RUNS_DIR:-./runs}", "target": "/workspace/runs", "type": "bind"} in MAIN["volumes"]


RANK = ["MASTER_ADDR", "MASTER_PORT", "WORLD_SIZE", "RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "LOST_AFTER"]
NETWORK = ["GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE"]


@pytest.mark.parametrize("name", RANK + NETWORK)
def test_a_container_is_a_rank_of_several_nodes_only_if_the_environment_says_so(name):
    assert MAIN["environment"][name] is None, "as it is outside, unset too"
    assert name in DISTRIBUTED, "docs/distributed.md explains it"


def test_each_variable_of_the_template_has_one_explanation():
    for paragraph in re.split(r"\n\n+", TEMPLATE.strip())[1:]:
        comment, setting = paragraph.split("\n")
        assert re.match(r"# \w.*[.,]$", comment)
        assert re.match(r"# [A-Z_]+=\S", setting)


# The service.


def test_the_user_owns_the_files_of_the_container():
    assert MAIN["user"] == "${HOST_UID:-1000}:${HOST_GID:-1000}"
    (everyone,) = (line for line in arguments("RUN") if "chmod" in line)
    assert {"runs", "checkpoints", "data", '"$HOME"'} <= set(everyone.split("chmod -R 1777")[1].split())


def test_data_that_must_outlive_the_container_is_mounted():
    (workdir,) = arguments("WORKDIR")
    mounted = {volume["target"]: volume["source"] for volume in MAIN["volumes"]}
    assert mounted[f"{workdir}/data"] == "${DATA_MOUNT_DIR:-./data}"
    assert {f"{workdir}/runs", f"{workdir}/checkpoints"} <= mounted.keys()
    home_of_hub = MAIN["environment"]["HF_HOME"]
    assert mounted[home_of_hub] == "${HF_HOME:-~/.cache/huggingface}"
    assert f"HF_HOME={home_of_hub} " in arguments("ENV")[0]


def test_build_arguments_have_the_defaults_of_the_dockerfile():
    in_dockerfile = dict(argument.split("=") for argument in arguments("ARG"))
    in_compose = {name: re.sub(r"\$\{\w+:-(.*)\}", r"\1", value) for name, value in MAIN["build"]["args"].items()}
    assert in_compose == in_dockerfile


def test_signals_reach_the_program():
    assert MAIN["init"] is True
    assert arguments("ENTRYPOINT") == ['["python"]']


def test_a_run_removes_its_network():
    assert MAIN["network_mode"] == "${DOCKER_NETWORK:-bridge}"
    assert "networks" not in MAIN


# The image.


def test_changed_code_reinstalls_nothing():
    code = INSTRUCTIONS.index("COPY . .")
    before, after = "\n".join(INSTRUCTIONS[:code]), "\n".join(INSTRUCTIONS[code:])
    assert "pip install" in before
    assert "RUN" not in after
    copied = [source for line in before.split("\n") if line.startswith("COPY") for source in line.split()[1:-1]]
    assert set(copied) == {"constraints.txt", "pyproject.toml", "*-requirements.txt"}


def test_the_image_has_the_packages_of_the_virtual_environment():
    for requirement in (
        '--editable ".[dev${EXTRAS:+,$EXTRAS}]"',
        '--no-deps --require-hashes --requirement "$extra-requirements.txt"',
    ):
        assert requirement in DOCKERFILE
        assert requirement in RUN_LOCAL


@pytest.mark.parametrize("in_base", ["2.9.1+cu130", None])
def test_the_torch_of_the_base_image_is_neither_replaced_nor_upgraded(tmp_path, in_base):
    (step,) = (line for line in arguments("RUN") if "torch" in line)
    shutil.copy(ROOT / "constraints.txt", tmp_path)
    (tmp_path / "python").write_text(
        f"""#!/bin/sh
        case $2 in
          pip) echo "$*" >pip; echo 2.99 >installed ;;
          *) [ -e installed ] && cat installed || {f"echo {in_base}" if in_base else "false"} ;;
        esac"""
    )
    (tmp_path / "python").chmod(0o755)
    environment = {"PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}", "TORCH_INDEX_URL": "https://a b"}
    shell = ["sh", "-c", step.replace("/opt/", "")]
    subprocess.run(shell, cwd=tmp_path, env=environment, check=True, capture_output=True)
    pins = re.findall("^torch==(.*)$", (tmp_path / "constraints.txt").read_text(), re.M)
    assert pins == [in_base or "2.99"]
    if in_base is None:
        asked = (tmp_path / "pip").read_text().strip()
        assert asked == "-m pip install --no-deps --constraint constraints.txt --index-url https://a b torch"
    else:
        assert not (tmp_path / "pip").exists()


@pytest.mark.skipif(shutil.which("hadolint") is None, reason="hadolint is not here")
def test_hadolint_reports_nothing():
    subprocess.run(["hadolint", *(ROOT / "docker").glob("*Dockerfile")], check=True)


# The debugger.


def test_the_debugger_waits_and_only_this_machine_can_reach_it():
    assert DEBUG["environment"]["DEBUG"] == "${DEBUG:-1}", "DEBUG=0 counts, as without Docker"
    assert DEBUG["environment"]["DEBUG_HOST"] == "0.0.0.0"
    port = DEBUG["environment"]["DEBUG_PORT"]
    assert port == "${DEBUG_PORT:-5678}"
    assert DEBUG["ports"] == [f"127.0.0.1:{port}:{port}"]
    assert "ports" not in MAIN


def test_the_debugger_changes_only_the_default_number_of_ranks():
    assert DEBUG.keys() == {"ports", "environment"}
    assert DEBUG["environment"].keys() == {"DEBUG", "DEBUG_HOST", "DEBUG_PORT", "DEBUG_RANK", "RANKS"}
    assert (MAIN["environment"]["RANKS"], DEBUG["environment"]["RANKS"]) == ("${RANKS:-auto}", "${RANKS:-1}")


# The dashboard.


def test_the_dashboard_and_main_start_independently():
    profiles = {name: service["profiles"] for name, service in SERVICES.items()}
    assert profiles == {"main": ["main"], "mongo": ["dashboard"], "omniboard": ["dashboard"]}
    assert re.findall(r"--profile=(\w+)", RUN_LOCAL) == ["dashboard", "main"]


def test_only_this_machine_can_reach_the_dashboard_and_its_database():
    assert MONGO["ports"] == ["127.0.0.1:27017:27017"]
    assert OMNIBOARD["ports"] == ["127.0.0.1:${DASHBOARD_PORT:-9000}:9000"]


def test_the_database_requires_the_password_that_runs_use():
    assert MONGO["command"] == ["--auth"]
    user = {"MONGO_INITDB_ROOT_USERNAME": "${SACRED_USER:-}", "MONGO_INITDB_ROOT_PASSWORD": "${SACRED_PASSWORD:-}"}
    assert MONGO["environment"] == user
    names = ("SACRED_USER", "SACRED_PASSWORD", "SACRED_DATABASE")
    assert {OMNIBOARD["environment"][name] for name in names} == {None}
    assert not OMNIBOARD.get("command"), "ps shows it"


def test_runs_do_not_depend_on_the_database_container():
    assert MONGO["volumes"] == ["mongo:/data/db"]
    assert "mongo" in PLAN["volumes"]


def test_a_run_can_join_the_network_of_the_database():
    assert MONGO["networks"] == OMNIBOARD["networks"] == ["dashboard"]
    assert f"# DOCKER_NETWORK={PLAN['networks']['dashboard']['name']}\n" in TEMPLATE


def test_every_version_of_the_dashboard_is_pinned_and_all_files_name_the_same_omniboard():
    assert re.fullmatch(r"mongo:\d+\.\d+\.\d+", MONGO["image"])
    dockerfile = (ROOT / "docker" / OMNIBOARD["build"]["dockerfile"]).read_text()
    assert re.search(r"^FROM node:\d+\.\d+\.\d+-", dockerfile, re.M)
    version = OMNIBOARD["image"].partition(":")[2]
    assert f"omniboard@{version}\n" in dockerfile
    assert f"omniboard@{version} " in RUN_LOCAL


@pytest.mark.skipif(shutil.which("node") is None, reason="Node.js is not here")
@pytest.mark.parametrize(
    ("host", "user", "uri"),
    [
        ("db:27018", "", "mongodb://db:27018/runs?authSource=admin"),
        ("db", "a b", "mongodb://a%20b:p%40%3A%2F%25@db/runs?authSource=admin"),
        ("mongodb://a,b:1/?tls=true", "u", "mongodb://u:p%40%3A%2F%25@a,b:1/runs?authSource=admin&tls=true"),
        ("mongodb://a/users", "u", "mongodb://u:p%40%3A%2F%25@a/runs?authSource=users"),
        ("mongodb+srv://me:mine@db.example", "u", "mongodb+srv://me:mine@db.example/runs?authSource=admin"),
    ],
)
def test_omniboard_reads_the_database_that_runs_write(host, user, uri):
    environment = {"SACRED_HOST": host, "SACRED_USER": user, "SACRED_PASSWORD": "p@:/%", "SACRED_DATABASE": "runs"}
    program = "process.stdout.write(require('./docker/omniboard.js').default.mongodbURI)"
    run = subprocess.run(
        ["node", "-e", program],
        cwd=ROOT,
        env={"PATH": os.environ["PATH"], **environment},
        capture_output=True,
        text=True,
        check=True,
    )
    assert run.stdout == uri


# Compose itself.


@pytest.mark.skipif(COMPOSE is None, reason="neither docker compose nor docker-compose is here")
@pytest.mark.parametrize("profiles", ["", "main", "dashboard"])
@pytest.mark.parametrize("files", [["docker-compose.yaml"], list(COMPOSE_FILES)])
def test_compose_accepts_the_files(files, profiles):
    assert COMPOSE is not None
    environment = {
        "PATH": os.environ["PATH"],
        "HOME": os.environ.get("HOME", "/"),
        "COMPOSE_FILE": ":".join(files),
        "COMPOSE_PROFILES": profiles,
        "DATA_MOUNT_DIR": "./data:of mine",
        "HOST_UID": "1234",
        "OMP_NUM_THREADS": "3",
        "RANK": "1",
        "DOCKER_NETWORK": "host",
    }
    result = subprocess.run([*COMPOSE, "config"], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    services = yaml.safe_load(result.stdout)["services"]
    assert {name for name, service in SERVICES.items() if profiles in service["profiles"]} <= services.keys()
    if profiles != "main":
        return
    service = services["main"]
    assert service["user"] == "1234:1000"
    assert service["build"]["args"]["BASE"] == "python:3.11-slim"
    assert str(ROOT / "data:of mine") in [volume["source"] for volume in service["volumes"]]
    assert str(service["environment"]["RANKS"]) == ("auto" if len(files) == 1 else "1")
    assert str(service["environment"]["RANK"]) == "1"
    assert service["environment"].get("WORLD_SIZE") is None
    assert service["network_mode"] == "host"
    assert str(service["environment"].get("DEBUG")) == ("None" if len(files) == 1 else "1")
    assert ("ports" in service) == (len(files) == 2)
    assert "127.0.0.1" in str(service.get("ports", "127.0.0.1"))

"""The files of deploy/ fit their schemas, restrict access, and their command lines train."""

import copy
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from helpers import ROOT, Command, succeed, weights_hash

DEPLOY = ROOT / "deploy"
SLURM = DEPLOY / "slurm.sh"
MANIFESTS = {
    path.name: [document for document in yaml.safe_load_all(path.read_text()) if document]
    for path in sorted(DEPLOY.glob("*.yaml"))
}
OBJECTS = {(name, document["kind"]): document for name, documents in MANIFESTS.items() for document in documents}
JOB, PYTORCHJOB = OBJECTS["kubernetes.yaml", "Job"], OBJECTS["pytorchjob.yaml", "PyTorchJob"]
REPLICAS = PYTORCHJOB["spec"]["pytorchReplicaSpecs"]
TEMPLATES = {
    "Job": JOB["spec"]["template"],
    "Master": REPLICAS["Master"]["template"],
    "Worker": REPLICAS["Worker"]["template"],
}
# The oldest that the first line of kubernetes.yaml speaks of, and the newest that the validator knows.
VERSIONS = ["1.28", "1.37"]


def settings_of_node(manifest: str, node: int) -> dict[str, Any]:
    return json.loads(OBJECTS[manifest, "ConfigMap"]["data"][f"node-{node}.json"])


# The schemas.


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize(("manifest", "kind"), [key for key in OBJECTS if key[1] != "PyTorchJob"])
def test_kubernetes_has_each_field_of_each_object(manifest: str, kind: str, version: str) -> None:
    assert kubernetes_validate.validate(OBJECTS[manifest, kind], version, strict=True) == version


@pytest.mark.parametrize("replica", REPLICAS)
@pytest.mark.parametrize("version", VERSIONS)
def test_kubernetes_has_each_field_of_the_pods_that_the_operator_makes(replica: str, version: str) -> None:
    pod = {"apiVersion": "v1", "kind": "Pod", **TEMPLATES[replica]}
    assert kubernetes_validate.validate(pod, version, strict=True) == version


def test_the_validator_refuses_an_unknown_field() -> None:
    job = copy.deepcopy(JOB)
    job["spec"]["template"]["spec"]["containers"][0]["privilege"] = True
    with pytest.raises(kubernetes_validate.ValidationError, match="privilege"):
        kubernetes_validate.validate(job, VERSIONS[-1], strict=True)


def test_the_operator_has_each_field_of_the_pytorchjob() -> None:
    # From its PyTorchJob v1: the fields there are of a run policy and a replica, and what its webhook asks for.
    assert PYTORCHJOB["apiVersion"] == "kubeflow.org/v1"
    assert re.fullmatch("[a-z]([-a-z0-9]*[a-z0-9])?", PYTORCHJOB["metadata"]["name"])
    assert PYTORCHJOB["spec"].keys() == {"runPolicy", "pytorchReplicaSpecs"}
    policy = PYTORCHJOB["spec"]["runPolicy"]
    assert policy.keys() == {"backoffLimit", "cleanPodPolicy"}
    assert isinstance(policy["backoffLimit"], int)
    assert policy["cleanPodPolicy"] in ("All", "Running", "None")
    assert REPLICAS.keys() == {"Master", "Worker"}
    assert REPLICAS["Master"]["replicas"] == 1
    for replica in REPLICAS.values():
        assert replica.keys() == {"replicas", "restartPolicy", "template"}
        assert replica["restartPolicy"] in ("Always", "OnFailure", "Never", "ExitCode")
        (container,) = replica["template"]["spec"]["containers"]
        assert container["name"] == "pytorch"
        assert [port["name"] for port in container["ports"]] == ["pytorchjob-port"]


# Rights.


@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES)
def test_a_pod_has_only_the_rights_that_it_needs(template: dict[str, Any]) -> None:
    pod = template["spec"]
    assert pod["automountServiceAccountToken"] is False
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["securityContext"]["runAsUser"] > 0
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert not {"hostNetwork", "hostPID", "hostIPC"} & pod.keys()
    assert not [volume for volume in pod["volumes"] if "hostPath" in volume]
    for container in pod["containers"]:
        assert container["securityContext"] == {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
        assert container["resources"]["limits"]["memory"] == container["resources"]["requests"]["memory"]


@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES)
def test_credentials_come_only_from_a_secret(template: dict[str, Any]) -> None:
    (container,) = template["spec"]["containers"]
    assert [list(source) for source in container["envFrom"]] == [["secretRef"]]
    secret = re.compile("HOST|USER|PASSWORD|TOKEN|KEY|CREDENTIAL|mongodb|://[^ ]*@")
    values = [*container["args"], *(variable["name"] for variable in container["env"])]
    assert not [value for value in values if secret.search(value)]
    assert not [document for documents in MANIFESTS.values() for document in documents if document["kind"] == "Secret"]


@pytest.mark.parametrize(("manifest", "template"), [("kubernetes.yaml", "Job"), ("pytorchjob.yaml", "Worker")])
def test_only_ranks_can_connect_to_ranks(manifest: str, template: str) -> None:
    labels = TEMPLATES[template]["metadata"]["labels"]
    policy = OBJECTS[manifest, "NetworkPolicy"]["spec"]
    assert policy["policyTypes"] == ["Ingress"]
    assert policy["podSelector"] == {"matchLabels": labels}
    assert policy["ingress"] == [{"from": [{"podSelector": {"matchLabels": labels}}]}]  # and on any port


# Consistency of the objects.


def test_the_first_pod_of_the_job_has_the_name_that_the_other_pods_resolve() -> None:
    service = OBJECTS["kubernetes.yaml", "Service"]
    pod = JOB["spec"]["template"]
    assert service["spec"]["clusterIP"] == "None"
    assert service["spec"]["publishNotReadyAddresses"] is True
    assert service["spec"]["selector"] == pod["metadata"]["labels"]
    assert pod["spec"]["subdomain"] == service["metadata"]["name"]
    args = pod["spec"]["containers"][0]["args"]
    assert f"--master-addr={JOB['metadata']['name']}-0.{service['metadata']['name']}" in args


def test_the_job_starts_all_nodes_at_once_with_the_settings_of_each() -> None:
    num_nodes = JOB["spec"]["completions"]
    assert JOB["spec"]["completionMode"] == "Indexed"
    assert JOB["spec"]["parallelism"] == num_nodes
    assert f"--nnodes={num_nodes}" in JOB["spec"]["template"]["spec"]["containers"][0]["args"]
    assert set(OBJECTS["kubernetes.yaml", "ConfigMap"]["data"]) == {f"node-{node}.json" for node in range(num_nodes)}
    num_replicas = sum(replica["replicas"] for replica in REPLICAS.values())
    assert set(OBJECTS["pytorchjob.yaml", "ConfigMap"]["data"]) == {f"node-{node}.json" for node in range(num_replicas)}


@pytest.mark.parametrize(("manifest", "template"), [("kubernetes.yaml", "Job"), ("pytorchjob.yaml", "Worker")])
def test_every_volume_that_a_pod_mounts_is_defined(manifest: str, template: str) -> None:
    pod = TEMPLATES[template]["spec"]
    (container,) = pod["containers"]
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
    names = {kind: document["metadata"]["name"] for (name, kind), document in OBJECTS.items() if name == manifest}
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    assert volumes["settings"]["configMap"]["name"] == names["ConfigMap"]
    assert volumes["results"]["persistentVolumeClaim"]["claimName"] == names["PersistentVolumeClaim"]
    (results,) = (mount["mountPath"] for mount in container["volumeMounts"] if mount["name"] == "results")
    workdir = re.findall("^WORKDIR (.*)$", (ROOT / "docker/Dockerfile").read_text(), re.MULTILINE)[0]
    paths = [value.partition("=")[2] for value in container["args"] if value.startswith("checkpoints_dir=")]
    paths += [variable["value"] for variable in container["env"] if variable["name"] == "SACRED_RUNS_DIR"]
    assert len(paths) == 2
    assert all(f"{workdir}/{path}".startswith(f"{results}/") for path in paths)


# The command lines: two nodes on this machine, and then one process that has all sites.

SMALL = {"max_seq_len": 32, "learning_rate": 3e-3, "optimiser": "adamw", "batch_size": 4, "num_local_epochs": 1}


@pytest.fixture
def small(tiny_model: str, corpus: tuple[Path, Path]) -> list[str]:
    """The settings of a federation that trains within seconds."""
    files = {"task_name": "text", "train_path": corpus[0], "test_path": corpus[1], "model": tiny_model}
    return [f"{key}={value}" for key, value in {**files, **SMALL}.items()]


def free_port() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


def environment(**variables: str) -> dict[str, str]:
    """Return the environment of a node, whose name need not resolve to this machine."""
    loopback = next(name for _, name in socket.if_nameindex() if name.startswith("lo"))
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    python_path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    shared = {"PATH": path, "PYTHONPATH": python_path, "GLOO_SOCKET_IFNAME": loopback}
    return {**os.environ, **shared, **variables}


def expand(text: str, variables: dict[str, str]) -> str:
    """Expand $(NAME) as the kubelet does."""
    return re.sub(r"\$\(([A-Z_]+)\)", lambda match: variables[match[1]], text)


def replace_one(arguments: list[str], old: str, new: str) -> list[str]:
    assert old in arguments
    return [new if argument == old else argument for argument in arguments]


def run_pods(
    pods: list[tuple[dict[str, Any], dict[str, str]]], manifest: str, folder: Path, small: list[str]
) -> list[str]:
    """Run the command of each pod in parallel with its environment variables; return the outputs."""
    (folder / "scripts").symlink_to(ROOT / "scripts")
    for name, text in OBJECTS[manifest, "ConfigMap"]["data"].items():
        (folder / name).write_text(text)
    processes = []
    for pod, variables in pods:
        (container,) = pod["spec"]["containers"]
        env = {variable["name"]: variable["value"] for variable in container["env"]} | variables
        command = [expand(part, env) for part in [*container["command"], *container["args"]]]
        (settings,) = (m["mountPath"] for m in container["volumeMounts"] if m["name"] == "settings")
        command = [part.replace(settings, str(folder)) for part in command]
        command = [sys.executable if part == "python" else part for part in command]
        if "--master-port=29500" in command:
            command = replace_one(command, "--master-addr=federation-0.federation", "--master-addr=127.0.0.1")
            command = replace_one(command, "--master-port=29500", f"--master-port={env['MASTER_PORT']}")
        processes.append(
            subprocess.Popen(
                [*command, *small],
                cwd=folder,
                env=environment(**env),
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
        )
    outputs = [process.communicate()[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], "\n".join(outputs)
    return outputs


ALONE: dict[int, str] = {}


def weights_of_one(command: Command, num_sites: int) -> str:
    """The weights of the same federation in one process, trained once for all tests."""
    if num_sites not in ALONE:
        ALONE[num_sites] = weights_hash(succeed(command(site_ids=[0] * num_sites, num_rounds=3, **SMALL)))
    return ALONE[num_sites]


def check(outputs: list[str], folder: Path, alone: str) -> None:
    assert weights_hash(outputs[0]) == alone
    assert "round" not in outputs[1], "rank 0 alone speaks"
    assert (folder / "results/checkpoints/round-3.pt").exists()
    assert (folder / "results/runs/1/model/config.json").exists()


@pytest.mark.long
@pytest.mark.usefixtures("warm")
def test_the_pods_of_the_job_end_with_the_weights_of_one_process(
    tmp_path: Path, small: list[str], command: Command
) -> None:
    port = free_port()
    pods = [(TEMPLATES["Job"], {"JOB_COMPLETION_INDEX": str(node), "MASTER_PORT": port}) for node in range(2)]
    outputs = run_pods(pods, "kubernetes.yaml", tmp_path, small)
    num_sites = sum(len(settings_of_node("kubernetes.yaml", node)["site_ids"]) for node in range(2))
    check(outputs, tmp_path, weights_of_one(command, num_sites))


@pytest.mark.long
@pytest.mark.usefixtures("warm")
def test_the_pods_of_the_pytorchjob_end_with_the_weights_of_one_process(
    tmp_path: Path, small: list[str], command: Command
) -> None:
    # The variables that the operator sets; LOCAL_RANK is not among them.
    world = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), "WORLD_SIZE": "2"}
    pods = [(TEMPLATES[name], {**world, "RANK": str(rank)}) for rank, name in enumerate(["Master", "Worker"])]
    outputs = run_pods(pods, "pytorchjob.yaml", tmp_path, small)
    num_sites = sum(len(settings_of_node("pytorchjob.yaml", node)["site_ids"]) for node in range(2))
    check(outputs, tmp_path, weights_of_one(command, num_sites))


# Slurm. srun, scontrol and scancel are stand-ins: nodes are processes here.

SRUN = """#!/usr/bin/env bash
[[ $1 = --kill-on-bad-exit=1 ]] && shift
for ((node = 0; node < SLURM_NNODES; node++)); do
  SLURM_NODEID=$node "$@" &
  nodes+=($!)
done
trap 'kill -TERM "${nodes[@]}"; trap - TERM' TERM # at which wait returns
echo $$ >srun.pid
status=0
for node in "${nodes[@]}"; do
  wait "$node" || status=$?
  wait "$node" || status=$?
done
exit "$status"
"""
SCONTROL = """#!/usr/bin/env bash
echo "$*" >>calls
[[ $1 != show ]] || printf '%s\\n' 127.0.0.{1..255}
"""
SCANCEL = """#!/usr/bin/env bash
echo "scancel $*" >>calls
kill -TERM "$(cat srun.pid)"
"""


def start_slurm(folder: Path, python: str, *arguments: str) -> subprocess.Popen[str]:
    """Start the batch file in a folder as Slurm does on the first node, with this Python."""
    for name, text in {
        "bin/srun": SRUN,
        "bin/scontrol": SCONTROL,
        "bin/scancel": SCANCEL,
        ".venv/bin/python": f"#!/usr/bin/env bash\n{python}\n",
    }.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    (folder / "scripts").symlink_to(ROOT / "scripts")
    job = str(int(free_port()) % 10000)
    variables = {"SLURM_SUBMIT_DIR": str(folder), "SLURM_JOB_NODELIST": "n[1-2]", "SLURM_NNODES": "2"}
    env = environment(**variables, SLURM_JOB_ID=job)
    env["PATH"] = f"{folder / 'bin'}{os.pathsep}{env['PATH']}"
    return subprocess.Popen(
        ["bash", SLURM, *arguments], env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def calls(folder: Path) -> list[str]:
    return (folder / "calls").read_text().splitlines()


@pytest.mark.long
def test_the_nodes_of_the_batch_file_end_with_the_weights_of_one_process(
    tmp_path: Path, small: list[str], command: Command
) -> None:
    (tmp_path / "node-0.json").write_text('{"site_ids": [0, 0]}')
    (tmp_path / "node-1.json").write_text('{"site_ids": [0, 0, 0]}')
    process = start_slurm(tmp_path, f'exec {sys.executable} "$@"', "with", "node-%n.json", "num_rounds=3", *small)
    output = process.communicate()[0]
    assert process.returncode == 0, output
    assert weights_hash(output) == weights_of_one(command, 5)
    assert calls(tmp_path) == ["show hostnames n[1-2]"]


def wait_for(path: Path) -> None:
    for _ in range(200):
        if path.exists():
            return
        time.sleep(0.1)
    raise AssertionError(path)


TRAINS_FOR_EVER = "trap 'echo >>ended; exit 143' TERM; echo >>started-$SLURM_NODEID; while :; do sleep 0.1; done"


def test_a_job_at_its_time_limit_ends_its_ranks_and_is_requeued(tmp_path: Path) -> None:
    process = start_slurm(tmp_path, TRAINS_FOR_EVER)
    wait_for(tmp_path / "started-0")
    wait_for(tmp_path / "started-1")
    wait_for(tmp_path / "srun.pid")
    process.send_signal(signal.SIGUSR1)
    process.communicate(timeout=30)
    assert process.returncode != 0
    assert (tmp_path / "ended").read_text() == "\n\n"
    job = calls(tmp_path)[1].split()[-1]
    assert calls(tmp_path)[1:] == [f"scancel --signal=TERM {job}", f"requeue {job}"]


def test_a_failed_run_is_a_failed_job_and_is_not_requeued(tmp_path: Path) -> None:
    process = start_slurm(tmp_path, "exit 41")
    process.communicate(timeout=30)
    assert process.returncode == 41
    assert calls(tmp_path) == ["show hostnames n[1-2]"]


def test_the_batch_file_requests_the_slurm_options_that_it_needs() -> None:
    options = dict(re.findall("^#SBATCH --([a-z-]+)(?:=(.*))?$", SLURM.read_text(), re.MULTILINE))
    assert options["ntasks-per-node"] == "1"
    assert options["signal"].startswith("B:USR1@")
    assert " USR1\n" in SLURM.read_text()
    assert "requeue" in options
    assert options["open-mode"] == "append"  # the output from before a requeue stays


def test_bash_parses_the_batch_file() -> None:
    subprocess.run(["bash", "-n", SLURM], check=True)


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not here")
def test_shellcheck_reports_nothing() -> None:
    subprocess.run(["shellcheck", SLURM], check=True)


# The pages about them.

PAGES = [ROOT / "docs" / f"{name}.md" for name in ("distributed", "elastic", "networks", "clusters")]


def test_the_page_explains_each_file() -> None:
    links = re.findall(r"\]\((?!http|#)([^)#]+)", (ROOT / "docs/clusters.md").read_text())
    assert {f"../deploy/{path.name}" for path in DEPLOY.iterdir()} <= set(links)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_bash_parses_each_command_of_the_pages(page: Path) -> None:
    blocks = re.findall(r"```console\n(.*?)```", page.read_text(), re.DOTALL)
    assert blocks
    for block in blocks:
        assert block.startswith("$ ")
        for line in re.sub(r"\\\n +", "", block).splitlines():
            subprocess.run(["bash", "-nc", line[2:] if line.startswith("$ ") else ":"], check=True)

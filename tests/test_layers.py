"""The plan of the house, held by reading the code's imports."""

import ast
import subprocess
import sys

import pytest
from conftest import ROOT

# Each module may import those before it, and those beside it that it names here.
LAYERS = [
    {"settings", "metrics", "partition", "signals", "strategies", "flat", "report.runs"},
    {"debugger", "mongo", "stores", "vigil", "tasks.labels", "report.canvas", "report.findings"},
    {"distributed", "report.charts", "report.tables"},
    {"averaging", "buffers", "launch", "training", "placement", "cache", "tasks.columns", "report.page"},
    {"server", "tasks.task", "hub", "tasks.csv_rows", "tasks.json_rows", "tasks.parquet_rows", "report"},
    {"replica", "tasks.reading"},
    {"models", "footprint", "federation", "checkpoint"},
    {"pretrained", "tasks.corpus", "saving"},
    {
        "classifier",
        "ledger",
        "tasks.bbcnews",
        "tasks.crepe",
        "tasks.imdb",
        "tasks.spooky_author",
        "tasks.text",
        "tracking",
        "observers",
    },
    {"tasks"},
    {"holdings"},
    {"job"},
]
MODULES = {
    ".".join(path.relative_to(ROOT / "scaling_fl").with_suffix("").parts).removesuffix(".__init__"): path
    for path in (ROOT / "scaling_fl").rglob("*.py")
}


def imports(module: str) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(MODULES[module].read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            found |= {str(node.module)} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def test_every_module_is_in_the_plan() -> None:
    assert set().union(*LAYERS) == set(MODULES) - {"__init__"}


@pytest.mark.parametrize("module", sorted(set(MODULES) - {"__init__"}))
def test_imports_run_downward_only(module: str) -> None:
    (level,) = [index for index, layer in enumerate(LAYERS) if module in layer]
    below = set().union(*LAYERS[:level])
    ours = {name.removeprefix("scaling_fl.") for name in imports(module) if name.startswith("scaling_fl.")}
    assert {name for name in ours if name in MODULES and name != "tasks"} <= below


@pytest.mark.parametrize(
    ("package", "users"),
    [
        ("torch.distributed", {"distributed", "launch"}),
        ("sacred", {"mongo", "observers"}),
        ("pymongo", {"mongo", "observers"}),
    ],
)
def test_a_package_that_is_hard_to_hold_has_few_users(package: str, users: set[str]) -> None:
    assert {
        module for module in MODULES if any(f"{name}.".startswith(f"{package}.") for name in imports(module))
    } == users


def test_importing_does_nothing() -> None:
    modules = ", ".join(f"scaling_fl.{module}" for module in MODULES if module != "__init__")
    code = f"""
import signal, sys, threading, torch
before = torch.random.get_rng_state(), torch.get_num_threads(), signal.getsignal(signal.SIGTERM)
import {modules}
assert torch.equal(torch.random.get_rng_state(), before[0])
assert (torch.get_num_threads(), signal.getsignal(signal.SIGTERM)) == before[1:]
assert not torch.distributed.is_initialized()
assert threading.active_count() == 1
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert (done.returncode, done.stdout) == (0, ""), done.stderr

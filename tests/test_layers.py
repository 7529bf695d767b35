"""Which package may use which, held by reading the code's imports."""

import ast
import subprocess
import sys

import pytest
from conftest import ROOT

# Each package, or module beside the packages, and those of ours that it may import. Inside a package all may import
# all, as long as there is no circle.
MAY_IMPORT: dict[str, set[str]] = {
    "errors": set(),
    "training": set(),
    "report": set(),
    "storage": {"errors"},
    "hub": {"errors"},
    "distributed": {"errors"},
    "models": {"hub", "errors"},
    "data": {"training", "distributed", "storage", "hub", "errors"},
    "federation": {"training", "models", "distributed", "errors"},
    "records": {"training", "distributed", "storage", "errors"},
    "experiment": {"data", "federation", "records", "training", "models", "distributed", "storage", "hub", "errors"},
    "command": {"experiment", "records", "report", "distributed", "errors"},
}
MODULES = {
    ".".join(path.relative_to(ROOT / "scaling_fl").with_suffix("").parts).removesuffix(".__init__"): path
    for path in (ROOT / "scaling_fl").rglob("*.py")
    if (path.parent / "__init__.py").exists()  # others are files of the project that `new` writes
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


def modules_used_by(module: str) -> set[str]:
    found = {name.removeprefix("scaling_fl.") for name in imports(module) if name.startswith("scaling_fl.")}
    return found & set(MODULES)


def test_every_package_is_in_the_table() -> None:
    assert {module.partition(".")[0] for module in MODULES} - {"__init__"} == set(MAY_IMPORT)


@pytest.mark.parametrize("module", sorted(set(MODULES) - {"__init__"}))
def test_a_package_uses_only_those_that_it_may(module: str) -> None:
    own = module.partition(".")[0]
    used = {name.partition(".")[0] for name in modules_used_by(module)}
    assert used - {own} <= MAY_IMPORT[own]


def test_no_imports_run_in_a_circle() -> None:
    left = {module: modules_used_by(module) - {module} for module in MODULES}
    while left:
        free = {module for module, used in left.items() if not used & set(left)}
        assert free, f"circles among {sorted(left)}"
        left = {module: used for module, used in left.items() if module not in free}


@pytest.mark.parametrize(
    ("package", "users"),
    [
        ("torch.distributed", {"distributed.collectives", "distributed.launch", "distributed.world"}),
        ("sacred", {"command.experiment", "records.mongo", "records.observers"}),
        ("pymongo", {"records.mongo", "records.observers"}),
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

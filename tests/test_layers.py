"""The packages that each package may import, checked against the imports in the code."""

import ast
import subprocess
import sys
import tomllib
from collections.abc import Iterable, Iterator
from importlib.metadata import PackageNotFoundError, packages_distributions, requires

import pytest
from helpers import ROOT
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

# Each package or top-level module, and the packages of this library that it may import. Modules of one package may
# import each other, but not in a circle.
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
LAZY = {"experiment.result": {"report"}}  # a finished run draws its report
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


@pytest.mark.parametrize("module", sorted(MODULES))
def test_a_module_and_its_functions_are_short(module: str) -> None:
    text = MODULES[module].read_text()
    functions = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    assert [found.name for found in functions if (found.end_lineno or 0) - found.lineno >= 50] == []
    assert len(text.splitlines()) <= 250


def test_every_package_is_in_the_table() -> None:
    assert {module.partition(".")[0] for module in MODULES} - {"__init__"} == set(MAY_IMPORT)


@pytest.mark.parametrize("module", sorted(set(MODULES) - {"__init__"}))
def test_a_package_imports_only_what_the_table_allows(module: str) -> None:
    package = module.partition(".")[0]
    used = {name.partition(".")[0] for name in modules_used_by(module)}
    assert used - {package} <= MAY_IMPORT[package] | LAZY.get(module, set())


def test_no_imports_are_circular() -> None:
    left = {module: modules_used_by(module) - {module} for module in MODULES}
    while left:
        free = {module for module, used in left.items() if not used & set(left)}
        assert free, f"circles among {sorted(left)}"
        left = {module: used for module, used in left.items() if module not in free}


@pytest.mark.parametrize(
    ("package", "users"),
    [
        ("torch.distributed", {f"distributed.{name}" for name in ("collectives", "launch", "rendezvous", "world")}),
        ("sacred", {"command.experiment", "records.mongo", "records.observers"}),
        ("pymongo", {"records.mongo", "records.observers"}),
    ],
)
def test_large_dependencies_are_imported_in_few_modules(package: str, users: set[str]) -> None:
    assert {
        module for module in MODULES if any(f"{name}.".startswith(f"{package}.") for name in imports(module))
    } == users


def installed_with(*extras: str) -> set[str]:
    """The modules that pip installs with these extras of the package."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    left = [*project["dependencies"], *(line for extra in extras for line in project["optional-dependencies"][extra])]
    found: set[str] = set()
    while left:
        needed = Requirement(left.pop())
        name = canonicalize_name(needed.name)
        if name not in found and (needed.marker is None or needed.marker.evaluate({"extra": ""})):
            found.add(name)
            try:
                left += requires(name) or []
            except PackageNotFoundError:
                continue
    modules = {
        module for module, names in packages_distributions().items() if found & {canonicalize_name(n) for n in names}
    }
    return modules | {name.replace("-", "_") for name in found}  # also of what is not here


def run_at_import(nodes: Iterable[ast.AST]) -> Iterator[ast.Import | ast.ImportFrom]:
    for node in nodes:
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield node
        elif not isinstance(node, ast.FunctionDef | ast.Lambda) and "TYPE_CHECKING" not in ast.dump(node):
            yield from run_at_import(ast.iter_child_nodes(node))


def packages_of(nodes: Iterable[ast.AST]) -> set[str]:
    found = set()
    for node in nodes:
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [str(node.module)] if isinstance(node, ast.ImportFrom) else []
        found |= {name.partition(".")[0] for name in names}
    return found - {"scaling_fl"} - sys.stdlib_module_names


@pytest.mark.parametrize("module", sorted(MODULES))
def test_a_module_imports_what_pip_installs_and_an_extra_only_where_it_is_used(module: str) -> None:
    tree = ast.parse(MODULES[module].read_text())
    assert packages_of(run_at_import(tree.body)) <= INSTALLED
    assert packages_of(ast.walk(tree)) <= INSTALLED_WITH_EXTRAS


def test_importing_has_no_side_effects_and_needs_no_extra() -> None:
    modules = ", ".join(f"scaling_fl.{module}" for module in MODULES if module != "__init__")
    hidden = INSTALLED_WITH_EXTRAS - INSTALLED - {"platformdirs"}  # of which setuptools has a copy
    assert {"s3fs", "gcsfs", "sentencepiece", "pytest", "sklearn"} <= hidden
    code = f"""
import signal, sys, threading

class Hide:
    def __init__(self, finder):
        self.finder = finder
    def find_spec(self, name, path=None, target=None):
        return None if name.partition(".")[0] in {hidden} else self.finder.find_spec(name, path, target)
    def __getattr__(self, name):
        return getattr(self.finder, name)

sys.meta_path[:] = map(Hide, sys.meta_path)
import torch
before = torch.random.get_rng_state(), torch.get_num_threads(), signal.getsignal(signal.SIGTERM)
import {modules}
assert torch.equal(torch.random.get_rng_state(), before[0])
assert (torch.get_num_threads(), signal.getsignal(signal.SIGTERM)) == before[1:]
assert not torch.distributed.is_initialized()
assert threading.active_count() == 1
assert not {hidden}.intersection(sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert (done.returncode, done.stdout) == (0, ""), done.stderr


INSTALLED = installed_with()
INSTALLED_WITH_EXTRAS = installed_with("s3", "gcs", "llm", "quantise", "sentencepiece", "trackers", "demo", "dev")

"""The package's door: what it names is there, and importing it takes nothing."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import ROOT

import scaling_fl
from scaling_fl.experiment.result import sites_as_numbers


def test_type_checkers_see_what_the_door_opens() -> None:
    tree = ast.parse((ROOT / "scaling_fl" / "__init__.py").read_text())
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and "scaling_fl" in str(node.module)]
    seen = {alias.name: str(node.module).removeprefix("scaling_fl.") for node in imports for alias in node.names}
    assert seen == scaling_fl._HOMES
    found = {name: getattr(scaling_fl, name) for name in dir(scaling_fl)}
    assert all(isinstance(value, dict) if name.isupper() else value.__name__ == name for name, value in found.items())
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        scaling_fl.nothing  # noqa: B018


@pytest.mark.parametrize(
    ("imported", "needed", "unwanted"),
    [
        ("scaling_fl", "scaling_fl", "torch numpy datasets transformers sacred pymongo tqdm"),
        (
            "scaling_fl.data.examples, scaling_fl.federation.round",
            "torch",
            "datasets transformers sacred pymongo pandas",
        ),
    ],
)
def test_an_import_brings_what_it_needs(imported: str, needed: str, unwanted: str) -> None:
    code = f"""
import sys, {imported}
print(sorted(set({unwanted.split()!r}) & set(sys.modules)), {needed!r} in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[] True\n"


def test_a_folder_of_the_same_name_does_not_hide_the_package(tmp_path: Path) -> None:
    """As the clone, beside a script."""
    (tmp_path / "scaling_fl").mkdir()
    code = "import scaling_fl; print(scaling_fl.__file__)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path)
    assert done.stdout == f"{ROOT / 'scaling_fl' / '__init__.py'}\n"


def test_the_numbers_of_sites_are_numbers_again_after_json() -> None:
    assert sites_as_numbers({"round": 1, "site.loss": {"0": 0.5, "10": 1}}) == {
        "round": 1,
        "site.loss": {0: 0.5, 10: 1},
    }

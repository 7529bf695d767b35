"""The pages: their links lead somewhere, they are short, and their tables, figures and Python are those of the code."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import ROOT
from test_layers import MAY_IMPORT, MODULES

from scaling_fl.experiment import checks
from scaling_fl.experiment.parameters import PARAMETERS, find_defaults
from scaling_fl.experiment.settings import FIELDS
from scaling_fl.federation.strategies import STRATEGIES
from scaling_fl.records import rounds

PAGES = [
    ROOT / "README.md",
    ROOT / "recipes" / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "CHANGELOG.md",
    *sorted((ROOT / "docs").glob("*.md")),
]
MAX_WORDS = 1_500
CODE = re.compile(r"^```.*?^```", re.DOTALL | re.MULTILINE)


def text_of(page: Path) -> str:
    """A page without its blocks of code."""
    return CODE.sub("", page.read_text())


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub gives the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", text_of(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_leads_to_a_file_and_a_heading(page: Path) -> None:
    text = text_of(page)
    links = re.findall(r"\]\((?!https?:)([^)\s]+)\)", text) + re.findall(r'(?:src|href)="(?!https?:)([^"]+)"', text)
    for link in links:
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_no_page_is_long(page: Path) -> None:
    assert len(page.read_text().split()) <= MAX_WORDS


def test_readme_leads_to_every_page() -> None:
    found: set[Path] = set()
    new = {ROOT / "README.md"}
    while new:
        found |= new
        links = {page.parent / link for page in new for link in re.findall(r"\]\(([^)#]+\.md)", text_of(page))}
        new = {link.resolve() for link in links if link.exists()} - found
    assert set(PAGES) <= found


def test_the_tables_are_those_of_the_code() -> None:
    for page in {of["page"] for of in FIELDS.values()}:
        assert checks.table(page) in (ROOT / f"docs/{page}.md").read_text()
    assert rounds.table() in (ROOT / "docs/metrics.md").read_text()
    used = {name: ", ".join(f"`{other}`" for other in sorted(others)) for name, others in MAY_IMPORT.items()}
    imports = "\n".join(f"| `{name}` | {others or 'nothing of ours'} |" for name, others in used.items())
    assert imports in (ROOT / "docs/architecture.md").read_text(), imports


def test_the_table_of_the_strategies_defaults_is_that_of_the_code() -> None:
    lines = [line.strip("|").split("|") for line in (ROOT / "docs/strategies.md").read_text().splitlines()]
    table = {name.strip(" `"): [cell.strip(" `") for cell in cells] for name, *cells in lines if cells}
    assert {*STRATEGIES} <= {*table}
    assert {*STRATEGIES} == {*table["setting"][1:]}
    for name in PARAMETERS["strategy"]:
        defaults = [find_defaults("strategy", strategy).get(name, "") for strategy in table["setting"][1:]]
        assert table[name][1:] == [str(default) for default in defaults]


def test_the_lines_to_read_are_counted() -> None:
    """To a tenth, so that a page need not change with every line."""
    lines = sum(len(path.read_text().splitlines()) for path in MODULES.values())
    (readme,) = re.findall(r"\| lines of Python to read \| ([\d,]+) \|", (ROOT / "README.md").read_text())
    (peers,) = re.findall(r"\| scaling_fl \| \d+ \| ([\d,]+),", (ROOT / "docs/peers.md").read_text())
    assert readme == peers
    assert lines == pytest.approx(int(readme.replace(",", "")), rel=0.1)


@pytest.mark.long(seconds=20)
@pytest.mark.usefixtures("warm")
def test_the_python_of_the_pages_runs(tmp_path: Path, small_run: dict[str, object]) -> None:
    """On small data, in one interpreter, as in a notebook that has them all."""
    pages = ("README.md", "docs/python.md", "docs/records.md", "docs/models.md")
    text = "".join((ROOT / page).read_text() for page in pages)
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(blocks) > 8
    cells = []
    for block in blocks:
        if block.startswith("# my_plugin.py"):
            (tmp_path / "my_plugin.py").write_text(block)
        else:
            cells.append(re.sub(r'\bSettings\((task_name="bbcnews", model="minilm", )?', "Settings(**small, ", block))
    small = {name: str(value) if isinstance(value, Path) else value for name, value in small_run.items()}
    del small["num_rounds"]
    (tmp_path / "cells.py").write_text("\n\n".join([f"small = {small!r}", *cells]))
    done = subprocess.run([sys.executable, "cells.py"], cwd=tmp_path, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr

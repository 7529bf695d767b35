"""The report of runs: its content, its errors, and its look in a real browser."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from helpers import ROOT, refusal
from PIL import Image, ImageColor

from scaling_fl import report
from scaling_fl.report.charts import PLOTS, draw_plot, label_plots
from scaling_fl.report.drawings import spread
from scaling_fl.report.findings import findings
from scaling_fl.report.page import page
from scaling_fl.report.runs import Run, read
from scaling_fl.report.tables import MEASURES, different, settings, summary

LABELS = ["business", "entertainment", "politics", "sport", "tech"]
EVIL = "<script>alert('x')</script>$_{\\frac$ \"&"


def by_site(values: np.ndarray) -> dict[int, float]:
    return dict(enumerate(values.tolist()))


def write_run(
    folder: Path,
    *,
    num_sites: int = 4,
    num_rounds: int = 8,
    rate: float = 0.5,
    alpha: float = 1.0,
    seed: int = 0,
    straggler: float = 1.0,
    labels: list[str] = LABELS,
    status: str = "COMPLETED",
    config: dict[str, Any] | None = None,
    change: Callable[[dict[str, Any]], Any] = lambda round_: None,
) -> str:
    """Write the folder of a run that learns at some rate; `change` changes each round before it is written."""
    random = np.random.default_rng(seed)
    folder.mkdir(parents=True)
    counts = np.ceil(random.dirichlet([alpha] * len(labels), num_sites) * random.lognormal(5, 0.4, (num_sites, 1)))
    examples = counts.sum(axis=1)
    hard = random.normal(0, 0.15, num_sites) + (counts.max(axis=1) / examples - 1 / len(labels)) * 0.3
    pace = random.lognormal(-4.5, 0.08, num_sites)
    pace[-1] *= straggler
    rounds = []
    for number in range(num_rounds + 1):
        loss = 0.15 + 1.45 * np.exp(-rate * number)
        values: dict[str, Any] = {"round": number, "time.evaluate_s": 1.5 * random.lognormal(0, 0.03)}
        if number == 0:
            values |= {"time.setup_s": 6.2, "comm.bytes": 90_900_000, "comm.expected_bytes": 90_850_000}
        else:
            per_site = {
                "loss": np.maximum(loss * 1.1 + hard * np.exp(-0.1 * number) + random.normal(0, 0.03, num_sites), 0.01),
                "seconds": examples * pace * random.lognormal(0, 0.04, num_sites),
                "memory_mb": 800 + random.normal(0, 5, num_sites),
            }
            per_site["accuracy"] = np.clip(1.02 - 0.46 * per_site["loss"], 0, 1)
            values |= {f"site.{name}": by_site(each.round(5)) for name, each in per_site.items()}
            values |= {"site.examples": by_site(examples)}
            for name, worst in (("loss", np.max), ("accuracy", np.min), ("seconds", np.max)):
                each = per_site[name]
                values |= {f"sites.{name}.worst": worst(each), f"sites.{name}.mean": each.mean()}
                values |= {f"sites.{name}.std": each.std()}
            values |= {"train.loss": (per_site["loss"] * examples).sum() / examples.sum()}
            values |= {"train.accuracy": (per_site["accuracy"] * examples).sum() / examples.sum()}
            values |= {"time.train_s": per_site["seconds"].sum() / 2, "time.aggregate_s": 0.05 * num_sites**0.5}
            values |= {"time.checkpoint_s": 0.3, "comm.bytes": 363_400_000, "comm.expected_bytes": 363_300_000}
            values["speed.examples_per_s"] = examples.sum() / values["time.train_s"]
            values["speed.tokens_per_s"] = 61 * values["speed.examples_per_s"]
        values["validation.loss"] = loss + 0.02 * random.normal() ** 2
        values["validation.accuracy"] = 0.975 - 0.52 * (values["validation.loss"] - 0.15)
        values["time.round_s"] = sum(value for name, value in values.items() if name.startswith("time.")) + 0.1
        change(values)
        rounds.append(json.dumps(values))
    settings = {"model": "minilm", "task_name": "bbcnews", "num_rounds": num_rounds, "strategy": "fedavg", "seed": 1}
    settings |= {"learning_rate": 2e-4, "job_name": None, "site_ids": [0] * num_sites, "partition": "dirichlet"}
    settings |= config or {}
    sites = [
        {"rank": site % 2, "device": "cpu", "examples": int(size), "tokens": int(61 * size), "labels": row.tolist()}
        for site, (size, row) in enumerate(zip(examples, counts.astype(int), strict=True))
    ]
    machine = {"hosts": "node-a, node-b", "torch": "2.13.0", "transformers": "5.23.0", "git": "08b3d36 (clean)"}
    record = {"status": status, "start_time": "2026-11-22T05:00:00.1", "heartbeat": "2026-11-22T05:07:10.2"}
    record |= {"host": {"hostname": "node-a", "cpu": "Xeon", "os": ["Linux", "6"]}, "result": 0.9}
    record |= {"meta": {"config_updates": {key: settings[key] for key in config or {}}}}
    (folder / "config.json").write_text(json.dumps(settings))
    (folder / "run.json").write_text(json.dumps(record))
    (folder / "info.json").write_text(json.dumps({"labels": labels, "sites": sites, "machine": machine}))
    (folder / "rounds.jsonl").write_text("".join(f"{line}\n" for line in rounds))
    return str(folder)


def evaluate(round_: dict[str, Any]) -> None:
    """Add what evaluation by site and on held-out examples measures."""
    sites = [int(site) for site in round_.get("site.loss", range(4))]
    accuracy = {site: round(round_["validation.accuracy"] - 0.0001 * site, 4) for site in sites}
    round_ |= {"site.test_accuracy": accuracy, "site.test_examples": {site: 10 + site for site in sites}}
    if round_["round"]:
        gain = {site: round(0.0002 * (site - 1), 4) for site in sites}
        round_ |= {"site.gain": gain, "site.local_accuracy": {site: accuracy[site] - gain[site] for site in sites}}
    for data, fraction in (("validation", 1.0), ("test", 0.9)):
        for name in ("accuracy", "macro_f1", "balanced_accuracy", "exact_match", "perplexity"):
            round_[f"{data}.{name}"] = fraction * round_["validation.accuracy"]
        round_ |= {f"{data}.loss": round_["validation.loss"], f"{data}.confusion": [[0, 0, 90], [0, 2, 10], [2, 2, 5]]}


class Reader(HTMLParser):
    """The tags, links and text of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.links: list[str] = []
        self.text: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.links += [value or "" for name, value in attributes if name in ("src", "href", "xlink:href", "data")]
        assert not [name for name, _ in attributes if name.startswith("on")], "a handler is a script"

    def handle_data(self, text: str) -> None:
        self.text.append(text)


@pytest.fixture(scope="module")
def three_runs(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The runs of a sweep: one completes, one has a malicious name and labels, one of many sites fails."""
    folder = tmp_path_factory.mktemp("runs")
    evil = {"job_name": EVIL, "strategy": EVIL, EVIL: EVIL, "learning_rate": 3e-4}
    runs = [
        write_run(folder / "1", num_rounds=4),
        write_run(
            folder / "2",
            num_rounds=4,
            rate=0.9,
            config=evil,
            labels=[EVIL, "日本語", "c"],
            status=EVIL,
            change=evaluate,
        ),
        write_run(folder / "3", num_rounds=4, num_sites=300, straggler=5, config={"job_name": "x" * 200}),
    ]
    info = json.loads((folder / "2" / "info.json").read_text())
    info["sites"][0]["device"] = info["machine"][EVIL] = EVIL
    info["meanings"] = {"validation.loss": {"unit": "nats", "meaning": f"[mean](a.md) {EVIL}"}, "train.loss": EVIL}
    (folder / "2" / "info.json").write_text(json.dumps(info))
    return runs


@pytest.fixture(scope="module")
def written(three_runs: list[str], tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The files of their report, the page first."""
    return [Path(path) for path in report.write(three_runs, str(tmp_path_factory.mktemp("report") / "sweep.html"))]


def test_a_page_has_no_script_and_loads_nothing(written: list[Path]) -> None:
    page = Reader(written[0].read_text())
    assert {"svg", "table", "title"} <= page.tags
    assert not page.tags & {"script", "link", "iframe", "object", "embed", "base", "form"}
    assert page.links
    assert all(link.startswith(("#", "data:image/png;base64,")) for link in page.links)
    assert not re.search(r"url\((?!#)|@import", written[0].read_text())


def test_the_contents_of_files_are_shown_as_text(written: list[Path]) -> None:
    text = Reader(written[0].read_text()).text
    assert sum(EVIL in words for words in text) > 10  # settings, labels, status, machine, charts
    for chart in re.findall(r"<svg.*?</svg>", written[0].read_text(), re.DOTALL):
        ElementTree.fromstring(chart.replace("<svg", '<svg xmlns:xlink="http://www.w3.org/1999/xlink"', 1))


def test_metrics_are_shown_with_the_meaning_that_the_record_gives(written: list[Path]) -> None:
    text = Reader(written[0].read_text()).text
    place = text.index("validation.loss")
    assert text[place + 4 : place + 6] == ["nats", f"mean {EVIL}"]


def test_charts_have_the_colours_of_the_light_or_dark_page(written: list[Path]) -> None:
    charts = re.findall(r"<svg.*?</svg>", written[0].read_text(), re.DOTALL)
    assert len(charts) == len(written) - 1
    for chart in charts:
        assert "fill: var(--quiet)" in chart
        assert set(re.findall(r"(?:stroke|fill): (#\w+)", chart)) <= {"#ffffff"}, "no other colour"
    assert all(f"stroke: var(--run{index})" in charts[0] for index in range(3))


@pytest.mark.long
def test_each_chart_is_also_a_png(written: list[Path]) -> None:
    charts = written[1:]
    assert {path.name.removeprefix("sweep-").removesuffix(".png") for path in charts} == {
        *("accuracy", "loss", "accuracy-by-time", "accuracy-by-bytes", "site-accuracy", "site-loss", "site-seconds"),
        *("site-test-accuracy", "site-test-accuracy-sorted", "site-gain-sorted"),
        *("site-accuracy-sorted", "site-seconds-sorted", "labels-1", "labels-2", "labels-3", "time", "bytes", "speed"),
    }
    assert sorted(written) == sorted(written[0].parent.iterdir())
    for path in charts:
        with Image.open(path) as image:
            assert image.width == 800
            assert len(image.convert("RGB").getcolors(1 << 24)) > 20, path.name


@pytest.mark.long
def test_a_page_of_a_thousand_sites_is_as_large_as_one_of_a_few(tmp_path: Path) -> None:
    sizes = []
    for num_sites in (50, 1000):
        runs = read([write_run(tmp_path / str(num_sites), num_sites=num_sites, num_rounds=3, change=evaluate)])
        charts = [
            draw_plot(plot, runs, with_png=False) for plot in (*PLOTS, *label_plots(runs)) if plot.section == "Sites"
        ]
        assert len(charts) == 9
        sizes.append(len(page(runs, [chart for chart in charts if chart is not None])))
    assert sizes[1] < 1.5 * sizes[0]


def test_a_legend_names_each_style_of_line(tmp_path: Path) -> None:
    runs = read([write_run(tmp_path / "run", num_rounds=3)])
    expected = {
        "accuracy": ["validation", "training", "best round"],
        "site-loss": ["median site", "worst site", "middle half", "all sites"],
        "bytes": ["sent", "expected"],
        "speed": [],
    }
    charts = [draw_plot(plot, runs, with_png=False) for plot in PLOTS if plot.name in expected]
    assert {chart.name: [text for _, _, text in chart.legend] for chart in charts if chart} == expected


def test_plotting_does_not_change_matplotlib_and_matplotlib_is_imported_only_then(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", num_rounds=0)
    code = f"""
import sys
from scaling_fl import report
assert not any(name.partition(".")[0] in ("matplotlib", "torch") for name in sys.modules)
import matplotlib
before = matplotlib.rcParams.copy()
report.write([{folder!r}], {str(tmp_path / "report.html")!r})
assert matplotlib.rcParams.copy() == before
assert "matplotlib.pyplot" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def only(folder: str) -> Run:
    (run,) = read([folder])
    return run


def test_a_run_without_problems_has_no_findings(tmp_path: Path) -> None:
    assert findings(only(write_run(tmp_path / "run", alpha=1e3))) == []


def fail_site_two(round_: dict[str, Any]) -> None:
    for name in [name for name in round_ if name.startswith("site.") and round_["round"] in (2, 5)]:
        del round_[name][2]


def sample_sites(round_: dict[str, Any]) -> None:
    """Leave sites 0 and 1 out of two rounds, in one of which site 2 fails."""
    if round_["round"]:
        asked = range(2 if round_["round"] in (2, 5) else 0, 4)
        round_["site.rank"] = dict.fromkeys(asked, 0)
        for name in [name for name in round_ if name.startswith("site.")]:
            round_[name] = {site: round_[name][site] for site in asked if (site, round_["round"]) != (2, 5)}
        round_["site.rank"] = dict.fromkeys(asked, 0)


def leave_site_one_behind(round_: dict[str, Any]) -> None:
    if round_["round"]:
        round_["site.accuracy"][1] = 0.25


@pytest.mark.parametrize(
    ("problem", "sentence"),
    [
        (
            {"straggler": 3},
            r"Site 3 \(rank 1, cpu\) takes [23]\.\d times .* and [23]\.\d times as long for each example",
        ),
        ({"straggler": 3}, r"Rank 1 \(cpu\) trains [\d.]+ s a round, the mean is [\d.]+ s"),
        ({"change": fail_site_two}, r"Sites failed \(number of rounds\): site 2 \(rank 0, cpu\): 2\.$"),
        ({"change": sample_sites}, r"Sites failed \(number of rounds\): site 2 \(rank 0, cpu\): 1\.$"),
        ({"change": leave_site_one_behind}, r"Site 1 \(rank 1, cpu\) has a training accuracy of 0\.250 in the last"),
        (
            {"change": lambda r: r.update({"comm.bytes": 1.2 * r["comm.expected_bytes"]})},
            r"^The ranks sent 20% more bytes",
        ),
        (
            {"change": lambda r: r["round"] > 6 and r.update({"train.loss": np.nan})},
            r"train\.loss .* 2 of 8 rounds, first in round 7\.$",
        ),
        (
            {"change": lambda r: r.update({"validation.loss": np.inf})},
            r"validation\.loss is not finite in 9 of 9 rounds, first in round 0\.$",
        ),
        (
            {"change": lambda r: r["round"] == 8 and r.update({"validation.accuracy": 0.3, "validation.loss": 2.0})},
            r"^Round 7 was the best, with .* It is 0\.3000 after round 8",
        ),
        ({"status": "FAILED"}, r"ended as failed after round 8"),
        ({"status": "RUNNING", "config": {"num_rounds": 9}}, r"was running .* 2026-11-22T05:07:10"),
        ({"labels": ["a", "b", "c"], "alpha": 1e-3}, r"of 4 sites have no example of at least one class"),
    ],
)
def test_a_problem_is_reported(tmp_path: Path, problem: dict[str, Any], sentence: str) -> None:
    said = findings(only(write_run(tmp_path / "run", **{"alpha": 1e3} | problem)))
    assert any(re.search(sentence, each) for each in said), said


def test_numbers_compare_runs_and_the_best_is_bold(tmp_path: Path) -> None:
    runs = read([write_run(tmp_path / str(rate), rate=rate, change=evaluate) for rate in (0.1, 0.9)])
    rows = {row.name: row for row in summary(runs)}
    assert set(rows) == {name for name, *_ in MEASURES}
    accuracy = max(round_["validation.accuracy"] for round_ in runs[1].rounds)
    assert rows["best round's validation accuracy"].texts[1] == f"{accuracy:.4f}"
    assert rows["best round's validation accuracy"].bold == [False, True]
    seconds = sum(round_["time.round_s"] for round_ in runs[0].rounds)
    assert rows["seconds in all"].texts[0] == f"{seconds:.1f}"
    assert rows["MB sent in all"].texts == ["2,998.1", "2,998.1"]
    assert rows["MB sent in all"].bold == [False, False]


def test_settings_that_differ_are_listed_apart_from_equal_ones(tmp_path: Path) -> None:
    changes = [{}, {"learning_rate": 1e-3}, {"learning_rate": 1e-3, "proximal_mu": 0.1}]
    rows = settings(read([write_run(tmp_path / str(n), config=change) for n, change in enumerate(changes)]))
    assert [(row.name, row.texts) for row in different(rows)] == [
        ("learning_rate", ["0.0002", "0.001", "0.001"]),
        ("proximal_mu", ["–", "–", "0.1"]),
    ]
    assert {row.name: row.bold for row in rows}["learning_rate"] == [False, True, True]


def test_runs_are_named_by_job_or_folder(tmp_path: Path) -> None:
    jobs = [None, "a", "b", "b"]
    folders = [write_run(tmp_path / str(n), num_rounds=0, config={"job_name": job}) for n, job in enumerate(jobs)]
    assert [run.name for run in read(folders)] == ["run 0", "a", f"b ({folders[2]})", f"b ({folders[3]})"]


def test_bands_are_quantiles_of_the_sites_that_did_not_fail(tmp_path: Path) -> None:
    def hundred(round_: dict[str, Any]) -> None:
        round_["site.loss"] = {site: site for site in range(101)}

    bands = spread(only(write_run(tmp_path / "run", num_sites=102, num_rounds=1, change=hundred)), "loss")
    assert bands is not None
    assert bands[:, -1].tolist() == [0, 25, 50, 75, 100]


def test_any_metric_may_be_missing(tmp_path: Path) -> None:
    run = only(write_run(tmp_path / "run", change=evaluate))
    run = replace(run, info=run.info | {"best": {"round": 8}})
    for name in {name for round_ in run.rounds for name in round_} - {"round"}:
        rounds = [{key: value for key, value in round_.items() if key != name} for round_ in run.rounds]
        assert len(summary([replace(run, rounds=rounds)])) >= len(MEASURES) - 3, name
        assert isinstance(findings(replace(run, rounds=rounds)), list)
        assert page([replace(run, rounds=rounds)], [])


@pytest.mark.parametrize("bare", [{}, {"validation.accuracy": float("nan"), "site.loss": {}}])
def test_a_run_with_few_metrics_has_a_page(tmp_path: Path, bare: dict[str, Any]) -> None:
    folder = Path(write_run(tmp_path / "run", num_rounds=0))
    (folder / "rounds.jsonl").write_text(json.dumps({"round": 0} | bare) + "\n")
    (folder / "info.json").unlink()
    path, *charts = report.write([str(folder)], str(tmp_path / "report.html"))
    assert "<h1>run run</h1>" in Path(path).read_text()
    assert charts == []


def test_a_run_without_rounds_jsonl_is_plotted_from_its_metrics(tmp_path: Path) -> None:
    folder = Path(write_run(tmp_path / "run"))
    rounds = only(str(folder)).rounds
    (folder / "rounds.jsonl").unlink()
    names = {name for round_ in rounds for name in round_ if not name.startswith("site.")} - {"round"}
    metrics = {name: [(r["round"], r[name]) for r in rounds if name in r] for name in names}
    (folder / "metrics.json").write_text(
        json.dumps({name: dict(zip(("steps", "values"), zip(*points))) for name, points in metrics.items()})  # noqa: B905
    )
    whole = [{key: value for key, value in round_.items() if not key.startswith("site.")} for round_ in rounds]
    assert only(str(folder)).rounds == whole


def test_a_truncated_last_line_is_ignored(tmp_path: Path) -> None:
    path = Path(write_run(tmp_path / "run")) / "rounds.jsonl"
    path.write_text(path.read_text()[:-200])
    assert [round_["round"] for round_ in only(str(path.parent)).rounds] == list(range(8))


def test_the_last_line_of_a_repeated_round_counts(tmp_path: Path) -> None:
    path = Path(write_run(tmp_path / "run")) / "rounds.jsonl"
    path.write_text(path.read_text() + '{"round": 3, "train.loss": 7}\n')
    assert only(str(path.parent)).rounds[3] == {"round": 3, "train.loss": 7}


def test_a_folder_without_a_run_is_refused_in_one_sentence(tmp_path: Path) -> None:
    folder = Path(write_run(tmp_path / "run"))
    assert "expected the folder of a run, such as runs/1, got one without a run.json" in refusal(
        lambda: read([str(tmp_path)])
    )
    assert "expected the folder of a run, such as runs/1, got one without a run.json" in refusal(
        lambda: read([str(tmp_path / "none")])
    )
    lines = (folder / "rounds.jsonl").read_text().splitlines()
    (folder / "rounds.jsonl").write_text("\n".join([lines[0], lines[1][:50], *lines[2:]]))
    assert "line 2: expected JSON" in refusal(lambda: read([str(folder)]))
    (folder / "rounds.jsonl").write_text("[1]\n")
    assert "line 1: expected an object with the number of a round" in refusal(lambda: read([str(folder)]))
    (folder / "rounds.jsonl").write_text(lines[0][:50])
    assert "expected a run with a finished round, got none" in refusal(lambda: read([str(folder)]))
    (folder / "config.json").write_text("{")
    assert "expected JSON, got" in refusal(lambda: read([str(folder)]))


def run_script(*arguments: str, cwd: Path = ROOT) -> tuple[int, str]:
    command = [sys.executable, str(ROOT / "scripts" / "report.py"), *arguments]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=env)
    return done.returncode, done.stdout + done.stderr


def test_the_command_writes_into_the_run_folder_or_for_several_runs_into_the_working_folder(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", num_rounds=0)
    status, said = run_script(folder)
    assert (status, said) == (0, f"{folder}/report.html, and 6 charts beside it\n")
    assert (tmp_path / "run" / "report-loss.png").exists()
    page_before = (tmp_path / "run" / "report.html").read_text()
    other = write_run(tmp_path / "other", num_rounds=1)
    status, said = run_script(folder, other, cwd=tmp_path)
    assert (status, said.partition(",")[0]) == (0, "report.html")
    assert (tmp_path / "report.html").exists()
    assert (tmp_path / "run" / "report.html").read_text() == page_before


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["none"], "error: 'none': expected the folder of a run, such as runs/1, got one without a run.json"),
        (["{run}", "--output", "report.pdf"], "error: --output: expected a file such as report.html, got 'report.pdf'"),
        (["{run}", "--output", "{run}/none/report.html"], "report.html' cannot be read or written: No such file"),
    ],
)
def test_the_command_refuses_wrong_input_in_one_sentence(tmp_path: Path, arguments: list[str], sentence: str) -> None:
    folder = write_run(tmp_path / "run", num_rounds=0)
    (tmp_path / "run" / "rounds.jsonl").write_text('{"round": 0}\n')
    status, said = run_script(*(argument.format(run=folder) for argument in arguments))
    assert status == 1
    assert sentence in said
    assert said.count("\n") == 1


@pytest.fixture(scope="module")
def browser() -> str:
    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome-headless-shell")
    found = next(filter(None, map(shutil.which, names)), None)
    if found is None:
        pytest.skip(f"there is no browser: none of {', '.join(names)} is on PATH")
    return found


@dataclass(frozen=True)
class View:
    """The content of a page in a browser, and its console."""

    picture: Image.Image
    dom: str
    console: list[str]


def view(browser: str, path: Path, folder: Path, width: int, *flags: str) -> View:
    """Open a page in a new browser of a given width."""
    picture = folder / "picture.png"
    options = [f"--user-data-dir={folder / 'profile'}", f"--window-size={width},2400", f"--screenshot={picture}"]
    options += ["--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars"]
    options += ["--no-first-run", "--disable-background-networking", "--enable-logging=stderr", "--dump-dom", *flags]
    done = subprocess.run(
        [browser, *options, path.as_uri()],
        capture_output=True,
        text=True,
        timeout=60,
        env=os.environ | {"HOME": str(folder)},
    )
    assert done.returncode == 0, done.stderr
    console = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    return View(Image.open(picture).convert("RGB"), done.stdout, console)


@pytest.mark.long
@pytest.mark.parametrize(
    ("width", "scheme", "blue", "background"),
    [(360, 1, "#0072b2", "#f6f7f9"), (1280, 1, "#0072b2", "#f6f7f9"), (1280, 0, "#4ba6e8", "#12151a")],
    ids=["phone", "desktop", "dark"],
)
def test_a_browser_shows_the_page(
    browser: str, written: list[Path], tmp_path: Path, width: int, scheme: int, blue: str, background: str
) -> None:
    shown = view(browser, written[0], tmp_path, width, f"--blink-settings=preferredColorScheme={scheme}")
    assert "<title>3 runs side by side – scaling_fl</title>" in shown.dom
    assert shown.console == []
    assert shown.picture.size == (width, 2400)
    colours = {colour: count for count, colour in shown.picture.getcolors(1 << 24)}
    assert len(colours) > 100
    assert colours[ImageColor.getrgb(background)] < 0.9 * width * 2400, "blank"
    assert colours.get(ImageColor.getrgb(blue), 0) > 50, "no curve of the first run"


@pytest.mark.long
@pytest.mark.parametrize("width", [360, 1280])
def test_the_page_is_no_wider_than_the_window(browser: str, written: list[Path], tmp_path: Path, width: int) -> None:
    text = written[0].read_text()
    ruler = "const root = document.documentElement; console.log(`${root.scrollWidth} of ${innerWidth} px`)"
    text = re.sub(r"<meta http-equiv.*?>", "", text).replace("<details>", "<details open>")
    (tmp_path / "page.html").write_text(text.replace("</body>", f"<script>{ruler}</script></body>"))
    # In a frame, as some browsers' windows are never as narrow as a phone's.
    (tmp_path / "frame.html").write_text(f'<iframe src="page.html" width="{width}" height="800" frameborder="0">')
    (line,) = view(browser, tmp_path / "frame.html", tmp_path, 1400).console
    assert f'"{width} of {width} px"' in line


@pytest.mark.long
def test_the_page_lets_no_script_run(browser: str, written: list[Path], tmp_path: Path) -> None:
    text = written[0].read_text().replace("</body>", "<script>document.title = 'changed'</script></body>")
    (tmp_path / "attacked.html").write_text(text)
    shown = view(browser, tmp_path / "attacked.html", tmp_path, 360)
    assert "<title>changed</title>" not in shown.dom
    assert len(shown.console) == 1  # the browser states the reason

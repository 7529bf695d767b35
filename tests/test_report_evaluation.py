"""The report of evaluation: rounds without it, the best round, confusions, and what each site gains."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure
from test_report import EVIL, Reader, evaluate, only, write_run

from scaling_fl.report.charts import PLOTS
from scaling_fl.report.confusions import confusions
from scaling_fl.report.findings import findings
from scaling_fl.report.page import folded, page
from scaling_fl.report.runs import Run
from scaling_fl.report.sites import sites
from scaling_fl.report.tables import answers, summary


def skip_odd_rounds(round_: dict[str, Any]) -> None:
    evaluate(round_)
    if round_["round"] % 2:
        for name in [name for name in round_ if name.startswith(EVALUATED)]:
            del round_[name]


EVALUATED = ("validation.", "test.", "site.test_", "site.gain", "site.local_", "time.evaluate_s")


def without(run: Run, *prefixes: str) -> Run:
    rounds = [{name: value for name, value in r.items() if not name.startswith(prefixes)} for r in run.rounds]
    return replace(run, rounds=rounds)


def text_of(*runs: Run) -> str:
    return " ".join(" ".join(Reader(page(list(runs), [])).text).split())


def tiles(run: Run) -> dict[str, str]:
    return {row.name: row.texts[0] for row in summary([run])}


def best_is(run: Run, best: Any) -> Run:
    return replace(run, info=run.info | {"best": best})


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return only(write_run(tmp_path_factory.mktemp("runs") / "1", alpha=1e3, change=evaluate))


@pytest.fixture(scope="module")
def sparse(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The run of nine rounds of which only the even ones were evaluated."""
    return only(write_run(tmp_path_factory.mktemp("runs") / "1", alpha=1e3, change=skip_odd_rounds))


def test_each_chart_joins_the_rounds_that_were_evaluated(sparse: Run) -> None:
    joined = set()
    for plot in PLOTS:
        axes = Figure().add_subplot()
        plot.draw(axes, [sparse])
        for line in axes.lines:
            assert not np.isnan(np.asarray(line.get_ydata(), dtype=float)).any(), plot.name
            if len(line.get_xdata()) == 5:
                joined.add(plot.name)
    assert joined >= {"accuracy", "loss", "accuracy-by-time", "accuracy-by-bytes", "site-test-accuracy"}


def test_a_run_that_is_stopped_between_evaluations_shows_the_last_one(sparse: Run) -> None:
    stopped = replace(sparse, rounds=sparse.rounds[:-1])
    assert stopped.rounds[-1]["round"] == 7
    shown, whole = tiles(stopped), tiles(replace(sparse, rounds=sparse.rounds[:-2]))
    for name in [name for name in whole if name.startswith(("last ", "best round's ", "worst site's test"))]:
        assert shown[name] == whole[name]
    assert "after round 6" in text_of(stopped)
    low = [r | {"validation.accuracy": 0.3, "validation.loss": 2.0} if r["round"] == 6 else r for r in stopped.rounds]
    (sentence,) = [each for each in findings(replace(stopped, rounds=low)) if each.startswith("Round")]
    assert sentence.startswith("Round 4 was the best")
    assert "It is 0.3000 after round 6." in sentence


def test_an_early_end_is_reported(run: Run) -> None:
    last = int(run.steps[-1])
    early = replace(run, config=run.config | {"num_rounds": last + 5, "early_stopping_rounds": 2})
    early = replace(early, info=run.info | {"stopped_early": True})
    assert f"The run ended after round {last} of {last + 5}, as early_stopping_rounds=2." in findings(early)
    whole = replace(early, config=early.config | {"num_rounds": last})
    assert not [sentence for sentence in findings(whole) if "early_stopping" in sentence]


def test_a_run_without_evaluation_has_a_page_and_no_word_of_it(run: Run) -> None:
    bare = without(run, *EVALUATED)
    text = text_of(bare)
    assert findings(bare) == []
    assert not [
        word for word in ("validation accuracy", "best round", "onfusion", "gain", "test accuracy") if word in text
    ]
    (accuracy,) = [plot for plot in PLOTS if plot.name == "accuracy"]
    assert [words for _, _, words in accuracy.draw(Figure().add_subplot(), [bare]) or []] == ["training"]


@pytest.mark.parametrize("best", [None, {}, {"round": 99}, {"round": None, "metric": None}, 3, {"round": [3]}])
def test_the_best_round_is_the_most_accurate_if_the_record_names_none(run: Run, best: Any) -> None:
    accuracy = run.metric("validation.accuracy")
    assert best_is(run, best).best_round == accuracy.argmax()
    assert f"best round {accuracy.argmax()}: validation accuracy" in text_of(best_is(run, best))


def test_the_best_round_is_that_of_the_record(run: Run) -> None:
    chosen = best_is(run, {"round": 3, "metric": "validation.loss"})
    accuracy, score = run.rounds[3]["validation.accuracy"], run.rounds[3]["test.macro_f1"]
    assert f"best round 3 by validation.loss: validation accuracy {accuracy:.4f}, test accuracy" in text_of(chosen)
    shown = tiles(chosen)
    assert shown["best round's validation accuracy"] == f"{accuracy:.4f}"
    assert shown["best round's test macro-F1"] == f"{score:.4f}"
    assert shown["last validation macro-F1"] == f"{run.rounds[-1]['validation.macro_f1']:.4f}"
    for name in ("accuracy", "loss"):
        (plot,) = [plot for plot in PLOTS if plot.name == name]
        axes = Figure().add_subplot()
        plot.draw(axes, [chosen])
        ring = axes.lines[-1]
        assert (ring.get_xdata(), ring.get_ydata()) == ([3], [run.rounds[3][f"validation.{name}"]])


def test_the_page_says_that_the_best_round_is_chosen_on_the_test_set(run: Run) -> None:
    sentence, untested = "chosen on the test set", without(run, "test.")
    assert "The best round is chosen on the test set, so its scores are optimistic" in text_of(untested)
    assert sentence not in text_of(run)
    assert sentence not in text_of(without(run, "test.", "validation."))
    assert sentence not in text_of(replace(untested, rounds=untested.rounds[:1])), "there is no choice"
    both = text_of(replace(run, name="held out"), replace(untested, name="at hand"))
    assert "The best round of at hand is chosen on the test set" in both


def with_confusion(run: Run, confusion: Any, labels: list[str], data: str = "validation") -> Run:
    last = {name: value for name, value in run.rounds[-1].items() if not name.endswith(".confusion")}
    rounds = [*run.rounds[:-1], last | {f"{data}.confusion": confusion}]
    return replace(run, rounds=rounds, info=run.info | {"labels": labels, "sites": []})


def test_a_confusion_matrix_has_the_labels_by_name_and_adds_up(run: Run) -> None:
    bare = without(run, "test.")
    table = confusions(with_confusion(bare, [[0, 0, 90], [0, 2, 10], [2, 2, 1234]], ["cat", EVIL, "dog"]))
    assert table is not None
    assert list(table.columns) == ["cat", f"{EVIL[:23]}…", "dog", "examples", "right"]
    assert [(row.name, list(row.texts)) for row in table.rows] == [
        ("cat", ["90", "–", "10", "100", "90 %"]),
        (f"{EVIL[:23]}…", ["–", "–", "–", "0", "–"]),
        ("dog", ["–", "–", "1,234", "1,234", "100 %"]),
    ]
    assert [list(row.bold).index(True) for row in table.rows] == [0, 1, 2]
    assert list(table.rows[0].shades) == [0.9, 0, 0.1, 0, 0]
    assert re.findall(r'style="--shade:(\d+)%">(?:<b>)?([\d–]+)', folded(table, is_open=True))[:3] == [
        ("45", "90"),
        ("0", "–"),
        ("5", "10"),
    ]


def test_confusions_of_the_last_evaluated_round_are_shown_and_those_in_test_first(run: Run, sparse: Run) -> None:
    tested, stopped = confusions(run), confusions(replace(without(sparse, "test."), rounds=sparse.rounds[:-1]))
    assert tested is not None
    assert stopped is not None
    assert "in test, after round 8" in tested.title
    assert "after round 6" in stopped.title
    assert tested.title in text_of(run)


def test_of_many_labels_the_largest_confusions_are_listed(run: Run) -> None:
    labels = [f"label {index}" for index in range(21)]
    right = [[label, label, 90] for label in range(21)]
    wrong = [[0, other, other] for other in range(1, 21)] + [[7, 0, 10]]
    few = with_confusion(without(run, "test."), [*right[:20], *wrong[:19]], labels[:20])
    many = with_confusion(few, right + wrong, labels)
    matrix, table = confusions(few), confusions(many)
    assert matrix is not None
    assert len(matrix.rows) == 20
    assert table is not None
    assert "The largest 15 of 21 confusions" in table.title
    counts = [int(row.texts[1]) for row in table.rows]
    assert counts == sorted([*range(1, 21), 10], reverse=True)[:15]
    assert (table.rows[0].name, list(table.rows[0].texts)) == ("label 0", ["label 20", "20", "7 %"])
    assert ("label 7", ["label 0", "10", "10 %"]) in [(row.name, list(row.texts)) for row in table.rows]
    assert confusions(with_confusion(few, right, labels)) is None


@pytest.mark.parametrize("broken", [None, 3, [], [3], [[0, 1]], [[0, None, 4]], [[0, -1, 4]], {"0": 3}])
def test_a_confusion_that_cannot_be_read_is_left_out(run: Run, broken: Any) -> None:
    changed = with_confusion(replace(run, rounds=run.rounds[-1:]), broken, ["a", "b"])
    assert confusions(changed) is None
    assert "Confusion matrix" not in text_of(changed)


def test_sites_that_gain_least_come_first(run: Run) -> None:
    def order(changed: Run) -> list[str]:
        table = sites(changed)
        assert table is not None
        return [row.name for row in table.rows]

    gains = {"0": 0.1, "1": -0.2, "3": 0.0}  # site 2 did not train in the round
    changed = replace(run, rounds=[*run.rounds[:-1], run.rounds[-1] | {"site.gain": gains}])
    table = sites(changed)
    assert table is not None
    assert order(changed) == ["site 1", "site 3", "site 0", "site 2"]
    assert [row.texts[list(table.columns).index("gain")] for row in table.rows] == [
        "-0.2000",
        "+0.0000",
        "+0.1000",
        "–",
    ]
    assert order(without(run, "site.gain")) == ["site 3", "site 2", "site 1", "site 0"], "by test accuracy"
    assert order(without(run, "site.gain", "site.test_")) == ["site 0", "site 1", "site 2", "site 3"]
    old = sites(without(run, *EVALUATED))
    assert old is not None
    assert not [name for name in old.columns if "test" in name or "gain" in name or "own" in name]


def test_of_a_thousand_sites_the_worst_off_are_listed(tmp_path: Path) -> None:
    def leave_behind(round_: dict[str, Any]) -> None:
        evaluate(round_)
        if round_["round"]:
            round_["site.gain"][700] = -0.4
            round_["site.test_accuracy"][500] = 0.0

    crowd = only(write_run(tmp_path / "run", num_sites=1000, num_rounds=1, change=leave_behind))
    table = sites(crowd)
    assert table is not None
    why = {row.name: row.texts[list(table.columns).index("why")] for row in table.rows}
    assert why["site 700"].startswith("least gain")
    assert "least accurate" in why["site 500"].split(", "), "none of its examples is right"
    assert len(why) <= 20
    assert not any("failed" in reasons for reasons in why.values())


@pytest.mark.parametrize(("least", "lines"), [(-0.1, 1), (0.1, 0)])
def test_the_chart_of_gains_has_a_line_at_zero_if_a_site_loses(run: Run, least: float, lines: int) -> None:
    (plot,) = [plot for plot in PLOTS if plot.name == "site-gain-sorted"]
    axes = Figure().add_subplot()
    plot.draw(axes, [replace(run, rounds=[run.rounds[-1] | {"site.gain": {"0": least, "1": 0.2}}])])
    assert sum(list(line.get_ydata()) == [0, 0] for line in axes.lines) == lines


def test_the_report_says_how_many_sites_gain_and_which_gains_least(run: Run) -> None:
    last = run.rounds[-1] | {
        "site.gain": {"0": 0.1, "1": -0.2, "2": 0.0, "3": 0.05},
        "site.test_accuracy": {"0": 0.9, "1": 0.75, "2": 0.8, "3": 0.85},
        "site.local_accuracy": {"0": 0.8, "1": 0.95, "2": 0.8, "3": 0.8},
    }
    named = [site | {"name": name} for site, name in zip(run.sites, ("A", "Ward B", "C", "D"), strict=True)]
    (sentence,) = findings(replace(run, rounds=[*run.rounds[:-1], last], info=run.info | {"sites": named}))
    assert sentence == (
        "2 of 4 sites gain test accuracy by federating, 1 lose; the mean is -0.013. Site 1 (Ward B, rank 1, cpu) gains "
        "least: the global model has 0.750 on its test examples, its own model 0.950."
    )
    assert findings(without(run, "site.gain")) == []


def test_a_site_with_a_low_test_accuracy_is_reported_with_its_number_of_examples(run: Run) -> None:
    low = run.rounds[-1]["site.test_accuracy"] | {"2": 0.25}
    rounds = [*run.rounds[:-1], run.rounds[-1] | {"site.test_accuracy": low}]
    (sentence,) = findings(without(replace(run, rounds=rounds), "site.gain"))
    assert sentence.startswith("Site 2 (rank 0, cpu) has a test accuracy of 0.250, on 12 examples, in the last round")


def test_the_page_of_a_language_model_has_its_answers_before_and_after(run: Run) -> None:
    assert answers(run) is None
    asked = replace(run, config=run.config | {"sample_questions": [f"Who? {EVIL}", "When?"]})
    last = max(asked.steps)
    rounds = [
        {name: value for name, value in of.items() if "confusion" not in name}
        | {"sample.answers": [f"answer {of['round']}", "x" * 400], "validation.exact_match": 0.5}
        for of in asked.rounds
    ]
    asked = replace(asked, rounds=rounds)
    table = answers(asked)
    assert table is not None
    assert table.columns[0] == "after round 0"
    assert table.columns[-1] == f"after round {last:.0f}"
    assert (table.rows[0].texts[0], table.rows[0].texts[-1]) == ("answer 0", f"answer {last:.0f}")
    assert len(table.rows[1].texts[0]) == 160
    assert "answer 0" in text_of(asked)
    assert tiles(asked)["last validation exact match"] == "0.5000"

"""What is evaluated: cuts of the sites' data, scores from pooled counts, gains by site."""

import hashlib
import json
import math
import re
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import LABELS, WORDS, Command, succeed, weights_hash
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import balanced_accuracy_score, confusion_matrix, f1_score
from torch import nn
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from transformers.modeling_outputs import SequenceClassifierOutput

from scaling_fl.data.examples import Examples
from scaling_fl.data.holdout import HoldOut
from scaling_fl.training.metrics import Means
from scaling_fl.training.scores import evaluate_classes, summarise_classes

Rows = list[dict[str, Any]]


def make_examples(texts: Sequence[int]) -> Examples:
    """Return an example for each number, of one token; equal numbers are equal texts."""
    tokens = np.array(texts, np.int64)
    lengths = np.ones(len(texts), np.int64)
    return Examples({"input_ids": tokens}, np.arange(len(texts)), lengths, np.zeros(len(texts), int), {"input_ids": 0})


@given(
    texts=st.lists(st.integers(0, 12), min_size=1, max_size=40),
    test=st.none() | st.floats(0.01, 0.99),
    validation=st.none() | st.floats(0.01, 0.99),
    site=st.integers(0, 1000),
)
@settings(max_examples=200, deadline=None)
def test_a_cut_uses_each_example_once_keeps_equal_texts_together_and_leaves_one_to_train_on(
    texts: list[int], test: float | None, validation: float | None, site: int
) -> None:
    cut = HoldOut(test, validation, seed=5).cut(make_examples(texts), site, has_test=False)
    assert sorted(np.concatenate(list(cut.values())).tolist()) == list(range(len(texts)))
    found = [{texts[index] for index in part} for part in cut.values()]
    assert sum(map(len, found)) == len(set(texts))
    assert len(cut["train"])
    assert len(cut["test"]) <= math.ceil(Fraction(str(test or 0)) * len(texts))
    assert all(np.all(np.diff(part) > 0) for part in cut.values())


@pytest.mark.parametrize(
    ("num_texts", "fraction", "held"), [(100, 0.07, 7), (2500, 0.2, 500), (2, 0.2, 1), (1, 0.9, 0), (5, 0.99, 4)]
)
def test_a_fraction_of_different_texts_is_taken_as_written_and_rounded_up(
    num_texts: int, fraction: float, held: int
) -> None:
    examples = make_examples(range(num_texts))
    for name, hold_out in (("test", HoldOut(fraction)), ("validation", HoldOut(None, fraction))):
        assert len(hold_out.cut(examples, 0, has_test=False)[name]) == held


def test_a_site_of_two_texts_holds_one_out_whatever_their_order() -> None:
    for site in range(50):
        cut = HoldOut(0.2).cut(make_examples([7] * 9 + [8]), site, has_test=False)
        assert cut["test"].tolist() == [9], "the nine equal ones are more than a fifth"


def test_a_site_with_test_examples_keeps_its_training_data_whole() -> None:
    cut = HoldOut(0.5, 0.5).cut(make_examples(range(8)), 0, has_test=True)
    assert [len(cut[name]) for name in ("train", "validation", "test")] == [4, 4, 0]


def test_cuts_are_those_of_every_version_and_machine() -> None:
    hold_out = HoldOut(0.2, 0.1, max_train=50, max_test=15, seed=7)
    cuts = [hold_out.cut(make_examples(range(100)), site, has_test=False) for site in range(3)]
    assert [[len(part) for part in cut.values()] for cut in cuts] == [[50, 8, 15]] * 3
    assert len({tuple(cut["test"]) for cut in cuts}) == 3
    everything = repr([{name: part.tolist() for name, part in cut.items()} for cut in cuts])
    assert hashlib.sha256(everything.encode()).hexdigest()[:16] == "980efefeb661038f"


def test_samples_do_not_move_the_cut() -> None:
    examples = make_examples(range(60))
    whole = HoldOut(0.5, 0.2).cut(examples, 3, has_test=False)
    some = HoldOut(0.5, 0.2, max_train=7, max_test=9).cut(examples, 3, has_test=False)
    assert [len(some["train"]), len(some["test"])] == [7, 9]
    assert all(set(some[name]) <= set(whole[name]) for name in whole)


class Answers(nn.Module):
    """Answers each text with the class that is its first token."""

    def __init__(self, num_labels: int) -> None:
        super().__init__()
        self.num_labels, self.unused = num_labels, nn.Parameter(torch.zeros(1))

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor) -> SequenceClassifierOutput:
        logits = nn.functional.one_hot(input_ids[:, 0], self.num_labels).float()
        return SequenceClassifierOutput(loss=nn.functional.cross_entropy(logits, labels), logits=logits)


@given(
    st.lists(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), max_size=12), min_size=1, max_size=5).filter(
        lambda sites: any(sites)
    ),
    st.integers(5, 9),
)
@settings(max_examples=100, deadline=None)
def test_scores_are_those_of_scikit_learn_on_the_pooled_answers(
    sites: list[list[tuple[int, int]]], classes: int
) -> None:
    model = Answers(classes)  # some of which no example and no answer has

    def evaluate_site(pairs: list[tuple[int, int]]) -> Means:
        batches = [torch.tensor(pairs[start : start + 5]) for start in range(0, len(pairs), 5)]
        return Means.of(evaluate_classes(model, ({"input_ids": of[:, 1:], "labels": of[:, 0]} for of in batches)))

    scores = summarise_classes(Means().merge(map(evaluate_site, sites)).totals())
    labels, answers = np.array([pair for pairs in sites for pair in pairs]).T
    assert scores["accuracy"] == pytest.approx(np.mean(labels == answers))
    assert scores["macro_f1"] == pytest.approx(f1_score(labels, answers, average="macro", zero_division=0))
    assert scores["balanced_accuracy"] == pytest.approx(balanced_accuracy_score(labels, answers))
    matrix = np.zeros((classes, classes), int)
    for label, answer, count in scores["confusion"]:
        matrix[label, answer] = count
    assert np.array_equal(matrix, confusion_matrix(labels, answers, labels=range(classes)))


def rounds_of(run: Path) -> Rows:
    return [json.loads(line) for line in (run / "rounds.jsonl").read_text().splitlines()]


def scores_of(run: Path) -> Rows:
    """Return the metrics of a run that depend on nothing but its settings."""
    of_machine = re.compile(r"time|speed|comm|rank|site\.rank|sites?\.(seconds|memory_mb)")
    return [{name: line[name] for name in line if not of_machine.match(name)} for line in rounds_of(run)]


HELD_OUT = {"num_sites": 5, "site_test_fraction": 0.3, "validation_fraction": 0.2, "evaluate_local": True}


def test_scores_of_sites_do_not_depend_on_ranks_and_batches_and_add_up(command: Command, tmp_path: Path) -> None:
    outputs = [
        succeed(command(ranks=ranks, val_batch_size=batch, **HELD_OUT)) for ranks, batch in ((1, 512), (2, 512), (1, 1))
    ]
    assert len(set(map(weights_hash, outputs))) == 1
    one, two, small = (scores_of(tmp_path / "runs" / number) for number in "123")
    assert one == two
    assert [line["site.test_accuracy"] for line in one] == [line["site.test_accuracy"] for line in small]
    last = one[-1]
    counts = last["site.test_examples"]
    assert set(counts.values()) == {4}, "30 % of 12 or 13 examples, rounded up"
    accuracies = last["site.test_accuracy"]
    pooled = sum(accuracies[site] * counts[site] for site in counts) / sum(counts.values())
    assert last["sites.test_accuracy.weighted"] == pytest.approx(pooled)
    assert last["sites.test_accuracy.worst"] == min(accuracies.values())
    assert last["sites.test_loss.worst"] == max(last["site.test_loss"].values())
    assert last["site.gain"] == {
        site: pytest.approx(accuracies[site] - own) for site, own in last["site.local_accuracy"].items()
    }
    assert last["sites.gain.worst"] == min(last["site.gain"].values())
    assert len(last["site.gain"]) == 5
    assert sum(count for _, _, count in last["test.confusion"]) == 31
    assert sum(count for _, _, count in last["validation.confusion"]) == 10, "20 % of 8 or 9 examples, rounded up"
    assert not any("local" in name for name in one[0]), "no site has trained before round 1"


def test_evaluation_changes_no_bit_of_the_weights(command: Command, tmp_path: Path) -> None:
    """Without held-out examples, the same data is trained on however the evaluation is set."""
    variants: list[dict[str, Any]] = [
        {},
        {"evaluate_every": 2},
        {"evaluate_every": 100, "max_test_examples": 7},
        {"max_test_examples_per_site": 3, "evaluate_local": True, "central_evaluation": False, "evaluate_every": 2},
    ]
    hashes = [weights_hash(succeed(command(**{"num_rounds": 3, **variant}))) for variant in variants]
    assert len(set(hashes)) == 1
    evaluated = [[("validation.loss" in line) for line in rounds_of(tmp_path / "runs" / str(run))] for run in (2, 3)]
    assert evaluated == [[True, False, True, True], [True, False, False, True]]
    lines = rounds_of(tmp_path / "runs" / "4")
    assert [any("local" in name for name in line) for line in lines] == [False, False, True, True]
    own = lines[-1]
    assert set(own["site.test_examples"].values()) == {3}
    assert own["validation.accuracy"] == own["sites.test_accuracy.weighted"]
    assert len(own["site.gain"]) == 4


def test_validation_examples_alone_leave_the_common_test_set_for_the_test(command: Command, tmp_path: Path) -> None:
    output = succeed(command(validation_fraction=0.2, num_rounds=0))
    (line,) = rounds_of(tmp_path / "runs" / "1")
    assert sum(count for _, _, count in line["test.confusion"]) == 31
    assert sum(count for _, _, count in line["validation.confusion"]) == 13, "of sites with 15 or 16 examples"
    assert sum(line["site.validation_examples"].values()) == 13
    assert not [name for name in line if name.startswith(("site.test", "sites"))], "no site has test examples"
    assert re.search(r"best .*, after round 0, by validation.loss .* on the sites' validation examples\n", output)


def test_only_sites_that_are_evaluated_are_evaluated_before_averaging(command: Command, tmp_path: Path) -> None:
    succeed(command(site_test_fraction=0.2, evaluate_local=True, evaluation_sites=[1, 3], num_rounds=1))
    last = rounds_of(tmp_path / "runs" / "1")[-1]
    assert list(last["site.local_loss"]) == list(last["site.gain"]) == list(last["site.test_loss"]) == ["1", "3"]


def test_local_evaluation_is_that_of_the_sites_own_model(command: Command, tmp_path: Path) -> None:
    """A federation of one site has the model of its site as its global model."""
    succeed(command(num_sites=1, site_test_fraction=0.4, evaluate_local=True, central_evaluation=False))
    for line in rounds_of(tmp_path / "runs" / "1")[1:]:
        assert line["site.local_loss"] == line["site.test_loss"]
        assert line["site.gain"] == {"0": 0.0}


def test_recorded_confusions_are_those_of_the_saved_model(
    command: Command, corpus: tuple[Path, Path], tmp_path: Path
) -> None:
    succeed(command(num_rounds=3, val_batch_size=4))
    last, folder = rounds_of(tmp_path / "runs" / "1")[-1], tmp_path / "runs" / "1" / "model"
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    rows = [line.split(",") for line in corpus[1].read_text().splitlines()[1:]]
    with torch.no_grad():
        logits = model(**tokenizer([text for text, _ in rows], return_tensors="pt", padding=True)).logits
    labels = [model.config.label2id[label] for _, label in rows]
    expected = confusion_matrix(labels, logits.argmax(-1).numpy(), labels=range(len(LABELS)))
    found = {(label, answer): count for label, answer, count in last["validation.confusion"]}
    assert found == {(i, j): int(n) for (i, j), n in np.ndenumerate(expected) if n}


@pytest.mark.long
def test_files_of_sites_are_cut_unless_they_have_a_test_file(
    command: Command, corpus: tuple[Path, Path], tmp_path: Path
) -> None:
    train, test = corpus
    lines = train.read_text().splitlines()
    for number in range(2):
        (tmp_path / f"{number}.csv").write_text("\n".join([lines[0], *lines[1 + number :: 2]]) + "\n")
    given = {"train_path": None, "test_path": None, "site_ids": [0, 0], "site_test_fraction": 0.5}
    given |= {"max_test_examples_per_site": 20}
    paths = [["0.csv", str(test)], "1.csv"]
    outputs = [succeed(command(ranks=ranks, site_paths=paths, **given)) for ranks in (1, 2)]
    assert len(set(map(weights_hash, outputs))) == 1
    one, two = (scores_of(tmp_path / "runs" / number) for number in "12")
    assert one == two
    assert sorted(one[0]["site.test_examples"].values()) == [15, 20]
    assert sorted(one[1]["site.examples"].values()) == [15, 31]
    alone = succeed(command(site_paths=["0.csv", "1.csv"], **given))
    assert weights_hash(alone) != weights_hash(outputs[0])


def test_a_sample_of_each_site_is_trained_on_without_a_test_file(command: Command, tmp_path: Path) -> None:
    settings = {"max_train_examples_per_site": 5, "site_test_fraction": 0.2, "test_path": None}
    output = succeed(command(**settings))
    assert "text: 20 examples to train on\n" in output
    assert "on 13 test examples of 4 sites; validation.* is that of the sites' test examples" in output
    assert set(rounds_of(tmp_path / "runs" / "1")[1]["site.examples"].values()) == {5}


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"central_evaluation": False}, "central_evaluation: expected True, as without site_test_fraction, "),
        ({"evaluate_local": True}, "evaluate_local: expected sites with test examples, got none. Set "),
        ({"site_test_fraction": 1}, "site_test_fraction: expected a fraction > 0 and < 1, such as 0.2 or None, got 1"),
        (
            {"num_sites": 61, "site_test_fraction": 0.5},
            "site_test_fraction: expected a site with at least two different texts or groups of rows, got none",
        ),
        ({"evaluation_sites": [1]}, "evaluation_sites: expected sites with test or validation examples, got [1]"),
        ({"test_path": None}, "test_path: expected a path or URL for task_name='text', got None"),
        (
            {"max_test_examples": 5, "central_evaluation": False, "site_test_fraction": 0.2},
            "max_test_examples: expected None, as central_evaluation=False leaves out the common test set, got 5",
        ),
        (
            {"max_test_examples_per_site": 5, "validation_fraction": 0.2, "test_path": None},
            "test_path: expected a path or URL for task_name='text', got None",
        ),
        (
            {"train_path": "few.csv", "partition": "natural", "site_column": "who", "site_test_fraction": 0.2}
            | {"validation_fraction": 0.1, "evaluation_sites": [0], "site_ids": [0]},
            "evaluation_sites: expected a site with validation examples, got [0]",
        ),
        ({"best_metric": None, "early_stopping_rounds": 1}, "early_stopping_rounds: expected None, as best_metric"),
        ({"best_metric": "validation.f1"}, "best_metric: expected one of validation.loss, "),
    ],
)
def test_what_cannot_be_evaluated_is_refused_before_training(
    command: Command, given: dict[str, Any], sentence: str, tmp_path: Path
) -> None:
    texts = ["goal,sport,a", "chip,tech,a", *(f"{word},food,b" for word in WORDS)]
    (tmp_path / "few.csv").write_text("\n".join(["text,label,who", *texts]))
    status, output = command("--unobserved", **given)
    assert status == 1
    assert f"error: {sentence}" in output
    assert "round |" not in output

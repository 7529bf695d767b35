"""Cohorts: who takes part in a round, in which of their batches, where, and with what weight."""

import json
import math
import random
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import LABELS, WORDS, Command, make_examples, refusal, succeed, weights_hash
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from scaling_fl.data.sites import SiteData
from scaling_fl.distributed.placement import place_sites
from scaling_fl.distributed.world import world
from scaling_fl.experiment.contradictions import find_contradictions
from scaling_fl.experiment.schedule import make_schedule
from scaling_fl.experiment.settings import Settings
from scaling_fl.federation.cohorts import Cohort, Cohorts, count_sites, share_out
from scaling_fl.federation.global_model import GlobalModel
from scaling_fl.federation.local_training import LocalTraining
from scaling_fl.federation.round import Federation
from scaling_fl.federation.site import Site
from scaling_fl.federation.strategies import make_strategy
from scaling_fl.training.loop import stop_after

SITES = {"num_sites": 10, "sites_per_round": 4, "site_ids": [0, 0]}


def test_cohorts_are_the_same_on_every_platform_and_for_any_order_of_names() -> None:
    expected = [[1, 12, 13], [14, 15, 16], [1, 15, 16]]
    for order in (range(20), reversed(range(20)), {*range(20)}):
        random.seed(3)
        torch.manual_seed(3)
        cohorts = Cohorts(list(order), 3, 7)
        assert [cohorts.of(round_) for round_ in (1, 2, 3)] == expected


def test_every_site_is_sampled_equally_often_and_each_seed_and_round_has_a_sample_of_its_own() -> None:
    cohorts = Cohorts(range(50), 5, seed=1)
    samples = [cohorts.of(round_) for round_ in range(1, 2_001)]
    assert all(len(set(sample)) == 5 and sample == sorted(sample) for sample in samples)
    counts = Counter(site for sample in samples for site in sample)
    statistic = sum((counts[site] - 200) ** 2 / 200 for site in range(50)) * 49 / 45  # without replacement
    assert statistic < 85.4, "chi-squared of 49 degrees of freedom, 0.1 %"
    assert len(set(map(tuple, samples))) > 1_990
    assert Cohorts(range(50), 5, seed=2).of(1) != samples[0]


@pytest.mark.parametrize(
    ("sites_per_round", "num_eligible", "min_sites", "expected"),
    [
        *((None, 7, 1, 7), (3, 7, 1, 3), (7, 7, 7, 7), (1, 1, 1, 1), (1.0, 7, 1, 7), (0.5, 7, 1, 3), (0.1, 7, 1, 1)),
        *((0.1, 7, 2, 2), (0.01, 7, 0, 1), (0.29, 100, 1, 29), (0.1, 30, 1, 3), (0.7, 10, 1, 7), (1e-9, 5, 5, 5)),
    ],
)
def test_a_fraction_is_rounded_down_to_at_least_min_sites(
    sites_per_round: float | None, num_eligible: int, min_sites: int, expected: int
) -> None:
    assert count_sites(sites_per_round, num_eligible, min_sites) == expected


def test_too_few_sites_are_refused() -> None:
    assert refusal(lambda: count_sites(8, 7, 1)) == (
        "sites_per_round: expected at most 7, the number of eligible sites, got 8"
    )
    assert refusal(lambda: count_sites(0.5, 7, 8)) == (
        "min_sites: expected at most 7, the number of eligible sites, got 8"
    )
    assert refusal(lambda: count_sites(3, 7, 4)) == "min_sites: expected at most sites_per_round=3, got 4"


def test_what_makes_no_cohort_is_refused() -> None:
    assert refusal(lambda: Cohorts([1, 1, 2], 2, 1)) == "eligible: expected each site once, got [1, 1, 2]"
    for num_sites in (0, 3):
        sentence = refusal(lambda num_sites=num_sites: Cohorts([1, 2], num_sites, 1))
        assert sentence == f"num_sites: expected 1 to 2, the number of eligible sites, got {num_sites}"
    sentence = refusal(lambda: moved(lambda round_: make_sites(1), weight_by="example"))
    assert sentence == "weight_by: expected one of examples, tokens, sites, got 'example'"


def test_earlier_rounds_of_a_site_are_counted_forwards_and_after_a_resume() -> None:
    cohorts = Cohorts(range(9), 2, seed=5)
    by_hand = {round_: sum(3 in cohorts.of(before) for before in range(1, round_)) for round_ in range(1, 40)}
    assert by_hand[39] > 3
    assert {round_: cohorts.count_rounds_before(3, round_) for round_ in by_hand} == by_hand
    assert cohorts.count_rounds_before(3, 20) == by_hand[20], "backwards"
    assert Cohorts(range(9), 2, seed=5).count_rounds_before(3, 39) == by_hand[39]
    assert Cohorts(range(9), 9, seed=5).count_rounds_before(3, 39) == 38


@given(st.lists(st.integers(0, 100), max_size=40), st.integers(1, 9))
def test_work_is_shared_out_to_at_most_four_thirds_of_the_least_longest(work: list[int], num_places: int) -> None:
    places = share_out(dict(enumerate(work)), num_places)
    assert places.keys() == set(range(len(work)))
    loads = Counter(dict.fromkeys(range(num_places), 0))
    for site, place in places.items():
        loads[place] += work[site]
    largest = sorted(work, reverse=True)
    bound = max([math.ceil(sum(work) / num_places), *largest[:1]])
    if len(work) > num_places:
        bound = max(bound, largest[num_places - 1] + largest[num_places])
    assert max(loads.values()) <= Fraction(4, 3) * bound + 1e-9 or max(loads.values()) <= bound + largest[0]
    assert len(loads) == num_places


def move(model: nn.Module, site: Site, round_: int) -> Mapping[str, Any]:
    """Move the only weight by the site's number, and fail where the data says so."""
    with torch.no_grad():
        next(model.parameters()).add_(float(site.number))
    if site.data == "fails":
        raise RuntimeError("no disk")
    return {"num_examples": site.num_examples}


def moved(
    sites: Callable[[int], list[Site]], num_rounds: int = 1, **options: Any
) -> tuple[list[dict[str, Any]], float]:
    """Return the metrics of some rounds, and the weight, which is 0 at first."""
    with world():
        model = nn.Linear(1, 1, bias=False)
        nn.init.zeros_(model.weight)
        topology = place_sites([0])
        server = GlobalModel(model, make_strategy(options.pop("strategy", "fedavg")), device=topology.devices[0])
        federation = Federation(topology, sites, model, server, train_site=options.pop("train", move), **options)
        metrics = []
        for round_ in range(1, num_rounds + 1):
            metrics.append(federation.train(round_))
            server.step()
        return metrics, server.weights.item()


def make_sites(*sizes: int, fails: tuple[int, ...] = ()) -> list[Site]:
    """Return sites 1, 2, ... on the CPU."""
    cpu = torch.device("cpu")
    return [
        Site(number, cpu, size, "fails" if number in fails else None, f"name {number}")
        for number, size in enumerate(sizes, 1)
    ]


def test_the_weights_are_those_of_the_cohort() -> None:
    by_round = {1: make_sites(10, 30), 2: make_sites(5, 5, 90)[2:], 3: make_sites(1, 2, 3)}
    metrics, weight = moved(lambda round_: by_round[round_], num_rounds=3)
    assert weight == pytest.approx((10 + 2 * 30) / 40 + 3 + (1 + 4 + 9) / 6)
    assert [of["sites.cohort"] for of in metrics] == [2, 1, 3]
    assert metrics[1]["site.rank"] == {3: 0}
    assert metrics[1]["site.name"] == {3: "name 3"}
    assert metrics[1]["rank.idle_s"] == {0: 0.0}


def test_a_site_that_stops_early_weighs_the_same_part_of_its_tokens() -> None:
    sites = [
        Site(0, torch.device("cpu"), num_examples=10, num_tokens=30),
        Site(1, torch.device("cpu"), num_examples=5, num_tokens=10),
    ]
    with world():
        by_tokens, by_examples = Cohort(sites, "tokens"), Cohort(sites, "examples")
        without = [replace(site, num_tokens=0) for site in sites]
        assert "expected sites with tokens that their model learns" in refusal(lambda: Cohort(without, "tokens"))
    assert [by_tokens.weigh(sites[0], used) for used in (10, 5)] == [Fraction(30, 40), Fraction(15, 40)]
    assert [by_examples.weigh(sites[0], used) for used in (10, 5)] == [Fraction(10, 15), Fraction(5, 15)]


def test_sites_may_weigh_the_same() -> None:
    sites = make_sites(10, 30, 1, fails=(3,))
    _, weight = moved(lambda round_: sites, weight_by="sites", min_sites=2)
    assert weight == pytest.approx((1 + 2) / 2, abs=1e-6)


@pytest.mark.parametrize("strategy", ["fedavg", "fedavgm", "fedyogi", "diloco"])
def test_a_round_of_which_no_site_is_left_is_recorded_and_moves_nothing(strategy: str) -> None:
    by_round = {1: make_sites(10, 30), 2: make_sites(5, 5, fails=(1, 2)), 3: make_sites(5, 5)}
    metrics, weight = moved(lambda round_: by_round[round_], 3, strategy=strategy, min_sites=0)
    del by_round[2]
    without = moved(lambda round_: by_round[round_ if round_ == 1 else 3], 2, strategy=strategy, min_sites=0)[1]
    assert weight == without
    assert metrics[1]["sites.cohort"] == metrics[1]["sites.failed"] == 2
    assert metrics[1]["site.examples"] == {}


def test_min_sites_counts_the_cohort() -> None:
    sentence = refusal(lambda: moved(lambda round_: make_sites(1, 1, 1, fails=(2,)), min_sites=3))
    assert sentence == (
        "min_sites: expected at least 3 sites left in round 1, got 2 of 3: site 2 (name 2) failed in round 1 with "
        "RuntimeError: no disk"
    )


def batches_of_steps(data: Any, num_rounds: int, steps: int) -> list[list[int]]:
    """Return the labels of the batches of each round of a site that trains for a number of steps."""
    seen: list[list[int]] = []
    training = LocalTraining(
        lambda weights: torch.optim.SGD(weights, lr=0.0),
        lambda site, seed, start: data.shuffled_batches(3, seed, start),
        lambda output, batch, means: seen[-1].extend(batch["labels"].tolist()),
        seed=4,
    )

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(1))

        def forward(self, **batch: Any) -> Any:
            return type("Output", (), {"loss": self.weight.sum()})

    for round_ in range(num_rounds):
        seen.append([])
        first = round_ * steps
        start = divmod(first, 4)
        site = Site(2, torch.device("cpu"), 99, settings={"local_steps": steps}, start=start)
        assert training(Model(), site, round_ + 7)["num_examples"] == len(seen[-1])
    return seen


def test_steps_go_on_in_the_epoch_where_the_last_round_stopped() -> None:
    data = make_examples(10)
    data = type(data)(**{**vars(data), "labels": np.arange(10)})
    rounds = batches_of_steps(data, num_rounds=8, steps=3)
    stream = [label for of_round in rounds for label in of_round]
    assert [len(of_round) for of_round in rounds] == [9, 7, 7, 7, 9, 7, 7, 7]
    epochs = [stream[start : start + 10] for start in range(0, len(stream), 10)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs), "each example once in an epoch"
    assert len(set(map(tuple, epochs))) == len(epochs), "each epoch has an order of its own"
    assert [label for of_round in batches_of_steps(data, 4, 6) for label in of_round] == stream


def test_the_schedule_counts_the_steps_of_the_rounds_before() -> None:
    settings = Settings(site_ids=[0, 0], num_sites=6, sites_per_round=2, local_steps=2, batch_size=4)
    examples, seen = make_examples(10), Counter[int]()
    with world():
        topology = place_sites([0, 0], 6)
        sizes, train = [examples.size(3)] * 6, dict.fromkeys(range(6), examples)
        schedule = make_schedule(settings, SiteData((), train, sizes, {}), topology)
        for round_ in range(1, 20):
            for site in schedule.train(round_):
                first = 2 * seen[site.number]
                assert site.start == divmod(first, 3)
                assert site.num_examples == sum((4, 4, 2)[step % 3] for step in (first, first + 1))
                seen[site.number] += 1
    assert len(seen) == 6


def test_a_deadline_stops_at_the_end_of_a_batch_and_after_one_at_least(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("scaling_fl.training.loop.time.monotonic", lambda: now[0])
    cpu = torch.device("cpu")

    def count(seconds: float | None) -> int:
        number = 0
        for _ in stop_after(seconds, cpu, [{}] * 10):
            number += 1
            now[0] += 1.0
        return number

    assert [count(seconds) for seconds in (None, 0.5, 3.0, 3.5, 99)] == [10, 1, 3, 4, 10]


def run(command: Command, small_run: dict[str, object], ranks: int = 1, **settings: object) -> str:
    """Train with the command, and return what it printed."""
    return succeed(command(**small_run | {"num_rounds": 3} | SITES | settings, ranks=ranks))


@pytest.mark.long
@pytest.mark.parametrize("how", [{"local_steps": 3, "weight_by": "sites"}, {}], ids=["steps", "epochs"])
def test_a_sampled_run_has_the_same_bits_on_any_ranks_and_after_a_stop(
    how: dict[str, object], command: Command, small_run: dict[str, object], tmp_path: Path
) -> None:
    whole = run(command, small_run, **how)
    assert "cohorts   4 of 10 sites in each of 3 rounds" in whole
    assert "sites of 10" in whole
    folder = {"checkpoints_dir": tmp_path / "checkpoints"}
    first = run(command, small_run, ranks=2, num_rounds=1, **how, **folder)
    resumed = run(command, small_run, ranks=3, **how, **folder)
    assert weights_hash(first) != weights_hash(whole) == weights_hash(resumed)
    assert weights_hash(run(command, small_run, seed=2, **how)) != weights_hash(whole)


def test_the_record_says_who_took_part_and_where(
    command: Command, small_run: dict[str, object], tmp_path: Path
) -> None:
    output = run(command, small_run, ranks=2, sites_per_round=0.55, eligible_sites=[9, 1, 3, 5, 7, 8, 2, 0])
    assert "4 of 8 eligible sites (sites_per_round 0.55, min_sites 1) in each of 3 rounds, for 1 epoch" in output
    (folder,) = tmp_path.glob("runs/[0-9]*")
    rounds = [json.loads(line) for line in (folder / "rounds.jsonl").read_text().splitlines()]
    cohorts = Cohorts([0, 1, 2, 3, 5, 7, 8, 9], 4, seed=1)
    for round_, metrics in enumerate(rounds[1:], 1):
        assert list(map(int, metrics["site.rank"])) == cohorts.of(round_)
        assert metrics["site.examples"].keys() == metrics["site.rank"].keys()
        assert Counter(metrics["site.rank"].values()) == {0: 2, 1: 2}, "about as many examples each"
        assert min(metrics["rank.idle_s"].values()) == 0 < max(metrics["rank.idle_s"].values())


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"sites_per_round": 11}, "sites_per_round: expected at most 10, the number of eligible sites, got 11"),
        ({"sites_per_round": 1.5}, "sites_per_round: expected a whole number >= 1, or a fraction > 0 and <= 1.0 or"),
        ({"eligible_sites": [3, 10]}, "eligible_sites: expected numbers of sites from 0 to 9, got 10"),
        ({"eligible_sites": ["a", 1, 2, 3]}, "eligible_sites: expected numbers of sites from 0 to 9, got 'a'"),
        ({"eligible_sites": [1, 2, 3]}, "sites_per_round: expected at most 3, the number of eligible sites, got 4"),
        ({"min_sites": 5}, "min_sites: expected at most sites_per_round=4, got 5"),
        ({"evaluation_sites": [0]}, "evaluation_sites: expected sites with test or validation examples, got [0]"),
        ({"site_deadline_s": 1, "trainer": "mine"}, "trainer: expected one of default"),
        (
            {"local_steps": 3, "site_settings": {1: {"num_local_epochs": 2}}},
            "site_settings[1]['num_local_epochs']: expected none, as the site trains for local_steps, got 2",
        ),
    ],
)
def test_what_cannot_be_is_refused_by_plan(
    settings: dict[str, object], sentence: str, command: Command, small_run: dict[str, object]
) -> None:
    status, output = command("plan", **small_run | SITES | settings)
    assert status == 1
    assert f"error: {sentence}" in output


def test_a_plan_says_that_sites_have_no_fixed_place(command: Command, small_run: dict[str, object]) -> None:
    output = succeed(command("plan", **small_run | SITES | {"local_steps": 5}))
    assert "cohorts   4 of 10 sites in each of 2 rounds, for 5 steps" in output
    assert "   9 |  any |    any |        6 |" in output
    assert "|             5 |" in output


def test_a_deadline_leaves_sites_with_what_they_have_trained_on(
    command: Command, small_run: dict[str, object], tmp_path: Path
) -> None:
    run(command, small_run, sites_per_round=None, num_rounds=1, num_local_epochs=50, site_deadline_s=1e-4)
    (folder,) = tmp_path.glob("runs/[0-9]*")
    metrics = json.loads((folder / "rounds.jsonl").read_text().splitlines()[1])
    assert set(metrics["site.examples"].values()) == {4}, "one batch each"
    assert metrics["speed.examples_per_s"] * metrics["time.train_s"] == pytest.approx(4 * 10)


@pytest.fixture
def with_files(tmp_path: Path) -> dict[str, object]:
    """Settings of five sites with a training file each, four of them with a test file."""
    words, random = np.array(WORDS), np.random.default_rng(1)
    paths = []
    for site in range(5):
        files = [tmp_path / f"{site}-{split}.csv" for split in ("train", "test")][: 2 - (site == 4)]
        for size, file in zip((7 + site, 3 + site), files, strict=False):
            rows = [f"{' '.join(random.choice(words, 5))},{LABELS[row % 3]}" for row in range(size)]
            file.write_text("\n".join(["text,label", *rows]) + "\n")
        paths.append(list(map(str, files)))
    sites = {"num_sites": None, "site_ids": [0] * 5, "sites_per_round": 2, "train_path": None, "test_path": None}
    return sites | {"site_paths": json.dumps(paths)}


def judged(tmp_path: Path) -> list[dict[str, int]]:
    """Return for each round the sites that were evaluated, and on how many examples, and forget the run."""
    (folder,) = tmp_path.glob("runs/[0-9]*")
    rounds = [json.loads(line) for line in (folder / "rounds.jsonl").read_text().splitlines()]
    folder.rename(tmp_path / f"done-{len(list(tmp_path.iterdir()))}")
    return [metrics["site.test_examples"] for metrics in rounds]


def test_all_sites_with_test_files_are_evaluated_or_those_that_are_named(
    command: Command, small_run: dict[str, object], with_files: dict[str, object], tmp_path: Path
) -> None:
    whole = run(command, small_run, **with_files)
    everyone = judged(tmp_path)
    assert everyone == [everyone[0]] * 4
    assert sorted(everyone[0].values()) == [3, 4, 5, 6]
    site = next(iter(everyone[0]))
    named = run(command, small_run, ranks=2, evaluation_sites=[int(site)], **with_files)
    assert judged(tmp_path) == [{site: everyone[0][site]}] * 4
    assert weights_hash(named) == weights_hash(whole), "evaluation changes nothing"


@pytest.mark.long
def test_of_many_sites_those_of_the_round_are_evaluated(
    command: Command,
    small_run: dict[str, object],
    with_files: dict[str, object],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("scaling_fl.experiment.schedule.MANY_SITES", 4)
    output = run(command, small_run, num_rounds=5, ranks=2, **with_files)
    cohorts, found = Cohorts(range(5), 2, seed=1), judged(tmp_path)
    left_out = [{*cohorts.of(max(round_, 1))} - {*map(int, of_round)} for round_, of_round in enumerate(found)]
    assert len(set.union(*left_out)) == 1, "the site without a test file"
    assert all(map(len, found))
    assert "of rounds that were evaluated on different sites" in output
    (without,) = set.union(*left_out)
    output = command("plan", **small_run | SITES | with_files | {"evaluation_sites": [without]})[1]
    assert (
        f"error: evaluation_sites: expected sites with test or validation examples, got [{without}], which have none"
        in output
    )
    alone = {"sites_per_round": 1, "eligible_sites": [without], "min_sites": 1}
    run(command, small_run, **with_files | alone)
    assert all(map(len, judged(tmp_path))), "others are evaluated"


def test_a_trainer_of_a_plugin_knows_neither_steps_nor_deadlines() -> None:
    own = {3: {"local_steps": None, "num_local_epochs": 2}}
    assert find_contradictions(Settings(local_steps=3, site_settings=own)) == []
    assert find_contradictions(Settings(trainer="mine", site_settings={3: {"local_steps": 2}})) == [
        "local_steps: expected None, as trainer='mine' does not know it, got 2"
    ]
    assert find_contradictions(Settings(trainer="mine", site_deadline_s=0.5)) == [
        "site_deadline_s: expected None, as trainer='mine' does not know it, got 0.5"
    ]


def test_before_the_first_round_its_sites_are_evaluated() -> None:
    seen: list[tuple[int, int]] = []

    def evaluate_site(model: nn.Module, site: Site, round_: int) -> Mapping[str, Any]:
        seen.append((round_, site.number))
        return {"num_examples": 1, "loss": 0.0}

    by_round = {1: make_sites(1, 1)[1:], 2: make_sites(1)}
    with world():
        federation = Federation(
            place_sites([0]),
            lambda round_: by_round[round_],
            nn.Linear(1, 1),
            train_site=move,
            evaluate_site=evaluate_site,
        )
        for round_ in range(3):
            federation.evaluate(round_)
    assert seen == [(0, 2), (1, 2), (2, 1)]


def test_a_resumed_run_has_cohorts_of_the_same_size_and_from_the_same_sites(
    command: Command, small_run: dict[str, object], tmp_path: Path
) -> None:
    settings = {"sites_per_round": 0.1, "min_sites": 2, "checkpoints_dir": tmp_path / "checkpoints"}
    run(command, small_run, num_rounds=1, **settings)
    status, output = command(**small_run | SITES | settings | {"min_sites": 3, "eligible_sites": [0, 1, 2]})
    assert status == 1
    assert "number of sites in a round was 2 and is 3; eligible sites was 'all' and is [0, 1, 2]" in output


def test_a_number_that_two_sites_have_is_refused() -> None:
    sites = [Site(number, torch.device("cpu"), 4) for number in (0, 1, 1)]
    with world():
        message = refusal(lambda: Cohort(sites, "examples"))
    assert message == "sites: expected another number for each on all ranks, got two of number 1"

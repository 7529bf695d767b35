"""Single sites have a learning rate, a number of epochs and a batch size of their own."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import Command, refusal, succeed, weights_hash

from scaling_fl.command.experiment import configure
from scaling_fl.data.tasks import TASKS
from scaling_fl.data.tasks.task import Task
from scaling_fl.distributed.world import world
from scaling_fl.experiment.build import build, largest_training_batch
from scaling_fl.experiment.contradictions import find_contradictions
from scaling_fl.experiment.settings import FIELDS, Settings

SITES = {"site_ids": [0, 0, 0, 0]}  # of the corpus's 61 examples they have 16, 15, 15 and 15
OWN = {"learning_rate": 1e-3, "num_local_epochs": 2, "batch_size": 7}


@pytest.mark.long
def test_settings_of_all_sites_are_those_of_the_run(command: Command) -> None:
    of_all = weights_hash(succeed(command(**SITES | OWN | {"num_rounds": 1})))
    by_site = {site: dict(OWN) for site in range(4)}
    assert weights_hash(succeed(command(**SITES | {"num_rounds": 1}, site_settings=by_site, ranks=2))) == of_all


def test_one_site_differs_in_what_it_trains_and_in_the_record(command: Command, tmp_path: Path) -> None:
    given: dict[str, Any] = SITES | {"num_rounds": 1, "checkpoints_dir": "checkpoints"}
    by_site = {2: {"num_local_epochs": 3}, 0: {"batch_size": 7}}
    plan = succeed(command("plan", **given, site_settings=by_site))
    steps = [line.split("|")[5] for line in plan.partition("steps a round")[2].splitlines()[1:5]]
    assert list(map(int, steps)) == [3, 4, 3 * 4, 4]
    succeed(command(**given, site_settings=by_site))
    folder = tmp_path / "runs" / "1"
    recorded = json.loads((folder / "config.json").read_text())["site_settings"]
    assert recorded == {"0": {"batch_size": 7}, "2": {"num_local_epochs": 3}}
    metrics = json.loads((folder / "rounds.jsonl").read_text().splitlines()[-1])
    assert metrics["speed.examples_per_s"] * metrics["time.train_s"] == pytest.approx(61 + 2 * 15)
    tokens = np.array([site["tokens"] for site in json.loads((folder / "info.json").read_text())["sites"]])
    assert metrics["speed.tokens_per_s"] * metrics["time.train_s"] == pytest.approx(tokens @ [1, 1, 3, 1])
    assert metrics["site.examples"] == {"0": 16, "1": 15, "2": 15, "3": 15}
    assert "resumed   after round 1" in succeed(command(**given | {"num_rounds": 2}, site_settings=recorded))
    status, output = command(**given | {"num_rounds": 3}, site_settings={2: {"num_local_epochs": 3}})
    assert status == 1
    assert "where site_settings was {0: {'batch_size': 7}, 2: {'num_local_epochs': 3}} and is {2: {'num" in output


def test_the_largest_batch_and_the_bar_count_them(small_run: dict[str, Any]) -> None:
    own = {"batch_size": 9, "num_local_epochs": 3}
    settings = Settings(**{**small_run, **SITES, "site_settings": {3: own}})
    settings = replace(settings, train_path=str(settings.train_path), test_path=str(settings.test_path))
    with world():
        job = build(settings)
        batch = largest_training_batch(settings, job, job.topology.devices[0])
        assert batch is not None
        assert len(batch["labels"]) == 9
        assert sum(map(job.schedule.count_examples, range(4))) == 61 + 2 * 15
        beyond = replace(settings, site_settings={4: own, 1: own})
        assert refusal(lambda: build(beyond)) == "site_settings: expected numbers of sites from 0 to 3, got 4"


def test_all_ways_to_write_them_are_one() -> None:
    of_site = {"num_local_epochs": 1, "learning_rate": 0.5}
    ways = [{3: of_site, 1: {"batch_size": 2}}, {"1": {"batch_size": 2}, "3": dict(reversed(of_site.items())), 7: {}}]
    assert [repr(Settings(site_settings=way).site_settings) for way in ways] == [
        "{1: {'batch_size': 2}, 3: {'learning_rate': 0.5, 'num_local_epochs': 1}}"
    ] * 2
    assert [Settings(site_settings=none).site_settings for none in (None, {}, {"0": {}})] == [None] * 3


@pytest.mark.parametrize(
    "value",
    [[], [3], 3, {3: 4}, {-1: {}}, {"03": {}}, {"a": {}}, {1.0: {}}, {True: {}}, {3: {}, "3": {}}, {"³": {}}],
    ids=repr,
)
def test_other_forms_are_refused(value: Any) -> None:
    assert not FIELDS["site_settings"]["kind"].accepts(value)


def test_each_wrong_value_is_a_sentence() -> None:
    by_site = {0: {"seed": 1}, 2: {"learning_rate": "1e-5", "num_local_epochs": 0, "batch_size": 4}}
    assert find_contradictions(Settings(site_settings=by_site)) == [
        "site_settings[0]: expected one of learning_rate, num_local_epochs, local_steps, batch_size, "
        "gradient_accumulation, got 'seed'",
        "site_settings[2]['learning_rate']: expected a number > 0, got '1e-5'. To YAML this is a text: write 1.0e-5",
        "site_settings[2]['num_local_epochs']: expected a whole number >= 1, got 0",
    ]


def test_the_record_has_texts_as_keys_though_settings_have_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    """MongoDB takes no others."""
    monkeypatch.setitem(TASKS, "late", Task(defaults={"site_settings": {1: OWN}}))
    assert configure({"task_name": "late"})["site_settings"] == {"1": OWN}

"""The pictures of README and docs show what they say: see benchmarks/picture.py, partitions.py and zigzag.py."""

import json
from itertools import pairwise
from pathlib import Path

import partitions
import picture
import pytest
import zigzag
from PIL import Image

from scaling_fl import PARTITIONERS


@pytest.mark.long
@pytest.mark.usefixtures("warm")
def test_the_picture_is_of_four_runs_with_one_hash_of_which_one_was_killed(
    small_run: dict[str, object], tmp_path: Path
) -> None:
    settings = [f"{name}={value}" for name, value in {**small_run, "num_rounds": 8}.items()]
    sha256, runs = picture.run_all(tmp_path, settings)
    assert len(sha256) == 64
    assert len(runs) == len(picture.LINES)
    resumed = list(runs.values())[-1]
    statuses = [json.loads((run / "run.json").read_text())["status"] for run in (*runs.values(), resumed.parent / "1")]
    assert statuses == ["COMPLETED"] * 4 + ["RUNNING"]
    lines = [(run / "rounds.jsonl").read_text().splitlines() for run in runs.values()]
    accuracies = [[json.loads(line)["validation.accuracy"] for line in of_run] for of_run in lines]
    assert all(of_run == accuracies[0] for of_run in accuracies)
    assert len(accuracies[0]) == 9
    picture.draw(tmp_path / "picture.png", sha256, runs)
    with Image.open(tmp_path / "picture.png") as image:
        assert image.width == picture.SHOWN_WIDTH


def test_runs_with_other_weights_make_no_picture() -> None:
    assert picture.only(["a", "a"]) == "a"
    with pytest.raises(SystemExit, match="expected one SHA-256"):
        picture.only(["a", "a", "b"])


def test_every_partition_is_in_the_picture(tmp_path: Path) -> None:
    assert partitions.PANELS.keys() == PARTITIONERS.keys()
    partitions.draw(tmp_path / "partitions.png", seed=1)
    with Image.open(tmp_path / "partitions.png") as image:
        assert image.width == 1200


def test_the_loss_by_step_goes_back_to_the_start_only_if_sites_load_a_fixed_start(tmp_path: Path) -> None:
    losses = zigzag.compare(num_rounds=3, num_steps=8)
    start = losses["the global weights"][0][0]
    for before, after in pairwise(losses["the global weights"]):
        assert after[0] - before[-1] < (start - before[-1]) / 8
    for before, after in pairwise(losses["a fixed start"]):
        assert before[-1] < start - 0.2
        assert after[0] == pytest.approx(start, abs=0.1)
    zigzag.draw(tmp_path / "zigzag.png", losses)
    with Image.open(tmp_path / "zigzag.png") as image:
        assert image.width == picture.SHOWN_WIDTH

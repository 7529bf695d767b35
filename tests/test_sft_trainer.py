"""Sites train with trl's SFTTrainer, as examples/sft_trainer.py lets them, where trl is installed."""

import json
import os
import re
import runpy
import shutil
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("trl", reason="trl, whose SFTTrainer the example uses, is not installed")
pytest.importorskip("peft")

import torch
from helpers import ROOT, Command, succeed
from test_examples import state_of_process
from test_instruct import PAIRS, put_model, put_rows
from tiny_llm import make_llama

from scaling_fl import TRAINERS
from scaling_fl.distributed.collectives import rank
from scaling_fl.distributed.launch import launch
from scaling_fl.distributed.world import world
from scaling_fl.experiment.run import train_on_rank
from scaling_fl.experiment.settings import Settings
from scaling_fl.federation.site import Site
from scaling_fl.records.rounds import Record


@pytest.fixture
def given(tmp_path: Path) -> dict[str, Any]:
    """Settings of three sites that train LoRA, and in `plugins` a copy of the example."""
    shutil.copy(ROOT / "examples" / "sft_trainer.py", tmp_path)
    return {
        **{"plugins": ["sft_trainer"], "trainer": "sft", "task_name": "instruct", "template": "chat"},
        "model": put_model(tmp_path, make_llama(num_positions=256)),
        "train_path": put_rows(tmp_path, "train.jsonl", PAIRS * 3),
        "test_path": put_rows(tmp_path, "test.jsonl", PAIRS),
        **{"adapter": "lora", "lora_targets": ["q_proj", "v_proj"], "optimiser": "adamw", "learning_rate": 0.02},
        **{"site_ids": [0, 0, 0], "batch_size": 4, "max_seq_len": 128, "num_rounds": 2, "report": False},
        "best_metric": None,
    }


def train(folder: Path, given: dict[str, Any], **changes: Any) -> tuple[dict[str, torch.Tensor], list[dict[str, Any]]]:
    """Train in this process, and return the final weights and the metrics of each round."""
    folder.mkdir()
    with world():
        train_on_rank(Settings(**given | changes), Record(folder=str(folder)))
    rounds = [json.loads(line) for line in (folder / "rounds.jsonl").read_text().splitlines()]
    return torch.load(folder / "final_model.pt", weights_only=True), rounds


def train_beside_it(folder: Path, given: dict[str, Any]) -> None:
    """Train with `SFTTrainer`, and before and after it without."""
    os.chdir(folder)
    own = train(folder / "before", given, trainer="default", plugins=None)
    Settings(**given)  # imports trl
    files, state = set(folder.iterdir()), repr(state_of_process())
    train(folder / "run", given)
    assert set(folder.iterdir()) == files | {folder / "run"}
    assert repr(state_of_process()) == state
    weights, rounds = train(folder / "after", given, trainer="default", plugins=None)
    assert all(torch.equal(weights[name], own[0][name]) for name in own[0])
    assert [of["validation.loss"] for of in rounds] == [of["validation.loss"] for of in own[1]]


def test_a_site_that_trains_with_sft_trainer_leaves_nothing_in_the_process(
    given: dict[str, Any], tmp_path: Path
) -> None:
    launch(train_beside_it, tmp_path, given, num_ranks=1, fork=True)


def compare_with_the_built_in(folder: Path, given: dict[str, Any]) -> None:
    """A step has all rows, so that their order is of no account."""
    os.chdir(folder)
    trained = train(folder / "theirs", given)
    built_in = {"trainer": "default", "plugins": None, "max_grad_norm": 1.0, "weight_decay": 0}
    ours = train(folder / "ours", given | built_in)
    for name, weight in ours[0].items():
        torch.testing.assert_close(trained[0][name], weight, rtol=0, atol=1e-5)
    assert trained[1][-1]["train.loss"] == pytest.approx(ours[1][-1]["train.loss"], abs=1e-5)
    assert trained[1][-1]["validation.loss"] == pytest.approx(ours[1][-1]["validation.loss"], abs=1e-5)
    assert trained[1][-1]["validation.loss"] < 0.9 * trained[1][0]["validation.loss"]


@pytest.mark.parametrize(
    ("optimiser", "rate", "bits"),
    [
        ("sgd", 0.5, None),
        pytest.param("adamw", 0.02, None, marks=pytest.mark.long),
        pytest.param("adamw8bit", 0.02, 4, marks=pytest.mark.long),
    ],
)
def test_sft_trainer_takes_the_steps_of_the_built_in_training(
    given: dict[str, Any], tmp_path: Path, optimiser: str, rate: float, bits: int | None
) -> None:
    if bits is not None:
        pytest.importorskip("bitsandbytes")
    given |= {"batch_size": 64, "num_local_epochs": 4, "optimiser": optimiser, "learning_rate": rate, "quantise": bits}
    if optimiser == "sgd":
        given["site_settings"] = {1: {"learning_rate": 0.25, "num_local_epochs": 3}}
    launch(compare_with_the_built_in, tmp_path, given, num_ranks=1, fork=True)


def stop_and_go_on(folder: Path, given: dict[str, Any]) -> None:
    os.chdir(folder)
    with world():
        train_on_rank(Settings(**given | {"num_rounds": 1}))
        train_on_rank(Settings(**given), Record(folder=str(folder)) if rank() == 0 else None)


@pytest.mark.long
def test_the_command_trains_with_sft_trainer_and_neither_ranks_nor_a_stop_change_a_bit(
    given: dict[str, Any], command: Command, tmp_path: Path
) -> None:
    output = succeed(command(**given))
    assert not re.search(r"warn|\[transformers\]|it/s|\{", output, re.IGNORECASE), "trl says nothing"
    launch(stop_and_go_on, tmp_path, given | {"checkpoints_dir": "checkpoints"}, num_ranks=2, fork=True)
    whole, stopped = (torch.load(tmp_path / of / "final_model.pt", weights_only=True) for of in ("runs/1", "."))
    assert whole.keys() == stopped.keys()
    assert all(torch.equal(whole[name], stopped[name]) for name in whole)


def test_a_site_with_fedprox_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(TRAINERS, "sft", None)  # so that the test leaves nothing there
    train_site = runpy.run_path(str(ROOT / "examples" / "sft_trainer.py"))["train_site"]
    site = Site(0, torch.device("cpu"), 1, None, settings={"proximal_mu": 0.1})
    with pytest.raises(ValueError, match=r"proximal_mu: expected 0, as trainer='sft' does not know it, got 0\.1"):
        train_site(torch.nn.Linear(1, 1), site, 1)

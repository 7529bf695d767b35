"""Models and trainers of one's own: the examples, and what a guest such as `transformers.Trainer` leaves behind."""

import os
import random
import re
import subprocess
import sys
from collections.abc import Callable, Mapping
from copy import deepcopy
from functools import partial
from importlib.util import module_from_spec, spec_from_file_location
from types import ModuleType
from typing import Any

import numpy as np
import pytest

pytest.importorskip("accelerate")

import torch
import torch.distributed as dist
from accelerate import Accelerator, PartialState
from accelerate.state import AcceleratorState, GradientState
from helpers import ROOT, refusal
from torch import nn
from transformers import TrainingArguments
from transformers.trainer_utils import enable_full_determinism

from scaling_fl.distributed.launch import launch
from scaling_fl.distributed.world import world
from scaling_fl.experiment.plugins import import_plugins
from scaling_fl.federation.round import Federation
from scaling_fl.federation.site import Site


def load(name: str) -> ModuleType:
    """Import an example."""
    spec = spec_from_file_location(name, ROOT / "examples" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


OWN_MODEL, OWN_TRAINER = load("own_model"), load("own_trainer")
OWN_TRAINER.NUM_TEXTS = (20, 3, 11)  # takes less time


def play(federation: Federation, *rounds: int) -> list[Any]:
    """Return the metrics of some rounds, but for those of ranks, and the SHA-256 of the weights after them."""
    seen: list[Any] = []
    for round_ in rounds:
        metrics = federation.train(round_)
        federation.global_model.step()
        metrics |= federation.evaluate(round_)
        seen.append({key: value for key, value in metrics.items() if not re.search("seconds|memory|rank", key)})
    return [*seen, federation.global_model.sha256()]


def play_two_rounds(example: ModuleType) -> list[Any]:
    """Play them at once, and then with a stop between them."""
    with world():
        whole = play(example.make_federation(), 1, 2)
        stopped = example.make_federation()
        before = play(stopped, 1)
        resumed = example.make_federation()
        resumed.global_model.load_state_dict(deepcopy(stopped.global_model.state_dict()))
        assert [before[0], *play(resumed, 2)] == whole
        return whole


@pytest.mark.parametrize(
    "example", [OWN_MODEL, pytest.param(OWN_TRAINER, marks=pytest.mark.long)], ids=["model", "trainer"]
)
def test_neither_ranks_nor_a_stop_change_a_bit_of_an_example(
    example: ModuleType, capfd: pytest.CaptureFixture[str]
) -> None:
    alone = play_two_rounds(example)
    assert launch(play_two_rounds, example, num_ranks=2, fork=True) == [alone, alone]
    assert alone[0] != alone[1]
    assert capfd.readouterr() == ("", "")


def test_a_missing_trl_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setitem(sys.modules, "trl", None)
    sentence = refusal(lambda: import_plugins(["examples.sft_trainer"]))
    assert sentence.startswith("plugins: expected a module that can be imported, got 'examples.sft_trainer' (")
    assert 'Install them: pip install "trl>=1.16" "peft>=0.17"' in sentence
    assert "\n" not in sentence


def test_own_model_has_at_most_forty_lines() -> None:
    lines = (ROOT / "examples" / "own_model.py").read_text().splitlines()
    assert len([line for line in lines if line.strip()]) <= 40


@pytest.mark.long(seconds=25)
@pytest.mark.usefixtures("warm")
@pytest.mark.parametrize("name", ["own_model", "own_trainer"])
def test_an_example_runs_as_it_is_and_learns(name: str) -> None:
    done = subprocess.run(
        [sys.executable, ROOT / "examples" / f"{name}.py"], capture_output=True, text=True, cwd=ROOT, timeout=300
    )
    # transformers' Trainer imports bitsandbytes, where it is installed, which warns of what it would compute with.
    said = [line for line in done.stderr.splitlines() if "kernels-community" not in line]
    assert (done.returncode, said) == (0, [])
    first, second = (line.split(" ", 1) for line in done.stdout.splitlines())
    assert (first[0], second[0]) == ("1", "2")
    assert first[1] == second[1]
    assert float(first[1].split("]")[0].split()[-1]) > 0.8


RATE = 5e-3  # of own_trainer


def train_by_hand(model: nn.Module, site: Site, round_: int) -> Mapping[str, Any]:
    """Take the steps that `Trainer` takes: AdamW, a rate that falls to 0, gradients of norm 1 at most."""
    rows, seed = site.data["train"], 1000 * round_ + site.number
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    optimiser = torch.optim.AdamW(weights, lr=RATE, weight_decay=0.0, fused=True)
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))
    batches = [site.data["collate"]([rows[index] for index in part]) for part in order.split(8)]
    torch.manual_seed(seed)
    torch.empty((), dtype=torch.int64).random_()  # which the loader of `Trainer` draws
    total = 0.0
    for step, batch in enumerate(batches):
        for group in optimiser.param_groups:
            group["lr"] = RATE * (1 - step / len(batches))
        optimiser.zero_grad()
        loss = model(**batch).loss
        loss.backward()
        nn.utils.clip_grad_norm_(weights, 1.0)
        optimiser.step()
        total += loss.item()
    return {"num_examples": len(rows), "loss": (total, len(batches))}


def test_a_trainer_trains_as_a_plain_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    def play_here() -> tuple[list[Any], torch.Tensor]:
        with world():
            federation = OWN_TRAINER.make_federation()
            return play(federation, 1, 2), federation.global_model.weights

    (*history, sha256), weights = play_here()
    monkeypatch.setattr(OWN_TRAINER, "train_site", train_by_hand)
    (*by_hand, sha256_by_hand), weights_by_hand = play_here()
    torch.testing.assert_close(weights, weights_by_hand, rtol=0, atol=1e-7)
    assert sha256 == sha256_by_hand
    for metrics, other in zip(history, by_hand, strict=True):
        assert metrics["train.loss"] == pytest.approx(other["train.loss"], abs=1e-6)
        assert metrics["validation.accuracy"] == other["validation.accuracy"]


def state_of_process() -> list[Any]:
    """Return what a guest might change for others in the process."""
    flags = torch.get_num_threads(), torch.get_default_dtype(), torch.get_default_device(), torch.is_grad_enabled()
    modes = torch.get_deterministic_debug_mode(), torch.get_float32_matmul_precision(), torch.backends.fp32_precision
    cudnn = torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark
    generators = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    states = [dict(kind._shared_state) for kind in (PartialState, AcceleratorState, GradientState)]
    return [sorted(os.environ.items()), dist.group.WORLD, flags, modes, cudnn, generators, states]


def set_flags(model: nn.Module, site: Site, round_: int) -> Mapping[str, Any]:
    """Leave in the process what one can."""
    assert torch.get_default_dtype() == torch.float32, "another site has been here"
    os.environ["LEFT_BEHIND"] = "1"
    torch.set_num_threads(3)
    torch.set_default_dtype(torch.float64)
    torch.set_default_device("meta")
    torch.set_grad_enabled(False)
    torch.use_deterministic_algorithms(True)
    torch.set_float32_matmul_precision("medium")
    torch.backends.cudnn.deterministic = torch.backends.cudnn.benchmark = True
    return {"num_examples": 1}


def set_tf32(model: nn.Module, site: Site, round_: int) -> Mapping[str, Any]:
    """Set what `TrainingArguments(tf32=True)` sets where there is a GPU."""
    assert torch.backends.fp32_precision == "none", "another site has been here"
    torch.backends.fp32_precision = "tf32"
    return {"num_examples": 1}


def look_for_peers(model: nn.Module, site: Site, round_: int) -> Mapping[str, Any]:
    """Find one process, whichever way one looks."""
    assert Accelerator(cpu=True).num_processes == 1
    assert TrainingArguments(use_cpu=True).world_size == 1
    assert not dist.is_initialized()
    names = {*os.environ} & {"RANK", "WORLD_SIZE", "LOCAL_RANK", "ACCELERATE_USE_FSDP", "OMPI_COMM_WORLD_SIZE"}
    assert not names
    with pytest.raises(ValueError, match="process group has not been initialized"):
        dist.barrier()  # which would wait for ranks that have fewer sites
    return {"num_examples": 1}


def train_determined(model: nn.Module, site: Site, round_: int) -> Mapping[str, Any]:
    """Train in the way that makes all of torch deterministic."""
    enable_full_determinism(3)
    return OWN_TRAINER.train_site(model, site, round_)


def compare_process(train_site: Callable[..., Any]) -> bool:
    """Tell whether a round leaves the process as it was, with the accelerator that the caller has made."""
    with world():
        federation = OWN_TRAINER.make_federation()
        federation._train_site = train_site
        os.environ.update(ACCELERATE_USE_FSDP="true", OMPI_COMM_WORLD_SIZE="2")
        PartialState._shared_state["device"] = torch.device("cpu")  # as of a caller who uses accelerate
        before = state_of_process()
        federation.train(1)
        federation.evaluate(1)
        return repr(state_of_process()) == repr(before)


@pytest.mark.parametrize("train_site", [OWN_TRAINER.train_site, train_determined, set_flags, set_tf32, look_for_peers])
def test_a_site_leaves_the_process_as_it_was(train_site: Callable[..., Any]) -> None:
    assert launch(compare_process, train_site, num_ranks=2, fork=True) == [True, True]


def describe_model(model: nn.Module) -> list[Any]:
    """Return all attributes of a model's modules and of its configuration, but for weights and modes."""
    holders = [*model.modules(), model.config]
    found = [{name: value for name, value in vars(holder).items() if name != "training"} for holder in holders]
    return [{name: list(value) if isinstance(value, dict) else value for name, value in of.items()} for of in found]


def train_and_describe(options: dict[str, Any]) -> list[Any]:
    """Return what one round gives if `Trainer` gets these options. The model is as before."""
    with world(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(OWN_TRAINER, "TrainingArguments", partial(TrainingArguments, **options))
        federation = OWN_TRAINER.make_federation()
        before = describe_model(federation.model)
        seen = play(federation, 1)
        assert repr(describe_model(federation.model)) == repr(before)
        assert federation.model.config.use_cache
        return seen


@pytest.mark.long
@pytest.mark.parametrize(
    "options",
    [
        {"bf16": True},
        {"activation_checkpointing": True},
        {"neftune_noise_alpha": 5.0},
        {"gradient_accumulation_steps": 2},
    ],
    ids=lambda options: next(iter(options)),
)
def test_what_a_trainer_does_to_the_model_ends_with_the_site(options: dict[str, Any]) -> None:
    alone = train_and_describe(options)
    assert launch(train_and_describe, options, num_ranks=2, fork=True) == [alone, alone]

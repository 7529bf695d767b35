"""Draw the loss by step of a federation, and of the same one whose sites load a fixed start in every round.

A small Llama of random weights learns a language of 64 words, each of which is followed by one of three others. In the
second federation a site loads the weights of the start in place of the global ones, so that its loss goes back to that
of the start with each round: a zig-zag.

    python benchmarks/zigzag.py
"""

import argparse
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from picture import shrink
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from scaling_fl import OPTIMISERS, Federation, LocalTraining, Site, place_sites, world
from scaling_fl.data.examples import Examples
from scaling_fl.federation.step_log import StepLog
from scaling_fl.training.loop import NOT_TRAINED
from scaling_fl.training.scores import score_tokens

NUM_SITES, BATCH_SIZE, LENGTH, VOCABULARY, FOLLOWERS = 4, 8, 24, 64, 3
LEARNING_RATE = 3e-3
COLOURS = {"the global weights": "#0072b2", "a fixed start": "#d55e00"}


def make_model() -> nn.Module:
    """Return a Llama of one layer, always with the same random weights."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    sizes |= {"vocab_size": VOCABULARY, "max_position_embeddings": LENGTH}
    return LlamaForCausalLM(LlamaConfig(use_cache=False, **sizes))


def make_texts(count: int, seed: int) -> Examples:
    """Return texts of the language, which is the same for all seeds."""
    followers = np.random.default_rng(0).integers(VOCABULARY, size=(VOCABULARY, FOLLOWERS))
    random = np.random.default_rng(seed)
    tokens = random.integers(VOCABULARY, size=(count, LENGTH))
    for place in range(1, LENGTH):
        tokens[:, place] = followers[tokens[:, place - 1], random.integers(FOLLOWERS, size=count)]
    columns = {"input_ids": tokens.ravel(), "labels": tokens.ravel()}
    lengths, padding = np.full(count, LENGTH), {"input_ids": 0, "labels": NOT_TRAINED}
    return Examples(columns, np.arange(count) * LENGTH, lengths, np.zeros(count, np.int64), padding)


def train(num_rounds: int, num_steps: int, *, from_fixed_start: bool) -> list[list[float]]:
    """Train a federation whose sites take so many steps in a round, and return the losses by round and step."""
    topology, step_log = place_sites([0] * NUM_SITES), StepLog(1)
    texts = {number: make_texts(num_steps * BATCH_SIZE, seed=number + 1) for number in topology.sites}
    training = LocalTraining(
        partial(OPTIMISERS["adamw"], lr=LEARNING_RATE),
        lambda site, seed, start: site.data.shuffled_batches(BATCH_SIZE, seed, start),
        score_tokens,
        seed=1,
        step_log=step_log,
    )
    start = make_model().state_dict()

    def train_site(model: nn.Module, site: Site, round_: int) -> Mapping[str, Any]:
        if from_fixed_start:
            model.load_state_dict(start)
        return training(model, site, round_)

    sites = [Site(number, device, len(texts[number]), texts[number]) for number, device in topology.sites.items()]
    federation, losses = Federation(topology, sites, make_model(), train_site=train_site), []
    for round_ in range(1, num_rounds + 1):
        metrics = federation.train(round_)
        federation.global_model.step()
        losses.append(step_log.gather(metrics["site.examples"], 0)["step.loss"])
    return losses


def compare(num_rounds: int, num_steps: int) -> dict[str, list[list[float]]]:
    """Return the losses by round and step of both federations, by what the sites load."""
    with world():
        both = (train(num_rounds, num_steps, from_fixed_start=is_fixed) for is_fixed in (False, True))
        return dict(zip(COLOURS, both, strict=True))


def draw(path: Path, losses: Mapping[str, list[list[float]]]) -> None:
    """Draw the losses of all federations by a count of steps that goes on over rounds."""
    figure = Figure(figsize=(8, 4), layout="constrained", facecolor="white")
    axes = figure.subplots()
    for name, rounds in losses.items():
        values = np.concatenate(rounds)
        axes.plot(np.arange(1, len(values) + 1), values, label=f"each round starts from {name}", color=COLOURS[name])
        for end in np.cumsum([len(of_round) for of_round in rounds])[:-1]:
            axes.axvline(end, color="#9aa2af", linestyle=":", linewidth=0.8)
    axes.set_xlabel("step of the sites' optimisers")
    axes.set_ylabel("training loss, mean of the sites")
    axes.set_ylim(bottom=0)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="lower left", frameon=False)
    figure.savefig(path, dpi=110)
    shrink(path)


def main() -> None:
    """Draw the picture of docs/local_training.md."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent.parent / "docs", help="its folder")
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--steps", type=int, default=25, help="of a site in a round")
    options = parser.parse_args()
    draw(options.output / "zigzag.png", compare(options.rounds, options.steps))


if __name__ == "__main__":
    main()

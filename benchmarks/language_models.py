"""Show what packing and LoRA cost and save in the training of a language model, on one thread of the CPU.

A Llama of random weights trains on made conversations: random tokens, the first half of them a prompt. Their batches
are padded and packed; the texts are all as long as the longest (`alike`), or from an eighth of that to it (`uneven`).
Then the whole model and LoRA train on the uneven texts of the middle length. What is compared takes turns on the same
texts. Printed are medians of CPU seconds, which other programs on the machine affect less than seconds of a clock, and
medians of the ratios of each repetition.

    python benchmarks/language_models.py --width 256 --layers 4 --lengths 32 128 512
"""

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from operator import truediv

import numpy as np
import torch
from torch import nn
from torch.optim import Optimizer
from transformers import LlamaConfig, LlamaForCausalLM

from scaling_fl.data.examples import Examples
from scaling_fl.federation.aggregation import COMM_DTYPES
from scaling_fl.models.adapters import add_adapter, lora
from scaling_fl.models.flat import trained_weights
from scaling_fl.training.loop import NOT_TRAINED, train
from scaling_fl.training.optimisers import OPTIMISERS
from scaling_fl.training.scores import check_packing, score_tokens

VOCABULARY = 8_192
HEAD = 64  # as wide as those of Llama 3 and SmolLM2
SHORTEST = 1 / 8  # of the longest text
LEARNING_RATE = 1e-4
SMALL = {"width": 32, "layers": 1, "lengths": [16], "batch_size": 4, "steps": 1}


def make_model(width: int, num_layers: int, longest: int) -> LlamaForCausalLM:
    """Return a Llama of random weights, always the same, which takes texts of up to `longest` tokens."""
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=width,
            intermediate_size=width * 8 // 3,
            num_hidden_layers=num_layers,
            num_attention_heads=max(1, width // HEAD),
            max_position_embeddings=longest,
            use_cache=False,
        )
    )


def make_texts(count: int, longest: int, spread: str) -> Examples:
    """Return texts of random tokens, whose second half is an answer."""
    random = np.random.default_rng(0)
    shortest = longest * SHORTEST if spread == "uneven" else longest
    lengths = np.exp(random.uniform(np.log(shortest), np.log(longest), count)).round().astype(np.int64)
    tokens = random.integers(VOCABULARY, size=lengths.sum())
    is_answer = np.concatenate([np.arange(length) >= length // 2 for length in lengths])
    columns = {"input_ids": tokens, "labels": np.where(is_answer, tokens, NOT_TRAINED)}
    padding = {"input_ids": 0, "labels": NOT_TRAINED}
    return Examples(columns, np.cumsum(lengths) - lengths, lengths, np.zeros(count, np.int64), padding)


def make_optimiser(model: nn.Module) -> Optimizer:
    """Return AdamW of the trained weights."""
    return OPTIMISERS["adamw"](trained_weights(model).values(), lr=LEARNING_RATE)


def take_turns(works: Sequence[Callable[[int], object]], num_repeats: int) -> list[list[float]]:
    """Return the CPU seconds of each of the works, repetition by repetition, after one that is not measured."""
    seconds: list[list[float]] = [[] for _ in works]
    for repeat in range(num_repeats + 1):
        for work, of_work in zip(works, seconds, strict=True):
            start = time.process_time()
            work(repeat)
            of_work.append(time.process_time() - start)
    return [of_work[1:] for of_work in seconds]


def median_ratio(numerators: list[float], denominators: list[float]) -> float:
    """Return the median of the ratios of the repetitions."""
    return statistics.median(map(truediv, numerators, denominators))


def compare_packing(model: nn.Module, longest: int, spread: str, options: argparse.Namespace) -> str:
    """Train on padded and on packed batches of the same texts, and return a line of the table."""
    texts = make_texts(options.batch_size * options.steps, longest, spread)
    both = texts, replace(texts, is_packed=True)
    check_packing(model, *(of.select(np.arange(options.batch_size)).batch() for of in both))
    optimiser = make_optimiser(model)

    def train_on(examples: Examples, seed: int) -> None:
        train(model, examples.shuffled_batches(options.batch_size, seed), optimiser, score_tokens)

    padded, packed = take_turns([partial(train_on, of) for of in both], options.repeats)
    num_tokens = int(texts.lengths.sum())
    speeds = (num_tokens / statistics.median(of) for of in (padded, packed))
    widths = [mean_places(of, options) for of in both]
    return (
        f"{longest:>7} | {spread:<6} | {widths[1]:>12,.0f} | {1 - widths[1] / widths[0]:>7.0%} | "
        f"{' | '.join(f'{speed:>8,.0f}' for speed in speeds)} | {median_ratio(padded, packed):>6.2f}"
    )


def mean_places(examples: Examples, options: argparse.Namespace) -> float:
    """Return how many tokens and places of padding the batches of the measured repetitions have, their mean."""
    seeds = range(1, options.repeats + 1)
    batches = (batch for seed in seeds for batch in examples.shuffled_batches(options.batch_size, seed))
    return statistics.mean(batch["input_ids"].numel() for batch in batches)


def compare_adapter(models: dict[str, nn.Module], longest: int, options: argparse.Namespace) -> list[str]:
    """Train each of the models on the same texts, and return the lines of the table."""
    texts = make_texts(options.batch_size * options.steps, longest, "uneven")
    optimisers = {name: make_optimiser(model) for name, model in models.items()}

    def train_one(name: str, seed: int) -> None:
        train(models[name], texts.shuffled_batches(options.batch_size, seed), optimisers[name], score_tokens)

    seconds = dict(zip(models, take_turns([partial(train_one, name) for name in models], options.repeats), strict=True))
    lines = []
    for name, model in models.items():
        num_weights = sum(weight.numel() for weight in trained_weights(model).values())
        states = (value for state in optimisers[name].state.values() for value in state.values())
        lines.append(
            f"{name:<5} | {num_weights:>11,} | {statistics.median(seconds[name]) / options.steps:>10.3f} | "
            f"{median_ratio(seconds[name], seconds['whole']):>5.2f} | "
            f"{num_weights * COMM_DTYPES['exact'].itemsize:>13,} | {sum(state.nbytes for state in states):>12,}"
        )
    return lines


def main() -> None:
    """Measure packing, then LoRA."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--lengths", nargs="+", type=int, default=[32, 128, 512], help="of the longest text")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--steps", type=int, default=2, help="of a repetition")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--small", action="store_true", help="with a tiny model, to see that it works")
    options = parser.parse_args()
    if options.small:
        vars(options).update(SMALL)
    torch.set_num_threads(1)
    make = partial(make_model, options.width, options.layers, max(options.lengths))
    models = {"whole": make(), "LoRA": add_adapter(make(), lora())}
    num_weights = sum(weight.numel() for weight in models["whole"].parameters())
    print(f"Llama, {options.width} wide, {options.layers} layers, {num_weights:,} weights, batches of", end="")
    print(f" {options.batch_size}, medians of {options.repeats}, torch {torch.__version__}\n")
    print("longest | texts  | tokens/batch | padding | tokens/s | packed/s | packed / padded", flush=True)
    for longest in options.lengths:
        for spread in ("alike", "uneven"):
            print(compare_packing(models["whole"], longest, spread, options), flush=True)
    print("\ntrain | weights     | s a step   | ratio | bytes a round | AdamW, bytes")
    middle = sorted(options.lengths)[len(options.lengths) // 2]
    print(*compare_adapter(models, middle, options), sep="\n")


if __name__ == "__main__":
    main()

"""Try the promises on a GPU, and measure what a federation costs there.

Each line that is printed is a finding. The models are random ones, made from configurations; the data is random.
`bits` and `memory` train with the command, in processes that run at once. `speed` compares rounds with a plain PyTorch
loop on the same device in this process, alternately, after a round to warm up.

    python benchmarks/gpu.py --parts bits memory speed profile

Without a GPU `--small` tries all of it on the CPU.
"""

import argparse
import os
import re
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from unittest.mock import patch

import torch
from commands import Command, put_data, put_model
from library import make_federation, run_round
from overhead import CASES, NUM_LABELS, VOCABULARY, Case, PlainLoop, distilbert
from torch import nn
from transformers import BertConfig, BertForSequenceClassification

from scaling_fl.distributed.launch import num_ranks
from scaling_fl.distributed.world import accelerator, world

REPETITIONS = 5
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


def bert_base() -> nn.Module:
    """Return a model of BERT-base's size, 109 million weights."""
    return BertForSequenceClassification(BertConfig(vocab_size=VOCABULARY, num_labels=NUM_LABELS, **NO_DROPOUT))


SPEED = {
    "DistilBERT's size, 8 sites of one batch of 32 x 128": Case(distilbert, 8, 32, 128, 32, 1),
    "BERT-base, 8 sites of 8 batches of 32 x 128": Case(bert_base, 8, 256, 128, 32, 1),
}


def report(*findings: object) -> None:
    """Print a finding."""
    print("|", *findings, flush=True)


# Bits and memory, with the command.


def try_bits(folder: Path, *, small: bool) -> None:
    """Train the same twice, and once with a kill after the first round."""
    settings = {
        **{"task_name": "text", "model": put_model(folder, small=small), "site_ids": [0, 0, 0, 0], "num_rounds": 3},
        **{"train_path": str(put_data(folder / "train.csv", 100 if small else 400)), "optimiser": "adamw"},
        **{"test_path": str(put_data(folder / "test.csv", 50 if small else 500)), "learning_rate": 5e-5},
        **{"batch_size": 2, "num_local_epochs": 1, "report": False},
    }
    stopped = settings | {"checkpoints_dir": str(folder / "checkpoints")}
    runs = {name: Command(folder, name, "with", settings) for name in ("first", "second")}
    runs["by torchrun"] = Command(folder, "torchrun", "with", settings, 1)
    victim = Command(folder, "stopped", "with", stopped)
    two = Command(folder, "two", "with", settings, 2)
    while victim.process.poll() is None and not (folder / "checkpoints" / "round-1.pt").exists():
        time.sleep(0.02)
    victim.process.kill()
    victim.process.wait()
    done = sorted(file.name for file in (folder / "checkpoints").glob("round-*.pt"))
    runs["killed and resumed"] = Command(folder, "resumed", "with", stopped)
    sums = {name: run.find(r"SHA-256 ([0-9a-f]{64})") for name, run in runs.items()}
    for name, sum_ in sums.items():
        report("4 sites, 3 rounds of AdamW with dropout", name, sum_)
    report("killed when there was", *done, "resumed:", runs["killed and resumed"].find(r"(resumed .*)"))
    report("all the same:", len(set(sums.values())) == 1)
    for line in runs["first"].output().splitlines():
        if re.match("model |sites |best |final |results", line) or re.match(r" *\d+ \|", line):
            report("    " + line)
    warned = set(re.findall(r"UserWarning: (.*?)(?: does not have a deterministic| is not)", runs["first"].output()))
    report("torch warns of kernels that are not deterministic:", *(warned or ["none"]))
    report("two ranks:", f"exit status {two.process.wait()}:", two.find("(error: .*)"))
    with patch.dict(os.environ, RANKS="auto"):
        report("RANKS=auto:", num_ranks(num_sites=4), "of 4 sites")


def try_memory(folder: Path, *, small: bool) -> None:
    """Compare the memory of 2, 32 and 256 sites, and what `plan` says of it."""
    common = {
        **{"task_name": "text", "model": put_model(folder, small=small), "site_ids": [0], "num_rounds": 1},
        **{"train_path": str(put_data(folder / "train.csv", 1_024)), "num_local_epochs": 1, "batch_size": 4},
        **{"test_path": str(put_data(folder / "test.csv", 64)), "val_batch_size": 64, "report": False},
    }
    numbers = (2, 8) if small else (2, 32, 256)
    plans = {n: Command(folder, f"plan{n}", "plan", common | {"num_sites": n}) for n in numbers}
    runs = {n: Command(folder, f"sites{n}", "with", common | {"num_sites": n}) for n in numbers}
    for number in numbers:
        planned = plans[number].find(r"\n *0 \| +\S+ \| +([\d,]+ MB)")
        peak = runs[number].rounds()[-1]["sites.memory_mb.worst"]
        report(f"{number} sites: peak while training {peak:,.0f} MB, planned {planned}")


# Speed, in this process.


def run_in_any_order(loop: PlainLoop, round_: int) -> None:
    """Train a round of the plain loop with kernels that are not deterministic."""
    torch.use_deterministic_algorithms(False)
    loop.run_round(round_)
    torch.use_deterministic_algorithms(True, warn_only=True)


def seconds(work: Callable[[int], object], round_: int) -> float:
    """Return how long a round takes on the device."""
    synchronize()
    start = time.perf_counter()
    work(round_)
    synchronize()
    return time.perf_counter() - start


def synchronize() -> None:
    """Wait for the device."""
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()


def try_speed(device: torch.device, cases: dict[str, Case]) -> None:
    """Compare rounds of the library with those of the plain loop."""
    for name, case in cases.items():
        plain = PlainLoop(case, device)
        federations = {dtype: make_federation(case, dtype) for dtype in ("exact", "float32", "bfloat16")}
        rounds: dict[str, Callable[[int], None]] = {"plain": plain.run_round}
        rounds |= {dtype: partial(run_round, of) for dtype, of in federations.items()}
        rounds["plain, any order of sums"] = partial(run_in_any_order, PlainLoop(case, device))
        times: dict[str, list[float]] = {run: [] for run in rounds}
        for round_ in range(1, REPETITIONS + 2):
            for run, work in rounds.items():
                times[run].append(seconds(work, round_))
        floor = times["plain"][1:]
        for run, of in times.items():
            ratio = statistics.median(a / b for a, b in zip(of[1:], floor, strict=True))
            report(f"{name}: {run}: {statistics.median(of[1:]):.3f} s, {ratio:.3f} of plain")
        for dtype, federation in federations.items():
            difference = (federation.global_model.weights - plain.weights).abs().max().item()
            report(f"{name}: {dtype}: weights after {REPETITIONS + 1} rounds differ from plain by {difference:.1e}")


def try_one_site(device: torch.device, case: Case) -> None:
    """Compare a federation of one site with ordinary training."""
    plain, federation = PlainLoop(case, device), make_federation(case, "exact")
    for round_ in range(1, 4):
        plain.run_round(round_)
        run_round(federation, round_)
    difference = (federation.global_model.weights - plain.weights).abs().max().item()
    report(f"one site, 3 rounds: differs from ordinary training by at most {difference:.1e}")


def try_kernels(device: torch.device) -> None:
    """Repeat the backward pass of attention over one text, for which torch may add in any order, and only warn."""
    random = torch.Generator(device).manual_seed(0)
    query, key, value = texts = [
        torch.randn(1, 12, 512, 64, generator=random, device=device, requires_grad=True) for _ in range(3)
    ]
    for warn_only in (True, False):
        torch.use_deterministic_algorithms(True, warn_only=warn_only)
        found = set()
        for _ in range(50):
            output = nn.functional.scaled_dot_product_attention(query, key, value)
            gradients = torch.autograd.grad(output.square().sum(), texts)
            found.add(b"".join(gradient.cpu().numpy().tobytes() for gradient in gradients))
        report(f"attention of one text, 50 times, torch {'warns' if warn_only else 'is strict'}: {len(found)} results")
    torch.use_deterministic_algorithms(True, warn_only=True)


def try_evaluation(device: torch.device, case: Case) -> None:
    """Compare evaluation with a plain loop."""
    federation, model = make_federation(case, "exact"), case.model().to(device).eval()
    tokens, labels = map(torch.from_numpy, case.examples())

    @torch.inference_mode()
    def plain(_: int) -> None:
        right = torch.zeros((), dtype=torch.int64, device=device)
        for batch in torch.arange(len(tokens)).split(case.batch_size):
            ids = tokens[batch].long().to(device)
            right += (model(ids, torch.ones_like(ids)).logits.argmax(-1) == labels[batch].to(device)).sum()
        right.item()

    times = [(seconds(federation.evaluate, round_), seconds(plain, round_)) for round_ in range(REPETITIONS + 1)][1:]
    ratio = statistics.median(ours / theirs for ours, theirs in times)
    rate = len(tokens) / statistics.median(ours for ours, _ in times)
    report(f"evaluation: {rate:,.0f} texts of {case.length} tokens a second, {ratio:.3f} of a plain loop's time")


def profile(case: Case, name: str) -> None:
    """Say where the time of a round goes."""
    from torch.profiler import ProfilerActivity, profile

    federation = make_federation(case, "exact")
    run_round(federation, 1)
    synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as found:
        took = seconds(partial(run_round, federation), 2)
    events = found.key_averages()
    kernels = [event for event in events if event.device_type != torch.autograd.DeviceType.CPU]
    busy = sum(event.self_device_time_total for event in kernels) * 1e-6
    report(f"profile of {name}: {took:.3f} s, of which the device computes {busy:.3f} s")
    for key in ("cudaLaunchKernel", "cudaMemcpyAsync", "cudaStreamSynchronize", "cudaDeviceSynchronize", "aten::item"):
        for event in (event for event in events if event.key == key):
            report(f"    {key}: {event.count} times, {event.self_cpu_time_total * 1e-6:.3f} s of CPU")
    by_device = sorted(events, key=lambda event: event.self_device_time_total, reverse=True)[:14]
    for event in by_device:
        report(f"    on the device {event.self_device_time_total * 1e-6:.4f} s, {event.count} times: {event.key[:90]}")
    for event in sorted(events, key=lambda event: event.self_cpu_time_total, reverse=True)[:10]:
        report(f"    on the CPU {event.self_cpu_time_total * 1e-6:.4f} s, {event.count} times: {event.key[:90]}")


def in_process(parts: list[str], *, small: bool) -> None:
    """Measure speed."""
    kind = accelerator()
    device = torch.device(kind, 0) if kind else torch.device("cpu")
    cases = {"small": CASES["try"]} if small else SPEED
    (name, first), last = next(iter(cases.items())), list(cases.values())[-1]
    with world():
        if "speed" in parts:
            try_kernels(device)
            try_speed(device, cases)
            try_one_site(device, replace(last, num_sites=1))
            try_evaluation(device, last)
        if "profile" in parts:
            profile(first, name)


def main() -> None:
    """Try and measure what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = ["bits", "memory", "speed", "profile"]
    parser.add_argument("--parts", nargs="+", choices=parts, default=parts)
    parser.add_argument("--small", action="store_true", help="use models that a CPU trains in seconds")
    options = parser.parse_args()
    card = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    report(f"{card}, torch {torch.__version__}, {os.cpu_count()} cores")
    for part, work in {"bits": try_bits, "memory": try_memory}.items():
        if part in options.parts:
            with TemporaryDirectory() as folder:
                work(Path(folder), small=options.small)
    in_process(options.parts, small=options.small)


if __name__ == "__main__":
    main()

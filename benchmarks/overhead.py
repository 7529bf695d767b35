"""Compare a run of the library with the least that a federated run could be, and with other libraries.

That floor is a plain PyTorch loop: two gloo ranks of one thread each, whose sites take turns on one
model, and one flat float32 all-reduce a round. It has none of the library's code and must end with
the library's weights. Both train on random tokens with fused SGD, without dropout or evaluation; the
library also pads, scores and checks as in a real run. `--peers` lets other libraries train the same,
each in an environment that is made for it (peers/environments.py, by peers/*.py); NVFlare, which takes
minutes a case, where it is named.

The programs that are compared are started at once and take turns of a fraction of a second, in which
the others are stopped: what else the machine does meets them alike. Only a program that sleeps gains,
as it also sleeps while it is stopped. Memory is measured in a run of its own. Linux only, as it is
read from /proc.

    python benchmarks/overhead.py --cases a b c --repetitions 3
    python benchmarks/overhead.py --cases a b256 c --repetitions 2 --peers
"""

import argparse
import importlib
import math
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from itertools import pairwise, starmap
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from peers.environments import OURS, PEERS, make_environment, version_of
from processes import cpu_of_ended, descendants
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    DistilBertConfig,
    DistilBertForSequenceClassification,
)

LIBRARY = ("float32", "exact")  # by the type of its messages
NUM_RANKS = 2
NUM_LABELS = 4
VOCABULARY = 30_522
LEARNING_RATE = 0.01
TURN = 0.3  # seconds
LOOK_EVERY = 0.1  # seconds that a program runs from one look at its memory to the next, in which it is stopped
WHOLE = ("wall, s", "CPU, s")
# Of the wall time: imports, launch and model; rounds, the steady one being the median of all but the first; the end.
PARTS = ("before rounds, s", "first round, s", "steady round, s", "after rounds, s")
MEMORY = "memory, MiB"  # the most at once
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "CUDA_VISIBLE_DEVICES": ""}


def bert_tiny() -> nn.Module:
    """Return a BERT of 4.4 million weights."""
    tiny = {"hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 512}
    no_dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return BertForSequenceClassification(BertConfig(vocab_size=VOCABULARY, num_labels=NUM_LABELS, **tiny, **no_dropout))


def distilbert() -> nn.Module:
    """Return a model of DistilBERT's size, 67 million weights."""
    no_dropout = {"dropout": 0.0, "attention_dropout": 0.0, "seq_classif_dropout": 0.0}
    return DistilBertForSequenceClassification(
        DistilBertConfig(vocab_size=VOCABULARY, num_labels=NUM_LABELS, **no_dropout)
    )


@dataclass(frozen=True)
class Case:
    """A federation whose sites have `num_examples` each, `length` tokens long."""

    make_model: Callable[[], nn.Module]
    num_sites: int
    num_examples: int
    length: int
    batch_size: int
    num_rounds: int

    @property
    def tolerance(self) -> float:
        """How much final weights below 1 may differ from the floor's, whose float32 sum is rounded with each site."""
        return max(1e-5, self.num_sites * 2**-24)

    def model(self) -> nn.Module:
        """Return the model with its first weights, drawn at random and always the same."""
        torch.manual_seed(0)
        return self.make_model()

    def examples(self) -> tuple[np.ndarray, np.ndarray]:
        """Return the tokens, a row an example, and the labels: one site's after another's."""
        random = np.random.default_rng(0)
        size = self.num_sites * self.num_examples
        tokens = random.integers(VOCABULARY, size=(size, self.length), dtype=np.int32)
        return tokens, random.integers(NUM_LABELS, size=size)

    def batches(self, site: int) -> list[np.ndarray]:
        """Return the indices of each of a site's batches."""
        own = np.arange(site * self.num_examples, (site + 1) * self.num_examples)
        return np.array_split(own, range(self.batch_size, self.num_examples, self.batch_size))


CASES = {
    "a": Case(bert_tiny, num_sites=16, num_examples=128, length=64, batch_size=32, num_rounds=5),
    "b64": Case(bert_tiny, num_sites=64, num_examples=32, length=64, batch_size=32, num_rounds=2),
    "b256": Case(bert_tiny, num_sites=256, num_examples=32, length=64, batch_size=32, num_rounds=2),
    "d": Case(bert_tiny, num_sites=1_000, num_examples=32, length=64, batch_size=32, num_rounds=2),
    "c": Case(distilbert, num_sites=4, num_examples=8, length=32, batch_size=8, num_rounds=3),
    "try": Case(bert_tiny, num_sites=4, num_examples=4, length=8, batch_size=4, num_rounds=2),  # that all of it works
}


def run_floor(case: Case, result: Path) -> None:
    """Train with nothing that is not needed, on ranks forked like the library's."""
    torch.multiprocessing.start_processes(floor_rank, (case, result), NUM_RANKS, start_method="fork")


def floor_rank(rank: int, case: Case, result: Path) -> None:
    """Train one rank's sites."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{result}.store", rank=rank, world_size=NUM_RANKS)
    loop = PlainLoop(case, torch.device("cpu"), rank, NUM_RANKS)
    moments = time_rounds(loop.run_round, case.num_rounds)
    if rank == 0:
        torch.save((moments, loop.weights), result)
    dist.destroy_process_group()


class PlainLoop:
    """A loop over the sites of a rank with the copies of weights and the mean that a federation needs, in float32."""

    def __init__(self, case: Case, device: torch.device, rank: int = 0, num_ranks: int = 1) -> None:
        tokens, labels = map(torch.from_numpy, case.examples())

        def batches(site: int) -> Iterator[tuple[Tensor, Tensor]]:
            return ((tokens[batch].long().to(device), labels[batch].to(device)) for batch in case.batches(site))

        self._case, self._sites, self._num_ranks = case, range(rank, case.num_sites, num_ranks), num_ranks
        self._vector, self._train = make_trainer(case, batches, device)
        self.weights, self._total = self._vector.clone(), torch.zeros_like(self._vector)

    def run_round(self, _: int) -> None:
        """Train the sites, and average those of all ranks."""
        self._total.zero_()
        for site in self._sites:
            self._vector.copy_(self.weights)
            self._train(site)
            self._total.add_(self._vector, alpha=1 / self._case.num_sites)
        if self._num_ranks > 1:
            dist.all_reduce(self._total)
        self.weights.copy_(self._total)


def make_batches(case: Case) -> list[list[tuple[Tensor, Tensor]]]:
    """Return the batches of each site, tokens and labels, for programs that keep them in memory."""
    tokens, labels = map(torch.from_numpy, case.examples())
    return [[(tokens[batch].long(), labels[batch]) for batch in case.batches(site)] for site in range(case.num_sites)]


def make_trainer(
    case: Case, batches: Callable[[int], Iterable[tuple[Tensor, Tensor]]], device: torch.device | None = None
) -> tuple[Tensor, Callable[[int], None]]:
    """Return the flat vector of a model's weights, and a function that trains it with the batches of a site."""
    model = case.model().to(device).train()
    vector = nn.utils.parameters_to_vector(model.parameters()).detach()
    nn.utils.vector_to_parameters(vector, model.parameters())  # which become views of it
    optimiser = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE, fused=True)

    def train(site: int) -> None:
        for ids, labels in batches(site):
            output = model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=labels)
            optimiser.zero_grad()
            output.loss.backward()
            optimiser.step()

    return vector, train


def time_rounds(run_round: Callable[[int], None], num_rounds: int) -> list[float]:
    """Return when the first round began and when each round ended, in seconds of the machine's clock."""
    moments = [time.monotonic()]
    for round_ in range(1, num_rounds + 1):
        run_round(round_)
        moments.append(time.monotonic())
    return moments


def run_one(case: str, run: str, result: str) -> None:
    """Train a case in this process with one program, which alone is imported."""
    if run == "floor":
        run_floor(CASES[case], Path(result))
    elif run in LIBRARY:
        importlib.import_module("library").run(case, Path(result), run)
    else:
        importlib.import_module(f"peers.{run}").run(case, Path(result))


class RunFailedError(Exception):
    """A program ended with an error."""


class Program:
    """A run of a case in a fresh process, stopped until its turn comes."""

    def __init__(self, case: str, run: str, python: str, folder: Path) -> None:
        self.result = folder / run
        self._turns: list[tuple[float, float]] = []
        self._cpu = 0.0  # of the processes that were waited for, when all have ended
        self._cpu_seen: dict[int, float] = {}  # of each process
        command = [python, __file__, "--one", case, run, str(self.result)]
        self.process = subprocess.Popen(command, env=os.environ | ENVIRONMENT, start_new_session=True)
        self._signal(signal.SIGSTOP)

    def run_for(self, seconds: float) -> bool:
        """Let it run for so long, or to its end, and tell whether that has come."""
        cpu = cpu_of_ended()
        start = time.monotonic()
        self._signal(signal.SIGCONT)
        try:
            self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            self._signal(signal.SIGSTOP)
        self._turns.append((start, time.monotonic()))
        self._cpu = cpu_of_ended() - cpu
        for pid in (self.process.pid, *descendants(self.process.pid)):
            with suppress(OSError):  # it has ended
                self._cpu_seen[pid] = cpu_of(pid)
        return self.process.returncode is not None

    def end(self) -> None:
        """End it, with its ranks, if it runs."""
        if self.process.poll() is None:
            self._signal(signal.SIGKILL)
            self.process.wait()

    def outcome(self) -> tuple[dict[str, float], Tensor]:
        """Return what it took in its turns, by WHOLE and PARTS, and its final weights."""
        if self.process.returncode != 0:
            raise RunFailedError(f"{self.result.name} ended with exit status {self.process.returncode}")
        moments, weights = torch.load(self.result)
        before, first, *steady, after = starmap(self._in_turns, pairwise([0, *moments, math.inf]))
        cpu = max(self._cpu, sum(self._cpu_seen.values()))  # as Ray does not wait for its processes
        times = self._in_turns(0, math.inf), cpu, before, first, statistics.median(steady), after
        return dict(zip((*WHOLE, *PARTS), times, strict=True)), weights

    def _in_turns(self, start: float, end: float) -> float:
        return sum(max(0.0, min(end, turn_end) - max(start, turn_start)) for turn_start, turn_end in self._turns)

    def _signal(self, number: int) -> None:
        """Send a signal to all its processes; some may have groups of their own, and start others meanwhile."""
        reached: set[int] = set()
        while found := {self.process.pid, *descendants(self.process.pid)} - reached:
            for pid in found:
                with suppress(ProcessLookupError):
                    os.kill(pid, number)
            reached |= found


def cpu_of(pid: int) -> float:
    """Return the CPU seconds of a process."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def take_turns(case: str, pythons: dict[str, str]) -> dict[str, tuple[dict[str, float], Tensor]]:
    """Let all programs run a case, and return their `outcome`, but for peers that fail."""
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        programs = {}
        for run, python in pythons.items():
            programs[run] = Program(case, run, python, Path(folder))
            stack.callback(programs[run].end)
        running = list(programs.values())
        while running:
            running = [program for program in running if not program.run_for(TURN)]
        outcomes = {}
        for run, program in programs.items():
            with peers_may_fail(run):
                outcomes[run] = program.outcome()
        return outcomes


@contextmanager
def peers_may_fail(run: str) -> Iterator[None]:
    """Print that another library's run has failed, as with too little memory, and go on without it."""
    try:
        yield
    except RunFailedError as error:
        if run not in PEERS:
            raise SystemExit(f"error: {error}") from error
        print(f"error: {error}, so it is left out", file=sys.stderr, flush=True)


def peak_memory(case: str, run: str, python: str) -> float:
    """Run one case alone and return the most memory that its processes had at once, in MiB."""
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        program = Program(case, run, python, Path(folder))
        stack.callback(program.end)
        peak, pause = 0.0, LOOK_EVERY
        while not program.run_for(pause):
            start = time.perf_counter()
            # A process that ends or forks during a look is counted twice in part, so look again.
            if (seen := memory(program.process.pid)) > peak:
                peak = max(peak, min(seen, memory(program.process.pid)))
            pause = max(LOOK_EVERY, time.perf_counter() - start)  # a look takes long where much memory is shared
        program.outcome()  # which is an error if it failed
        return peak


def memory(pid: int) -> float:
    """Return the MiB of a process and its descendants as PSS: what n processes share counts once."""
    total = 0.0
    for process in (pid, *descendants(pid)):
        with suppress(OSError):  # it has ended meanwhile
            lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
            total += sum(int(line.split()[1]) for line in lines if line.startswith("Pss:")) / 1024
    return total


def compare(case: str, pythons: dict[str, str], num_repetitions: int) -> dict[str, dict[str, list[float]]]:
    """Return what each run of a case took, repetition by repetition; its memory is measured once.

    Args:
        case: a key of CASES.
        pythons: the program that runs each.
        num_repetitions: how often.

    Raises:
        SystemExit: final weights are not the floor's, or the floor or the library failed.
    """
    measured: dict[str, dict[str, list[float]]] = {run: {name: [] for name in (*WHOLE, *PARTS)} for run in pythons}
    for _ in range(num_repetitions):
        found = take_turns(case, {run: pythons[run] for run in measured})
        measured = {run: measured[run] for run in found}
        for run, (times, weights) in found.items():
            difference = (weights - found["floor"][1]).abs().max().item()
            print(case, run, *(f"{name} {value:.3f}" for name, value in times.items()), sep=" | ", end="")
            print(f" | differs by {difference:.0e}", flush=True)
            if not difference <= (most := CASES[case].tolerance):
                raise SystemExit(f"error: the weights of {run} differ from the floor's by more than {most:.1e}")
            for name, value in times.items():
                measured[run][name].append(value)
    complete: dict[str, dict[str, list[float]]] = {}
    for run, values in measured.items():
        with peers_may_fail(run):
            complete[run] = values | {MEMORY: [peak_memory(case, run, pythons[run])]}
    return complete


def print_tables(results: dict[str, dict[str, dict[str, list[float]]]]) -> None:
    """Print a Markdown table of each case: the floor's medians, and multiples of the floor in the same repetition."""
    print(f"\n{machine()}, torch {torch.__version__}, {NUM_RANKS} ranks of one thread")
    for name, runs in results.items():
        case = CASES[name]
        title = f"({name}) {case.make_model.__name__}, {case.num_sites} sites x {case.num_examples} examples"
        print(f"\n| {title} |", " | ".join(version_of(run) for run in runs), "|")
        print("|---" * (1 + len(runs)) + "|")
        for measure in (*WHOLE, MEMORY, *PARTS):
            floor, *others = (runs[run][measure] for run in runs)
            print(
                f"| {measure} | {statistics.median(floor):.2f} |",
                " | ".join(ratios(values, floor) for values in others),
                "|",
            )
    if {"a", "b256"} <= results.keys():
        both = results["a"].keys() & results["b256"].keys()
        growth = (
            f"{run} {runs[MEMORY][0] / results['a'][run][MEMORY][0]:.2f}"
            for run, runs in results["b256"].items()
            if run in both
        )
        print("\nMemory with 256 sites over that with 16:", ", ".join(growth))


def ratios(values: Sequence[float], floor: Sequence[float]) -> str:
    """Return values as multiples of the floor's: the median, and what it lies between."""
    found = sorted(value / least for value, least in zip(values, floor, strict=True))
    spread = f" ({found[0]:.2f} to {found[-1]:.2f})" if len(found) > 1 else ""
    return f"{statistics.median(found):.2f}{spread}"


def machine() -> str:
    """Return the cores that this process may use, and the name of the processor."""
    names = re.findall(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    return f"{len(os.sched_getaffinity(0))} cores of {names[0] if names else 'an unknown processor'}"


def choose_peers(names: list[str] | None) -> list[str]:
    """Return the peers to compare with: those that are named; if none is, all but the slow ones; none for None."""
    return [name for name, peer in PEERS.items() if not peer.is_slow] if names == [] else names or []


def main() -> None:
    """Measure the cases asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cases = "a: 16 sites; b: b64 and b256, of 64 and 256; c: 4 of a larger model; d: 1,000; try: a quick check"
    parser.add_argument("--cases", nargs="+", choices=sorted({*CASES, "b"}), default=list("abc"), help=cases)
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--peers", nargs="*", choices=PEERS, help="libraries, by default all but the slow ones")
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        run_one(*options.one)
    else:
        ours = sys.executable if options.peers is None else make_environment("scaling_fl", OURS)
        pythons = dict.fromkeys(("floor", *LIBRARY), ours)
        pythons |= {name: make_environment(name, PEERS[name]) for name in choose_peers(options.peers)}
        chosen = [name for name in CASES if name in options.cases or name[0] in options.cases]
        print_tables({name: compare(name, pythons, options.repetitions) for name in chosen})


if __name__ == "__main__":
    main()

"""Kill ranks at random moments, resume on other numbers of ranks, and compare with runs without interruption.

A federation of six sites, with dropout and AdamW, trains on 1, 2 or 3 local ranks. At a random moment a rank gets
SIGKILL: while a site trains, in a collective, in the step of the outer optimiser, in evaluation, while it writes or
renames a checkpoint, or at any moment. Then the same command resumes, until the run has completed. It must end with
the weights and metrics of a run without interruption, and each checkpoint must be complete as soon as it has its
name. Linux only, as /proc lists the ranks.

    python benchmarks/chaos.py --kills 60 --seed 1
"""

import argparse
import ctypes
import faulthandler
import json
import mmap
import os
import re
import runpy
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from random import Random
from threading import RLock, Timer
from typing import Any

import torch
import torch.distributed as dist
import transformers
from fsspec.implementations.local import LocalFileSystem
from processes import SCRIPT, descendants
from tqdm import tqdm
from transformers import BertConfig, BertForSequenceClassification, BertTokenizerFast

from scaling_fl import storage
from scaling_fl.federation import local_training
from scaling_fl.federation.global_model import GlobalModel
from scaling_fl.federation.round import Federation
from scaling_fl.records import checkpoint

STRATEGIES = ("fedavg", "fedadam", "diloco")
NUM_ROUNDS = 6
NUM_RANKS = (1, 2, 3)
END_SECONDS = 45.0  # most seconds from a kill to the end of the command, on a very busy machine
HANG_SECONDS = 120.0  # after which a command that was not killed hangs
WORDS = "goal match team chip code disk soup bread salt the a of and in on was very old new good".split()  # noqa: SIM905
# Metrics that differ between equal runs: times, memory, and bytes, which depend on the number of ranks.
VARYING_METRICS = re.compile(r"(time|comm|speed)\.|sites\.(seconds|memory_mb)\.")

TRAINING, COLLECTIVE, STEP, EVALUATION = "local training", "collective", "optimiser step", "evaluation"
WRITING, RENAMING, ANY = "checkpoint half written", "checkpoint renamed", "any moment"
PHASES = ("other", TRAINING, COLLECTIVE, STEP, EVALUATION, WRITING, RENAMING)
AT_THE_END = "after the last round"
# Phase in which to kill -> number of calls of a rank in about two rounds.
TARGETS = {TRAINING: 4, COLLECTIVE: 40, STEP: 2, EVALUATION: 2, WRITING: 2, RENAMING: 2, ANY: 0}


class Row(ctypes.Structure):
    """The state of one rank."""

    _fields_ = (("process", ctypes.c_int64), ("phase", ctypes.c_int64), ("killed", ctypes.c_double))


class Board:
    """The states of all ranks, in memory that forks share, so that it can be read after a rank's end."""

    def __init__(self) -> None:
        self._memory = mmap.mmap(-1, mmap.PAGESIZE)
        self._ranks: dict[int, int] = {}  # of processes, as RANK is hidden from what a site calls
        self.rows = (Row * max(NUM_RANKS)).from_buffer(self._memory)

    def own_rank(self) -> int:
        """Return the number of the calling rank, whose first call is not that of a site."""
        return self._ranks.setdefault(os.getpid(), int(os.environ.get("RANK", "0")))

    def own_row(self) -> Any:
        """Return the row of the calling rank."""
        row = self.rows[self.own_rank()]
        row.process = os.getpid()
        return row


@dataclass(frozen=True)
class PlannedKill:
    """When to kill a rank: in its `call`-th call of a phase, after a fraction of it."""

    target: str
    num_ranks: int
    rank: int
    call: int
    fraction: float

    @staticmethod
    def sample(random: Random, target: str) -> "PlannedKill":
        """Sample a kill. Only rank 0 writes checkpoints."""
        num_ranks = random.choice(NUM_RANKS)
        rank = 0 if target in (WRITING, RENAMING) else random.randrange(num_ranks)
        return PlannedKill(target, num_ranks, rank, random.randint(1, max(TARGETS[target], 1)), random.random())


@dataclass(frozen=True)
class Kill:
    """The result of a kill."""

    phase: str
    num_ranks: int
    rank: int
    next_ranks: int  # on which the run resumed
    seconds: float  # until the command had ended
    last_round: int  # on disk
    is_torn: bool  # it left a part of a checkpoint under the temporary name


@dataclass(frozen=True)
class Stop:
    """The result of a SIGTERM."""

    when: str
    num_ranks: int
    seconds: float  # until the command had ended


@dataclass(frozen=True)
class Result:
    """The result of a run, or of all runs of a campaign."""

    weights: str
    num_rounds: int
    metrics: dict[str, tuple[list[int], list[float]]]  # name -> rounds and values
    kills: list[Kill] = field(default_factory=list)
    stops: list[Stop] = field(default_factory=list)


def make_files(folder: Path) -> dict[str, object]:
    """Write a tiny model and texts that it can learn; return the settings of their federation."""
    random = Random(0)
    labels = ("sport", "tech", "food")

    def write(name: str, num_rows: int) -> Path:
        rows = ["text,label"]
        for row in range(num_rows):
            label = row % len(labels)
            words = random.choices(WORDS[3 * label : 3 * label + 3], k=4) + random.choices(WORDS[9:], k=row % 9)
            rows.append(f"{' '.join(random.sample(words, len(words)))},{labels[label]}")
        (folder / name).write_text("\n".join(rows) + "\n")
        return folder / name

    model = folder / "model"
    model.mkdir(parents=True)
    (model / "words.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]))
    tokenizer = BertTokenizerFast(vocab=str(model / "words.txt"), model_max_length=64)
    tokenizer.save_pretrained(model)
    torch.manual_seed(0)
    size = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    config = BertConfig(vocab_size=len(tokenizer), max_position_embeddings=64, **size)  # dropout is 0.1
    BertForSequenceClassification(config).save_pretrained(model)
    return {
        "task_name": "text",
        "train_path": write("train.csv", 61),
        "test_path": write("test.csv", 31),
        "model": model,
        "max_seq_len": 32,
        "optimiser": "adamw",
        "learning_rate": 3e-3,
        "batch_size": 4,
        "num_local_epochs": 1,
        "num_rounds": NUM_ROUNDS,
        "site_ids": [0, 0, 0, 0, 0, 0],
    }


def fork(program: Callable[[], object], output: Path) -> int:
    """Run a program in a fork of this process, which shares its imports; return the process id."""
    pid = os.fork()
    if pid:
        return pid
    status = 70
    try:
        file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, 1)
        os.dup2(file, 2)
        for name, number in {"stdout": 1, "stderr": 2}.items():
            stream = open(number, "w", buffering=1, closefd=False)  # noqa: SIM115
            setattr(sys, name, stream)
            setattr(sys, f"__{name}__", stream)
        faulthandler.enable(stream)  # prints where a command hangs, see `stop`
        tqdm.set_lock(RLock())  # all forks share the default lock, and a killed fork never releases it
        program()
        status = 0
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)


def run_script(settings: dict[str, object], folder: Path, **environment: str) -> None:
    """Run the command in a folder, which gets its checkpoints and records."""
    os.chdir(folder)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "OMP_NUM_THREADS", "SACRED_HOST"):
        os.environ.pop(name, None)
    os.environ |= {"SACRED_RUNS_DIR": "runs", "HF_HUB_OFFLINE": "1", **environment}
    settings = settings | {"checkpoints_dir": "checkpoints"}
    sys.argv = [str(SCRIPT), "with", *(f"{key}={value}" for key, value in settings.items())]
    runpy.run_path(str(SCRIPT), run_name="__main__")


def start(settings: dict[str, object], folder: Path, num_ranks: int, planned: PlannedKill | None, board: Board) -> int:
    """Start the command, whose ranks write their phases on the board and end as planned; return its process id."""

    def program() -> None:
        watch_phases(board, planned)
        run_script(settings, folder, RANKS=str(num_ranks))

    return fork(program, folder / "output.txt")


def watch_phases(board: Board, planned: PlannedKill | None) -> None:
    """Let this process and its forks write their phases on the board, and end as planned."""
    fraction = planned.fraction if planned else 0

    def die() -> None:
        board.own_row().killed = time.monotonic()
        os.kill(os.getpid(), signal.SIGKILL)

    def around(call: Callable, *args: Any, **options: Any) -> Any:
        if fraction < 0.5:
            die()
        call(*args, **options)  # afterwards a collective has started, or a file has its name
        die()

    def within(call: Callable, *args: Any, **options: Any) -> Any:
        Timer(fraction * 0.03, die).start()  # a site takes about 30 ms
        return call(*args, **options)

    def halfway(call: Callable, filesystem: Any, path: str, data: bytes) -> None:
        call(filesystem, path, data[: int(fraction * len(data))])
        die()

    def watch(owner: Any, name: str, phase: str, kill: Callable) -> None:
        call, num_calls = getattr(owner, name), 0

        def watched(*args: Any, **options: Any) -> Any:
            nonlocal num_calls
            num_calls += 1
            row = board.own_row()
            before, row.phase = row.phase, PHASES.index(phase)
            try:
                if planned and (planned.rank, planned.target, planned.call) == (board.own_rank(), phase, num_calls):
                    return kill(call, *args, **options)
                return call(*args, **options)
            finally:
                row.phase = before

        setattr(owner, name, watched)

    for row in board.rows:
        row.process = row.phase = row.killed = 0
    watch(local_training, "take_steps", TRAINING, within)
    watch(Federation, "score", EVALUATION, within)
    watch(GlobalModel, "step", STEP, within)
    watch(dist, "all_reduce", COLLECTIVE, around)
    watch(storage, "write_bytes", WRITING, halfway)
    watch(LocalFileSystem, "mv", RENAMING, around)


def rounds_on_disk(folder: Path, known: set[Path] | None = None) -> list[int]:
    """Return the rounds that have a checkpoint, and check the files that are not among the known ones.

    Raises:
        ValueError: a file is damaged.
    """
    found = [path for path in (folder / "checkpoints").glob("*") if checkpoint.NAME.fullmatch(path.name)]
    for path in set(found) - (known or set()):
        with suppress(FileNotFoundError):  # removed by keep_checkpoints
            checkpoint.read(str(path))
    if known is not None:
        known.update(found)
    return sorted(int(path.stem.removeprefix("round-")) for path in found)


def stop(processes: list[int]) -> None:
    """End processes that hang; they first print where."""
    for number in (signal.SIGABRT, signal.SIGKILL):
        for process in processes:
            with suppress(ProcessLookupError):
                os.kill(process, number)
        time.sleep(0.5)


def wait(
    pid: int, folder: Path, victim: Callable[[], int | None], number: int = signal.SIGKILL
) -> tuple[int, float | None]:
    """Wait for a command, check its checkpoints, and send a signal to `victim()` as soon as that is a process.

    Returns:
        The exit status, and the time of the signal, if there was one.
    """
    known: set[Path] = set()
    began, signalled = time.monotonic(), None
    while True:
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status), signalled
        if signalled is None and (process := victim()) is not None:
            with suppress(ProcessLookupError):  # it has just ended
                os.kill(process, number)
                signalled = time.monotonic()
        if time.monotonic() - began > HANG_SECONDS:
            stop([*descendants(pid), pid])
            os.waitpid(pid, 0)
            raise TimeoutError(f"the command hangs: {(folder / 'output.txt').read_text()}")
        rounds_on_disk(folder, known)
        time.sleep(0.01)


def kill_once(
    settings: dict[str, object], folder: Path, planned: PlannedKill, next_ranks: int, board: Board
) -> Kill | None:
    """Start the command and kill one of its ranks. Return None if the run completed before.

    Raises:
        AssertionError: it did not end as expected.
    """
    before = rounds_on_disk(folder)
    began = time.monotonic()
    pid = start(settings, folder, planned.num_ranks, planned, board)

    def victim() -> int | None:
        if planned.target != ANY or time.monotonic() - began < 3 * planned.fraction:
            return None
        if planned.num_ranks == 1:
            return pid
        ranks = sorted({row.process for row in board.rows} & set(descendants(pid)))
        return ranks[planned.rank % len(ranks)] if ranks else None

    status, signalled = wait(pid, folder, victim)
    ended = time.monotonic()
    output = (folder / "output.txt").read_text()
    if status == 0:
        return None
    rank = planned.rank
    killed = signalled or board.rows[rank].killed
    after = rounds_on_disk(folder)
    assert killed > began, f"no rank was killed: {output}"
    assert ended - killed < END_SECONDS, f"{ended - killed:.1f} s: {output}"
    if planned.num_ranks == 1:
        assert status == -signal.SIGKILL, output
    else:
        assert status == 128 + signal.SIGKILL, output
        (found,) = re.findall(r"^error: rank (\d+) was ended by SIGKILL", output, re.MULTILINE)
        assert planned.target == ANY or int(found) == rank, output
        rank = int(found)
    assert max(after, default=0) >= max(before, default=0), "a round is lost"
    parts = list((folder / "checkpoints").glob(".round*.part"))
    return Kill(
        phase=PHASES[board.rows[rank].phase],
        num_ranks=planned.num_ranks,
        rank=rank,
        next_ranks=next_ranks,
        seconds=ended - killed,
        last_round=max(after, default=0),
        is_torn=bool(parts),
    )


def interrupt_once(settings: dict[str, object], folder: Path, num_ranks: int, moment: float) -> Stop | None:
    """Start the command and send it SIGTERM after some seconds. Return None if the run completed before.

    Raises:
        AssertionError: it did not end as expected.
    """
    records = set((folder / "runs").glob("[0-9]*"))
    (folder / "output.txt").write_text("")
    began = time.monotonic()
    pid = start(settings, folder, num_ranks, None, Board())
    status, signalled = wait(pid, folder, lambda: pid if time.monotonic() - began > moment else None, signal.SIGTERM)
    if status == 0:
        return None
    seconds = time.monotonic() - (signalled or began)
    output = (folder / "output.txt").read_text()
    assert seconds < END_SECONDS, f"{seconds:.1f} s: {output}"
    assert "Traceback" not in output, output
    assert not [path for path in folder.rglob("*") if ".part" in path.name], "a part of a file"
    is_completed = re.search(r"^final  ", output, re.MULTILINE) is not None
    new = set((folder / "runs").glob("[0-9]*")) - records
    reports = [json.loads((path / "run.json").read_text()) for path in new]
    if status == -signal.SIGTERM:  # Python had just started, or was about to end
        assert is_completed or not reports, output
    else:
        assert status == 128 + signal.SIGTERM, output
        assert output.count("interrupted by SIGTERM\n") == 1, output
        statuses = [report["status"] for report in reports]
        assert statuses in ([], ["INTERRUPTED"]) or (is_completed and statuses == ["COMPLETED"]), (statuses, output)
    table = re.findall(r"^ +(\d+) \|", output, re.MULTILINE)
    when = AT_THE_END if is_completed else "in a round" if table else "before round 0"
    return Stop(when, num_ranks, seconds)


def finish(settings: dict[str, object], folder: Path, num_ranks: int) -> Result:
    """Run or resume the command to its end.

    Raises:
        AssertionError: it failed.
    """
    pid = start(settings, folder, num_ranks, None, Board())
    status, _ = wait(pid, folder, lambda: None)
    return read_result(status, folder)


def read_result(status: int, folder: Path) -> Result:
    """Return the weights and metrics of a completed command; check that output, record and checkpoint agree."""
    output = (folder / "output.txt").read_text()
    assert status == 0, output
    (weights,) = re.findall(r"^weights +SHA-256 (\w{64})$", output, re.MULTILINE)
    record = max((folder / "runs").glob("[0-9]*"), key=lambda path: int(path.name))
    logged = json.loads((record / "metrics.json").read_text())
    metrics = {
        name: (values["steps"], values["values"]) for name, values in logged.items() if not VARYING_METRICS.match(name)
    }
    last = checkpoint.read(str(folder / "checkpoints" / f"round-{max(rounds_on_disk(folder))}.pt"))
    saved = {
        name: [(round_, row[name]) for round_, row in enumerate(last["history"]) if name in row] for name in metrics
    }
    assert saved == {name: list(zip(*pair, strict=True)) for name, pair in metrics.items()}, "the record differs"
    return Result(weights, len(last["history"]) - 1, metrics)


def campaign(settings: dict[str, object], folder: Path, num_kills: int, random: Random) -> Result:
    """Train a federation while ranks are killed in each phase; start a new one when it has completed.

    Raises:
        AssertionError: a command did not end as expected, or two runs that were killed differ.
    """
    results: list[Result] = []
    kills: list[Kill] = []
    targets: list[str] = []
    board = Board()
    run_folder = folder / "0"
    run_folder.mkdir(parents=True)
    planned = None
    while len(kills) < num_kills:
        targets = targets or random.sample(list(TARGETS), len(TARGETS))
        planned = planned or PlannedKill.sample(random, targets.pop())
        upcoming = PlannedKill.sample(random, targets.pop() if targets else random.choice(list(TARGETS)))
        if kill := kill_once(settings, run_folder, planned, upcoming.num_ranks, board):
            kills.append(kill)
        else:
            results.append(read_result(0, run_folder))
            run_folder = folder / str(len(results))
            run_folder.mkdir()
        planned = upcoming
    results.append(finish(settings, run_folder, planned.num_ranks if planned else 1))
    assert all(result == results[0] for result in results), "runs that were killed differ"
    return replace(results[0], kills=kills)


def interruptions(
    settings: dict[str, object], folder: Path, num_signals: int, random: Random, ranks: Sequence[int] = NUM_RANKS
) -> Result:
    """Train federations to their end while their command gets SIGTERM.

    Raises:
        AssertionError: a command did not end as expected, or two runs that were interrupted differ.
    """
    duration, results = {}, []
    for num_ranks in ranks:
        run_folder = folder / f"alone-{num_ranks}"
        run_folder.mkdir(parents=True)
        began = time.monotonic()
        results.append(finish(settings, run_folder, num_ranks))
        duration[num_ranks] = time.monotonic() - began
    stops: list[Stop] = []
    run_folder = folder / "0"
    run_folder.mkdir()
    while len(stops) < num_signals:
        num_ranks = random.choice(ranks)
        stop = interrupt_once(settings, run_folder, num_ranks, random.uniform(0, duration[num_ranks]))
        stops += [stop] if stop else []
        if stop is None or stop.when == AT_THE_END or len(stops) == num_signals:
            done = read_result(0, run_folder) if stop is None else finish(settings, run_folder, random.choice(ranks))
            results.append(done)
            run_folder = folder / str(len(results))
            run_folder.mkdir()
    assert all(result == results[0] for result in results), "runs that were interrupted differ"
    return replace(results[0], stops=stops)


def compare(result: Result, alone: Result, strategy: str, events: str) -> None:
    """Check that a campaign ended as the run without interruption, and print its weights."""
    if (result.weights, result.metrics) != (alone.weights, alone.metrics):
        raise SystemExit(f"error: {strategy} did not end as the run without interruption")
    print(f"{strategy}: {events}, weights SHA-256 {result.weights}", flush=True)


def print_table(title: str, groups: Mapping[str, Sequence[Kill | Stop]]) -> None:
    """Print a line for each group of kills or signals."""
    print(f"\n{title:26} times  on 1, 2, 3 ranks  longest until all had ended, s")
    for name, events in groups.items():
        if events:
            by_ranks = Counter(event.num_ranks for event in events)
            numbers = ", ".join(str(by_ranks[number]) for number in NUM_RANKS)
            print(f"{name:26} {len(events):>5}  {numbers:>16}  {max(event.seconds for event in events):>31.1f}")


def print_summary(kills: list[Kill], seconds: float) -> None:
    """Print how often ranks were killed."""
    changed = sum(kill.next_ranks != kill.num_ranks for kill in kills)
    print(
        f"\n{len(kills)} kills and as many resumptions, {changed} on another number of ranks, in {seconds:.0f} s; "
        f"{sum(kill.is_torn for kill in kills)} left a part of a checkpoint.\n"
        "Weights and metrics are equal to those of runs without interruption. Rounds lost: 0"
    )


def main() -> None:
    """Run the campaigns of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=60)
    parser.add_argument("--signals", type=int, default=0)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(1)  # a pool of threads does not survive a fork
    transformers.utils.logging.disable_progress_bar()
    runpy.run_path(str(SCRIPT))  # imports what the forks need
    random, kills, stops, began = Random(options.seed), [], [], time.monotonic()
    with tempfile.TemporaryDirectory(prefix="chaos-") as name:
        base = make_files(Path(name, "files"))
        for number, strategy in enumerate(STRATEGIES):
            num_kills, num_signals = ((count + number) // len(STRATEGIES) for count in (options.kills, options.signals))
            settings, folder = base | {"strategy": strategy}, Path(name, strategy)
            (folder / "alone").mkdir(parents=True)
            alone = finish(settings, folder / "alone", num_ranks=1)
            killed = campaign(settings, folder, num_kills, random)
            compare(killed, alone, strategy, f"{num_kills} kills")
            kills += killed.kills
            if num_signals:
                stopped = interruptions(settings, folder / "signals", num_signals, random)
                compare(stopped, alone, strategy, f"{num_signals} times SIGTERM")
                stops += stopped.stops
    print_table("a rank was killed in", {phase: [kill for kill in kills if kill.phase == phase] for phase in PHASES})
    print_summary(kills, time.monotonic() - began)
    if stops:
        moments = ("before round 0", "in a round", AT_THE_END)
        print_table("SIGTERM came", {when: [stop for stop in stops if stop.when == when] for when in moments})


if __name__ == "__main__":
    main()

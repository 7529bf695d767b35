"""Kill ranks at random moments, start again on other numbers of ranks, and compare with runs that nobody touched.

A federation of six sites, with dropout and AdamW, trains on 1, 2 or 3 local ranks. At a moment that the
seed draws, a rank gets SIGKILL: while a site trains, in a collective, in the server's step, in
evaluation, with a checkpoint half written, around its renaming, or whatever it is doing. Then the same command
goes on, until the run is through. It must end with the weights and metrics of a run that was left alone, and each
checkpoint must be whole as soon as it has its name. Linux only, as ranks are found in /proc.

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
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from threading import RLock, Timer
from typing import Any

import torch
import torch.distributed as dist
import transformers
from fsspec.implementations.local import LocalFileSystem
from tqdm import tqdm
from transformers import BertConfig, BertForSequenceClassification, BertTokenizerFast

from scaling_fl.federation import round
from scaling_fl.federation.global_model import GlobalModel
from scaling_fl.records import checkpoint

SCRIPT = Path(__file__).parent.parent / "scripts" / "train_federated.py"
STRATEGIES = ("fedavg", "fedadam", "diloco")
NUM_ROUNDS = 6
NUM_RANKS = (1, 2, 3)
SOON = 45.0  # seconds from a kill until the command has ended, on a very busy machine
PATIENCE = 120.0  # seconds after which a command that was not killed hangs
WORDS = "goal match team chip code disk soup bread salt the a of and in on was very old new good".split()  # noqa: SIM905
# What differs from run to run and is no result: seconds, and bytes, of which more ranks send more.
INCIDENTAL = re.compile(r"(time|comm|speed)\.|sites\.(seconds|memory_mb)\.")

TRAINING, COLLECTIVE, STEP, EVALUATION = "local training", "collective", "server step", "evaluation"
WRITING, RENAMING, ANY = "checkpoint half written", "checkpoint renamed", "any moment"
PHASES = ("elsewhere", TRAINING, COLLECTIVE, STEP, EVALUATION, WRITING, RENAMING)  # as the board knows them
AT_THE_END = "after the last round"
# What a strike can aim at, and the most calls of a rank in about two rounds.
AIMS = {TRAINING: 4, COLLECTIVE: 40, STEP: 2, EVALUATION: 2, WRITING: 2, RENAMING: 2, ANY: 0}


class Row(ctypes.Structure):
    """What one rank does."""

    _fields_ = (("process", ctypes.c_int64), ("phase", ctypes.c_int64), ("killed", ctypes.c_double))


class Board:
    """What each rank does, in memory that forks share: it can be read when the rank is dead."""

    def __init__(self) -> None:
        self._memory = mmap.mmap(-1, mmap.PAGESIZE)
        self.rows = (Row * max(NUM_RANKS)).from_buffer(self._memory)

    def own(self) -> Any:
        """Return the row of the calling rank."""
        row = self.rows[int(os.environ.get("RANK", "0"))]
        row.process = os.getpid()
        return row


@dataclass(frozen=True)
class Strike:
    """Where a rank is to die: in its `call`-th call of a phase, at a fraction of it."""

    aim: str
    num_ranks: int
    rank: int
    call: int
    fraction: float

    @staticmethod
    def draw(random: Random, aim: str) -> "Strike":
        """Draw a strike. Rank 0 alone writes checkpoints."""
        num_ranks = random.choice(NUM_RANKS)
        rank = 0 if aim in (WRITING, RENAMING) else random.randrange(num_ranks)
        return Strike(aim, num_ranks, rank, random.randint(1, max(AIMS[aim], 1)), random.random())


@dataclass(frozen=True)
class Kill:
    """What a strike did."""

    phase: str
    num_ranks: int
    rank: int
    next_ranks: int  # with which the run went on
    seconds: float  # until the command had ended
    last_round: int  # on disk
    is_torn: bool  # it left a part of a checkpoint, aside


@dataclass(frozen=True)
class Stop:
    """What SIGTERM did."""

    when: str
    num_ranks: int
    seconds: float  # until the command had ended


@dataclass
class Result:
    """How a run ended, or the runs of a campaign together."""

    weights: str
    num_rounds: int
    metrics: dict[str, tuple[list[int], list[float]]]  # name -> rounds and values
    kills: list[Kill] = field(default_factory=list)
    stops: list[Stop] = field(default_factory=list)


def make_files(folder: Path) -> dict[str, object]:
    """Write a tiny model and texts that it can learn; return the settings of a federation with them."""
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
    """Run a program in a fork of this process, which has imported all that takes long; return its process id."""
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
        faulthandler.enable(stream)  # says where a command hangs, see `stop`
        tqdm.set_lock(RLock())  # its own is shared by all forks, and would stay locked if one is killed that holds it
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
    """Do what the command does in a folder, where it leaves checkpoints and records."""
    os.chdir(folder)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "OMP_NUM_THREADS", "SACRED_HOST"):
        os.environ.pop(name, None)
    os.environ |= {"SACRED_RUNS_DIR": "runs", "HF_HUB_OFFLINE": "1", **environment}
    settings = settings | {"checkpoints_dir": "checkpoints"}
    sys.argv = [str(SCRIPT), "with", *(f"{key}={value}" for key, value in settings.items())]
    runpy.run_path(str(SCRIPT), run_name="__main__")


def start(settings: dict[str, object], folder: Path, num_ranks: int, strike: Strike | None, board: Board) -> int:
    """Start the command, whose ranks write on the board what they do and die by the strike; return its process id."""

    def program() -> None:
        watch_phases(board, strike)
        run_script(settings, folder, RANKS=str(num_ranks))

    return fork(program, folder / "output.txt")


def watch_phases(board: Board, strike: Strike | None) -> None:
    """Let this process and its forks write on the board what they do, and die where the strike says."""

    def die() -> None:
        board.own().killed = time.monotonic()
        os.kill(os.getpid(), signal.SIGKILL)

    def around(call: Callable, *args: Any, **options: Any) -> Any:
        if strike and strike.fraction < 0.5:
            die()
        call(*args, **options)  # a collective is under way then, a file has its name
        die()

    def within(call: Callable, *args: Any, **options: Any) -> Any:
        Timer((strike.fraction if strike else 0) * 0.03, die).start()  # a site takes some 30 ms
        return call(*args, **options)

    def halfway(call: Callable, filesystem: Any, path: str, data: bytes) -> None:
        call(filesystem, path, data[: int((strike.fraction if strike else 0) * len(data))])
        die()

    def watch(owner: Any, name: str, phase: str, kill: Callable, num_calls: int = 0) -> None:
        call = getattr(owner, name)

        def watched(*args: Any, **options: Any) -> Any:
            nonlocal num_calls
            num_calls += 1
            row = board.own()
            before, row.phase = row.phase, PHASES.index(phase)
            is_here = strike and strike.rank == int(os.environ.get("RANK", "0"))
            try:
                if strike and is_here and (strike.aim, strike.call) == (phase, num_calls):
                    return kill(call, *args, **options)
                return call(*args, **options)
            finally:
                row.phase = before

        setattr(owner, name, watched)

    for row in board.rows:
        row.process = row.phase = row.killed = 0
    watch(round, "train", TRAINING, within)
    watch(round, "evaluate", EVALUATION, within)
    watch(GlobalModel, "step", STEP, within)
    watch(dist, "all_reduce", COLLECTIVE, around)
    watch(checkpoint, "put", WRITING, halfway, num_calls=-1)  # the first one tries whether the folder can be written to
    watch(LocalFileSystem, "mv", RENAMING, around)


def family(pid: int) -> Iterator[int]:
    """Yield the ids of a process's descendants."""
    for children in Path(f"/proc/{pid}/task").glob("*/children"):
        with suppress(OSError):
            for child in map(int, children.read_text().split()):
                yield child
                yield from family(child)


def rounds_on_disk(folder: Path, known: set[Path] | None = None) -> list[int]:
    """Return the rounds that have a file, and read those that are not yet among the known.

    Raises:
        ValueError: one of these is not what was written.
    """
    found = [path for path in (folder / "checkpoints").glob("*") if checkpoint.NAME.fullmatch(path.name)]
    for path in set(found) - (known or set()):
        with suppress(FileNotFoundError):  # keep_checkpoints has removed it meanwhile
            checkpoint.read(str(path))
    if known is not None:
        known.update(found)
    return sorted(int(path.stem.removeprefix("round-")) for path in found)


def stop(processes: list[int]) -> None:
    """End processes that hang. They say where before."""
    for number in (signal.SIGABRT, signal.SIGKILL):
        for process in processes:
            with suppress(ProcessLookupError):
                os.kill(process, number)
        time.sleep(0.5)


def wait(
    pid: int, folder: Path, victim: Callable[[], int | None], number: int = signal.SIGKILL
) -> tuple[int, float | None]:
    """Wait for a command. Look at its checkpoints meanwhile, and signal `victim()` as soon as that is a process.

    Returns:
        Its exit status, and when somebody was signalled here.
    """
    known: set[Path] = set()
    began, struck = time.monotonic(), None
    while True:
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status), struck
        if struck is None and (process := victim()) is not None:
            with suppress(ProcessLookupError):  # it has ended meanwhile
                os.kill(process, number)
                struck = time.monotonic()
        if time.monotonic() - began > PATIENCE:
            stop([*family(pid), pid])
            os.waitpid(pid, 0)
            raise TimeoutError(f"the command hangs: {(folder / 'output.txt').read_text()}")
        rounds_on_disk(folder, known)
        time.sleep(0.01)


def strike_once(
    settings: dict[str, object], folder: Path, strike: Strike, next_ranks: int, board: Board
) -> Kill | None:
    """Start the command and kill one of its ranks. None: it was through before.

    Raises:
        AssertionError: it did not end as it should.
    """
    before = rounds_on_disk(folder)
    began = time.monotonic()
    pid = start(settings, folder, strike.num_ranks, strike, board)

    def victim() -> int | None:
        if strike.aim != ANY or time.monotonic() - began < 3 * strike.fraction:
            return None
        if strike.num_ranks == 1:
            return pid
        ranks = sorted({row.process for row in board.rows} & set(family(pid)))
        return ranks[strike.rank % len(ranks)] if ranks else None

    status, struck = wait(pid, folder, victim)
    ended = time.monotonic()
    output = (folder / "output.txt").read_text()
    if status == 0:
        return None
    rank = strike.rank
    row = board.rows[rank]
    after = rounds_on_disk(folder)
    assert (struck or row.killed) > began, f"nobody was killed: {output}"
    assert ended - (struck or row.killed) < SOON, f"{ended - (struck or row.killed):.1f} s: {output}"
    if strike.num_ranks == 1:
        assert status == -signal.SIGKILL, output
    else:
        assert status == 128 + signal.SIGKILL, output
        (found,) = re.findall(r"^error: rank (\d+) was ended by SIGKILL", output, re.MULTILINE)
        assert strike.aim == ANY or int(found) == rank, output
        rank = int(found)
    assert max(after, default=0) >= max(before, default=0), "a round is lost"
    parts = list((folder / "checkpoints").glob(".round*.part"))
    return Kill(
        phase=PHASES[board.rows[rank].phase],
        num_ranks=strike.num_ranks,
        rank=rank,
        next_ranks=next_ranks,
        seconds=ended - (struck or row.killed),
        last_round=max(after, default=0),
        is_torn=bool(parts),
    )


def interrupt_once(settings: dict[str, object], folder: Path, num_ranks: int, moment: float) -> Stop | None:
    """Start the command and send it SIGTERM after so many seconds. None: it was through before.

    Raises:
        AssertionError: it did not end as it should.
    """
    records = set((folder / "runs").glob("[0-9]*"))
    (folder / "output.txt").write_text("")
    began = time.monotonic()
    pid = start(settings, folder, num_ranks, None, Board())
    status, struck = wait(pid, folder, lambda: pid if time.monotonic() - began > moment else None, signal.SIGTERM)
    if status == 0:
        return None
    seconds = time.monotonic() - (struck or began)
    output = (folder / "output.txt").read_text()
    assert seconds < SOON, f"{seconds:.1f} s: {output}"
    assert "Traceback" not in output, output
    assert not [path for path in folder.rglob("*") if ".part" in path.name], "half a file"
    is_through = re.search(r"^final  ", output, re.MULTILINE) is not None
    new = set((folder / "runs").glob("[0-9]*")) - records
    reports = [json.loads((path / "run.json").read_text()) for path in new]
    if status == -signal.SIGTERM:  # Python had just been started, or was about to end
        assert is_through or not reports, output
    else:
        assert status == 128 + signal.SIGTERM, output
        assert output.count("interrupted by SIGTERM\n") == 1, output
        statuses = [report["status"] for report in reports]
        assert statuses in ([], ["INTERRUPTED"]) or (is_through and statuses == ["COMPLETED"]), (statuses, output)
    table = re.findall(r"^ +(\d+) \|", output, re.MULTILINE)
    when = AT_THE_END if is_through else "in a round" if table else "before round 0"
    return Stop(when, num_ranks, seconds)


def finish(settings: dict[str, object], folder: Path, num_ranks: int) -> Result:
    """Run the command, or what is left of it, to its end.

    Raises:
        AssertionError: it failed.
    """
    pid = start(settings, folder, num_ranks, None, Board())
    status, _ = wait(pid, folder, lambda: None)
    return read_result(status, folder)


def read_result(status: int, folder: Path) -> Result:
    """Return the weights and metrics of a command that is through: what it printed, logged and saved."""
    output = (folder / "output.txt").read_text()
    assert status == 0, output
    (weights,) = re.findall(r"^weights +SHA-256 (\w{64})$", output, re.MULTILINE)
    record = max((folder / "runs").glob("[0-9]*"), key=lambda path: int(path.name))
    logged = json.loads((record / "metrics.json").read_text())
    metrics = {
        name: (values["steps"], values["values"]) for name, values in logged.items() if not INCIDENTAL.match(name)
    }
    last = checkpoint.read(str(folder / "checkpoints" / f"round-{max(rounds_on_disk(folder))}.pt"))
    saved = {
        name: [(round_, row[name]) for round_, row in enumerate(last["history"]) if name in row] for name in metrics
    }
    assert saved == {name: list(zip(*pair, strict=True)) for name, pair in metrics.items()}, "the record differs"
    return Result(weights, len(last["history"]) - 1, metrics)


def campaign(settings: dict[str, object], folder: Path, num_kills: int, random: Random) -> Result:
    """Train a federation while ranks are killed, at each aim in turn; start a new one if one is through too soon.

    Raises:
        AssertionError: a command did not end as it should, or two runs that were killed differ.
    """
    results: list[Result] = []
    kills: list[Kill] = []
    aims: list[str] = []
    board = Board()
    own = folder / "0"
    own.mkdir(parents=True)
    strike = None
    while len(kills) < num_kills:
        aims = aims or random.sample(list(AIMS), len(AIMS))
        strike = strike or Strike.draw(random, aims.pop())
        upcoming = Strike.draw(random, aims.pop() if aims else random.choice(list(AIMS)))
        if kill := strike_once(settings, own, strike, upcoming.num_ranks, board):
            kills.append(kill)
        else:
            results.append(read_result(0, own))
            own = folder / str(len(results))
            own.mkdir()
        strike = upcoming
    results.append(finish(settings, own, strike.num_ranks if strike else 1))
    assert all(result == results[0] for result in results), "runs that were killed differ"
    return Result(results[0].weights, results[0].num_rounds, results[0].metrics, kills)


def interruptions(
    settings: dict[str, object], folder: Path, num_signals: int, random: Random, ranks: Sequence[int] = NUM_RANKS
) -> Result:
    """Train federations while their command gets SIGTERM, each until it is through.

    Raises:
        AssertionError: a command did not end as it should, or two runs that were interrupted differ.
    """
    length, results = {}, []
    for num_ranks in ranks:
        own = folder / f"alone-{num_ranks}"
        own.mkdir(parents=True)
        began = time.monotonic()
        results.append(finish(settings, own, num_ranks))
        length[num_ranks] = time.monotonic() - began
    stops: list[Stop] = []
    own = folder / "0"
    own.mkdir()
    while len(stops) < num_signals:
        num_ranks = random.choice(ranks)
        stop = interrupt_once(settings, own, num_ranks, random.uniform(0, length[num_ranks]))
        stops += [stop] if stop else []
        if stop is None or stop.when == AT_THE_END or len(stops) == num_signals:
            results.append(read_result(0, own) if stop is None else finish(settings, own, random.choice(ranks)))
            own = folder / str(len(results))
            own.mkdir()
    assert all(result == results[0] for result in results), "runs that were interrupted differ"
    return Result(results[0].weights, results[0].num_rounds, results[0].metrics, stops=stops)


def print_stops(stops: list[Stop]) -> None:
    """Print when SIGTERM came."""
    print(f"\n{'SIGTERM came':26} times  on 1, 2, 3 ranks  longest until all had ended, s")
    for when in ("before round 0", "in a round", AT_THE_END):
        if own := [stop for stop in stops if stop.when == when]:
            by_ranks = Counter(stop.num_ranks for stop in own)
            numbers = ", ".join(str(by_ranks[number]) for number in NUM_RANKS)
            print(f"{when:26} {len(own):>5}  {numbers:>16}  {max(stop.seconds for stop in own):>31.1f}")


def print_table(kills: list[Kill], seconds: float) -> None:
    """Print what was killed where."""
    print(f"\n{'a rank was killed in':26} kills  on 1, 2, 3 ranks  longest until all had ended, s")
    for phase in PHASES:
        if own := [kill for kill in kills if kill.phase == phase]:
            by_ranks = Counter(kill.num_ranks for kill in own)
            numbers = ", ".join(str(by_ranks[number]) for number in NUM_RANKS)
            print(f"{phase:26} {len(own):>5}  {numbers:>16}  {max(kill.seconds for kill in own):>31.1f}")
    changed = sum(kill.next_ranks != kill.num_ranks for kill in kills)
    print(
        f"\n{len(kills)} kills and as many resumptions, {changed} on another number of ranks, in {seconds:.0f} s; "
        f"{sum(kill.is_torn for kill in kills)} found a part of a checkpoint aside.\n"
        "Weights and metrics are those of runs that were left alone. Rounds lost: 0"
    )


def main() -> None:
    """Kill as often as asked."""
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
            share = (options.kills + number) // len(STRATEGIES)
            settings = base | {"strategy": strategy}
            Path(name, strategy, "alone").mkdir(parents=True)
            alone = finish(settings, Path(name, strategy, "alone"), num_ranks=1)
            result = campaign(settings, Path(name, strategy), share, random)
            kills += result.kills
            if (result.weights, result.metrics) != (alone.weights, alone.metrics):
                raise SystemExit(f"error: {strategy} did not end as the run that was left alone")
            print(f"{strategy}: {share} kills, weights SHA-256 {result.weights}", flush=True)
            if share := (options.signals + number) // len(STRATEGIES):
                result = interruptions(settings, Path(name, strategy, "signals"), share, random)
                stops += result.stops
                if (result.weights, result.metrics) != (alone.weights, alone.metrics):
                    raise SystemExit(f"error: {strategy} did not end as the run that was left alone")
                print(f"{strategy}: {share} times SIGTERM, weights SHA-256 {result.weights}", flush=True)
    print_table(kills, time.monotonic() - began)
    if stops:
        print_stops(stops)


if __name__ == "__main__":
    main()

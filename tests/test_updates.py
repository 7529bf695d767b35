"""The words after `with` on the command line: settings by name, and files of settings."""

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers import Command

from scaling_fl.command import experiment as command
from scaling_fl.command.arguments import insert_files

SENTENCES = {
    "model.name=a": "'model.name': expected the name of a setting, got an unknown one. Did you mean model?",
    "model.=a": "'model.': expected the name of a setting, got an unknown one. Did you mean model?",
    ".model=a": "'.model': expected the name of a setting, got an unknown one. Did you mean model?",
    "model[0]=a": "'model[0]': expected the name of a setting, got an unknown one. Did you mean model?",
    "site_paths.x=1": "'site_paths.x': expected the name of a setting, got an unknown one. Did you mean site_paths?",
    "model.config.a=0": "'model.config.a': expected the name of a setting, got an unknown one. Did you mean model?",
    "seed.a.b=1": "'seed.a.b': expected the name of a setting, got an unknown one. Did you mean seed?",
    "num-rounds=1": "'num-rounds': expected the name of a setting, got an unknown one. Did you mean num_rounds?",
    "$where=1": "'$where': expected the name of a setting, got an unknown one. print_config lists all settings",
    "=x": "'=x': expected name=value or a file of settings, got neither. ",
    " = ": "' = ': expected name=value or a file of settings, got neither. ",
    "with": "'with': expected name=value or a file of settings, got neither. ",
    "": "'': expected name=value or a file of settings, got neither. ",
    "missing.json": "'missing.json': expected name=value or a file of settings, got neither. ",
    "folder.json": "'folder.json': expected name=value or a file of settings, got neither. ",
    "dotted.json": "'model.name': expected the name of a setting, got an unknown one. Did you mean model?",
    "number.yaml": "1: expected the name of a setting, got an unknown one. print_config lists all settings",
    "list.json": 'list.json: expected settings such as {"seed": 2} in JSON (.json) or YAML (.yaml), got a list',
    "text.yaml": 'text.yaml: expected settings such as {"seed": 2} in JSON (.json) or YAML (.yaml), got a str',
    "empty.json": "empty.json: expected settings such as ",
    "empty.yaml": 'empty.yaml: expected settings such as {"seed": 2} in JSON (.json) or YAML (.yaml), got an empty one',
    "half.json": "half.json: expected settings such as ",
    "half.yaml": "half.yaml: expected settings such as ",
    "latin.json": "latin.json: expected settings such as ",
    "a.pickle": "a.pickle: expected settings such as ",
    "a.txt": "a.txt: expected settings such as ",
}
FILES = {
    "dotted.json": b'{"seed": 2, "model.name": "a"}',
    "number.yaml": b"1: 2\n",
    "list.json": b'["seed", 2]',
    "text.yaml": b"seed\n",
    "empty.json": b"",
    "empty.yaml": b"",
    "half.json": b'{"seed": 2,',
    "half.yaml": b"seed: [2\n",
    "latin.json": '{"author": "J\xf6"}'.encode("latin-1"),
    "a.txt": b'{"seed": 2}',
}


class Trap:
    """Unpickling it makes a folder."""

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.mkdir, (Path("sprung"),)


@pytest.fixture(scope="module")
def check_updates() -> Callable[[list[str]], None]:
    return command.check_updates


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("folder.json").mkdir()
    for name, content in FILES.items():
        Path(name).write_bytes(content)
    Path("a.pickle").write_bytes(pickle.dumps(Trap()))


@pytest.mark.usefixtures("files")
@pytest.mark.parametrize("word", SENTENCES)
def test_an_unknown_word_is_one_sentence(check_updates: Callable[[list[str]], None], word: str) -> None:
    with pytest.raises(SystemExit) as caught:
        check_updates(["train.py", "--unobserved", "with", "seed=3", word, "num_rounds=2"])
    sentence = str(caught.value)
    assert sentence.startswith(f"error: {SENTENCES[word]}")
    assert "\n" not in sentence
    assert not Path("sprung").exists()


def test_a_date_in_yaml_is_a_text(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("job_name: 2026-11-21\nseed: 2\n")
    assert insert_files(["scaling-fl", "with", str(tmp_path / "a.yaml")])[2:] == ["job_name='2026-11-21'", "seed=2"]


def test_a_setting_before_with_is_one_sentence(check_updates: Callable[[list[str]], None]) -> None:
    for argv in (["train.py", "seed=2"], ["train.py", "plan", "seed=2", "with", "num_rounds=1"]):
        with pytest.raises(SystemExit, match=r"^error: 'seed=2': expected `with` before the first setting, got none: "):
            check_updates(argv)


def test_settings_and_files_of_settings_are_accepted(
    check_updates: Callable[[list[str]], None], tmp_path: Path
) -> None:
    (tmp_path / "some.json").write_text(json.dumps({"site_ids": [0, 0], "model": "a.b", "site_paths": ["a.csv"]}))
    (tmp_path / "some.yaml").write_text("seed: 2\nnum_sites: null\n")
    files = [str(tmp_path / "some.json"), str(tmp_path / "some.yaml")]
    check_updates(["train.py", "plan", "with", "seed = 3", "model=a.b=c", *files, "--name=x", "-u"])
    check_updates(["train.py", "-c", "a=b"])


@pytest.mark.parametrize("word", ["model.name=a", "model='a',['b']", "task_name='a',['b']"])
def test_a_wrong_word_prints_no_traceback(command: Command, word: str) -> None:
    key, _, value = word.partition("=")
    status, output = command("print_config", **{key: value})
    assert status == 1
    assert len(output.splitlines()) == 1
    assert output.startswith("error: ")

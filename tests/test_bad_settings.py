"""A bad setting or environment is one clear sentence on the command line, before a run starts."""

from collections.abc import Callable
from pathlib import Path

import pytest

from scaling_fl.command import experiment as command
from scaling_fl.experiment.checks import quote_text

# What is typed after `with`, and a part of the sentence.
SETTINGS: dict[tuple[str, ...], str] = {
    ("seed.b=1",): "'seed.b': expected the name of a setting, got an unknown one. Did you mean seed?",
    ("learning_rat=1",): "'learning_rat': expected the name of a setting, got an unknown one. Did you mean",
    ("=1",): "'=1': expected name=value or a file of settings, got neither",
    ("seed=-1",): "seed: expected a whole number >= 0 and < 4294967296, got -1",
    ("seed=4294967296",): "seed: expected a whole number >= 0 and < 4294967296, got 4294967296",
    ("learning_rate=fast",): "learning_rate: expected a number > 0, got 'fast'",
    ("learning_rate=-1",): "learning_rate: expected a number > 0, got -1",
    ("learning_rate=nan",): "learning_rate: expected a number > 0, got 'nan'",
    ("learning_rate=1e999",): "learning_rate: expected a number > 0, got inf",
    ("learning_rate=1" + "0" * 400,): "learning_rate: expected a number > 0, got 1000",
    ("learning_rate=True",): "learning_rate: expected a number > 0, got True",
    ("learning_rate=__import__('os').mkdir('sprung')",): "learning_rate: expected a number > 0, got ",
    ("server_learning_rate=1e300",): "server_learning_rate: expected a number > 0 and < 1e+36 or None, got 1e+300",
    ("proximal_mu=1e300",): "proximal_mu: expected a number >= 0 and < 1e+36, got 1e+300",
    ("proximal_mu=-1",): "proximal_mu: expected a number >= 0 and < 1e+36, got -1",
    ("server_momentum=1", "strategy=fedavgm"): "server_momentum: expected a number >= 0 and < 1 or None, got 1",
    ("server_beta2=1", "strategy=fedyogi"): "server_beta2: expected a number >= 0 and < 1 or None, got 1",
    ("server_tau=1e-20", "strategy=fedadam"): "server_tau: expected a number > 1e-18 and < 1e+18 or None, got 1e-20",
    ("server_beta2=0.9", "strategy=fedadagrad"): "server_beta2: expected None, as strategy='fedadagrad' does not",
    ("server_momentum=0.9",): "server_momentum: expected None, as strategy='fedavg' does not use it, got 0.9. Leave it",
    ("dirichlet_alpha=0.5",): "dirichlet_alpha: expected None, as partition='iid' does not use it, got 0.5. Leave it",
    ("dirichlet_alpha=0", "partition=dirichlet"): "dirichlet_alpha: expected a number > 0 or None, got 0",
    ("batch_size=True",): "batch_size: expected a whole number >= 1, got True",
    ("batch_size=0",): "batch_size: expected a whole number >= 1, got 0",
    ("num_rounds=three",): "num_rounds: expected a whole number >= 0, got 'three'",
    ("num_rounds=1.5",): "num_rounds: expected a whole number >= 0, got 1.5",
    ("num_rounds=",): "num_rounds: expected a whole number >= 0, got ''",
    ("site_ids=4",): "site_ids: expected a list of GPU ids such as [0,0,1,1], got 4",
    ("site_ids=[]",): "site_ids: expected a list of GPU ids such as [0,0,1,1], got []",
    ("site_ids=[0,0",): "site_ids: expected a list of GPU ids such as [0,0,1,1], got '[0,0'",
    ("site_ids=[0,-1]",): "site_ids: expected a list of GPU ids such as [0,0,1,1], got [0, -1]",
    ("site_ids=[0.5]",): "site_ids: expected a list of GPU ids such as [0,0,1,1], got [0.5]",
    ("site_ids=[[0]]",): "site_ids: expected a list of GPU ids such as [0,0,1,1], got [[0]]",
    ("iid_split=1",): "iid_split: expected True or False, got 1",
    ("iid_split=false",): "iid_split: expected True or False, got 'false'",
    ("max_seq_len=0",): "max_seq_len: expected a whole number >= 1, got 0",
    ("keep_checkpoints=0",): "keep_checkpoints: expected a whole number >= 1 or None, got 0",
    ("task_name=None",): "task_name: expected one of bbcnews, ",
    ("task_name=AGNEWS",): "task_name: expected one of bbcnews, agnews, ",
    ("task_name=[1]",): "task_name: expected one of bbcnews, ",
    ("optimiser=lion",): "optimiser: expected one of sgd, adamw, adamw8bit, got 'lion'",
    ("strategy=median",): "strategy: expected one of fedavg, fedavgm, ",
    ("partition=stripes",): "partition: expected one of iid, by_label, shards, few_labels, dirichlet, dirichlet_sites,",
    ("partition=natural",): "site_column: expected a value, as partition='natural' has no default, got None",
    ("site_column=user",): "site_column: expected None, as partition='iid' does not use it, got 'user'. Leave it out",
    ("labels_per_site=2", "partition=shards"): "labels_per_site: expected None, as partition='shards' does not use it",
    (
        "sizes=[1,0]",
        "partition=sizes",
    ): "sizes: expected linear, exponential, or a list with a number > 0 for each site",
    ("sizes=square", "partition=sizes"): "such as [3,1,1] or None, got 'square'",
    ("min_examples=0",): "min_examples: expected a whole number >= 1, got 0",
    (
        "task_name=text",
        "min_examples=2",
        "site_paths=['a','b','c','d']",
    ): "min_examples: expected 1, as the data of site_paths is not",
    (
        *("task_name=text", "partition=natural", "site_column=s"),
        "site_paths=['a','b','c','d']",
    ): "partition: expected 'iid', as the data of site_paths is not partitioned, got 'natural'",
    ("comm_dtype=int4",): "comm_dtype: expected one of exact, float32, bfloat16, float16, int8, got 'int4'",
    ("model=",): "model: expected a text, got ''",
    ("text_column=",): "text_column: expected a text or None, got ''",
    ("checkpoints_dir=",): "checkpoints_dir: expected a text or None, got ''",
    ("labels=[a,b]",): "labels: expected a list of two or more labels such as ['no','yes'] or None, got '[a,b]'",
    ("labels=['a','a ']",): "labels: expected names that differ and are not empty, got ['a',",
    ("labels=[0,1]", "task_name=imdb"): "has its own (neg, pos)",
}
# SACRED_HOST, and a part of the sentence.
HOSTS = {
    "127.0.0.1:99999": "Port must be",
    "127.0.0.1:0": "Port must be an integer between 0 and 65535",
    "127.0.0.1:-1": "Port",
    "127.0.0.1:": "Port",
    "http://127.0.0.1:9": "URI must begin with 'mongodb://' or 'mongodb+srv://'",
    "mongodb://": "Empty host",
    "[::1": "an IPv6 address",
    "mongodb+srv://127.0.0.1": "",
    "mongodb+srv://a.b:27017": "must not include a port number",
    "mongodb://me:s@cr:e/t%$@127.0.0.1:9": "",
}


@pytest.fixture
def refuse(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """Returns the one sentence with which a command is refused, and checks that it creates no file."""
    monkeypatch.chdir(tmp_path)

    def run(argv: list[str]) -> None:
        command.check_updates(argv)
        command.experiment.run_commandline(argv)

    def refuse(*words: str) -> str:
        given = ["with", *words] if words else []
        with pytest.raises(SystemExit) as caught:
            run([quote_text(word) for word in ["train_federated.py", "plan", *given]])
        sentence = str(caught.value)
        assert sentence.startswith("error: ")
        assert "\n" not in sentence
        assert len(sentence) < 800
        assert list(tmp_path.iterdir()) == []
        return sentence

    return refuse


@pytest.mark.parametrize("words", SETTINGS, ids=lambda words: " ".join(words)[:40])
def test_a_bad_setting_is_one_clear_sentence(refuse: Callable[..., str], words: tuple[str, ...]) -> None:
    assert SETTINGS[words] in refuse(*words)


@pytest.mark.parametrize("host", HOSTS)
def test_an_invalid_host_is_one_clear_sentence_without_the_password(
    refuse: Callable[..., str], monkeypatch: pytest.MonkeyPatch, host: str
) -> None:
    for name, value in (("HOST", host), ("USER", "so me@:/%$"), ("PASSWORD", "s@cr:e/t%$")):
        monkeypatch.setenv(f"SACRED_{name}", value)
    sentence = refuse()
    assert "SACRED_HOST: expected the address of a MongoDB server, got " in sentence
    assert HOSTS[host] in sentence
    assert "s@cr" not in sentence
    assert "s%40cr" not in sentence


@pytest.mark.parametrize(
    ("variable", "says"),
    [
        ("SACRED_DATABASE=a/b $.", "SACRED_DATABASE: expected the name of a database, got 'a/b $.' ("),
        ("RANKS=0", "RANKS: expected a whole number from 1, got '0'"),
        ("RANKS=many", "RANKS: expected a whole number from 1, got 'many'"),
        ("OMP_NUM_THREADS=x", "OMP_NUM_THREADS: expected a whole number from 1, got 'x'"),
    ],
)
def test_a_bad_environment_is_one_clear_sentence(
    refuse: Callable[..., str], monkeypatch: pytest.MonkeyPatch, variable: str, says: str
) -> None:
    monkeypatch.setenv("SACRED_HOST", "127.0.0.1:9" if "SACRED" in variable else "")
    monkeypatch.setenv(*variable.split("="))
    assert says in refuse()

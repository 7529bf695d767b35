"""Sites with separate files: the placement changes nothing, and no content of a file leaves its node."""

import json
import os
import re
import socket
from ast import literal_eval
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from datasets import Dataset
from helpers import LABELS, WORDS, Command, accuracies, succeed, weights_hash
from transformers import AutoTokenizer

from scaling_fl.data.reader import pick, read_file
from scaling_fl.data.site_files import SiteFile, labels_to_send
from scaling_fl.distributed.heartbeat import _make_report
from scaling_fl.distributed.world import world

READ = ("all_reduce", "broadcast", "all_gather")  # the collectives that are called
SIZES = (17, 9, 23)


@pytest.fixture(scope="session")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[list[str]]:
    """A training file for each of three sites, and a test file for two; the second site has one label only."""
    folder, random = tmp_path_factory.mktemp("sites"), np.random.default_rng(1)

    def write(name: str, count: int, labels: tuple[str, ...]) -> str:
        rows = [f"{' '.join(random.choice(WORDS, 5))},{labels[row % len(labels)]}" for row in range(count)]
        (folder / name).write_text("\n".join(["text,label", *rows]) + "\n")
        return str(folder / name)

    train = [write(f"{i}.csv", size, LABELS if i != 1 else LABELS[:1]) for i, size in enumerate(SIZES)]
    return [[train[0], write("0-test.csv", 8, LABELS)], [train[1]], [train[2], write("2-test.csv", 13, LABELS)]]


def with_files(files: list, **others: object) -> dict[str, object]:
    return {
        "site_paths": json.dumps(files).replace(" ", ""),
        "site_ids": str([0] * len(files)).replace(" ", ""),
        "train_path": None,
        "test_path": None,
        **others,
    }


def start_node(command: Command, number: int, port: int, local_rank: int = 0, **settings: object) -> int:
    """Run one of two nodes in the background: one process, no launcher; returns its process id."""
    pid = os.fork()
    if pid:
        return pid
    node = {"RANK": str(number), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    node["LOCAL_RANK"] = str(local_rank)
    status, output = 1, ""
    try:
        folder = Path(f"node-{number}")
        folder.mkdir(exist_ok=True)
        status, output = command(env={**node, "GLOO_SOCKET_IFNAME": "lo"}, folder=folder, **settings)
        Path(f"node-{number}.txt").write_text(output)
    finally:
        os._exit(status)


@pytest.fixture
def two_nodes(command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[str]]:
    """Runs two nodes with different settings, and returns their outputs."""
    monkeypatch.chdir(tmp_path)

    def run(*nodes: dict[str, object], status: int = 0) -> list[str]:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        started = [start_node(command, number, port, **settings) for number, settings in enumerate(nodes)]
        statuses = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in started]
        outputs = [Path(f"node-{number}.txt").read_text() for number in range(2)]
        assert statuses == [status, status], outputs
        return outputs

    return run


@pytest.mark.long(seconds=14)
def test_the_same_sites_have_the_same_weights_on_any_nodes(
    command: Command, two_nodes: Callable[..., list[str]], files: list
) -> None:
    alone = succeed(command(ranks=1, **with_files(files)))
    assert "3 with 9 to 23 examples each (of their own)" in alone
    assert "49 examples to train on\n" in alone
    assert ", on 21 test examples of " in alone
    hashes = {weights_hash(succeed(command(ranks=ranks, **with_files(files)))) for ranks in (2, 3)}
    hashes |= {weights_hash(succeed(command(ranks=2, **with_files(files[::-1]))))}
    for first, second in ((files[:2], files[2:]), (files[2:], files[:2])):
        outputs = two_nodes(with_files(first), with_files(second))
        hashes.add(weights_hash(outputs[0]))
        assert accuracies(outputs[0]) == accuracies(alone)
        for (path, *_), size in zip(files, SIZES, strict=True):
            (line,) = re.findall(rf"^site \d +.*{path}.*$", "\n".join(outputs), re.MULTILINE)
            assert line.endswith(f"{size} examples")
            assert (path in outputs[0]) == any(path == train for train, *_ in first), "a path stays on its node"
    assert hashes == {weights_hash(alone)}


@pytest.mark.long
def test_a_run_resumes_with_its_nodes_in_another_order(
    command: Command, two_nodes: Callable[..., list[str]], files: list, tmp_path: Path
) -> None:
    whole = succeed(command(num_rounds=3, **with_files(files)))
    settings = {"checkpoints_dir": tmp_path / "checkpoints"}
    two_nodes(with_files(files[:1], num_rounds=1, **settings), with_files(files[1:], num_rounds=1, **settings))
    two_nodes(with_files(files[1:], num_rounds=2, **settings), with_files(files[:1], num_rounds=2, **settings))
    resumed = succeed(command(ranks=2, num_rounds=3, **with_files(files, **settings)))
    assert weights_hash(resumed) == weights_hash(whole)
    assert accuracies(resumed) == accuracies(whole)


def test_the_test_files_are_evaluated_as_one_set(command: Command, files: list, tmp_path: Path) -> None:
    separately = succeed(command(num_rounds=0, **with_files(files)))
    parts = [Path(pair[1]).read_text().splitlines() for pair in files if len(pair) == 2]
    (tmp_path / "all.csv").write_text("\n".join([parts[0][0], *(row for part in parts for row in part[1:])]) + "\n")
    together = succeed(command(num_rounds=0, train_path=files[2][0], test_path=tmp_path / "all.csv"))
    assert accuracies(separately) == accuracies(together)
    losses = [
        float(line.split("|")[3])
        for output in (separately, together)
        for line in output.splitlines()
        if line.startswith("    0 |")
    ]
    assert losses[0] == pytest.approx(losses[1], abs=2e-4)


def test_ranks_exchange_only_weights_counts_metrics_labels_and_settings(
    command: Command, two_nodes: Callable[..., list[str]], files: list, tiny_model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All collective calls of a run are recorded on both nodes."""

    def recorded(collective: Callable, kind: str) -> Callable:
        def call(*tensors: object, **options: object) -> object:
            sent = tensors[1] if kind == "all_gather" else tensors[0]
            assert isinstance(sent, torch.Tensor)
            with open("sent.txt", "a") as file:
                file.write(f"{(kind, str(sent.dtype), sent.numel(), sent.numpy().tobytes())!r}\n")
            return collective(*tensors, **options)

        return call

    for kind in READ:
        monkeypatch.setattr(dist, kind, recorded(getattr(dist, kind), kind))
    for kind in dir(dist):
        if (
            re.match("all|reduce|gather|scatter|send|recv|isend|irecv|broadcast|barrier|batch", kind)
            and kind not in READ
        ):
            monkeypatch.setattr(dist, kind, None)  # no other collective is called
    two_nodes(with_files(files[:2]), with_files(files[2:]))

    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    texts = [row.split(",")[0] for pair in files for path in pair for row in Path(path).read_text().splitlines()[1:]]
    tokens = [tokenizer(text)["input_ids"] for text in texts]
    secrets = [text.encode() for text in texts] + [str(ids)[1:-1].encode() for ids in tokens]
    dtypes = (np.int64, np.int32, np.uint8, np.float32)
    secrets += [np.array(ids, dtype).tobytes() for ids in tokens for dtype in dtypes]
    secrets += [path.encode() for pair in files for path in pair]
    num_weights = None
    for node in range(2):
        sent = [literal_eval(line) for line in Path(f"node-{node}/sent.txt").read_text().splitlines()]
        assert len(sent) > 20
        for kind, dtype, size, data in sent:
            assert not any(secret in data for secret in secrets), (kind, dtype, size)
            if dtype == "torch.uint8":  # the text of a value: read it
                value = literal_eval(data.rstrip(b"\0").decode()) if data.rstrip(b"\0") else None
                words = set(re.findall(r"[a-z]+", repr(value)))
                assert not words & (set(WORDS) - {"of", "in", "on", "a", "the", "was", "and"}), value
            elif dtype == "torch.float32" or size > 2:  # weights and sums of them, of which there is one number
                num_weights = num_weights or size
                assert size == num_weights
            else:  # how long a text is
                assert dtype == "torch.int64"


SECRET = "raspberry"
REFUSED = {  # a file's name and content, the error on its node, and the place that other nodes report
    "a row": (
        "a.csv",
        f'text,label\na,x\n{SECRET},y,"{SECRET}"\n',
        "row 2: expected 2 fields, got 3",
        "row 2 of the train file",
    ),
    "a quote": ("a.csv", f'text,label\n"{SECRET}" a,x\n', "line 2: ',' expected", "line 2 of the train file"),
    "no label": (
        "a.csv",
        f"text,label\na,x\n{SECRET},\n",
        "expected a value in 'label', got none",
        "row 2 of the train file",
    ),
    "no header": (
        "a.csv",
        f"{SECRET},x\na,y\n",
        f"a column of '{SECRET}/a.csv' ('{SECRET}', 'x')",
        "the train file",
    ),
    "JSON": (
        "a.jsonl",
        f'{{"text": 1, "{SECRET}": 2}}',
        "row 1: text_column='text': expected texts, got a number",
        "row 1 of the train file",
    ),
    "no file": ("a.csv", "", "expected rows, got an empty file", "the train file"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_peers_learn_of_a_wrong_file_but_nothing_of_its_content(
    what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    name, content, says, where = REFUSED[what]
    (tmp_path / SECRET).mkdir()
    path = f"{SECRET}/{name}"
    Path(path).write_text(content)
    with world(), pytest.raises(ValueError, match=re.escape(says)) as caught:
        SiteFile("site_paths[0] on rank 1", "train", path).use(read_file, "text", path, "train")
    assert (
        caught.value.message_for_peers == f"{where} of site_paths[0] on rank 1 is refused: its node prints the reason"
    )


def test_labels_that_may_be_texts_are_not_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = Dataset.from_dict({"text": ["a", "b"], "label": ["pos", SECRET]})
    file = SiteFile("site_paths[0] on rank 1", "train", "a.csv")
    assert file.use(labels_to_send, rows, None) == ["pos", SECRET]
    monkeypatch.setattr("scaling_fl.data.site_files.MAX_LABELS", 1)
    known, columns = {"0": "neg", "1": "pos"}, ("text", "label")
    for work, says, where in (
        (lambda: pick(rows, "a.csv", columns, known), "row 2: expected a label out of 0, 1", "row 2 of the train file"),
        (lambda: labels_to_send(rows, None), "expected at most 1 different labels, got 2", "the train file"),
    ):
        with world(), pytest.raises(ValueError, match=says) as caught:
            file.use(work)
        assert (
            caught.value.message_for_peers
            == f"{where} of site_paths[0] on rank 1 is refused: its node prints the reason"
        )


def test_an_unexpected_error_sends_nothing_of_a_file(tmp_path: Path) -> None:
    with world(), pytest.raises(KeyError) as caught:
        SiteFile("site_paths[0] on rank 1", "test", "a.csv").use({}.__getitem__, SECRET)
    assert _make_report(caught.value) == repr(
        ("failed", "the test file of site_paths[0] on rank 1 is refused: its node prints the reason")
    )


@pytest.mark.parametrize("local_rank", [0, 1])
def test_a_refused_file_is_explained_only_by_its_rank(
    local_rank: int, two_nodes: Callable[..., list[str]], files: list, tmp_path: Path
) -> None:
    name, content, says, where = REFUSED["a row"]
    (tmp_path / name).write_text(content)
    good, bad = files[0], [str(tmp_path / name)]
    nodes = (
        [with_files([good]), with_files([bad])] if local_rank == 0 else [with_files([good, bad])] * 2
    )  # or two ranks of one of many nodes
    other, node_output = two_nodes(nodes[0], {**nodes[1], "local_rank": local_rank}, status=1)
    assert (
        other
        == f"error: rank 1: {where} of site_paths[{local_rank}] on rank 1 is refused: its node prints the reason\n"
    )
    assert node_output == f"error: '{tmp_path / name}': {says}\n"


def test_a_site_with_a_unique_label_trains_if_the_setting_names_the_labels(
    command: Command, files: list, tmp_path: Path
) -> None:
    (tmp_path / "one.csv").write_text("text,label\ngoal,typo\n")
    settings = with_files([files[0], [str(tmp_path / "one.csv")]], num_rounds=1)
    assert "or each at two sites or more" in command("--unobserved", **settings)[1]
    output = succeed(command("plan", labels=json.dumps(["typo", *LABELS]).replace(" ", ""), **settings))
    assert re.search(r"\| typo 0, sport 6, tech 6, food 5$", output, re.MULTILINE)
    assert re.search(r"\| typo 1, sport 0, tech 0, food 0$", output, re.MULTILINE)


BAD = {
    "another label": (
        "one file",
        "or each at two sites or more, got typo only in site_paths[2] on rank 0.",
    ),
    "no test file": (
        "no test",
        "site_paths: expected [training file, test file] of one site or more, got no test file",
    ),
    "a missing file": (
        "missing",
        "'/no/such.csv': expected the path or fsspec URL of a file, got none (there is no such file)",
    ),
}


@pytest.mark.long
@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("what", BAD)
def test_wrong_files_are_one_sentence(command: Command, files: list, tmp_path: Path, what: str, ranks: int) -> None:
    (tmp_path / "typo.csv").write_text("text,label\ngoal,typo\nteam,sport\n")
    given = {"one file": [files[0], files[2], [str(tmp_path / "typo.csv")]], "no test": [files[1], files[0][:1]]}
    given["missing"] = [files[0], ["/no/such.csv"]]
    kind, sentence = BAD[what]
    status, output = command("--unobserved", ranks=ranks, **with_files(given[kind]))
    assert (status, len(output.splitlines())) == (1, 1), output
    assert output.startswith("error: ")
    assert sentence in output or sentence.replace("rank 0", "rank 1") in output


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        (
            {"site_ids": "[0,0]"},
            "site_paths: expected the files of 2 sites, one for each of site_ids, got those of 3",
        ),
        ({"train_path": "x.csv"}, "train_path: expected None, as site_paths names the data, got 'x.csv'"),
        ({"max_train_examples": 5}, "max_train_examples: expected None, as site_paths names the data, got 5"),
        (
            {"partition": "by_label"},
            "partition: expected 'iid', as the data of site_paths is not partitioned, got 'by_label'",
        ),
        ({"num_sites": 5}, "num_sites: expected 3, the number of sites in the site_paths of all nodes, got 5."),
        (
            {"site_paths": "data.csv"},
            "site_paths: expected a list of paths, or of [training file, test file]",
        ),
        ({"site_paths": "[['a','b','c']]"}, "a list of paths"),
        ({"site_paths": "[]"}, "a list of paths"),
        ({"task_name": "bbcnews", "model": "minilm"}, "task_name: expected a task that takes files, got 'bbcnews'"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_settings_that_conflict_with_site_files_are_refused(
    command: Command, files: list, settings: dict[str, object], sentence: str
) -> None:
    extra = {"max_train_examples": None} if settings.get("task_name") == "bbcnews" else {}
    status, output = command("--unobserved", **{**with_files(files), **extra, **settings})
    assert status == 1
    assert sentence in output
    assert len(output.splitlines()) == 1

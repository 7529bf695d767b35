"""A model that cannot be trained on the sites' texts is refused before round 0, by a plan and by a run."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers import Command, accuracies, succeed
from safetensors.torch import load_file, save_file
from tiny_models import WORDS, edit, put_model
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

ROWS = "text,label\n" + "once upon a time,a\nthe end,b\n" * 3


@pytest.fixture
def texts(tmp_path: Path) -> dict[str, object]:
    """The settings of a run on a few texts."""
    (tmp_path / "rows.csv").write_text(ROWS)
    return {"train_path": "rows.csv", "test_path": "rows.csv", "model": "model", "max_seq_len": 8, "num_rounds": 1}


def set_weight(name: str, value: float) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        weights = load_file(folder / "model.safetensors")
        weights[name].fill_(value)
        save_file(weights, folder / "model.safetensors", {"format": "pt"})

    return spoil


@pytest.mark.parametrize(
    ("family", "options", "spoil", "says"),
    [
        (
            "bert",
            {},
            set_weight("encoder.layer.0.output.dense.bias", float("nan")),
            "error: model='model': expected a finite loss of its longest batch (2 texts of 4 tokens), got nan",
        ),
        (
            "reformer",
            {},
            lambda folder: edit(folder / "config.json", local_attn_chunk_length=5),
            "error: model='model': it cannot train on its longest batch (2 texts of 8 tokens): If training, sequence",
        ),
        (
            "bart",
            {},
            lambda folder: (folder.parent / "rows.csv").write_text(f"{ROWS}the </s> end,a\n"),
            "error: the training data: text 7 of the 7 in use: expected 1 end token '</s>', from which this model",
        ),
    ],
    ids=["not a number", "an unexpected width", "an end token in a text"],
)
def test_texts_that_a_model_refuses_are_one_sentence(
    family: str,
    options: dict[str, object],
    spoil: Callable[[Path], object],
    says: str,
    command: Command,
    texts: dict[str, object],
    tmp_path: Path,
) -> None:
    put_model(tmp_path / "model", family, **options)
    spoil(tmp_path / "model")
    for what in ((), ("plan",)):
        status, output = command(*what, **texts)
        assert (status, output.splitlines()[-1].startswith(says)) == (1, True), output
        assert "Traceback" not in output


@pytest.mark.parametrize("family", ["bert", "mixtral"])
def test_a_plan_accepts_a_model_that_works(
    family: str, command: Command, texts: dict[str, object], tmp_path: Path
) -> None:
    put_model(tmp_path / "model", family)
    edit(tmp_path / "model" / "config.json", return_dict=False)
    plan = succeed(command("plan", **texts))
    assert plan.endswith("the plan holds: a run with these settings would not be refused\n")
    assert "fake_tensor" not in plan
    output = succeed(command(**texts, report=False))
    assert "newly initialised" in output


@pytest.mark.parametrize("separate_files", [False, True])
def test_a_head_is_matched_by_the_names_of_its_labels(
    separate_files: bool, command: Command, texts: dict[str, object], tmp_path: Path
) -> None:
    model = str(tmp_path / "model")
    put_model(tmp_path / "model", "bert")
    config = AutoConfig.from_pretrained(model, id2label={0: "b", 1: "a"}, label2id={"b": 0, "a": 1})
    classifier = AutoModelForSequenceClassification.from_pretrained(model, config=config)
    classifier.classifier.weight.data *= 100  # so that its answers differ
    classifier.save_pretrained(model)
    words = [f"{a} {b} {c}" for a in WORDS[3:] for b in WORDS[3:6] for c in WORDS[5:8]]
    tokens = AutoTokenizer.from_pretrained(model)(words, return_tensors="pt")
    with torch.inference_mode():
        answers = [classifier.config.id2label[int(i)] for i in classifier.eval()(**tokens).logits.argmax(1)]
    assert len(set(answers)) == 2
    (tmp_path / "rows.csv").write_text(
        "text,label\n" + "".join(f"{a},{b}\n" for a, b in zip(words, answers, strict=True))
    )
    if separate_files:
        texts |= {"train_path": None, "test_path": None, "site_paths": '[["rows.csv","rows.csv"],"rows.csv"]'}
    output = succeed(command(**texts | {"num_rounds": 0, "site_ids": [0, 0]}))
    assert accuracies(output) == [1.0]
    assert "newly initialised: none\n" in output

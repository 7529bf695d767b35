"""A model that cannot be trained on the sites' texts is refused before round 0, by a plan as by a run."""

from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import Command, succeed
from safetensors.torch import load_file, save_file
from tiny_models import edit, put_model

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
            "error: text 7 of the 7 in use: expected 1 end token '</s>', from which this model reads its answer, got 2",
        ),
    ],
    ids=["not a number", "a width that it does not take", "an end token in a text"],
)
def test_what_a_model_does_not_take_is_one_sentence(
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
def test_a_plan_of_a_model_that_works_holds(
    family: str, command: Command, texts: dict[str, object], tmp_path: Path
) -> None:
    put_model(tmp_path / "model", family)
    edit(tmp_path / "model" / "config.json", return_dict=False)
    plan = succeed(command("plan", **texts))
    assert plan.endswith("the plan holds: nothing of it would be refused\n")
    assert "fake_tensor" not in plan
    output = succeed(command(**texts, report=False))
    assert "newly initialised" in output

"""Bases in few bits: the bits are those of transformers, and an adapter beside them keeps the promises."""

import gc
import json
import re
import shutil
import sys
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import bases
import pytest
import torch
from bases import LLAMA_1B, OF_FLOWERTUNE, OF_FULL, OPEN_3B, OPEN_7B, PUBLISHED
from helpers import Command, Play, long_but, make_bert, make_examples, refusal, succeed, weights_hash
from test_instruct import PAIRS, put_model, put_rows
from test_invariants import check_promises, list_new_objects_only, tensor_bytes, train_plainly
from tiny_llm import make_llama
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

from scaling_fl.distributed.world import world
from scaling_fl.experiment.adapting import FROZEN, adapt, identity_of_adapter
from scaling_fl.experiment.build import build, identity_of_settings
from scaling_fl.experiment.checks import check
from scaling_fl.experiment.contradictions import find_contradictions
from scaling_fl.experiment.header import describe_training
from scaling_fl.experiment.objectives import make_model
from scaling_fl.experiment.plan import plan
from scaling_fl.experiment.result import Run
from scaling_fl.experiment.run import train_on_rank
from scaling_fl.experiment.saved import load_for_use
from scaling_fl.experiment.settings import Settings
from scaling_fl.federation import aggregation
from scaling_fl.models.adapters import add_adapter, lora
from scaling_fl.models.compute import checkpoint_activations
from scaling_fl.models.flat import frozen_sha256, trained_weights
from scaling_fl.models.memory import Meter, estimate_bytes, state_bytes
from scaling_fl.models.pretrained import load_pretrained
from scaling_fl.models.quantised import find_factors, find_whole, num_bytes_of, quantise_
from scaling_fl.records.rounds import Record
from scaling_fl.training.loop import train
from scaling_fl.training.optimisers import OPTIMISERS
from scaling_fl.training.scores import score_classes, score_tokens

pytest.importorskip("peft")
pytest.importorskip("bitsandbytes")

HEAD = {"classifier.weight", "classifier.bias"}


def make_quantised(bits: int = 4, seed: int = 0, **changes: Any) -> Any:
    """A small BERT in few bits with LoRA."""
    model = make_bert(seed)
    quantise_(model, bits, HEAD)
    given = {**lora(**{"rank": 2, "dropout": 0.1, **changes}), "task_type": "SEQ_CLS"}
    return add_adapter(model, given, full=HEAD, seed=5)


def logits(model: nn.Module) -> Tensor:
    batch = make_examples(9).batch()
    with torch.no_grad():
        return model.eval()(**batch).logits


def make_gpt2() -> GPT2LMHeadModel:
    """Whose layers have their weights the other way round."""
    sizes = {"vocab_size": 400, "n_positions": 64, "n_embd": 16, "n_layer": 2, "n_head": 2}
    return GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=1, eos_token_id=2))


@pytest.mark.parametrize("make", [make_llama, make_gpt2])
@pytest.mark.parametrize("bits", [8, 4])
def test_the_bits_are_those_of_transformers(bits: int, make: Callable[[], nn.Module], tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    folder = put_model(tmp_path, make())
    ours = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    quantise_(ours, bits)
    asked = {
        8: {"load_in_8bit": True},
        4: {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    }
    theirs = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, quantization_config=BitsAndBytesConfig(**asked[bits])
    )
    found, expected = ours.state_dict(), theirs.state_dict()
    assert found.keys() == expected.keys()
    assert len(find_factors(ours)) >= 7 * 2, "of all linear layers"
    assert all(torch.equal(found[name], expected[name]) for name in found)
    ids = torch.arange(12).view(2, 6)
    assert torch.equal(ours.eval()(input_ids=ids).logits, theirs.eval()(input_ids=ids).logits)


@pytest.mark.parametrize("bits", long_but(4, [8, 4]))
def test_an_adapter_beside_few_bits_keeps_the_promises(bits: int, tmp_path: Path) -> None:
    check_promises(partial(make_quantised, bits), tmp_path)


@pytest.mark.parametrize("bits", [8, 4])
def test_a_federation_of_one_site_is_ordinary_training_beside_the_same_base(bits: int) -> None:
    make = partial(make_quantised, bits)
    play = Play(site_ids=(0,), make_model=make, num_examples=19, watch=lambda _, federation: federation.model)
    _, watched = play.play()
    expected, found = train_plainly(play, make()), watched[-1]
    for name, weight in trained_weights(expected).items():
        assert torch.equal(found.get_parameter(name), weight), name
    assert not torch.allclose(logits(found), logits(make()), atol=1e-3), "the weights must move"


@pytest.mark.parametrize("bits", [8, 4])
def test_products_in_bfloat16_leave_biases_as_they_are_and_where_the_flat_vector_has_them(bits: int) -> None:
    model = make_bert()
    quantise_(model, bits, HEAD, compute=torch.bfloat16)  # as on a GPU
    model = add_adapter(model, {**lora(rank=2), "bias": "lora_only", "task_type": "SEQ_CLS"}, full=HEAD)
    biases = {name: bias for name, bias in model.named_parameters() if name.endswith("bias")}
    trained = [bias for name, bias in biases.items() if name.endswith("layer.bias") and bias.requires_grad]
    with torch.no_grad():
        for bias in biases.values():
            bias.copy_(torch.linspace(0.1, 0.9, len(bias)))
    before, outputs, places = frozen_sha256(model), logits(model), [bias.data_ptr() for bias in trained]
    with torch.autocast("cpu", torch.bfloat16):
        model.train()(**make_examples(9).batch()).loss.backward()
    assert frozen_sha256(model) == before
    assert torch.equal(logits(model), outputs), "else an evaluation depends on which rank has trained a site"
    assert len(trained) == 4
    assert [bias.data_ptr() for bias in trained] == places
    assert all(bias.grad is not None and bias.grad.dtype == torch.float32 for bias in trained)


@pytest.mark.long(seconds=8)
def test_two_sixteen_and_sixty_four_sites_share_one_base_and_take_the_same_memory(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    peaks: dict[int, int] = {}

    def measured(output: object, batch: dict[str, Tensor], means: object) -> None:
        if torch.is_grad_enabled() and batch["input_ids"].shape == (2, 12) and len(seen) < 3:  # the largest
            seen.append(batch)
            peaks[num_sites] = max(peaks.get(num_sites, 0), tensor_bytes())
        score_classes(output, batch, means)

    monkeypatch.setattr("helpers.score_classes", measured)
    list_new_objects_only()
    for num_sites in (2, 16, 64):
        seen: list[dict[str, Tensor]] = []
        gc.collect()
        sites = (0,) * num_sites
        Play(make_model=make_quantised, site_ids=sites, num_examples=128, num_rounds=1, batch_size=2).play()
    assert len(seen) == 3
    assert peaks[2] == pytest.approx(peaks[16], rel=0.01) == pytest.approx(peaks[64], rel=0.01)


def test_the_hash_of_the_frozen_weights_has_their_factors() -> None:
    for bits in (8, 4):
        model = make_quantised(bits)
        before = frozen_sha256(model)
        assert before == frozen_sha256(make_quantised(bits)) != frozen_sha256(make_quantised(bits, seed=1))
        logits(model)
        assert frozen_sha256(model) == before, "of 8 bits, the first pass puts them elsewhere"
        name = next(name for name in find_factors(model) if name.endswith(("absmax", "SCB")))
        find_factors(model)[name].view(-1)[0] += 1
        assert frozen_sha256(model) != before
    assert not find_factors(make_bert())


@pytest.mark.parametrize("bits", [8, 4])
def test_the_bytes_of_a_layer_are_counted(bits: int) -> None:
    model = make_bert()
    shapes = {name: module.weight.shape for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    quantise_(model, bits, HEAD)
    factors = find_factors(model)
    for name, shape in shapes.items():
        if name != "classifier":
            of_layer = [tensor for key, tensor in factors.items() if key.startswith(f"{name}.") and "__nf4" not in key]
            size = model.get_submodule(name).weight.nbytes + sum(tensor.nbytes for tensor in of_layer)
            assert num_bytes_of(bits, *shape) == size, "but for a text that bitsandbytes writes into files"


@pytest.fixture
def given(tmp_path: Path) -> dict[str, Any]:
    """Settings of a small run of a language model."""
    return {
        **{"task_name": "instruct", "model": put_model(tmp_path), "template": "plain", "max_seq_len": 64},
        "train_path": put_rows(tmp_path, "train.jsonl", PAIRS),
        "test_path": put_rows(tmp_path, "test.jsonl", PAIRS[:3]),
        **{"site_ids": [0, 0], "num_rounds": 2, "learning_rate": 0.01, "optimiser": "adamw", "batch_size": 4},
        **{"report": False, "best_metric": None, "adapter": "lora", "lora_rank": 4, "local_steps": 3},
    }


def run(given: dict[str, Any], folder: Path, **changes: Any) -> tuple[dict[str, Tensor], dict[str, Any], list[Any]]:
    """Train in this process, and return the final weights, the facts and the metrics of each round."""
    folder.mkdir()
    info: dict[str, Any] = {}
    with world():
        train_on_rank(Settings(**given | changes), Record(folder=str(folder), add_info=info.update))
    rounds = [json.loads(line) for line in (folder / "rounds.jsonl").read_text().splitlines()]
    return torch.load(folder / "final_model.pt", weights_only=True), info, rounds


@pytest.mark.parametrize("narrow", [{"quantise": 8}, {"quantise": 4}, {"base_dtype": "bfloat16"}], ids=str)
def test_a_language_model_learns_and_its_merged_model_is_another_one_whose_loss_is_on_record(
    narrow: dict[str, Any], given: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights, info, rounds = run(given, tmp_path / "run", **narrow, merge=True)
    printed = capsys.readouterr().out
    losses = [metrics["validation.loss"] for metrics in rounds]
    assert losses[2] < losses[1] < losses[0]
    assert all("lora_" in name and weight.dtype == torch.float32 for name, weight in weights.items())
    found = info["model_merged"]
    assert found["loss_of_trained"] == pytest.approx(losses[-1], abs=1e-6)
    assert found["loss"] != found["loss_of_trained"]
    differs = abs(found["loss"] - losses[-1]) > 0.01
    assert f"{found['loss']:.4f}; {losses[-1]:.4f} of the adapter beside a base in " in printed
    assert ("To use what was trained, load the adapter" in printed) == differs

    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model_merged")
    assert {weight.dtype for weight in merged.parameters()} == {torch.float32}
    whole = {"adapter": None, "lora_rank": None, "num_rounds": 0, "model": str(tmp_path / "run" / "model_merged")}
    _, _, (again,) = run(given | whole, tmp_path / "again")
    assert again["validation.loss"] == pytest.approx(found["loss"], abs=1e-5)


@pytest.mark.parametrize("bits", [4, pytest.param(8, marks=pytest.mark.long(seconds=5))])
def test_the_command_resumes_on_other_ranks_and_refuses_other_bits(
    bits: int, command: Command, given: dict[str, Any], tmp_path: Path
) -> None:
    settings = {name: str(value).replace(" ", "") for name, value in given.items()} | {"quantise": bits}
    whole = succeed(command(**settings))
    stopped = settings | {"checkpoints_dir": tmp_path / "checkpoints"}
    succeed(command(**stopped | {"num_rounds": 1}))
    assert weights_hash(succeed(command(**stopped, ranks=2))) == weights_hash(whole)
    status, output = command(**stopped | {"quantise": 12 - bits})
    assert (status, f"quantise was {bits} and is {12 - bits}" in output) == (1, True), output


def test_the_saved_model_is_used_beside_the_base_that_it_was_trained_with(
    command: Command, given: dict[str, Any], tmp_path: Path
) -> None:
    settings = {name: str(value).replace(" ", "") for name, value in given.items()}
    succeed(command(**settings, quantise=4, merge=True))
    folder = tmp_path / "runs" / "1"
    ours, used = Run.load(folder).model, load_for_use(str(folder), generates=True).model
    copied = load_for_use(str(shutil.copytree(folder / "model", tmp_path / "copy")), generates=True).model
    merged = load_for_use(str(folder / "model_merged"), generates=True).model
    ids = torch.arange(12).view(2, 6)
    outputs = [model(input_ids=ids).logits for model in (ours, used, merged, copied)]
    assert torch.equal(outputs[0], outputs[1])
    assert torch.equal(outputs[0], outputs[3])
    assert find_factors(used)
    assert not find_factors(merged)
    assert not torch.allclose(outputs[0], outputs[2], atol=1e-4)


def test_a_run_says_that_its_base_has_other_bits_than_the_adapter_was_trained_with(tmp_path: Path) -> None:
    (tmp_path / "scaling_fl.json").write_text(json.dumps({"template": "alpaca", "quantise": 4}))
    for bits in (8, None):
        (line,) = describe_training(Settings(model=str(tmp_path), quantise=bits))
        assert line == f"quantise  {bits}, but {tmp_path} was trained with 4"
    assert describe_training(Settings(model=str(tmp_path), quantise=4)) == []


NARROW = [{"quantise": 8}, {"quantise": 4}, {"base_dtype": "bfloat16"}, {"quantise": 4, "base_dtype": "bfloat16"}]


@pytest.mark.parametrize("narrow", NARROW, ids=str)
def test_the_head_of_a_classifier_and_what_its_files_lack_train_in_float32(
    narrow: dict[str, Any], tiny_model: str, tmp_path: Path
) -> None:
    labels = ["food", "sport", "tech"]
    settings = Settings(adapter="lora", lora_modules_to_save=["pooler"], **narrow)
    pretrained = load_pretrained(tiny_model, 32)
    model = adapt(settings, pretrained, make_model(settings, pretrained, labels, None), labels).model
    batch = make_examples(9).batch()
    model.train()(**batch | {"input_ids": batch["input_ids"] % 20}).loss.backward()
    trained = trained_weights(model)
    assert {weight.dtype for weight in trained.values()} == {torch.float32}
    assert {name for name in trained if "lora_A" not in name} == {
        name for name, weight in trained.items() if weight.grad is not None and weight.grad.any()
    }, "the gradient of A is 0 as long as B is"
    assert sum("modules_to_save" in name for name in trained) == 4
    embedding = model.get_base_model().bert.embeddings.word_embeddings.weight
    assert str(embedding.dtype).removeprefix("torch.") == narrow.get("base_dtype", "float32")
    assert bool(find_factors(model)) == ("quantise" in narrow)


@pytest.mark.parametrize("bits", [None, 8, 4])
def test_modules_that_train_whole_fit_between_those_of_a_base_in_bfloat16(bits: int | None) -> None:
    model = make_llama().to(torch.bfloat16)
    given = lora(rank=2, modules_to_save=["embed_tokens", "o_proj", "lm_head"])
    if bits is not None:
        quantise_(model, bits, find_whole(given, model), torch.bfloat16)
    model = add_adapter(model, given)
    ids = torch.arange(5, 29).view(2, 12)
    found = model(input_ids=ids, labels=ids)
    found.loss.backward()
    assert found.logits.dtype == torch.float32, "nothing after the head needs fewer bits"
    whole = {name: weight for name, weight in trained_weights(model).items() if "modules_to_save" in name}
    assert len({name.split(".modules_to_save")[0].split(".")[-1] for name in whole}) == 3
    assert all(weight.dtype == torch.float32 and weight.grad.any() for weight in whole.values())


def test_what_few_bits_need_is_a_sentence(given: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    without = {name: value for name, value in given.items() if name not in ("adapter", "lora_rank")}
    for name, value in (("quantise", 4), ("base_dtype", "bfloat16")):
        with world():
            says = refusal(partial(build, Settings(**without, **{name: value})))
        assert says == f"{name}: expected None, as there is no adapter, got {value!r}. Set adapter=lora"
    assert "quantise: expected 8 or 4 or None, got 3" in refusal(lambda: check({"quantise": 3}))
    with world():
        says = refusal(partial(build, Settings(**given, quantise=8, use_dora=True)))
    assert says.startswith("quantise: expected 4 or None with DoRA on a CPU"), "its second step would fail"
    assert "quantise=4: expected a model with frozen linear layers" in refusal(lambda: quantise_(make_bert(), 4, ALL))
    assert find_contradictions(Settings(**given, quantise=4)) == []
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    (says,) = find_contradictions(Settings(**given, quantise=4))
    assert says.startswith("quantise=4: expected the package bitsandbytes, got none. EXTRAS=quantise")
    (says,) = find_contradictions(Settings(**given | {"optimiser": "adamw8bit"}))
    assert says.startswith("optimiser='adamw8bit': expected the package bitsandbytes, got none. EXTRAS=quantise")


ALL = {name for name, _ in make_bert().named_parameters()}


def test_ranks_and_resumed_runs_compare_the_frozen_bits_and_the_version_of_bitsandbytes() -> None:
    for given in ({"adapter": "lora", "quantise": 4}, {"optimiser": "adamw8bit"}):
        assert identity_of_settings(Settings(**given))["version of bitsandbytes"] == version("bitsandbytes")
    assert "version of bitsandbytes" not in identity_of_settings(Settings(adapter="lora", optimiser="adamw"))
    hashes = {identity_of_adapter(Settings(adapter="lora"), make_quantised(bits))[FROZEN] for bits in (8, 4)}
    assert hashes == {frozen_sha256(make_quantised(8)), frozen_sha256(make_quantised(4))}
    assert len(hashes) == 2


@pytest.mark.parametrize(
    ("bits", "checkpoints"),
    [(4, True), (8, False), *(pytest.param(*case, marks=pytest.mark.long) for case in ((4, False), (8, True)))],
)
def test_the_estimate_is_the_memory_of_training(bits: int, checkpoints: bool) -> None:
    model = LlamaForCausalLM(LLAMA)
    quantise_(model, bits)
    model = add_adapter(model, {**lora(rank=4), "task_type": "CAUSAL_LM"})
    if checkpoints:
        checkpoint_activations(model)
    ids = torch.arange(8 * 64).view(8, 64) % 300
    batch = {"input_ids": ids, "labels": ids, "attention_mask": torch.ones_like(ids)}
    make_optimiser = partial(OPTIMISERS["adamw"], lr=1e-3)
    expected = estimate_bytes(model, batch, None, make_optimiser)
    held = [*model.parameters(), *model.buffers(), *find_factors(model).values()]
    with Meter([*held, *batch.values()]) as meter:
        train(model, [batch, batch], make_optimiser(trained_weights(model).values()), score_tokens)
    measured = meter.peak + sum(tensor.nbytes for tensor in held)
    assert expected == pytest.approx(measured, rel=0.15)


LLAMA = LlamaConfig(
    vocab_size=300, hidden_size=64, intermediate_size=128, num_hidden_layers=6, num_attention_heads=2, use_cache=False
)


MODELS = [
    {"adapter": None, "lora_rank": None},
    {},
    {"base_dtype": "bfloat16", "lora_mean": "alternate"},
    {"quantise": 8, "activation_checkpointing": True},
    {"quantise": 4, "base_dtype": "bfloat16"},
]


@pytest.mark.parametrize("settings", MODELS, ids=str)
def test_a_configuration_alone_is_planned_as_the_model_with_its_weights(
    settings: dict[str, Any],
    given: dict[str, Any],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("PIECE", "ACCELERATOR_PIECE"):  # of a buffer, which is as long as small models
        monkeypatch.setattr(aggregation, name, 16)
    planned = []
    for has_weights in (True, False):
        with world():
            planned.append(plan(Settings(**given | settings)))
        output = capsys.readouterr().out
        assert ("the plan holds" in output) == has_weights
        assert ("nothing was computed" in output) != has_weights
        Path(given["model"], "model.safetensors").unlink(missing_ok=True)
        Path(given["model"], "model.safetensors.index.json").write_text("{}")
        Path(given["model"], "training_args.bin").touch()  # as trainers of others leave it
    assert planned[0]["devices"][0]["bytes"] > 0
    assert planned[0] == planned[1]


def test_a_classifier_is_planned_from_its_configuration_but_not_trained(
    small_run: dict[str, Any], tmp_path: Path
) -> None:
    folder = str(shutil.copytree(small_run["model"], tmp_path / "model"))
    paths = {name: str(small_run[name]) for name in ("train_path", "test_path")}
    settings = Settings(**small_run | paths | {"model": folder}, site_ids=[0, 0], adapter="lora", quantise=4)
    with world():
        planned = plan(settings)
        Path(settings.model, "model.safetensors").unlink()
        assert planned["message"] == plan(settings)["message"]
        assert "model.safetensors" in refusal(partial(build, settings))


@pytest.mark.long
def test_the_command_plans_full_training_of_1_billion_weights_from_a_configuration(
    command: Command, tmp_path: Path
) -> None:
    status, output = command("plan", **bases.put_run(tmp_path, LLAMA_1B) | OF_FULL)
    assert status == 0, output
    found = int(re.search(r"0 \|    cpu \| ([\d,]+) MB", output)[1].replace(",", ""))  # type: ignore[index]
    num_weights = 1_235_814_400
    fixed = num_weights * (4 + 8 + 4 + 8) / 1e6  # the model, AdamW, the global weights, their sum
    assert fixed + num_weights * 4 / 1e6 < found < 48_000
    assert "has no weights, and nothing was computed" in output


@pytest.mark.long(seconds=30)
@pytest.mark.usefixtures("warm")
def test_the_memory_of_flowertune_is_known_from_the_configuration_and_fits_its_devices() -> None:
    sizes = {
        (name, bits): bases.estimate(config, OF_FLOWERTUNE | {"quantise": bits})
        for name, config in (("3B", OPEN_3B), ("7B", OPEN_7B))
        for bits in (8, 4)
    }
    # Published is what a device had in use, with the kernels and what torch keeps of freed memory.
    for key, size in sizes.items():
        assert 0.7 * PUBLISHED[key] < size < PUBLISHED[key]
    assert sizes["3B", 4] < 24, "two sites share one base"


def test_adamw_with_a_state_in_8_bits_is_close_to_adamw() -> None:
    finals = {}
    for name in ("adamw", "adamw8bit"):
        torch.manual_seed(0)
        weights = nn.Parameter(torch.randn(64, 64))
        optimiser = OPTIMISERS[name]([weights], lr=0.01)
        for step in range(20):
            optimiser.zero_grad()
            ((weights - step / 20) ** 2).sum().backward()
            optimiser.step()
        finals[name] = weights.detach()
        states = [value for value in optimiser.state[weights].values() if isinstance(value, Tensor)]
        held = sum(value.nbytes for value in states if value.shape == weights.shape)
        assert state_bytes(partial(OPTIMISERS[name], lr=0.01), 4_096) == held == 4_096 * (8 if name == "adamw" else 2)
    torch.manual_seed(0)
    moved = (finals["adamw"] - torch.randn(64, 64)).norm()
    assert 0 < (finals["adamw8bit"] - finals["adamw"]).norm() < 0.1 * moved


def test_adamw_with_a_state_in_8_bits_keeps_the_promises(tmp_path: Path) -> None:
    play = Play(site_ids=(0, 0, 0), num_examples=23, optimiser="adamw8bit", checkpoints_dir=str(tmp_path))
    alone = play.but(checkpoints_dir=None).on_ranks(1)
    play.but(num_rounds=1).on_ranks(2)
    history, hashes = play.on_ranks(1)
    assert (history, hashes[-1]) == (alone[0], alone[1][-1])


def test_a_site_goes_on_with_a_state_in_8_bits(given: dict[str, Any], tmp_path: Path) -> None:
    kept = given | {"optimiser": "adamw8bit", "optimiser_state": "keep", "lora_rank": 256}  # A has 4,096 weights
    whole, _, _ = run(kept, tmp_path / "whole")
    stopped = kept | {"checkpoints_dir": str(tmp_path / "checkpoints")}
    run(stopped, tmp_path / "first", num_rounds=1)
    again, _, _ = run(stopped, tmp_path / "second")
    other, _, _ = run(kept, tmp_path / "other", optimiser_state="reset")
    assert all(torch.equal(again[name], weight) for name, weight in whole.items())
    assert not all(torch.equal(other[name], weight) for name, weight in whole.items())
    (path, *_) = sorted((tmp_path / "checkpoints" / "optimisers").glob("*-round-2.pt"))
    found = torch.load(path, weights_only=False)
    assert "torch.uint8" in repr({tensor.dtype for tensor in find_tensors(found)})


def find_tensors(value: Any) -> list[Tensor]:
    """All tensors in dicts and lists."""
    if isinstance(value, Tensor):
        return [value]
    inside = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    return [tensor for item in inside for tensor in find_tensors(item)]


@pytest.mark.long(seconds=3)
def test_the_benchmark_measures_what_is_estimated(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["bases.py", "--small"])
    bases.main()
    lines = [line.split("|") for line in capsys.readouterr().out.splitlines() if line.startswith(tuple(bases.BASES))]
    assert [line[0].strip() for line in lines] == [*bases.BASES]
    sizes = {line[0].strip(): [float(cell) for cell in line[2:]] for line in lines}
    assert all(size[2] == pytest.approx(size[1], rel=0.1) for size in sizes.values())
    assert sizes["4 bits"][0] < sizes["8 bits"][0] < sizes["float32"][0]

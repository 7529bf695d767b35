"""Adapters: what trains, what travels, what is saved, and that the mean of the sites is what its name says."""

import gc
import json
import shutil
from collections.abc import Callable
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import Command, Play, make_bert, make_examples, refusal, succeed, weights_hash
from safetensors.torch import load_file
from test_invariants import check_promises, list_new_objects_only, tensor_bytes, train_plainly
from tiny_llm import make_llama
from tiny_models import put_model
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertTokenizerFast,
)

from scaling_fl.distributed.collectives import check_equal, rank
from scaling_fl.distributed.launch import launch
from scaling_fl.distributed.world import world
from scaling_fl.experiment.adapting import FROZEN, adapt, identity_of_adapter
from scaling_fl.experiment.build import build
from scaling_fl.experiment.kinds import plain
from scaling_fl.experiment.plan import check_output
from scaling_fl.experiment.settings import Settings
from scaling_fl.federation.global_model import GlobalModel
from scaling_fl.federation.replica import Replica
from scaling_fl.federation.strategies import fedavg
from scaling_fl.federation.turns import InTurn
from scaling_fl.models.adapter_files import adapter_state, load_saved, load_weights_, merge
from scaling_fl.models.adapters import add_adapter, lora, turns
from scaling_fl.models.classifier import make_classifier
from scaling_fl.models.flat import frozen_sha256, trained_weights
from scaling_fl.models.pretrained import load_pretrained
from scaling_fl.records.export import save_model
from scaling_fl.training.loop import evaluate
from scaling_fl.training.scores import score_classes

peft = pytest.importorskip("peft")

HEAD = {"classifier.weight", "classifier.bias"}


def make_adapted(model: nn.Module | None = None, freeze_a: bool = False, **changes: Any) -> Any:
    """A small BERT with LoRA."""
    given = {**lora(**{"rank": 2, "dropout": 0.1, **changes}), "task_type": "SEQ_CLS"}
    return add_adapter(model or make_bert(), given, full=HEAD, seed=5, freeze_a=freeze_a)


@torch.no_grad()
def shake(model: nn.Module, seed: int = 0) -> None:
    """Move the trained weights, of which B starts at 0."""
    random = torch.Generator().manual_seed(seed)
    for weight in trained_weights(model).values():
        weight += 0.1 * torch.randn(weight.shape, generator=random)


def logits(model: nn.Module) -> Tensor:
    batch = make_examples(9).batch()
    with torch.no_grad():
        return model.eval()(**batch | {"input_ids": batch["input_ids"] % 20}).logits  # fewer than any model has


def test_an_adapter_keeps_the_promises_of_a_whole_model(tmp_path: Path) -> None:
    check_promises(make_adapted, tmp_path)


def test_wrapping_draws_from_a_generator_of_its_own_and_keeps_the_mode() -> None:
    model, base = make_bert().eval(), make_bert()
    before = torch.random.get_rng_state()
    first = make_adapted(model)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert not any(module.training for module in first.modules())
    assert all(module.training for module in make_adapted(make_bert().train()).modules())
    torch.rand(7)
    second = make_adapted(base)
    assert all(map(torch.equal, adapter_state(first).values(), adapter_state(second).values()))
    other = add_adapter(make_bert(), {**lora(rank=2), "task_type": "SEQ_CLS"}, full=HEAD, seed=6)
    assert not all(map(torch.equal, adapter_state(first).values(), adapter_state(other).values()))
    assert frozen_sha256(first) == frozen_sha256(second) != frozen_sha256(make_adapted(make_bert(seed=1)))


def product(model: Any) -> Tensor:
    """All products of B and A in one vector, times their scale."""
    layers = [module for module in model.modules() if hasattr(module, "get_delta_weight")]
    return torch.cat([layer.get_delta_weight("default").detach().double().flatten() for layer in layers])


@pytest.mark.parametrize("mean", ["ab", "freeze_a", "alternate"])
def test_the_mean_of_the_products_is_the_product_of_the_mean_if_one_factor_stays(mean: str) -> None:
    """Two rounds, so that both factors have had their turn and B is not 0."""
    with world():
        model = make_adapted(freeze_a=mean == "freeze_a")
        groups = turns(model) if mean == "alternate" else ((),)
        server, replica = GlobalModel(model, fedavg, turns=groups), Replica(model)
        weights = [Fraction(1, 2), Fraction(1, 3), Fraction(1, 6)]
        for round_ in (1, 2):
            before, dense = product(model), torch.zeros(())
            server.start_round(round_)
            others = set().union(*groups) - set(groups[(round_ - 1) % len(groups)])
            for site, weight in enumerate(weights):
                replica.reset(server)
                random = torch.Generator().manual_seed(10 * round_ + site)
                with torch.no_grad():
                    for name, tensor in trained_weights(model).items():
                        if name not in others:
                            tensor += torch.randn(tensor.shape, generator=random) / 10
                dense = dense + float(weight) * product(model)
                replica.exchange(server, weight, check_first=True)
            server.step()
            replica.reset(server)
            moved = (dense - before).norm()
            error = (product(model) - dense).norm() / moved
            assert moved > 0.01
            assert error > 0.01 if mean == "ab" and round_ == 2 else error < 1e-5 or mean == "ab"


def test_one_factor_is_half_of_the_bytes_and_all_of_them_are_of_the_adapter() -> None:
    model = BertForSequenceClassification(make_bert().config)
    sizes = {}
    with world():
        for mean in ("ab", "freeze_a", "alternate"):
            adapted = make_adapted(freeze_a=mean == "freeze_a")
            groups = turns(adapted) if mean == "alternate" else ((),)
            sizes[mean] = GlobalModel(adapted, fedavg, turns=groups).num_moving
    head = sum(weight.numel() for weight in model.classifier.parameters())
    (both,) = sizes["ab"]
    assert both - head == 4 * 2 * (32 + 32)  # four layers of rank 2, 32 wide
    assert sizes["freeze_a"] == [head + (both - head) // 2]
    assert sizes["alternate"] == sizes["freeze_a"] * 2


@pytest.mark.parametrize("changes", [{}, {"dora": True}, {"modules_to_save": ["LayerNorm"]}], ids=str)
def test_each_trained_weight_has_a_gradient_and_no_frozen_one(changes: dict) -> None:
    model = make_adapted(targets="all-linear", dropout=0.0, **changes)
    shake(model)  # as the gradient of A is 0 as long as B is
    model.train()(**make_examples(9).batch()).loss.backward()
    moved = {name for name, weight in model.named_parameters() if weight.grad is not None and weight.grad.any()}
    assert moved == trained_weights(model).keys()
    assert len([name for name in moved if "lora_A" in name]) == 2 * 6 + 1, "all linear layers but the head"


def test_dropout_is_off_in_evaluation_and_the_mode_stays() -> None:
    model = make_adapted(dropout=0.9)
    shake(model)
    without = make_adapted(dropout=0.0)
    shake(without)
    scores = [
        evaluate(each, [make_examples(9).batch()], score_classes).result() for each in (model.train(), model, without)
    ]
    assert scores[0] == scores[1] == scores[2]
    outputs = [model.train()(**make_examples(9).batch()).logits for _ in range(2)]
    assert not torch.equal(*outputs), "else dropout is off"


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"target_modules": ["query", "quary"]}, "lora_targets: expected modules of the model, such as "),
        ({"modules_to_save": ["poller"]}, "lora_modules_to_save: expected modules of the model, such as "),
        ({"init_lora_weights": "pissa"}, "init_lora_weights: expected one of True, False, gaussian, orthogonal"),
        ({"rang": 2}, "adapter_config: expected the configuration of a peft_type of peft "),
        ({"peft_type": "LARO"}, "adapter_config: expected the configuration of a peft_type of peft "),
        ({"target_modules": ["query", "classifiers"]}, "lora_targets: expected modules of the model, such as "),
        ({"modules_to_save": ["score"]}, "lora_modules_to_save: expected modules of the model, such as "),
        ({"target_modules": ["LayerNorm"]}, "adapter: expected a configuration that fits the model, got "),
    ],
)
def test_what_peft_would_ignore_or_refuse_in_its_own_words_is_a_sentence(changes: dict, says: str) -> None:
    given = {**lora(), "task_type": "SEQ_CLS", **changes}
    assert refusal(lambda: add_adapter(make_bert(), given, full=HEAD)).startswith(says)


def test_a_method_whose_loss_is_another_one_is_refused() -> None:
    given = {"peft_type": "ADALORA", "total_step": 9, "tinit": 1, "tfinal": 1}
    says = refusal(lambda: add_adapter(make_bert(), given, full=HEAD))
    assert says.startswith("adapter_config: expected another peft_type than ADALORA, which adds a penalty to the loss")


def test_a_method_that_saves_no_other_modules_is_taken() -> None:
    given = {"peft_type": "TRAINABLE_TOKENS", "token_indices": [1, 2]}
    assert trained_weights(add_adapter(make_llama(), given)).keys()


def test_a_tied_module_is_refused_as_a_copy_of_it_would_train() -> None:
    model = make_bert()
    model.classifier = nn.Linear(32, 50, bias=False)
    model.classifier.weight = model.bert.embeddings.word_embeddings.weight
    says = refusal(lambda: add_adapter(model, {**lora(modules_to_save=["word_embeddings"]), "task_type": "SEQ_CLS"}))
    assert says.startswith("modules_to_save: expected modules with weights of their own, got bert.embeddings.word_emb")
    assert "classifier.weight" in says


@pytest.mark.parametrize("new", ["bert.pooler.dense", "bert.encoder.layer.1.output.LayerNorm"])
def test_what_is_newly_initialised_trains_and_is_saved_whatever_its_name(new: str, tmp_path: Path) -> None:
    full = {*HEAD, f"{new}.weight", f"{new}.bias"}
    model = add_adapter(make_bert(), {**lora(), "task_type": "SEQ_CLS"}, full=full)
    shake(model)
    model.save_pretrained(tmp_path, save_embedding_layers=False)
    base = make_bert()
    with torch.no_grad():
        for name, weight in base.named_parameters():
            if name in full:
                weight.normal_()
    back = peft.PeftModel.from_pretrained(base, tmp_path)
    assert torch.equal(logits(back), logits(model))


def test_a_name_by_which_peft_would_train_other_modules_too_is_refused() -> None:
    given = {**lora(modules_to_save=["norm"], targets=["q_proj"]), "task_type": "CAUSAL_LM"}
    assert refusal(lambda: add_adapter(make_llama(), given)) == (
        "lora_modules_to_save: expected more of a name, such as 'model.norm', got 'norm', by which peft would train "
        "model.layers.0.input_layernorm, too"
    )
    add_adapter(make_llama(), given | {"modules_to_save": ["model.norm"]})


def test_a_new_weight_beside_pretrained_ones_of_its_module_is_refused() -> None:
    given = {**lora(), "task_type": "SEQ_CLS"}
    says = refusal(lambda: add_adapter(make_bert(), given, full={*HEAD, "bert.pooler.dense.bias"}))
    assert "got bert.pooler.dense.bias, which is newly initialised in a module with pretrained weights" in says
    names = {name for name, _ in make_bert().named_parameters()}
    assert "expected a model with pretrained weights" in refusal(lambda: add_adapter(make_bert(), given, full=names))


@pytest.mark.parametrize("change", ["missing", "unexpected", "shape"])
def test_weights_that_are_not_those_of_the_adapter_are_refused(change: str) -> None:
    model = make_adapted()
    weights = dict(adapter_state(model))
    name = min(weights)
    if change == "missing":
        del weights[name]
    else:
        weights[name if change == "shape" else f"{name}.more"] = torch.zeros(3)
    assert name in refusal(lambda: load_weights_(model, weights, "mine"))


@pytest.mark.parametrize("rslora", [True, False])
def test_the_scale_is_that_of_the_paper_before_and_after_the_folder(rslora: bool, tmp_path: Path) -> None:
    model = make_adapted(rank=16, alpha=16, rslora=rslora)
    model.save_pretrained(tmp_path, save_embedding_layers=False)
    for each in (model, peft.PeftModel.from_pretrained(make_bert(), tmp_path)):
        scales = {layer.scaling["default"] for layer in each.modules() if hasattr(layer, "lora_A")}
        assert scales == {4.0 if rslora else 1.0}


def test_many_sites_and_rounds_leave_one_adapter_a_layer_and_no_memory() -> None:
    def watch(_: GlobalModel, federation: Any) -> tuple[int, int, int]:
        model = federation.model
        gc.collect()
        return len(list(model.modules())), sum(weight.numel() for weight in model.parameters()), tensor_bytes()

    play = Play(make_model=make_adapted, make_turns=turns, site_ids=(0,) * 16, num_rounds=3, num_examples=32)
    list_new_objects_only()
    assert len(set(play.but(watch=watch).play()[1])) == 1


def test_the_merged_model_has_the_logits_of_the_adapter_and_the_class_of_the_base(tmp_path: Path) -> None:
    model = make_adapted(targets="all-linear")
    shake(model)
    before = logits(model)
    merged = merge(model)
    assert torch.equal(logits(model), before), "the adapter stays"
    merged.save_pretrained(tmp_path)
    back = BertForSequenceClassification.from_pretrained(tmp_path)
    assert back.state_dict().keys() == make_bert().state_dict().keys()
    assert (back.dtype, back.get_input_embeddings().weight.shape) == (torch.float32, (50, 32))
    assert torch.allclose(logits(back), before, atol=1e-5)
    assert not torch.allclose(before, logits(make_bert()), atol=1e-3)


@pytest.mark.parametrize("family", ["albert", "bart", "t5"])
def test_the_folders_of_families_that_share_weights_have_the_logits_of_the_adapter(family: str, tmp_path: Path) -> None:
    """ALBERT's layers are one, and the others embed twice with one weight; peft has no names of ALBERT's modules."""
    pretrained, labels = load_pretrained(put_model(tmp_path / "base", family), 16), ["a", "b", "c"]
    classifier = make_classifier(pretrained, labels, seed=1, rows=None)
    if family == "albert":
        says = refusal(lambda: adapt(Settings(adapter="lora"), pretrained, classifier, labels))
        assert says.endswith("Set lora_targets=all-linear, or target_modules")
    model = adapt(Settings(adapter="lora", lora_targets="all-linear"), pretrained, classifier, labels).model.eval()
    shake(model)
    batch = {"input_ids": torch.tensor([[4, 5, 2], [7, 3, 2]]), "attention_mask": torch.ones(2, 3)}
    with torch.no_grad():
        before = model(**batch).logits
        for each, tolerance in [(model, 0), (merge(model), 1e-5)]:
            folder = save_model(str(tmp_path), each, pretrained.tokenizer, str(tolerance))
            back = load_saved(folder, AutoModelForSequenceClassification.from_pretrained)
            assert (back(**batch).logits - before).abs().max() <= tolerance


def test_the_command_trains_saves_resumes_and_goes_on_from_an_adapter(
    command: Command, tiny_model: str, tmp_path: Path
) -> None:
    """With the mean that has most to get wrong, on one and two ranks."""
    settings = {"adapter": "lora", "lora_rank": 2, "lora_mean": "alternate", "lora_dropout": 0.1, "num_rounds": 3}
    whole = succeed(command(**settings, merge=True))
    stopped = {**settings, "checkpoints_dir": tmp_path / "checkpoints"}
    succeed(command(**{**stopped, "num_rounds": 1}))
    assert weights_hash(succeed(command(**stopped, ranks=2))) == weights_hash(whole)
    lines = (tmp_path / "runs" / "3" / "rounds.jsonl").read_text().splitlines()
    sent = {metrics["round"]: metrics.get("comm.expected_bytes") for metrics in map(json.loads, lines)}
    assert (sent[2], sent[3]) == (2 * 8 * 355,) * 2, "of two ranks, in 64 bits: half of A and B, and the head"
    for other, says in [({"lora_rank": 3}, "lora_rank was 2 and is 3"), ({"seed": 2}, "frozen weights was '")]:
        status, output = command(**{**stopped, **other})
        assert (status, says in output) == (1, True), output
    assert "lora_mean alternate: 611 weights (0.002 MB) trained and shared, of which 355 and 355 in turn" in whole

    run = tmp_path / "runs" / "1"
    info = json.loads((run / "info.json").read_text())
    assert len(info["frozen_sha256"]) == 64
    saved = torch.load(run / "final_model.pt")
    assert saved.keys() == load_file(run / "model" / "adapter_model.safetensors").keys()
    config = AutoConfig.from_pretrained(run / "model")
    base = AutoModelForSequenceClassification.from_pretrained(tiny_model, config=config, ignore_mismatched_sizes=True)
    untrained = logits(base)  # before peft changes it
    ours = load_saved(str(run / "model"), AutoModelForSequenceClassification.from_pretrained)
    theirs = peft.PeftModel.from_pretrained(base, run / "model")
    merged = AutoModelForSequenceClassification.from_pretrained(run / "model_merged")
    assert torch.equal(logits(ours), logits(theirs))
    assert torch.allclose(logits(merged), logits(ours), atol=1e-5)
    assert not torch.allclose(logits(ours), untrained, atol=1e-3)

    goes_on = succeed(command(model=run / "model", num_rounds=0, lora_mean="freeze_a"))
    assert "newly initialised: none" in goes_on
    last = json.loads((run / "rounds.jsonl").read_text().splitlines()[-1])
    rounds = {path.parent.name: path.read_text().splitlines() for path in (tmp_path / "runs").glob("*/rounds.jsonl")}
    first = json.loads(rounds[max(rounds, key=int)][0])
    assert first["validation.loss"] == last["validation.loss"]


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Path]:
    """Makes the folder of a model in an empty cache of the hub."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))

    def make(name: str) -> Path:
        repository = tmp_path / f"models--{name.replace('/', '--')}"
        (repository / "refs").mkdir(parents=True)
        (repository / "refs" / "main").write_text("a-commit")
        return repository / "snapshots" / "a-commit"

    return make


@pytest.mark.parametrize("has_config", [True, False])
def test_an_adapter_of_the_hub_trains_on(
    has_config: bool, hub: Callable[[str], Path], tiny_model: str, tmp_path: Path
) -> None:
    """As a run leaves it, and as peft does, without the configuration of the model and a tokenizer."""
    labels = ["0", "1", "2"]
    shutil.copytree(tiny_model, hub("user/base"))
    pretrained = load_pretrained("user/base", 32)
    classifier = make_classifier(pretrained, labels, seed=1, rows=None)
    first = adapt(Settings(adapter="lora"), pretrained, classifier, labels).model
    shake(first)
    folder = shutil.copytree(save_model(str(tmp_path), first, pretrained.tokenizer), hub("user/adapter"))
    if not has_config:
        for path in folder.iterdir():
            if not path.name.startswith("adapter_"):
                path.unlink()
    pretrained = load_pretrained("user/adapter", 32)
    assert (pretrained.base, pretrained.adapter.base) == ("user/base",) * 2
    classifier = make_classifier(pretrained, labels, seed=2, rows=None)
    settings = Settings(model="user/adapter", lora_mean="freeze_a")
    second = adapt(settings, pretrained, classifier, labels)
    assert second.new == []
    assert torch.equal(logits(second.model), logits(first))
    assert {name for name in trained_weights(second.model) if "lora" in name} == turns(first)[0]
    for change, says in [({"revision": "v1"}, "expected no revision of the model"), (None, "expected the weights of")]:
        if change is None:
            (folder / "adapter_model.safetensors").unlink()
        config = json.loads((folder / "adapter_config.json").read_text()) | (change or {"revision": None})
        (folder / "adapter_config.json").write_text(json.dumps(config))
        assert says in refusal(lambda: load_pretrained("user/adapter", 32))


def size_of(place: Path) -> int:
    return sum(path.stat().st_size for path in (place, *place.rglob("*")) if path.is_file())


@pytest.mark.long
@pytest.mark.parametrize("keeps_checkpoints", [True, False])
@pytest.mark.parametrize("merges", [True, False])
def test_the_space_that_is_asked_for_is_what_a_run_writes(
    keeps_checkpoints: bool, merges: bool, command: Command, tiny_model: str, small_run: dict, tmp_path: Path
) -> None:
    """Of a model beside which adapter and tokenizer are not small."""
    model, words = tmp_path / "model", (Path(tiny_model) / "words.txt").read_text().split()
    (tmp_path / "words.txt").write_text("\n".join([*words, *(f"word-{number}" for number in range(20_000))]))
    tokenizer = BertTokenizerFast(vocab=str(tmp_path / "words.txt"), model_max_length=64)
    tokenizer.save_pretrained(model)
    make_bert(vocab_size=len(tokenizer)).save_pretrained(model)
    checkpoints = tmp_path / "checkpoints"
    settings = {"model": str(model), "adapter": "lora", "lora_rank": 64, "lora_targets": "all-linear", "merge": merges}
    settings |= {"checkpoints_dir": str(checkpoints)} if keeps_checkpoints else {}
    (tmp_path / "empty").mkdir()
    with world():
        all_settings = Settings(**{name: plain(value) for name, value in (small_run | settings).items()})
        needs = check_output(all_settings, build(all_settings), str(tmp_path / "empty"))
    succeed(command(**settings))
    asked = {need.purpose: need.final for need in needs}
    run = tmp_path / "runs" / "1"
    of_best = 0 if keeps_checkpoints else size_of(run / "final_model.pt")  # best.pt, which is removed at the end
    assert asked.pop("the final model") == pytest.approx(size_of(run) + of_best, rel=0.1)
    assert sum(asked.values()) == pytest.approx(size_of(checkpoints), rel=0.1)


def test_a_federation_of_one_site_is_ordinary_training_of_the_adapter() -> None:
    play = Play(site_ids=(0,), make_model=make_adapted, num_examples=19, watch=lambda _, federation: federation.model)
    _, watched = play.play()
    expected, found = train_plainly(play, make_adapted()), watched[-1]
    largest = max((found.get_parameter(name) - weight).abs().max() for name, weight in expected.named_parameters())
    assert largest < 1e-6
    assert not torch.allclose(product(found), product(make_adapted()), atol=1e-3), "the weights must move"


def test_ranks_and_resumed_runs_compare_what_peft_is_asked_for_and_frozen_weights() -> None:
    def identity(changes: dict[str, Any], freeze_a: bool = False, seed: int = 0) -> dict[str, Any]:
        given = {**lora(), "task_type": "SEQ_CLS"}
        base = make_bert(seed)
        base.name_or_path = str(changes.pop("place", "here"))
        model = add_adapter(base, {**given, **changes}, full=HEAD, freeze_a=freeze_a)
        return identity_of_adapter(Settings(adapter_config={"peft_type": "LORA"}), model)

    first = identity({})
    assert first["version of peft"] == peft.__version__
    assert first == identity({"place": "elsewhere", "target_modules": ["value", "query"]})
    for name, value in {"lora_alpha": 8, "use_rslora": True, "alpha_pattern": {"query": 3}}.items():
        other = identity({name: value})
        assert {key for key in other if other[key] != first[key]} == {f"{name} of the adapter"}
    assert identity({}, freeze_a=True)[FROZEN] != first[FROZEN] != identity({}, seed=1)[FROZEN]


@pytest.mark.parametrize("mean", ["freeze_a", "alternate"])
def test_a_mean_is_not_called_exact_where_a_third_factor_trains(mean: str, tiny_model: str) -> None:
    given = {"peft_type": "LORA", "use_dora": True}
    labels = ["food", "sport", "tech"]
    pretrained = load_pretrained(tiny_model, 32)
    for lora_mean in ("ab", mean):
        settings = Settings(adapter_config=given, lora_mean=lora_mean)
        classifier = make_classifier(pretrained, labels, seed=1, rows=None)
        if lora_mean == "ab":
            assert adapt(settings, pretrained, classifier, labels).model.peft_config
    says = refusal(lambda: adapt(settings, pretrained, classifier, labels))
    assert says.startswith("lora_mean: expected ab, as base_model.model.")


@pytest.mark.long
def test_ranks_whose_adapters_differ_refuse_each_other() -> None:
    """As where a node has an old folder at the path of the setting."""

    def compare(alphas: tuple[float | None, ...]) -> str:
        with world():
            alpha = alphas[rank()]
            model = make_bert() if alpha is None else make_adapted(alpha=alpha)
            identity = identity_of_adapter(Settings(adapter_config={"peft_type": "LORA"}), model)
            return refusal(lambda: check_equal(identity))

    for alphas, says in [((16, 8), "lora_alpha of the adapter"), ((16, None), FROZEN), ((None, 16), FROZEN)]:
        found = launch(partial(compare, alphas), num_ranks=2, fork=True)
        assert all(each.startswith(f"{says}: expected the same on all ranks, got ") for each in found)


def test_a_factor_is_frozen_in_the_round_of_the_other_and_only_then() -> None:
    model, seen = make_adapted(), []
    whole = trained_weights(model).keys()

    def note(model: nn.Module, site: Any, round_: int) -> dict[str, Any]:
        seen.append(trained_weights(model).keys())
        if round_ == 3:
            raise OSError("the disk of the site")
        return {"num_examples": 0}

    train_site = InTurn(note, turns(model))
    for round_ in (1, 2):
        train_site(model, None, round_)
    with pytest.raises(OSError, match="disk"):
        train_site(model, None, 3)
    of_b, of_a = turns(model)
    assert seen == [whole - of_a, whole - of_b, whole - of_a]
    assert trained_weights(model).keys() == whole
    assert not train_site.leaves_nothing


def test_a_site_that_moves_a_weight_out_of_turn_is_refused() -> None:
    with world():
        model = make_adapted()
        server, replica = GlobalModel(model, fedavg, turns=turns(model)), Replica(model)
        shake(model)
        server.start_round(1)
        says = refusal(lambda: replica.exchange(server, Fraction(1), check_first=False))
        before = server.sha256()
        server.step()
        assert server.sha256() == before, "nothing of it is in the mean"
    assert "lora_A.default.weight: expected to stay as it is in this round" in says


def make_counting() -> Any:
    """An adapter whose model counts its passes in a buffer, without dropout, which draws from one generator."""
    model = make_bert(dropout=0.0)
    model.register_buffer("passes", torch.zeros(()))
    model.register_forward_pre_hook(lambda module, _: module.passes.add_(1) and None)
    return make_adapted(model, dropout=0.0)


def test_factors_in_turn_keep_the_promises_though_sites_fail(tmp_path: Path, two_devices: Callable[[], None]) -> None:
    """On ranks, on devices of a rank, and stopped before a round of each factor."""
    play = Play(make_model=make_counting, make_turns=turns, site_ids=(0,) * 4, num_rounds=3, num_examples=21)
    play = play.but(min_sites=2, broken=(2,), proximal_mu=0.1)
    history, hashes = play.play()
    assert len(set(hashes)) == play.num_rounds + 1, "the weights must move"
    assert [metrics.get("sites.failed") for metrics in history] == [None, 1, 1, 1]
    for num_rounds in range(1, play.num_rounds + 1):
        resumed, again = play.but(num_rounds=num_rounds, checkpoints_dir=str(tmp_path)).play()
        assert again[-1] == hashes[num_rounds + 1]
    assert resumed == history
    assert play.on_ranks(2) == (history, hashes)
    two_devices()
    assert play.play() == (history, hashes)


@pytest.mark.parametrize("comm_dtype", ["float32", "bfloat16", "float16"])
def test_the_rounded_means_of_factors_in_turn_are_close_to_the_exact_ones(comm_dtype: str) -> None:
    def watch(server: GlobalModel, _: Any) -> Tensor:
        return server.weights[:-1].clone()  # without the buffer

    play = Play(make_model=make_counting, make_turns=turns, num_examples=21, watch=watch)
    (first, *_, exact), found = play.play()[1], play.but(comm_dtype=comm_dtype).play()[1][-1]
    assert (found - exact).norm() < 0.02 * (exact - first).norm()


def test_only_the_factor_of_a_round_moves_whatever_the_strategy_does_without_a_gradient() -> None:
    """And a round of no site, or of none of a factor, moves nothing."""
    with world():
        model = make_counting()
        shake(model)
        groups = turns(model)
        server = GlobalModel(model, lambda weights: torch.optim.SGD(weights, lr=1, weight_decay=0.1), turns=groups)
        replica = Replica(model)
        for round_, moves in [(1, True), (2, False), (3, True), (4, True)]:
            before = {name: weight.clone() for name, weight in server.state_dict()["weights"].items()}
            server.start_round(round_)
            if moves:
                replica.reset(server)
                replica.exchange(server, Fraction(1, 2), check_first=True)
            server.step()
            after = server.state_dict()["weights"]
            moved = {name for name, weight in before.items() if not torch.equal(weight, after[name])}
            assert moved == (trained_weights(model).keys() - groups[round_ % 2] if moves else set())


def test_a_pooler_that_the_files_lack_trains_beside_the_adapter(tiny_model: str, tmp_path: Path) -> None:
    """Which peft leaves frozen at random."""
    shutil.copytree(tiny_model, tmp_path, dirs_exist_ok=True)
    BertForMaskedLM(AutoConfig.from_pretrained(tiny_model)).save_pretrained(tmp_path)
    labels = ["food", "sport", "tech"]
    pretrained = load_pretrained(str(tmp_path), 32)
    classifier = make_classifier(pretrained, labels, seed=1, rows=None)
    model = adapt(Settings(adapter="lora"), pretrained, classifier, labels).model
    whole = {name for name in trained_weights(model) if "lora" not in name}
    assert len(whole) == 4
    assert {name for name in whole if "pooler" in name} == {
        f"base_model.model.bert.pooler.modules_to_save.default.dense.{part}" for part in ("weight", "bias")
    }
    assert model.peft_config["default"].base_model_name_or_path == str(tmp_path)

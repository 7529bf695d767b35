"""Sites train as people know it: schedules of the learning rate, accumulation, clipping, weight decay."""

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from helpers import make_bert, refusal
from helpers import make_examples as make_texts
from peft import LoraConfig, PrefixTuningConfig, get_peft_model
from test_next_tokens import make_examples as make_answers
from tiny_llm import make_llama
from torch import Tensor, nn
from transformers import get_cosine_with_min_lr_schedule_with_warmup, get_linear_schedule_with_warmup

from scaling_fl.data.examples import Examples
from scaling_fl.data.sites import SiteData
from scaling_fl.distributed.placement import place_sites
from scaling_fl.distributed.world import world
from scaling_fl.experiment.build import build
from scaling_fl.experiment.contradictions import find_contradictions
from scaling_fl.experiment.local_training import local_optimiser
from scaling_fl.experiment.run import train_on_rank
from scaling_fl.experiment.schedule import make_schedule
from scaling_fl.experiment.settings import Settings
from scaling_fl.federation.cohorts import Cohorts
from scaling_fl.federation.local_training import LocalTraining
from scaling_fl.federation.site import TRAINERS, Site
from scaling_fl.models.compute import checkpoint_activations, set_attention
from scaling_fl.models.flat import trained_weights
from scaling_fl.models.memory import activation_bytes
from scaling_fl.training.loop import Batch, evaluate, take_steps
from scaling_fl.training.metrics import Means
from scaling_fl.training.optimisers import OPTIMISERS, change_gradients
from scaling_fl.training.schedules import RateSchedule, constant, cosine, linear
from scaling_fl.training.scores import score_classes, score_tokens

CPU = torch.device("cpu")
STEPS, ROUNDS = 5, 4  # of a round, of a schedule


def stream(schedule: RateSchedule, num_rounds: int = ROUNDS, num_steps: int = STEPS) -> list[float]:
    """The rates of all steps of some rounds, with a peak of 2."""
    places = [(round_, step) for round_ in range(1, num_rounds + 1) for step in range(num_steps)]
    return [schedule.rate(2.0, round_, step, num_steps) for round_, step in places]


@pytest.mark.parametrize("warmup_steps", [0, 1, 7])
def test_the_rates_of_all_rounds_are_those_of_transformers(warmup_steps: int) -> None:
    def theirs(make: Callable[..., Any], **options: float) -> list[float]:
        optimiser = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=2.0)
        scheduler, rates = make(optimiser, warmup_steps, STEPS * ROUNDS, **options), []
        for _ in range(STEPS * ROUNDS):
            rates.append(optimiser.param_groups[0]["lr"])
            optimiser.step()
            scheduler.step()
        return rates

    assert stream(linear(ROUNDS, warmup_steps=warmup_steps)) == pytest.approx(theirs(get_linear_schedule_with_warmup))
    with_minimum = theirs(get_cosine_with_min_lr_schedule_with_warmup, min_lr=0.5)
    assert stream(cosine(ROUNDS, 0.5, warmup_steps)) == pytest.approx(with_minimum)


def test_rates_by_hand() -> None:
    assert stream(constant()) == [2.0] * 20, "to the bit"
    assert stream(constant(4), 2, 3) == [0.0, 0.5, 1.0, 1.5, 2.0, 2.0]
    assert stream(linear(2), 2, 2) == [2.0, 1.5, 1.0, 0.5]
    assert stream(linear(2, 1.0), 3, 2) == [2.0, 1.75, 1.5, 1.25, 1.0, 1.0], "the last rate stays"
    assert stream(linear(2, per_round=True), 2, 3) == [2.0] * 3 + [1.0] * 3
    half = 1 + math.cos(math.pi / 4)
    assert stream(cosine(2), 2, 2) == pytest.approx([2.0, half, 1.0, 2 - half])
    assert stream(cosine(3, 0.5, per_round=True), 3, 1) == pytest.approx([2.0, 0.5 + 1.5 * 0.75, 0.5 + 1.5 * 0.25])
    assert linear(1, 0.5, warmup_steps=9).rate(2.0, 2, 4, 5) == 0.5, "a warm-up that is longer than the schedule"


def test_sites_with_many_and_few_steps_are_at_the_same_place() -> None:
    rates = [cosine(3).rate(1.0, 2, num_steps // 2, num_steps) for num_steps in (2, 10, 1_000)]
    assert rates == pytest.approx([(1 + math.cos(math.pi / 2)) / 2] * 3)


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The rates of the steps of an optimiser named `seen`."""
    rates: list[float] = []

    class Seen(torch.optim.SGD):
        def step(self, *arguments: Any) -> Any:
            rates.append(self.param_groups[0]["lr"])
            return super().step(*arguments)

    monkeypatch.setitem(OPTIMISERS, "seen", Seen)
    return rates


def run(given: dict[str, Any]) -> None:
    with world():
        train_on_rank(Settings(**given))


def test_a_schedule_goes_on_in_cohorts_that_train_for_steps_and_in_a_run_that_is_resumed(
    small_run: dict[str, Any], seen: list[float], tmp_path: Path
) -> None:
    given = small_run | {"optimiser": "seen", "learning_rate": 0.04, "checkpoints_dir": str(tmp_path)}
    given |= {"site_ids": [0], "num_sites": 6, "sites_per_round": 2, "local_steps": 3, "lr_schedule": "linear"}
    given |= {"site_settings": {site: {"learning_rate": 0.08} for site in Cohorts(range(6), 2, seed=1).of(2)}}
    given |= {"lr_schedule_rounds": 4, "min_learning_rate": 0.01}
    run(given | {"num_rounds": 1})
    run(given | {"num_rounds": 5})  # beyond the schedule
    expected = []
    for round_ in range(5):
        for site in Cohorts(range(6), 2, seed=1).of(round_ + 1):
            peak = given["site_settings"].get(site, {}).get("learning_rate", 0.04)
            done = [min((3 * round_ + step) / 12, 1) for step in range(3)]
            expected += [0.01 + (peak - 0.01) * (1 - of_all) for of_all in done]
    assert seen == pytest.approx(expected)


def test_a_schedule_counts_the_steps_of_epochs_and_its_length_may_not_change(
    small_run: dict[str, Any], seen: list[float], tmp_path: Path
) -> None:
    given = small_run | {"optimiser": "seen", "learning_rate": 1e-3, "checkpoints_dir": str(tmp_path)}
    given |= {"site_ids": [0, 0, 0, 0], "batch_size": 5, "num_local_epochs": 2, "lr_schedule": "cosine"}
    given |= {"warmup_steps": 2, "site_settings": {3: {"gradient_accumulation": 2}}}  # 16, 15, 15 and 15 examples
    assert Settings(**given).lr_schedule_rounds == 2 == Settings(**vars(Settings(**given))).lr_schedule_rounds
    run(given | {"num_rounds": 1, "lr_schedule_rounds": 2})
    assert "lr_schedule_rounds was 2 and is 3" in refusal(lambda: run(given | {"num_rounds": 3}))
    run(given)
    expected = []
    for round_ in range(2):
        for num_steps in (8, 6, 6, 4):
            for step in range(num_steps):
                now = round_ * num_steps + step
                progress = (now - 2) / (2 * num_steps - 2)
                expected.append(1e-3 * (now / 2 if now < 2 else (1 + math.cos(math.pi * progress)) / 2))
    assert seen == pytest.approx(expected)


def test_a_warm_up_that_lasts_until_the_end_of_the_schedule_is_refused(small_run: dict[str, Any]) -> None:
    given = small_run | {"lr_schedule": "linear", "site_ids": [0, 0], "batch_size": 10, "lr_schedule_rounds": 3}
    given |= {"site_settings": {1: {"batch_size": 5}}}  # of 31 and 30 examples: 4 and 6 steps a round
    with world():
        assert refusal(lambda: build(Settings(**given, warmup_steps=18))) == (
            "warmup_steps: expected fewer than 18, the most steps of a site in lr_schedule_rounds=3, got 18"
        )
        build(Settings(**given, warmup_steps=17))
        build(Settings(**small_run, warmup_steps=1_000))  # which has no end


def test_a_schedule_needs_the_number_of_steps() -> None:
    training = LocalTraining(
        partial(torch.optim.SGD, lr=1.0), lambda *_: iter(()), score_classes, 0, schedule=constant(1)
    )
    assert refusal(lambda: training(nn.Linear(1, 1), Site(0, CPU, 1), 1)) == (
        "num_steps: expected the steps of a round, on which the learning rate depends, got 0"
    )


def trained(model: nn.Module, examples: Examples, batch_size: int, score: Any = score_classes, **options: Any) -> Any:
    """Train a copy of a model in float64 for three rounds; return its weights, and the scores of the last round."""
    by_name = {name: options.pop(name) for name in ("local_steps", "num_local_epochs") if name in options}
    made = partial(OPTIMISERS["sgd"], lr=0.1)
    training = LocalTraining(
        made, lambda site, seed, start: site.data.shuffled_batches(batch_size, seed, start), score, 3, **options
    )
    by_name |= {"batch_size": batch_size, "gradient_accumulation": options.get("gradient_accumulation", 1)}
    settings = Settings(**by_name, learning_rate=0.1)
    model = model.double()
    with world():
        topology = place_sites([0])
        schedule = make_schedule(settings, SiteData((), {0: examples}, [examples.size(3)], {}), topology)
        results = [training(model, *schedule.train(round_), round_) for round_ in (1, 2, 3)]
    return torch.cat([weight.detach().flatten() for weight in model.parameters()]), results[-1]


def differ(a: tuple[Tensor, Any], b: tuple[Tensor, Any]) -> float:
    """Return by how much two results of `trained` differ."""
    assert a[1].keys() == b[1].keys()
    assert a[1]["num_examples"] == b[1]["num_examples"]
    for name in ("loss", "accuracy"):
        assert a[1][name][1] == b[1][name][1]
        assert float(a[1][name][0]) == pytest.approx(float(b[1][name][0]))
    return (a[0] - b[0]).abs().max().item()


@pytest.mark.parametrize("how", [{"num_local_epochs": 2}, {"local_steps": 3}], ids=["epochs", "steps"])
def test_accumulated_gradients_are_those_of_the_large_batch(how: dict[str, int]) -> None:
    answers, texts = make_answers(), make_texts(11)  # of 5 answers two steps have 4 and 1, and a micro-batch has 1 text
    whole = trained(make_llama(), answers, 4, score_tokens, **how)  # whose loss is in float32
    assert differ(trained(make_llama(), answers, 2, score_tokens, gradient_accumulation=2, **how), whole) < 1e-6
    assert differ(trained(make_llama(), answers, 1, score_tokens, gradient_accumulation=4, **how), whole) < 1e-6
    packed = replace(answers, is_packed=True)
    assert differ(trained(make_llama(), packed, 1, score_tokens, gradient_accumulation=4, **how), whole) < 1e-6
    whole = trained(make_bert(dropout=0.0), texts, 6, **how)
    assert differ(trained(make_bert(dropout=0.0), texts, 3, gradient_accumulation=2, **how), whole) < 1e-12
    assert differ(trained(make_bert(dropout=0.0), texts, 2, gradient_accumulation=3, **how), whole) < 1e-12


def test_a_micro_batch_without_a_token_to_predict_changes_nothing() -> None:
    answers = make_answers()
    first, second = (answers.select(np.array(rows)).batch() for rows in ([0, 1], [2, 3]))
    empty = second | {"labels": torch.full_like(second["labels"], -100)}

    def after(*steps: list[Batch]) -> tuple[Tensor, dict[str, float]]:
        model = make_llama()
        optimiser = torch.optim.AdamW(model.parameters(), lr=0.1)
        scores = take_steps(model, steps, optimiser, score_tokens).result()
        return torch.cat([weight.detach().flatten() for weight in model.parameters()]), scores

    weights, scores = after([first], [second])
    for steps in ([[first, empty], [empty, second]], [[first], [empty, empty], [second]]):
        assert torch.equal(after(*steps)[0], weights)
        assert after(*steps)[1] == scores


class Straight(nn.Module):
    """A model whose loss has the gradient that a batch states."""

    def __init__(self, *start: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(start))
        self.other = nn.Parameter(torch.tensor(start), requires_grad=False)

    def forward(self, gradient: Tensor, labels: Tensor) -> SimpleNamespace:
        return SimpleNamespace(loss=(gradient * (self.weight + self.other)).sum())


def push(*gradient: float, num_examples: int = 1) -> Batch:
    return {"gradient": torch.tensor(gradient), "labels": torch.zeros(num_examples)}


def no_score(output: Any, batch: Batch, means: Means) -> None: ...


def test_a_gradient_is_clipped_after_it_is_accumulated() -> None:
    def step(bound: float, *batches: Batch) -> list[float]:
        model = Straight(0.0, 0.0)
        optimiser = OPTIMISERS["sgd"]([model.weight], lr=1.0)
        take_steps(model, [batches], optimiser, no_score, before_step=change_gradients(optimiser, 0.0, bound))
        return (-model.weight).tolist()

    assert step(1.0, push(30.0, 40.0)) == pytest.approx([0.6, 0.8])
    assert step(10.0, push(3.0, 4.0)) == [3.0, 4.0], "a shorter one is left alone"
    parts = push(8.0, 0.0, num_examples=3), push(0.0, 32.0, num_examples=1)  # their mean is (6, 8)
    assert step(100.0, *parts) == [6.0, 8.0]
    assert step(5.0, *parts) == pytest.approx([3.0, 4.0])


class OnTop(torch.optim.SGD):
    """An optimiser that calls the step of its parent class, so that torch calls the hooks of a step twice."""

    def step(self, closure: Any = None) -> Any:
        return super().step(closure)


@pytest.mark.parametrize("kind", [torch.optim.SGD, OnTop])
def test_clipping_is_of_the_gradient_with_the_pull_which_is_added_once(kind: type[torch.optim.SGD]) -> None:
    def batches(site: Site, seed: int, start: int) -> Iterator[Batch]:
        yield from (push(3.0), push(3.0), push(-6.0))

    def end(**options: Any) -> float:
        model = Straight(0.0)
        training = LocalTraining(partial(kind, lr=1.0), batches, no_score, 0, **options)
        training(model, Site(0, CPU, 3), 1)
        return model.weight.item()

    assert end(proximal_mu=1.0) == -3 - (3 - 3) - (-6 - 3)
    assert end(proximal_mu=1.0, max_grad_norm=1.0) == pytest.approx(
        -1 - 1 + 1, abs=1e-5
    )  # else -1 - (1 - 1) - (-1 - 1)


def test_weight_decay_is_that_of_torch_and_none_keeps_the_optimisers_own(monkeypatch: pytest.MonkeyPatch) -> None:
    def step(weight_decay: float | None, optimiser: str) -> float:
        weight = nn.Parameter(torch.ones(1))
        weight.grad = torch.zeros(1)
        settings = Settings(optimiser=optimiser, learning_rate=0.5, weight_decay=weight_decay)
        assert not find_contradictions(settings)
        local_optimiser(settings)([weight]).step()
        return weight.item()

    assert [step(decay, "sgd") for decay in (None, 0.0, 0.1)] == pytest.approx([1.0, 1.0, 0.95])
    assert [step(decay, "adamw") for decay in (None, 0.0, 0.1)] == pytest.approx([0.995, 1.0, 0.95])
    monkeypatch.setitem(OPTIMISERS, "plain", lambda weights, lr: torch.optim.SGD(weights, lr))
    assert Settings(optimiser="plain").weight_decay is None
    assert find_contradictions(Settings(optimiser="plain", weight_decay=0.1)) == [
        "weight_decay: expected None, as optimiser='plain' does not use it, got 0.1. Leave it out, or set optimiser to "
        "one of sgd, adamw, adamw8bit"
    ]


def test_what_the_others_ignore_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(TRAINERS, "mine", lambda model, site, round_: {})
    assert find_contradictions(Settings(lr_schedule_rounds=3, min_learning_rate=1e-6, lr_per_round=False)) == [
        f"{name}: expected None, as lr_schedule='constant' does not use it, got {value}. Leave it out, or set "
        "lr_schedule to one of linear, cosine"
        for name, value in {"min_learning_rate": 1e-6, "lr_schedule_rounds": 3, "lr_per_round": False}.items()
    ]
    sites = {1: {"learning_rate": 1e-6}, 2: {"gradient_accumulation": 3}}
    falling = {"lr_schedule": "cosine", "optimiser": "sgd", "learning_rate": 1e-3, "site_settings": sites}
    assert find_contradictions(Settings(**falling, min_learning_rate=1e-5)) == [
        "min_learning_rate: expected less than site_settings[1]['learning_rate']=1e-06, got 1e-05"
    ]
    assert find_contradictions(Settings(**falling, num_rounds=5, lr_schedule_rounds=3)) == [
        "num_rounds: expected at most 3, as after lr_schedule_rounds=3 the learning rate is 0, got 5. Set "
        "min_learning_rate, or a larger lr_schedule_rounds, from the start"
    ]
    assert not find_contradictions(Settings(**falling, num_rounds=5, lr_schedule_rounds=3, min_learning_rate=1e-7))
    assert not find_contradictions(Settings(**falling, num_rounds=0))
    assert find_contradictions(Settings(**falling, lr_per_round=True, num_rounds=1, warmup_steps=2)) == [
        "lr_per_round: expected False, as with lr_schedule_rounds=1 the rate never falls, got True",
        "warmup_steps: expected 0, as with lr_per_round=True the rate does not change within a round, got 2",
    ]
    of_default = {"max_grad_norm": 1.0, "warmup_steps": 2, "weight_decay": 0.1, "trainer": "mine"}
    found = find_contradictions(Settings(**falling, **of_default))
    assert found == [
        f"{name}: expected {default}, as trainer='mine' does not know it, got {value}"
        for name, default, value in (
            ("max_grad_norm", None, 1.0),
            ("gradient_accumulation", 1, 3),
            ("lr_schedule", "'constant'", "'cosine'"),
            ("warmup_steps", 0, 2),
            ("weight_decay", 0, 0.1),
        )
    ]
    assert not find_contradictions(Settings(trainer="mine", optimiser="adamw"))


def steps_of(model: nn.Module, batches: list[Batch], score: Any) -> tuple[list[Tensor], dict[str, float]]:
    """Train a model with its dropout, and return its weights and scores, and what it scores in evaluation."""
    torch.manual_seed(5)
    optimiser = torch.optim.SGD(trained_weights(model).values(), lr=0.1)
    scores = take_steps(model, [batches[:2], batches[2:]], optimiser, score).result()
    tested = {f"tested_{name}": value for name, value in evaluate(model, batches, score).result().items()}
    return [weight.detach().clone() for weight in trained_weights(model).values()], scores | tested


def make_lora() -> nn.Module:
    model = get_peft_model(
        make_llama(), LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear", lora_dropout=0.2)
    )
    torch.manual_seed(1)
    for name, weight in trained_weights(model).items():
        if "lora_B" in name:
            nn.init.normal_(weight)
    return model


@pytest.mark.parametrize("make_model", [partial(make_bert, dropout=0.3), partial(make_llama, 0.3), make_lora])
def test_activations_that_are_computed_again_change_no_bit_and_take_less_memory(make_model: Callable[[], Any]) -> None:
    is_bert = make_model().main_input_name == "input_ids" and "Bert" in type(make_model()).__name__
    examples, score = (make_texts(8), score_classes) if is_bert else (make_answers(), score_tokens)
    batches = list(examples.shuffled_batches(2, seed=0))
    kept, again = make_model(), make_model()
    checkpoint_activations(again)
    needs = [activation_bytes(model, examples.batch(), is_training=True) for model in (kept, again)]
    assert needs[1] < needs[0]
    (weights, scores), (same, same_scores) = (steps_of(model, batches, score) for model in (kept, again))
    assert same_scores == scores
    assert all(map(torch.equal, same, weights))


def test_attention_is_computed_as_asked(small_run: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    with world():
        job = build(Settings(**small_run, attn_implementation="eager", activation_checkpointing=True))
        assert job.loaded.model.config._attn_implementation == "eager"
        assert any(getattr(module, "gradient_checkpointing", False) for module in job.loaded.model.modules())
    model, batch = make_bert().eval(), make_texts(5).batch()
    scores = model(**batch).logits
    assert model.config._attn_implementation == "sdpa"
    set_attention(model, "eager")
    assert torch.allclose(model(**batch).logits, scores, atol=1e-5)
    assert model(**batch, output_attentions=True).attentions is not None
    says = refusal(lambda: set_attention(model, "flash_attention_2"))
    assert says.startswith(
        "attn_implementation: expected one that BertForSequenceClassification has, got 'flash_attention_2': "
    )
    monkeypatch.setattr(
        type(model), "_can_set_attn_implementation", classmethod(lambda cls: False)
    )  # as of models with code of their own
    assert refusal(lambda: set_attention(model, "sdpa")) == (
        "attn_implementation: expected one that BertForSequenceClassification has, such as 'eager', got 'sdpa'"
    )
    prefixed = get_peft_model(make_llama(), PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    assert refusal(lambda: checkpoint_activations(prefixed)) == (
        "activation_checkpointing: expected False, as prefix tuning needs the cache, got True"
    )
    model.supports_gradient_checkpointing = False
    assert refusal(lambda: checkpoint_activations(model)) == (
        "activation_checkpointing: expected False, as BertForSequenceClassification has none, got True"
    )


def test_autocast_computes_products_in_a_type_and_keeps_weights_in_float32() -> None:
    def batches(site: Site, seed: int, start: int) -> Iterator[Batch]:
        return make_texts(8).shuffled_batches(2, 0)

    ours, plain, exact = (make_bert(dropout=0.0) for _ in range(3))
    for model, autocast in ((ours, torch.bfloat16), (exact, None)):
        training = LocalTraining(partial(torch.optim.SGD, lr=0.1), batches, score_classes, 0, autocast=autocast)
        training(model, Site(0, CPU, 8), 1)
    optimiser = torch.optim.SGD(plain.parameters(), lr=0.1)
    plain.train()
    for batch in batches(Site(0, CPU, 8), 0, 0):
        optimiser.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = plain(**batch).loss
        loss.backward()
        optimiser.step()
    assert all(map(torch.equal, ours.parameters(), plain.parameters()))
    assert not all(map(torch.equal, ours.parameters(), exact.parameters()))
    assert {weight.dtype for weight in ours.parameters()} == {torch.float32}
    batch, half = make_texts(8).batch(), {"autocast": torch.bfloat16}
    assert activation_bytes(ours, batch, True, **half) != activation_bytes(ours, batch, True)


def test_autocast_is_refused_where_it_is_slow_unless_it_is_forced(
    small_run: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    support = (("_is_avx2_supported", True), ("_is_avx512_bf16_supported", False), ("_is_amx_tile_supported", False))
    for name, answer in support:  # as of a CPU with AVX-512 from before bfloat16
        monkeypatch.setattr(torch.cpu, name, lambda answer=answer: answer)
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: True)
    with world():
        assert refusal(lambda: build(Settings(**small_run, autocast="bfloat16"))) == (
            "autocast: expected None, as this cpu has no instructions for bfloat16 and is several times slower in it, "
            "got 'bfloat16'. force_autocast=True uses it all the same"
        )
        build(Settings(**small_run, autocast="bfloat16", force_autocast=True))
    assert find_contradictions(Settings(force_autocast=True)) == [
        "force_autocast: expected False, as there is no autocast, got True"
    ]

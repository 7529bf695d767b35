"""The task `instruct`: language models learn the answers of conversations, with the same loop and promises."""

import json
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import Command, refusal, succeed, weights_hash
from tiny_llm import make_llama, make_tokenizer
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BloomConfig,
    BloomForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaModel,
    RobertaConfig,
    RobertaForCausalLM,
)

from scaling_fl.data.exercises import make_exercises
from scaling_fl.data.nicknames import QUESTIONS
from scaling_fl.distributed.world import world
from scaling_fl.experiment.build import build, make_evaluation
from scaling_fl.experiment.contradictions import find_contradictions
from scaling_fl.experiment.plan import plan
from scaling_fl.experiment.run import train_on_rank
from scaling_fl.experiment.settings import Settings
from scaling_fl.federation.local_training import order_seed
from scaling_fl.records.console import Progress
from scaling_fl.records.rounds import METRICS, Record
from scaling_fl.training.loop import NOT_TRAINED

COLOURS = {"sky": "blue", "grass": "green", "snow": "white", "coal": "black", "blood": "red", "sun": "yellow"}
PAIRS = [(f"Which colour has {thing}?", colour) for thing, colour in COLOURS.items()]
LONG = [(f"Describe {thing}.", f"It is {colour}, as all know. " * 3) for thing, colour in COLOURS.items()]


def put_model(folder: Path, model: Any = None, chat_template: str = "chatml") -> str:
    """Save a small language model."""
    path = folder / "llm"
    model = make_llama() if model is None else model
    model.config.use_cache = True  # as most have it
    model.save_pretrained(path)
    make_tokenizer(chat_template=chat_template).save_pretrained(path)
    return str(path)


def put_rows(folder: Path, name: str, pairs: Sequence[tuple[str, str]], **columns: Sequence[str]) -> str:
    """Write prompts and completions as JSON Lines."""
    rows = [
        {"instruction": prompt, "output": answer, **{key: values[number] for key, values in columns.items()}}
        for number, (prompt, answer) in enumerate(pairs)
    ]
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder / name)


@pytest.fixture
def given(tmp_path: Path) -> dict[str, Any]:
    """Settings of a small run, with a common test set."""
    return {
        "task_name": "instruct",
        "model": put_model(tmp_path),
        "train_path": put_rows(
            tmp_path, "train.jsonl", PAIRS + LONG, kind=["short"] * len(PAIRS) + ["long"] * len(LONG)
        ),
        "test_path": put_rows(tmp_path, "test.jsonl", PAIRS[:3]),
        **{"template": "plain", "max_seq_len": 64, "site_ids": [0, 0], "num_rounds": 1, "learning_rate": 0.01},
        **{"batch_size": 4, "report": False, "best_metric": None},
    }


def run(given: dict[str, Any], folder: Path, **changes: Any) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
    """Train in this process, and return the final weights and the metrics of each round."""
    folder.mkdir()
    with world():
        train_on_rank(Settings(**given | changes), Record(folder=str(folder)))
    rounds = [json.loads(line) for line in (folder / "rounds.jsonl").read_text().splitlines()]
    return torch.load(folder / "final_model.pt", weights_only=True), rounds


def join(weights: dict[str, Tensor]) -> Tensor:
    return torch.cat([weights[name].ravel() for name in sorted(weights)])


def test_one_step_of_two_sites_is_the_step_on_all_their_tokens(given: dict[str, Any], tmp_path: Path) -> None:
    step = {"optimiser": "sgd", "learning_rate": 1.0, "batch_size": 99, "min_examples": 1}
    sites = {**step, "partition": "natural", "site_column": "kind"}
    before, alone, by_tokens, by_examples = map(
        join,
        [
            make_llama().state_dict(),
            run(given, tmp_path / "alone", **step, site_ids=[0])[0],
            run(given, tmp_path / "tokens", **sites)[0],
            run(given, tmp_path / "examples", **sites, weight_by="examples")[0],
        ],
    )
    moved = (alone - before).norm()
    assert (by_tokens - alone).norm() < 1e-5 * moved
    assert (by_examples - alone).norm() > 0.05 * moved, "the sites must have answers of other lengths"


def test_a_site_that_trains_for_steps_weighs_the_tokens_of_its_batches(given: dict[str, Any]) -> None:
    with world():
        job = build(Settings(**given | {"local_steps": 2, "batch_size": 2, "num_rounds": 5}))
        fewer = 0
        for round_ in range(1, 6):
            for site in job.schedule.train(round_):
                examples = job.data.train[site.number]
                epochs = [examples.shuffled_batches(2, order_seed(1, site.number, n)) for n in range(9)]
                batches = [batch for epoch in epochs for batch in epoch][2 * (round_ - 1) : 2 * round_]
                num_tokens = sum(int((batch["labels"][:, 1:] != NOT_TRAINED).sum()) for batch in batches)
                most = job.data.sizes[site.number].num_trained_tokens
                assert site.num_tokens == min(num_tokens, most)
                fewer += num_tokens < most
                assert site.num_examples == sum(len(batch["labels"]) for batch in batches)
        assert fewer >= 5, "else all tokens of a site are counted"


def test_where_a_site_runs_and_a_stop_change_no_bit(given: dict[str, Any], tmp_path: Path, command: Command) -> None:
    given |= {
        "report": False,
        "site_ids": [0, 0, 0],
        "num_rounds": 2,
        "pack": True,
        "label_column": None,
        "labels": None,
    }
    steps = [{}, {"ranks": 2, "checkpoints_dir": tmp_path, "num_rounds": 1}, {"checkpoints_dir": tmp_path}]
    outputs = [succeed(command(**given | step)) for step in steps]
    assert weights_hash(outputs[0]) == weights_hash(outputs[2]) != weights_hash(outputs[1])
    assert "resumed   after round 1" in outputs[2]


def test_a_model_that_has_learned_its_answers_by_heart_gives_them(given: dict[str, Any], tmp_path: Path) -> None:
    _, rounds = run(
        given,
        tmp_path / "run",
        **{"train_path": put_rows(tmp_path, "short.jsonl", PAIRS), "num_local_epochs": 40, "batch_size": 3},
        **{"score_by": "exact_match", "sample_questions": [PAIRS[0][0], PAIRS[3][0]], "site_ids": [0]},
    )
    assert rounds[0]["validation.exact_match"] == 0
    assert rounds[1]["validation.exact_match"] == rounds[1]["validation.accuracy"] == 1
    assert rounds[1]["sample.answers"] == ["blue", "black"]
    assert rounds[1]["validation.perplexity"] == math.exp(rounds[1]["validation.loss"])


def test_an_answer_that_was_cut_is_not_asked_for(given: dict[str, Any], tmp_path: Path) -> None:
    path = put_rows(tmp_path, "some.jsonl", [*PAIRS[:2], *LONG])
    with world():
        job = build(Settings(**given | {"test_path": path, "max_seq_len": 24, "score_by": "exact_match"}))
        evaluation = make_evaluation(Settings(**given | {"score_by": "exact_match"}), job, Progress())
        assert job.data.lost["answers_cut"] == 2 * len(LONG)
        (device,) = job.data.common
        assert evaluation.evaluate_device(job.loaded.model, device)["exact_match"] == (0, 2)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"template": "flowertune", "score_by": "exact_match"}, "template='flowertune' does not end an answer"),
        ({"sample_questions": ["Who?", "Who? " * 99]}, "sample_questions: question 2: expected a prompt of 1 to 64"),
    ],
)
def test_what_no_model_can_answer_is_refused_before_training(
    given: dict[str, Any], changes: dict[str, Any], expected: str
) -> None:
    with world():
        assert expected in refusal(lambda: plan(Settings(**given | changes)))


def test_each_site_is_evaluated_on_its_own_answers(given: dict[str, Any], tmp_path: Path) -> None:
    changes = {"test_path": None, "site_test_fraction": 0.3, "score_by": "exact_match", "evaluate_local": True}
    changes |= {"sample_questions": ["Which colour has coal?"]}
    _, rounds = run(given, tmp_path / "run", **changes, partition="natural", site_column="kind", num_rounds=2)
    last = rounds[-1]
    assert {*last["site.test_exact_match"]} == {*last["site.local_exact_match"]} == {"0", "1"}
    of_answers = {name for name in METRICS if re.search("perplexity|exact_match|answers", name)}
    expected = {name for name in of_answers if not name.startswith("test.")}  # which needs validation examples
    assert {name for name in last if re.search("perplexity|exact_match|answers", name)} == expected
    assert last["sites.test_exact_match.worst"] == min(last["site.test_exact_match"].values())
    assert last["validation.exact_match"] == last["sites.test_exact_match.weighted"]


def test_packing_changes_no_loss_but_for_rounding(given: dict[str, Any], tmp_path: Path) -> None:
    (_, padded), (_, packed) = (run(given, tmp_path / str(pack), pack=pack, num_rounds=2) for pack in (False, True))
    for before, after in zip(padded, packed, strict=True):
        assert after["validation.loss"] == pytest.approx(before["validation.loss"], abs=1e-4)
    assert packed[2]["train.loss"] == pytest.approx(padded[2]["train.loss"], abs=1e-4)
    assert packed[2]["site.examples"] == padded[2]["site.examples"]
    num_tokens, num_packed = (round(of[2]["speed.tokens_per_s"] * of[2]["time.train_s"]) for of in (padded, packed))
    assert num_packed == num_tokens
    with world():
        data = build(Settings(**given | {"pack": True})).data
    assert all(len(examples.batch()["input_ids"]) == 1 for examples in data.train.values())
    assert all("attention_mask" in part.batch() for parts in data.common.values() for part in parts)


def test_a_model_that_mixes_packed_texts_is_refused(given: dict[str, Any], tmp_path: Path) -> None:
    folder = tmp_path / "other"
    folder.mkdir()
    bloom = BloomForCausalLM(BloomConfig(vocab_size=400, hidden_size=16, n_layer=1, n_head=2, initializer_range=0.5))
    path = put_model(folder, bloom)
    run(given, tmp_path / "run", model=path)
    message = refusal(lambda: run(given, tmp_path / "refused", model=path, pack=True))
    assert "pack: expected a model that tells texts in a row apart by their positions, got a loss of" in message
    alone = put_rows(tmp_path, "alone.jsonl", PAIRS[:1])  # may follow itself
    changes = {"model": path, "train_path": alone, "site_ids": [0], "pack": True, "batch_size": 1}
    assert "pack: expected" in refusal(lambda: run(given, tmp_path / "alone", **changes))


def test_the_result_has_the_end_of_an_answer_and_a_cache(given: dict[str, Any], tmp_path: Path) -> None:
    run(given, tmp_path / "run", num_rounds=0)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model")
    end = make_tokenizer().convert_tokens_to_ids("<|im_end|>")
    assert end in model.generation_config.eos_token_id
    assert model.config.use_cache
    assert all(map(torch.equal, model.state_dict().values(), make_llama().state_dict().values()))


def test_the_result_of_an_adapter_is_read_as_others_read_it(given: dict[str, Any], tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    changes = {"adapter": "lora", "lora_rank": 2, "merge": True, "num_rounds": 2}
    weights, _ = run(given, tmp_path / "run", **changes)
    assert all("lora_" in name for name in weights)
    assert json.loads((tmp_path / "run" / "model" / "adapter_config.json").read_text())["task_type"] == "CAUSAL_LM"
    batch = {"input_ids": torch.arange(3, 30).reshape(3, 9)}
    with torch.no_grad():
        folder = tmp_path / "run" / "model"
        ours = AutoModelForCausalLM.from_pretrained(folder).eval()
        by_path = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(given["model"]), folder).eval()
        merged = AutoModelForCausalLM.from_pretrained(f"{folder}_merged").eval()
        expected = by_path(**batch).logits
        assert torch.equal(ours(**batch).logits, expected)
        assert torch.allclose(merged(**batch).logits, expected, atol=1e-5)
        assert not torch.allclose(make_llama().eval()(**batch).logits, expected, atol=1e-2)
    _, more = run(given, tmp_path / "more", model=str(folder), num_rounds=1)
    _, all_ = run(given, tmp_path / "all", **changes | {"num_rounds": 3})
    assert more[0]["validation.loss"] == all_[2]["validation.loss"], "a run continues from the folder"


def test_rows_that_are_left_out_or_cut_are_counted(given: dict[str, Any], tmp_path: Path) -> None:
    path = put_rows(tmp_path, "odd.jsonl", [*PAIRS, ("Which?", ""), ("A " * 99, "red")])
    assert "text 7 of the 8" in refusal(lambda: run(given, tmp_path / "refused", train_path=path))
    with world():
        job = build(Settings(**given | {"train_path": path, "skip_long": True}))
    assert job.data.lost == {"rows_left_out": 1, "prompts_cut": 1, "answers_cut": 0}
    assert sum(map(len, job.data.train.values())) == len(PAIRS) + 1


def test_rows_that_are_left_out_move_no_row_to_another_site(given: dict[str, Any], tmp_path: Path) -> None:
    kinds = ["a", "a", "a", "b", "b", "b", "b"]
    path = put_rows(tmp_path, "odd.jsonl", [("Which?", ""), *PAIRS], kind=kinds)
    natural = {"partition": "natural", "site_column": "kind", "skip_long": True}
    with world():
        job = build(Settings(**given | natural | {"train_path": path}))
    assert job.data.names == ("a", "b")
    message = refusal(
        lambda: run(
            given,
            tmp_path / "refused",
            **natural,
            train_path=put_rows(tmp_path, "emptied.jsonl", [("Which?", ""), *PAIRS], kind=["c", *kinds[1:]]),
        )
    )
    assert "skip_long: expected a row left of each value of site_column, got none of 'c'" in message
    assert [(size.num_examples, size.label_counts) for size in job.data.sizes] == [(2, ()), (4, ())]
    files = {"train_path": None, "test_path": None, "skip_long": True, "site_paths": [[path, path], [path]]}
    with world():
        job = build(Settings(**given | files))
    assert job.data.lost["rows_left_out"] == 3


@pytest.mark.long
def test_sites_with_files_of_their_own_show_counts_only(
    given: dict[str, Any], tmp_path: Path, command: Command
) -> None:
    files = [put_rows(tmp_path, f"{name}.jsonl", pairs) for name, pairs in {"a": PAIRS, "b": LONG}.items()]
    changes = {"train_path": None, "test_path": None, "site_paths": [[files[0], files[0]], [files[1]]]}
    output = succeed(command(**given | changes | {"label_column": None, "labels": None}, ranks=2))
    assert "12 examples to train on" in output
    assert "weighted by tokens" in output
    alone = succeed(command(**given | changes | {"label_column": None, "labels": None}))
    assert weights_hash(alone) == weights_hash(output)
    assert "colour" not in output


def test_a_model_that_sees_later_tokens_is_refused(given: dict[str, Any], tmp_path: Path) -> None:
    folder = tmp_path / "other"
    folder.mkdir()
    config = {"vocab_size": 400, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    roberta = RobertaForCausalLM(RobertaConfig(**config, intermediate_size=16, max_position_embeddings=70))
    path = put_model(folder, roberta)
    message = refusal(lambda: run(given, tmp_path / "refused", model=path))
    assert "expected a causal language model" in message
    assert "sees those before it only" in message


def test_a_model_without_its_head_is_refused(given: dict[str, Any], tmp_path: Path) -> None:
    folder = tmp_path / "other"
    folder.mkdir()
    config = LlamaConfig(
        vocab_size=400, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    message = refusal(lambda: run(given, tmp_path / "refused", model=put_model(folder, LlamaModel(config))))
    assert "expected all weights of a causal language model in its files, got none for lm_head.weight" in message


def test_virtual_tokens_are_not_scored(given: dict[str, Any], tmp_path: Path) -> None:
    pytest.importorskip("peft")
    config = {"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 3}
    changes = {"adapter_config": config, "num_rounds": 2, "num_local_epochs": 4, "score_by": "exact_match"}
    weights, rounds = run(given, tmp_path / "run", **changes)
    assert [tuple(weight.shape) for weight in weights.values()] == [(3, 16)]
    assert rounds[2]["train.loss"] < rounds[1]["train.loss"]
    assert "by their positions" in refusal(lambda: run(given, tmp_path / "refused", **changes, pack=True))
    with world():
        plan(Settings(**given | changes))


def test_prompts_are_learned_if_that_is_asked_for(given: dict[str, Any]) -> None:
    with world():
        sizes, with_prompts = (
            build(Settings(**given | {"train_on_prompt": learns})).data.sizes for learns in (False, True)
        )
    for before, after in zip(sizes, with_prompts, strict=True):
        assert before.num_trained_tokens < after.num_trained_tokens == after.num_tokens - after.num_examples


@pytest.mark.parametrize("padding", [None, "[PAD]"], ids=["none", "without an embedding"])
def test_models_without_a_padding_token_are_trained(given: dict[str, Any], tmp_path: Path, padding: str | None) -> None:
    folder = tmp_path / "other"
    folder.mkdir()
    path = put_model(
        folder, GPT2LMHeadModel(GPT2Config(vocab_size=400, n_embd=16, n_layer=1, n_head=2, n_positions=64))
    )
    tokenizer = AutoTokenizer.from_pretrained(path)
    tokenizer.pad_token = padding
    tokenizer.save_pretrained(path)
    _, rounds = run(given, tmp_path / "run", model=path, num_rounds=2)
    assert rounds[2]["validation.loss"] < rounds[0]["validation.loss"]


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"labels": ["a", "b"]}, "labels: expected None, as task_name='instruct' has no labels"),
        ({"text_column": "x"}, "text_column: expected None, as task_name='instruct' finds the columns"),
        ({"partition": "dirichlet"}, "partition: expected one without labels"),
        ({"iid_split": False}, "partition: expected one without labels"),
        ({"score_by": "exact_match", "train_on_prompt": True}, "score_by: expected None"),
        ({"best_metric": "validation.macro_f1"}, "best_metric: expected one of validation.loss, validation.accuracy"),
        ({"best_metric": "validation.exact_match"}, "validation.exact_match needs score_by=exact_match"),
        (
            {"task_name": "text", "template": "chat"},
            "template: expected None, as task_name='text' has no conversations",
        ),
        ({"task_name": "text", "template": None, "pack": True}, "pack: expected False, as task_name='text'"),
        ({"task_name": "text", "template": None, "weight_by": "tokens"}, "weight_by: expected examples or sites"),
        (
            {"task_name": "text", "template": None, "best_metric": "validation.perplexity"},
            "best_metric: expected one of",
        ),
    ],
)
def test_settings_that_make_no_sense_are_refused(given: dict[str, Any], changes: dict[str, Any], expected: str) -> None:
    (problem,) = find_contradictions(Settings(**given | changes))
    assert expected in problem


def test_without_a_test_file_a_fraction_is_asked_for(given: dict[str, Any], tmp_path: Path) -> None:
    message = refusal(lambda: run(given, tmp_path / "refused", test_path=None))
    assert message == (
        "test_path: expected a path or URL for task_name='instruct', got None. validation_fraction holds out a part of "
        "the training data"
    )


def test_the_default_is_a_run_that_needs_nothing_but_packages() -> None:
    settings = Settings(task_name="instruct")
    assert (settings.model, settings.train_path, settings.weight_by) == ("smollm2", "exercises", "tokens")
    assert (settings.partition, settings.site_column, settings.score_by) == ("natural", "kind", "exact_match")
    others = Settings(task_name="instruct", train_path="dolly", model="gpt2")
    assert Settings(task_name="instruct", adapter_config={"peft_type": "IA3"}).adapter is None
    assert (others.partition, others.site_column, others.score_by, others.adapter) == ("iid", None, None, None)
    assert Settings(task_name="agnews", model="smollm2").template is None
    assert Settings(task_name="instruct", site_paths=[["a.jsonl"]]).train_path is None
    asked = {row["messages"][0]["content"] for row in make_exercises()}
    assert asked.isdisjoint(QUESTIONS)

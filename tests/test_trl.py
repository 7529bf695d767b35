"""Tokens, labels, losses and weights are those of trl's SFTTrainer, where trl is installed."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from tiny_llm import CHATS, KINDS, make_llama, make_tokenizer, rows_of, say
from transformers import PreTrainedTokenizerFast

from scaling_fl.data.conversation import Conversation
from scaling_fl.data.templates import TEMPLATES
from scaling_fl.data.tokens import ConversationEncoder
from scaling_fl.distributed.world import world
from scaling_fl.experiment.build import build
from scaling_fl.experiment.centralised import without_federation
from scaling_fl.experiment.run import train_on_rank
from scaling_fl.experiment.settings import Settings
from scaling_fl.records.rounds import Record
from scaling_fl.training.seeds import derive_seed

trl = pytest.importorskip("trl", reason="trl, whose SFTTrainer is the reference, is not installed")

ROWS = (
    say("Name a colour.", "Red and blue.", context="a dog"),
    say("Which?\nA or b", "Blue é 漢\n\nA dog"),
    say("Q", "A"),
)
CHAT_ROWS = (say("Which?", "Red.", "And?", "A dog ran."), say("Which?", "Red.", system="Be brief."))


def trl_batch(
    folder: Path, tokenizer: PreTrainedTokenizerFast, rows: list[dict[str, Any]], **options: Any
) -> dict[str, torch.Tensor]:
    """The batch of trl's own collator."""
    arguments = trl.SFTConfig(output_dir=str(folder), use_cpu=True, report_to="none", max_length=None, **options)
    trainer = trl.SFTTrainer(
        make_llama(), args=arguments, train_dataset=Dataset.from_list(rows), processing_class=tokenizer
    )
    return trainer.data_collator([trainer.train_dataset[index] for index in range(len(rows))])


def our_batch(tokenizer: PreTrainedTokenizerFast, template: str, *rows: Conversation) -> dict[str, torch.Tensor]:
    return ConversationEncoder(tokenizer, template, 4096).encode(rows_of(*rows)).examples.batch()


def without_start(tokenizer: PreTrainedTokenizerFast, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A batch without the start token, which trl leaves out where a chat template does not write it."""
    if tokenizer.bos_token_id is None:
        return batch
    assert (batch["input_ids"][:, 0] == tokenizer.bos_token_id).all()
    return {name: column[:, 1:] for name, column in batch.items()}


def check_equal(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    is_token = ours["attention_mask"] == 1
    assert torch.equal(is_token, theirs["attention_mask"] == 1)
    assert torch.equal(ours["input_ids"][is_token], theirs["input_ids"][is_token])
    assert torch.equal(ours["labels"], theirs["labels"])
    if int(ours["input_ids"].max()) < 400 and ours["input_ids"].shape[1] <= 512:
        model = make_llama().eval()
        losses = [model(**{name: batch[name] for name in ours}).loss.item() for batch in (ours, theirs)]
        assert losses[0] == pytest.approx(losses[1], abs=1e-6)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("template", ["alpaca", "plain"])
def test_prompts_and_completions_have_the_labels_of_trl(tmp_path: Path, kind: str, template: str) -> None:
    tokenizer = make_tokenizer(kind, "none")
    texts = []
    for row in ROWS:
        pieces = TEMPLATES[template](row, tokenizer)
        prompt = "".join(piece.text for piece in pieces if not piece.is_answer)
        texts.append({"prompt": prompt, "completion": row.turns[1].content})  # to which trl adds the end token
    check_equal(our_batch(tokenizer, template, *ROWS), trl_batch(tmp_path, tokenizer, texts))


@pytest.mark.parametrize("kind", KINDS)
def test_a_chat_has_the_labels_of_trl_but_for_the_line_after_the_end_token(tmp_path: Path, kind: str) -> None:
    tokenizer = make_tokenizer(kind)
    turns = [[turn._asdict() for turn in row.turns] for row in CHAT_ROWS]
    theirs = trl_batch(tmp_path, tokenizer, [{"prompt": row[:-1], "completion": row[-1:]} for row in turns])
    # trl trains the last answer of such a row alone.
    ours = without_start(tokenizer, our_batch(tokenizer, "chat", *CHAT_ROWS))
    places = torch.arange(ours["labels"].shape[1])
    first_trained = theirs["labels"].ne(-100).int().argmax(1, keepdim=True)
    ours["labels"] = ours["labels"].masked_fill(places < first_trained, -100)
    last_end = ((ours["input_ids"] == tokenizer.eos_token_id) * ours["attention_mask"] * places).amax(1, keepdim=True)
    is_after = (places > last_end) & (theirs["labels"] != -100)
    assert {
        tokenizer.decode(labels[after]).strip(" ") for labels, after in zip(theirs["labels"], is_after, strict=True)
    } == {"\n"}
    theirs["labels"] = theirs["labels"].masked_fill(is_after, -100)
    check_equal(ours, theirs)


@pytest.mark.parametrize("kind", KINDS)
def test_a_template_that_marks_answers_has_the_labels_of_trl(tmp_path: Path, kind: str) -> None:
    answer = "m['content'] + '<|im_end|>'"
    marked = CHATS["chatml"].replace(
        "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}",
        "{{ '<|im_start|>' + m['role'] + '\n' }}{% if m['role'] == 'assistant' %}{% generation %}{{ "
        + answer
        + " }}{% endgeneration %}{% else %}{{ "
        + answer
        + " }}{% endif %}{{ '\n' }}",
    )
    assert "generation" in marked
    tokenizer = make_tokenizer(kind)
    rows = [{"messages": [turn._asdict() for turn in row.turns]} for row in CHAT_ROWS]
    try:
        tokenizer.chat_template = marked
        theirs = trl_batch(tmp_path, tokenizer, rows, assistant_only_loss=True)
        both = our_batch(tokenizer, "chat", *CHAT_ROWS)
    finally:
        tokenizer.chat_template = CHATS["chatml"]
    ours = our_batch(tokenizer, "chat", *CHAT_ROWS)
    assert torch.equal(both["labels"], ours["labels"])
    check_equal(without_start(tokenizer, ours), theirs)


def test_a_centralised_run_is_sft_trainer_called_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three rounds of two epochs, with a schedule over all steps, accumulation and clipping."""
    monkeypatch.chdir(tmp_path)
    make_llama().save_pretrained(tmp_path / "start")
    make_tokenizer().save_pretrained(tmp_path / "start")
    words = ["a", "dog", "ran", "red", "and", "blue", "which", "colours", "are", "there"]
    rows = [{"instruction": f"{words[k % 10]} {words[k % 7]}", "output": " ".join(words[k % 5 :])} for k in range(23)]
    Path("rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    settings = Settings(
        **{"task_name": "instruct", "template": "chat", "train_path": "rows.jsonl", "test_path": "rows.jsonl"},
        **{"model": str(tmp_path / "start"), "centralised": True, "num_rounds": 3, "num_local_epochs": 2},
        **{"batch_size": 4, "gradient_accumulation": 2, "optimiser": "adamw", "weight_decay": 0.0, "max_seq_len": 64},
        **{"learning_rate": 5e-3, "lr_schedule": "cosine", "warmup_steps": 3, "max_grad_norm": 0.5},
    )
    with world():
        examples = build(without_federation(settings)).data.train[0]
        train_on_rank(settings, Record(str(tmp_path)))
    ours = torch.load("final_model.pt", weights_only=True)

    orders = [
        np.random.default_rng(derive_seed(settings.seed, "order", round_, 0, epoch)).permutation(len(rows)).tolist()
        for round_ in (1, 2, 3)
        for epoch in (0, 1)
    ]

    class InOurOrder(trl.SFTTrainer):  # type: ignore[misc, name-defined]
        def _get_train_sampler(self, *_: Any) -> Any:
            class Epochs:
                def __iter__(self) -> Any:
                    return iter(orders.pop(0))

                def __len__(self) -> int:
                    return len(rows)

            return Epochs()

    columns = [examples.select(np.array([index])).batch() for index in range(len(rows))]
    data = Dataset.from_list([{name: row[name][0].tolist() for name in ("input_ids", "labels")} for row in columns])
    arguments = trl.SFTConfig(
        **{"output_dir": str(tmp_path / "trl"), "use_cpu": True, "report_to": "none", "save_strategy": "no"},
        **{"num_train_epochs": 6, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "bf16": False},
        **{"learning_rate": 5e-3, "lr_scheduler_type": "cosine", "warmup_steps": 3, "max_grad_norm": 0.5},
        **{"weight_decay": 0.0, "max_length": None, "gradient_checkpointing": False, "disable_tqdm": True},
    )
    trainer = InOurOrder(make_llama(), args=arguments, train_dataset=data, processing_class=make_tokenizer())
    trainer.train()
    theirs = dict(trainer.model.named_parameters())
    start = dict(make_llama().named_parameters())
    assert not orders
    assert max((ours[name] - start[name]).abs().max().item() for name in theirs) > 1e-2
    assert max((ours[name] - theirs[name]).abs().max().item() for name in theirs) < 1e-5

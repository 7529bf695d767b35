"""Tokens, labels and losses are those of trl's SFTTrainer, where trl is installed."""

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from tiny_llm import CHATS, KINDS, make_llama, make_tokenizer, rows_of, say
from transformers import PreTrainedTokenizerFast

from scaling_fl.data.conversations import Conversation
from scaling_fl.data.templates import TEMPLATES
from scaling_fl.data.tokens import ConversationEncoder

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

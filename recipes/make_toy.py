"""Make a folder with tiny models and tiny data, with which every recipe runs offline: TOY=FOLDER recipes/...sh."""

import csv
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer
from toy_instructions import INSTRUCTIONS, make_instructions
from transformers import BertConfig, BertForPreTraining, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils import logging

WORDS = {
    "imdb": ("terrible boring awful", "wonderful moving great"),
    "agnews": ("election minister war", "match goal team", "market profit shares", "software chip network"),
}
COMMON = "the a of and in on was it with this new old film game report day".split()  # noqa: SIM905
CONFIG = {
    **{"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64},
    **{"max_position_embeddings": 512, "type_vocab_size": 2, "hidden_act": "gelu", "initializer_range": 0.02},
    **{"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1},
}
NUM_ROWS = {"train": 320, "test": 240}  # enough for two sites with 100 of each
CONTROLS = ["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]
CHAT = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def make_model(folder: Path) -> None:
    """Write a random BERT as old repositories of the hub have it: no model_type, and vocab.txt as its tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    words = [word for texts in WORDS.values() for text in texts for word in text.split()]
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words, *COMMON]
    (folder / "vocab.txt").write_text("".join(f"{word}\n" for word in vocabulary))
    config = CONFIG | {"vocab_size": len(vocabulary)}
    (folder / "config.json").write_text(json.dumps(config))
    torch.manual_seed(0)
    model = BertForPreTraining(BertConfig(**config))
    torch.save(model.state_dict(), folder / "pytorch_model.bin")


def make_texts(words: Sequence[str], count: int, random: np.random.Generator) -> Iterator[tuple[int, str]]:
    """Yield numbers of labels, in turn, and texts that have words of their label among common ones."""
    for row in range(count):
        label = row % len(words)
        text = [*random.choice(words[label].split(), 3), *random.choice(COMMON, random.integers(3, 12))]
        yield label, " ".join(random.permutation(text)).capitalize()


def make_data(folder: Path) -> None:
    """Write the training and test files of IMDB (text,label) and of AG News (class, title, description)."""
    random = np.random.default_rng(0)
    for split, count in NUM_ROWS.items():
        for task, words in WORDS.items():
            (folder / task).mkdir(parents=True, exist_ok=True)
            texts = make_texts(words, count, random)
            with open(folder / task / f"{split}.csv", "w", newline="") as file:
                write = csv.writer(file, lineterminator="\n").writerow
                if task == "imdb":
                    write(["text", "label"])
                for label, text in texts:
                    write([text, label] if task == "imdb" else [label + 1, "A title", text])


def make_language_model(folder: Path, num_layers: int) -> None:
    """Write a random Llama, 64 wide, and a tokenizer of bytes and their pairs with a chat template."""
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = BpeTrainer(vocab_size=512, special_tokens=CONTROLS, initial_alphabet=alphabet, show_progress=False)
    rows = [row for make in INSTRUCTIONS.values() for row in make()]
    tokenizer.train_from_iterator([str(value) for row in rows for value in row.values()], trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="</s>", pad_token="</s>")
    fast.chat_template = CHAT
    fast.save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        **{"vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": num_layers},
        **{"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 1024},
        **{"bos_token_id": None, "eos_token_id": 2, "pad_token_id": 2, "tie_word_embeddings": True},
    )
    LlamaForCausalLM(config).save_pretrained(folder)


def make(folder: Path) -> None:
    """Write all models and data."""
    make_model(folder / "model")
    make_data(folder)
    make_language_model(folder / "llm", num_layers=2)
    make_language_model(folder / "llm-small", num_layers=1)
    make_instructions(folder / "instruct")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(f"usage: {sys.argv[0]} FOLDER, such as data/toy")
    logging.disable_progress_bar()
    make(Path(sys.argv[1]))
    print(f"{sys.argv[1]}: models and data. Type: TOY={sys.argv[1]} recipes/flower_quickstart.sh")

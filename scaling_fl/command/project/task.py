"""The data, the model and the training of this project, each under a name that settings.yaml uses.

Every rank imports this module before anything else. Replace what you need, and delete the rest.
"""

from collections.abc import Mapping
from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.normalizers import Lowercase
from tokenizers.pre_tokenizers import Whitespace
from torch import nn
from transformers import BertConfig, PreTrainedConfig, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from scaling_fl import MODELS, TASKS, TRAINERS, Nickname, Site, Task
from scaling_fl.data.files import read_table
from scaling_fl.training.seeds import derive_seed

# The data: a table with a column of texts and one of labels, each label with its name.
TASKS["reviews"] = Task(
    read=lambda path, split, columns: read_table(path, columns=columns),
    columns=("review", "stars"),
    labels={"1": "bad", "2": "bad", "4": "good", "5": "good"},
)

WORDS = """[PAD] [UNK] and but not never very too is was the it i love like hate fine great good nice best happy fresh
quick kind warm bad poor worst sad stale slow rude cold late broken dirty clean food tea soup room bed staff"""


def make_model() -> tuple[PreTrainedConfig, PreTrainedTokenizerBase]:
    """Describe a small BERT, whose weights depend on the setting `seed`, and a tokenizer of a few words."""
    words = {word: number for number, word in enumerate(WORDS.split())}
    split = Tokenizer(WordLevel(words, unk_token="[UNK]"))
    split.normalizer, split.pre_tokenizer = Lowercase(), Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=split, pad_token="[PAD]", unk_token="[UNK]")
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    return BertConfig(vocab_size=len(words), max_position_embeddings=64, **sizes), tokenizer


MODELS["small-bert"] = Nickname(make=make_model)  # Nickname(lambda: "bert-base-cased") loads pretrained weights


def train_clipped(model: nn.Module, site: Site, round_: int) -> Mapping[str, Any]:
    """Train a site with gradients of bounded length: samples by seeds alone, and keeps nothing for the next round."""
    own = site.settings
    optimiser = torch.optim.AdamW(model.parameters(), lr=own["learning_rate"])
    loss, num_right, count = 0.0, 0, 0
    for epoch in range(own["num_local_epochs"]):
        seed = derive_seed(own["seed"], "order", round_, site.number, epoch)
        for batch in site.data.shuffled_batches(own["batch_size"], seed):
            batch = {name: tensor.to(site.device) for name, tensor in batch.items()}
            output = model(**batch)
            output.loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimiser.step()
            optimiser.zero_grad()
            loss += output.loss.item() * len(batch["labels"])
            num_right += int((output.logits.argmax(-1) == batch["labels"]).sum())
            count += len(batch["labels"])
    return {"num_examples": site.num_examples, "loss": (loss, count), "accuracy": (num_right, count)}


TRAINERS["clipped"] = train_clipped

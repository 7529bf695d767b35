"""Three sites fine-tune a classifier of texts, each with `transformers.Trainer`.

    python examples/own_trainer.py [MODEL]

MODEL is a hub id or the folder of a model with its tokenizer; without it, a tiny BERT that is newly initialised.
While a site trains, the library hides the launcher's variables and the process group, so `Trainer` sees one process.
"""

import random
import sys
from tempfile import TemporaryDirectory

import torch
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    BertTokenizerFast,
    PrinterCallback,
    Trainer,
    TrainingArguments,
)

from scaling_fl import Federation, Site, launch, place_sites, world

WORDS = ("goal match team player coach".split(), "chip code disk cloud robot".split())  # of sport, of technology
OTHER_WORDS = "the a of and in on was very old new good last".split()
SIZES = (60, 24, 39)  # texts of each site


def make_texts(count, seed):
    """Return texts and their labels, 0 or 1."""
    draw, labels = random.Random(seed), [index % 2 for index in range(count)]
    return [" ".join(draw.choices(WORDS[label], k=2) + draw.choices(OTHER_WORDS, k=6)) for label in labels], labels


def make_model(path):
    torch.manual_seed(0)
    if path:
        return AutoModelForSequenceClassification.from_pretrained(path, num_labels=2), AutoTokenizer.from_pretrained(path)
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS[0], *WORDS[1], *OTHER_WORDS]
    config = BertConfig(
        vocab_size=len(words), hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64
    )
    tokenizer = BertTokenizerFast(vocab={word: index for index, word in enumerate(words)})
    return BertForSequenceClassification(config), tokenizer


def train_site(model, site, round_):
    with TemporaryDirectory() as folder:
        trainer = Trainer(
            model,
            TrainingArguments(
                folder,
                seed=1000 * round_ + site.number,  # of the order of texts and of dropout
                learning_rate=3e-3,
                num_train_epochs=1,
                per_device_train_batch_size=8,
                use_cpu=site.device.type == "cpu",
                save_strategy="no",
                logging_strategy="no",
                report_to="none",
                disable_tqdm=True,
            ),
            train_dataset=site.data["train"],
        )
        trainer.remove_callback(PrinterCallback)
        loss = trainer.train().training_loss
    return {"num_examples": site.num_examples, "loss": (loss * site.num_examples, site.num_examples)}

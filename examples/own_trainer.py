"""Three sites fine-tune a classifier of texts, each with `transformers.Trainer`.

    python examples/own_trainer.py [MODEL]

MODEL is a folder with a model and its tokenizer, or a hub id; without it, a tiny BERT that is newly initialised. While
a site trains, the launcher's variables and the process group are hidden, so that `Trainer` finds one process. It takes
all GPUs that it sees: on a machine with several, let it see one (CUDA_VISIBLE_DEVICES). sft_trainer.py is the same for
`trl.SFTTrainer`, as a trainer that a run knows by name.
"""

import random
import sys
from tempfile import TemporaryDirectory

import torch
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertTokenizerFast,
    DataCollatorWithPadding,
    PrinterCallback,
    Trainer,
    TrainingArguments,
)

from scaling_fl import Federation, Site, launch, place_sites, world

NUM_TEXTS = (120, 48, 75)  # of each site
SPORT, TECHNOLOGY = ["goal", "match", "team", "player", "coach"], ["chip", "code", "disk", "cloud", "robot"]
OTHER = ["the", "a", "of", "and", "in", "on", "was", "very", "old", "new", "good", "last"]


def train_site(model, site, round_):
    with TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder,
            seed=1000 * round_ + site.number,  # of the order of the texts, and of dropout
            num_train_epochs=1,
            per_device_train_batch_size=8,
            learning_rate=site.settings.get("learning_rate", 5e-3),
            use_cpu=site.device.type == "cpu",
            save_strategy="no",
            logging_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )
        trainer = Trainer(model, arguments, data_collator=site.data["collate"], train_dataset=site.data["train"])
        trainer.remove_callback(PrinterCallback)
        num_steps, mean_loss, _ = trainer.train()
    return {"num_examples": len(site.data["train"]), "loss": (mean_loss * num_steps, num_steps)}


def evaluate_site(model, site, round_):
    batch = site.data["collate"](site.data["test"]).to(site.device)
    is_right = model(**batch).logits.argmax(-1) == batch["labels"]
    return {"num_examples": len(is_right), "accuracy": (is_right.sum(), len(is_right))}


def make_model(path=None):
    torch.manual_seed(0)  # of what is newly initialised
    if path is not None:
        model = AutoModelForSequenceClassification.from_pretrained(path, num_labels=2)
        return model, AutoTokenizer.from_pretrained(path)
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *SPORT, *TECHNOLOGY, *OTHER]
    tokenizer = BertTokenizerFast(vocab={word: number for number, word in enumerate(words)})
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    return AutoModelForSequenceClassification.from_config(BertConfig(vocab_size=len(words), **sizes)), tokenizer


def make_rows(tokenizer, count, seed):
    draw, rows = random.Random(seed), []
    for number in range(count):
        words = draw.choices((SPORT, TECHNOLOGY)[number % 2], k=2) + draw.choices(OTHER, k=draw.randint(2, 8))
        rows.append({**tokenizer(" ".join(words)), "labels": number % 2})
    return rows


def make_federation(path=None):
    model, tokenizer = make_model(path)
    topology = place_sites([0] * len(NUM_TEXTS))
    sites = []
    for number, device in topology.sites.items():
        train, test = (make_rows(tokenizer, NUM_TEXTS[number], seed=f"{part} {number}") for part in ("train", "test"))
        data = {"train": train, "test": test, "collate": DataCollatorWithPadding(tokenizer)}
        sites.append(Site(number, device, len(train), data))
    return Federation(topology, sites, model, train_site=train_site, evaluate_site=evaluate_site)


def main(path=None, num_rounds=3):
    with world():
        federation, accuracies = make_federation(path), []
        for round_ in range(1, num_rounds + 1):
            federation.train(round_)
            federation.global_model.step()
            accuracies.append(round(federation.evaluate(round_)["validation.accuracy"], 3))
        return accuracies, federation.global_model.sha256()


if __name__ == "__main__":
    for num_ranks in (1, 2):
        print(num_ranks, "ranks:", *launch(main, *sys.argv[1:], num_ranks=num_ranks)[0])

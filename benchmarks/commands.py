"""The command in a process of its own, and the model and data that benchmarks train with it."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from overhead import NUM_LABELS, VOCABULARY
from processes import SCRIPT
from transformers import BertTokenizerFast, DistilBertConfig, DistilBertModel


def put_model(folder: Path, *, small: bool) -> str:
    """Write a random model of DistilBERT's size, with dropout, and a tokenizer."""
    words = [f"w{number}" for number in range(1_000)]
    (folder / "words.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words]))
    BertTokenizerFast(vocab=str(folder / "words.txt"), model_max_length=512).save_pretrained(folder)
    torch.manual_seed(0)
    sizes = {"dim": 64, "n_layers": 1, "n_heads": 2, "hidden_dim": 64} if small else {}
    DistilBertModel(DistilBertConfig(vocab_size=VOCABULARY, **sizes)).save_pretrained(folder)
    return str(folder)


def put_data(file: Path, num_rows: int) -> Path:
    """Write a CSV of random texts, in which the label is a word."""
    random = np.random.default_rng(0)
    rows = ["text,label"]
    for _ in range(num_rows):
        label = random.integers(NUM_LABELS)
        words = random.permutation([*random.integers(10, 1_000, random.integers(20, 120)), label])
        rows.append(f"{' '.join(f'w{word}' for word in words)},label {label}")
    file.write_text("\n".join(rows) + "\n")
    return file


class Command:
    """A run of the command in a process of its own.

    Args:
        folder: of its output.
        name: of the run, for the file of its output.
        subcommand: `with` or `plan`.
        settings: of the run.
        num_ranks: that torchrun starts; None: one, without torchrun.
    """

    def __init__(self, folder: Path, name: str, subcommand: str, settings: dict, num_ranks: int | None = None) -> None:
        self._output, self._runs = folder / f"{name}.txt", folder / "runs" / name
        torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={num_ranks}"]
        words = [] if subcommand == "with" else [subcommand]
        arguments = [f"{key}={value!r}" for key, value in settings.items()]
        with self._output.open("w") as file:
            self.process = subprocess.Popen(
                [sys.executable, *(torchrun if num_ranks else []), str(SCRIPT), *words, "with", *arguments],
                stdout=file,
                stderr=subprocess.STDOUT,
                cwd=folder,
                env=os.environ | {"SACRED_RUNS_DIR": str(self._runs)},
            )

    def output(self) -> str:
        """Return what it printed, once it has ended."""
        self.process.wait()
        return self._output.read_text()

    def rounds(self) -> list[dict[str, Any]]:
        """Return the metrics of its rounds, once it has ended."""
        self.process.wait()
        return [json.loads(line) for line in (self._runs / "1" / "rounds.jsonl").read_text().splitlines()]

    def find(self, pattern: str) -> str:
        """Return what it printed that matches, or else the end of it all."""
        found = re.search(pattern, self.output())
        return found[1] if found else f"status {self.process.returncode}: {self.output()[-1500:]}"

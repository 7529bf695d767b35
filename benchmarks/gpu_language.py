"""Try language models on a GPU: the promises with adapters and few bits, what they cost, and the memory they take.

Each line that is printed is a finding. Models are Llamas of random weights, texts are random words. `bits` trains each
way once, and once with a kill after a round, in processes that run at once; then two of the models answer.
`speed` trains a larger model with the command in several ways, one after another, and a plain PyTorch loop with peft.
`memory` compares what `plan` says of the models of FlowerTune with what their training takes.

    python benchmarks/gpu_language.py --parts bits memory speed

Without a GPU `--small` tries all of it on the CPU.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
import traceback
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from bases import (
    LLAMA_1B,
    OF_FLOWERTUNE,
    OPEN_3B,
    OPEN_7B,
    PUBLISHED,
    estimate,
    make_model,
    measure_training,
    put_tokenizer,
)
from commands import Command
from gpu import report, seconds
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from scaling_fl.distributed.world import world
from scaling_fl.models.adapters import add_adapter, lora
from scaling_fl.models.quantised import find_factors, move_, quantise_
from scaling_fl.training.loop import NOT_TRAINED

NUM_WORDS = 1_000
SIZES = {"vocab_size": 4_096, "hidden_size": 512, "intermediate_size": 1_376, "num_hidden_layers": 4}
SIZES |= {"num_attention_heads": 8}
SMALL = {"vocab_size": 1_024, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1}
SMALL |= {"num_attention_heads": 1}
LORA: dict[str, Any] = {"adapter": "lora", "lora_rank": 8, "lora_alpha": 16, "lora_dropout": 0.1}
WAYS: dict[str, dict[str, Any]] = {
    "all weights": {"attn_implementation": "sdpa"},
    "all weights, autocast": {"autocast": "bfloat16", "force_autocast": True},
    "all weights, adamw8bit": {"optimiser": "adamw8bit"},
    "kept optimisers, cosine": {"optimiser_state": "keep", "lr_schedule": "cosine", "gradient_accumulation": 2},
    "FedAdam, int8, by site": {
        **{"strategy": "fedadam", "comm_dtype": "int8", "site_test_fraction": 0.2, "evaluate_local": True}
    },
    "LoRA, packed": LORA | {"pack": True, "max_grad_norm": 1.0},
    "LoRA, bfloat16": LORA | {"base_dtype": "bfloat16", "activation_checkpointing": True},
    "LoRA, 8 bits": LORA | {"quantise": 8, "activation_checkpointing": True},
    "LoRA, 4 bits": LORA | {"quantise": 4, "merge": True, "sample_questions": ["w1 w2 w3"]},
}
SPEED: dict[str, dict[str, Any]] = {
    "LoRA, bfloat16": {"base_dtype": "bfloat16"},
    "LoRA, autocast": {"autocast": "bfloat16", "force_autocast": True},
    "LoRA, 8 bits": {"quantise": 8, "activation_checkpointing": True},
    "LoRA, 4 bits": {"quantise": 4},
}


def put_llama(folder: Path, sizes: dict[str, Any], device: torch.device) -> str:
    """Write a Llama of random weights in bfloat16, and a tokenizer of words."""
    put_tokenizer(folder, [f"w{number}" for number in range(NUM_WORDS)])
    torch.manual_seed(0)
    with device:
        LlamaForCausalLM(LlamaConfig(**sizes)).to(torch.bfloat16).save_pretrained(folder)
    return str(folder)


def put_texts(file: Path, num_rows: int, length: int) -> str:
    """Write instructions and answers of random words, each up to half as long as `length`."""
    random = np.random.default_rng(num_rows)

    def words() -> str:
        return " ".join(
            f"w{word}" for word in random.integers(NUM_WORDS, size=random.integers(length // 4, length // 2))
        )

    file.write_text("".join(json.dumps({"instruction": words(), "output": words()}) + "\n" for _ in range(num_rows)))
    return str(file)


def settings_of(
    folder: Path, sizes: dict[str, Any], num_rows: int, length: int, device: torch.device
) -> dict[str, Any]:
    """Return the settings of a run that learns texts of `length` tokens on a model of these sizes."""
    return {
        **{"task_name": "instruct", "template": "plain", "model": put_llama(folder / "llama", sizes, device)},
        **{"train_path": put_texts(folder / "train.jsonl", num_rows, length), "max_seq_len": length},
        **{"test_path": put_texts(folder / "test.jsonl", 16, length), "optimiser": "adamw", "learning_rate": 1e-3},
        **{"num_local_epochs": 1, "report": False, "weight_by": "tokens"},
    }


def try_bits(folder: Path, device: torch.device, *, small: bool) -> None:
    """Train each way once, and once with a kill after the first round."""
    common = settings_of(folder, SMALL if small else SIZES, 32 if small else 256, 64, device)
    common |= {"site_ids": [0, 0, 0, 0], "num_rounds": 4, "batch_size": 4}
    runs, victims, stopped = {}, {}, {}
    for way, settings in WAYS.items():
        stopped[way] = common | settings | {"checkpoints_dir": str(folder / f"{name_of(way)}-checkpoints")}
        victims[way] = Command(folder, f"{name_of(way)}-stopped", "with", stopped[way])
        runs[way] = [Command(folder, name_of(way), "with", common | settings)]
    waiting = dict(victims)
    while waiting:
        time.sleep(0.02)
        for way, victim in list(waiting.items()):
            if victim.process.poll() is None and not Path(stopped[way]["checkpoints_dir"], "round-1.pt").exists():
                continue
            del waiting[way]
            victim.process.kill()
            victim.process.wait()
            runs[way].append(Command(folder, f"{name_of(way)}-resumed", "with", stopped[way]))
    for way, of_way in runs.items():
        sums = [run.find(r"SHA-256 ([0-9a-f]{64})") for run in of_way]
        resumed = of_way[-1].find(r"resumed.* round (\d)")
        is_same = len(set(sums)) == 1 and len(sums[0]) == 64
        same = f"the same SHA-256 {sums[0][:8]}" if is_same else f"NOT the same: {[of[-400:] for of in sums]}"
        report(f"{way}: resumed after round {resumed[-100:]}: {same}, {describe_losses(of_way[0])}")
        for line in of_way[0].output().splitlines():
            if "Warning" in line or line.startswith("merged"):
                report("    " + line[:300])
    for name in map(name_of, ("LoRA, 8 bits", "LoRA, 4 bits")):
        answers = [generate(folder / "runs" / name / "1") for _ in (1, 2)]
        report(f"{name} answers twice alike: {answers[0] == answers[1]}: {answers[0][-200:]}")


def name_of(way: str) -> str:
    """Return the name of the run and the files of a way."""
    return way.replace(" ", "-")


def describe_losses(run: Command) -> str:
    """Return the losses of the rounds of an unbroken run, and the time of each round."""
    return "losses " + " ".join(f"{of['validation.loss']:.4f} ({of['time.round_s']:.1f} s)" for of in run.rounds())


def generate(run: Path) -> str:
    """Return what a run's model answers."""
    script = Path(__file__).parent.parent / "scripts" / "generate.py"
    command = [sys.executable, str(script), "--model", str(run), "--question", "w1 w2 w3", "--max-new-tokens", "8"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout or "nothing"


def compare_bits(device: torch.device) -> None:
    """Compare the bits that a CPU makes of weights with those that the device makes."""
    for bits in (8, 4):
        found = []
        for place in (torch.device("cpu"), device):
            torch.manual_seed(0)
            model: Any = LlamaForCausalLM(LlamaConfig(**SMALL)).to(place)
            quantise_(model, bits)
            move_(model, device)
            found.append(
                {name: of.cpu() for name, of in (find_factors(model) | dict(model.named_parameters())).items()}
            )
        different = [name for name, of in found[0].items() if not torch.equal(of, found[1][name])]
        report(
            f"{bits} bits of a CPU and of {device.type}: {len(different)} of {len(found[0])} tensors differ",
            different[:4],
        )


def try_speed(folder: Path, device: torch.device, *, small: bool) -> None:
    """Train the model with the command in several ways, then with a plain loop."""
    length, num_rows, batch_size = (32, 16, 4) if small else (512, 128, 8)
    common = settings_of(folder, SMALL if small else LLAMA_1B, num_rows, length, device)
    common |= {"site_ids": [0, 0], "num_rounds": 4, "batch_size": batch_size, "evaluate_every": 4}
    common |= {"adapter": "lora", "lora_targets": ["q_proj", "v_proj"], "lora_rank": 32, "best_metric": None}
    plans = {way: Command(folder, f"plan-{way}", "plan", common | settings) for way, settings in SPEED.items()}
    for planned in plans.values():
        planned.process.wait()  # as the runs are timed
    for way, settings in SPEED.items():
        run = Command(folder, way, "with", common | settings)
        run.process.wait()
        report(f"{way}: planned", plans[way].find(r"\n *0 \| +\S+ \| +([\d,]+ MB)")[-200:])
        try:
            rounds = run.rounds()
        except FileNotFoundError:
            report(f"{way}: no rounds:", run.output()[-800:])
            continue
        speeds, trained = ([of[name] for of in rounds[2:]] for name in ("speed.tokens_per_s", "time.train_s"))
        report(
            f"{way}: {statistics.median(speeds):,.0f} tokens a second in training (rounds of {min(trained):.3f} to "
            f"{max(trained):.3f} s), at most {rounds[-1]['sites.memory_mb.worst']:,.0f} MB, "
            f"setup {rounds[1].get('time.setup_s', 0):.1f} s"
        )
    compare_plain(folder, device, length, batch_size)


def compare_plain(folder: Path, device: torch.device, length: int, batch_size: int) -> None:
    """Train the same texts beside a base in bfloat16 with a plain loop of peft and PyTorch."""
    tokenizer = AutoTokenizer.from_pretrained(folder / "llama")
    rows = [json.loads(line) for line in (folder / "train.jsonl").read_text().splitlines()]
    texts = [f"{row['instruction']} {row['output']}" for row in rows]
    model: Any = LlamaForCausalLM.from_pretrained(folder / "llama", dtype=torch.bfloat16)
    model = add_adapter(model, lora(rank=32, alpha=64, targets=["q_proj", "v_proj"])).to(device).train()
    trained = [weight for weight in model.parameters() if weight.requires_grad]

    def train(_: int) -> None:
        optimiser = torch.optim.AdamW(trained, lr=1e-3, fused=True)
        for start in range(0, len(texts), batch_size):
            batch = tokenizer(
                texts[start : start + batch_size],
                padding=True,
                truncation=True,
                max_length=length,
                return_tensors="pt",
                return_token_type_ids=False,
            ).to(device)
            labels = batch["input_ids"].where(batch["attention_mask"] == 1, NOT_TRAINED)
            loss = model(**batch, labels=labels).loss
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()

    num_tokens = sum(len(tokens) for tokens in tokenizer(texts, truncation=True, max_length=length)["input_ids"])
    speed = num_tokens / statistics.median([seconds(train, n) for n in range(4)][1:])
    report(f"plain loop of peft, bfloat16: {speed:,.0f} tokens a second")


def try_memory(device: torch.device, *, small: bool) -> None:
    """Measure two steps of LoRA with 16 texts of 512 tokens, and what `plan` says of them."""
    shape = (2, 8) if small else (16, 512)
    for (name, bits), published in PUBLISHED.items():
        sizes = SMALL if small else {"7B": OPEN_7B, "3B": OPEN_3B}[name]
        for dtype in ("float32", "bfloat16"):
            model = make_model(LlamaConfig(**sizes, use_cache=False), bits, device, getattr(torch, dtype))
            ids = torch.randint(sizes["vocab_size"], shape, device=device)
            batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
            found = measure_training(model, batch, device) * 1e-9
            del model
            report(f"{name} in {bits} bits, the rest {dtype}: {found:.1f} GB, FlowerTune publishes {published}")
            if not small:
                planned = estimate(sizes, OF_FLOWERTUNE | {"quantise": bits, "base_dtype": dtype})
                report(f"    planned {planned:.1f} GB")


def main() -> None:
    """Try and measure what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = ["bits", "memory", "speed"]
    parser.add_argument("--parts", nargs="+", choices=parts, default=parts)
    parser.add_argument("--small", action="store_true", help="use models that a CPU trains in seconds")
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    card = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    report(f"{card}, torch {torch.__version__}, {os.cpu_count()} cores")
    for part in options.parts:
        start = time.perf_counter()
        with TemporaryDirectory() as folder, world():
            try:
                if part == "memory":
                    compare_bits(device)
                    try_memory(device, small=options.small)
                else:
                    {"bits": try_bits, "speed": try_speed}[part](Path(folder), device, small=options.small)
            except Exception:
                report(f"{part} failed:", traceback.format_exc())
        report(f"{part} took {time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()

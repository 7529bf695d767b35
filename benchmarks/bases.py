"""Measure the memory that a site takes to train LoRA beside a frozen model in 32, 16, 8 and 4 bits, and estimate it.

A Llama of random weights trains on random tokens, two steps of AdamW. Measured is the peak of all tensors: on a GPU
what torch allocated, on a CPU what its operators made. Then the memory of larger models is estimated from their
configurations alone, with the settings of FlowerTune, and of training all weights of Llama 3.2 1B.

    python benchmarks/bases.py --width 1024 --layers 8
"""

import argparse
import json
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from scaling_fl import Settings, plan
from scaling_fl.models.adapters import add_adapter, lora
from scaling_fl.models.compute import checkpoint_activations
from scaling_fl.models.flat import trained_weights
from scaling_fl.models.memory import Batch, Meter, estimate_bytes
from scaling_fl.models.quantised import find_factors, measure, move_, quantise_
from scaling_fl.training.loop import train
from scaling_fl.training.optimisers import OPTIMISERS
from scaling_fl.training.scores import score_tokens

BASES: dict[str, tuple[int | None, torch.dtype]] = {  # bits of the linear layers, and the type of the rest
    **{"float32": (None, torch.float32), "bfloat16": (None, torch.bfloat16)},
    **{"8 bits": (8, torch.float32), "4 bits": (4, torch.float32)},
}
# As the config.json of each has it on the hub.
LLAMA_1B = {"vocab_size": 128_256, "hidden_size": 2_048, "intermediate_size": 8_192, "num_hidden_layers": 16}
LLAMA_1B |= {"num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64, "tie_word_embeddings": True}
OPEN_3B = {"vocab_size": 32_000, "hidden_size": 3_200, "intermediate_size": 8_640, "num_hidden_layers": 26}
OPEN_7B = {"vocab_size": 32_000, "hidden_size": 4_096, "intermediate_size": 11_008, "num_hidden_layers": 32}
OPEN_3B |= {"num_attention_heads": 32}
OPEN_7B |= {"num_attention_heads": 32}
PUBLISHED = {("7B", 8): 22.0, ("7B", 4): 16.5, ("3B", 8): 13.5, ("3B", 4): 10.6}  # GB, by FlowerTune's README
OF_FLOWERTUNE: dict[str, Any] = {
    **{"template": "flowertune", "batch_size": 16, "val_batch_size": 16, "activation_checkpointing": True},
    **{"adapter": "lora", "lora_rank": 32, "lora_alpha": 64, "lora_targets": ["q_proj", "v_proj"]},
}
OF_FULL: dict[str, Any] = {"template": "alpaca", "batch_size": 4, "val_batch_size": 4}


def make_model(config: LlamaConfig, bits: int | None, device: torch.device, dtype: torch.dtype) -> Any:
    """Return a Llama of random weights in so many bits on a device, the rest in another type, with LoRA."""
    torch.manual_seed(0)
    with device:
        model = LlamaForCausalLM(config).to(dtype if bits is None else torch.float32)
    if bits is not None:
        quantise_(model, bits, dtype=dtype, compute=torch.float32 if device.type == "cpu" else torch.bfloat16)
    model = add_adapter(model, lora(rank=32, alpha=64, targets=["q_proj", "v_proj"]))
    checkpoint_activations(model)
    return model


def measure_training(model: Any, batch: Batch, device: torch.device) -> int:
    """Train two steps, and return the peak of the bytes of all tensors."""
    make_optimiser = partial(OPTIMISERS["adamw"], lr=1e-4)
    move_(model, device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    held = [*model.parameters(), *model.buffers(), *find_factors(model).values()]
    with Meter([*held, *batch.values()]) as meter:
        train(model, [batch, batch], make_optimiser(list(trained_weights(model).values())), score_tokens)
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    return meter.peak + sum(tensor.nbytes for tensor in held)


def estimate(sizes: dict[str, Any], settings: dict[str, Any]) -> float:
    """Return how many GB `plan` expects two sites to take that train texts of 512 tokens on a model of these sizes."""
    with tempfile.TemporaryDirectory() as folder:
        return plan(Settings(**put_run(Path(folder), sizes) | settings))["devices"][0]["bytes"] * 1e-9


def put_run(folder: Path, sizes: dict[str, Any]) -> dict[str, Any]:
    """Write a model's configuration, a tokenizer of a word, and texts; return the settings that name them."""
    LlamaConfig(**sizes).save_pretrained(folder)
    put_tokenizer(folder, ["a"])
    (folder / "rows.jsonl").write_text((json.dumps({"instruction": "a", "output": "a " * 600}) + "\n") * 32)
    path = str(folder / "rows.jsonl")
    return {
        **{"task_name": "instruct", "model": str(folder), "train_path": path, "test_path": path},
        **{"site_ids": [0, 0], "max_seq_len": 512, "optimiser": "adamw"},
    }


def put_tokenizer(folder: Path, words: Sequence[str]) -> None:
    """Write a tokenizer of words, which pads with the token that ends a text."""
    numbers = {word: number for number, word in enumerate(["<unk>", "</s>", *words])}
    tokenizer = Tokenizer(WordLevel(numbers, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    controls = {"unk_token": "<unk>", "eos_token": "</s>", "pad_token": "</s>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **controls).save_pretrained(folder)


def main() -> None:
    """Measure a model of these sizes, then estimate those of others."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--vocabulary", type=int, default=8_192)
    parser.add_argument("--length", type=int, default=128, help="of the texts")
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--small", action="store_true", help="with a tiny model, to see that it works")
    options = parser.parse_args()
    if options.small:
        vars(options).update({"width": 256, "layers": 2, "vocabulary": 256, "length": 8, "batch_size": 2})
    torch.set_num_threads(1)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    ids = torch.randint(options.vocabulary, (options.batch_size, options.length))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    print(f"Llama, {options.width} wide, {options.layers} layers, on {device}, torch {torch.__version__}\n")
    print("base     | weights     | their MB | training, MB | estimated", flush=True)
    config = LlamaConfig(
        vocab_size=options.vocabulary,
        hidden_size=options.width,
        intermediate_size=options.width * 8 // 3,
        num_hidden_layers=options.layers,
        num_attention_heads=max(1, options.width // 64),
        use_cache=False,
    )
    for base, (bits, dtype) in BASES.items():
        model = make_model(config, bits, device, dtype)
        num_weights, num_bytes = measure(model)
        estimated = estimate_bytes(model, batch, None, partial(OPTIMISERS["adamw"], lr=1e-4))
        found = measure_training(model, batch, device)
        print(
            f"{base:<8} | {num_weights:>11,} | {num_bytes * 1e-6:>8.1f} | {found * 1e-6:>12.1f} | "
            f"{estimated * 1e-6:>9.1f}",
            flush=True,
        )
    if options.small:
        return
    print("\nmodel, of a configuration alone    | GB estimated | with base_dtype=bfloat16 | GB published", flush=True)
    for (name, bits), published in PUBLISHED.items():
        config = {"7B": OPEN_7B, "3B": OPEN_3B}[name]
        sizes = [estimate(config, OF_FLOWERTUNE | {"quantise": bits, "base_dtype": d}) for d in ("float32", "bfloat16")]
        print(
            f"OpenLLaMA {name} in {bits} bits, LoRA      | {sizes[0]:>12.1f} | {sizes[1]:>24.1f} | {published:>12.1f}",
            flush=True,
        )
    for optimiser in ("adamw", "adamw8bit"):
        size = estimate(LLAMA_1B, OF_FULL | {"optimiser": optimiser})
        print(f"Llama 3.2 1B, whole, {optimiser:<13} | {size:>12.1f} |")


if __name__ == "__main__":
    main()

"""Frozen linear layers in 8 or 4 bits. The package bitsandbytes is imported when a model has some.

8 bits are LLM.int8() (Dettmers et al. 2022, arXiv 2208.07339); 4 bits are NF4 with double quantisation, of QLoRA
(Dettmers et al. 2023, arXiv 2305.14314).
"""

import logging
import math
from collections import Counter
from collections.abc import Collection, Mapping
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

LAYERS = {"Linear8bitLt": 8, "Linear4bit": 4}  # of the layers of bitsandbytes, which need not be installed here
OUTLIER = 6.0  # of LLM.int8(): activations above it are multiplied in 16 bits
BLOCK, NESTED = 64, 256  # weights with one factor, and factors with one, of 4 bits


def silence() -> None:
    """Keep bitsandbytes, which peft imports, too, from warning of kernels that are missing, and of rounded products."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)


def check_bitsandbytes(setting: str) -> None:
    """Check that the package bitsandbytes is installed, without its import, which asks a GPU and so is not forked.

    Raises:
        ValueError: it is not.
    """
    if find_spec("bitsandbytes") is None:
        raise ValueError(
            f"{setting}: expected the package bitsandbytes, got none. EXTRAS=quantise for run-local.sh, or pip install "
            "bitsandbytes, installs it"
        )


def _find_layers(model: Any, others: Collection[str]) -> dict[str, nn.Module]:
    """Return the linear layers that are quantised, by name, as transformers chooses them."""
    from transformers.pytorch_utils import Conv1D  # here, as a federation of other models needs no transformers

    places = Counter(id(weight) for _, weight in model.named_parameters(remove_duplicate=False))
    precise = set(getattr(model, "_keep_in_fp32_modules", None) or ())
    return {
        name: module
        for name, module in model.named_modules()
        if type(module) in (nn.Linear, Conv1D)
        and module is not model.get_output_embeddings()
        and f"{name}.weight" not in others
        and places[id(module.weight)] == 1  # a weight of two layers would become two
        and precise.isdisjoint(name.split("."))
    }


def find_whole(config: Mapping[str, Any], model: nn.Module) -> set[str]:
    """Return the names of the weights of modules that train whole by peft's configuration of an adapter."""
    entries = config.get("modules_to_save") or ()
    return {name for name, _ in model.named_parameters() if any(f".{entry}." in f".{name}" for entry in entries)}


def quantise_(
    model: Any,
    bits: int,
    others: Collection[str] = (),
    dtype: torch.dtype = torch.float32,
    compute: torch.dtype = torch.float32,
) -> None:
    """Put the linear layers of a model in 8 or 4 bits, one after another, where their weights are.

    Args:
        model: of transformers, without an adapter.
        bits: of a weight.
        others: names of weights that are not put in them.
        dtype: of all other weights.
        compute: the type of products with weights of 4 bits; those with weights of 8 bits choose their own.

    Raises:
        ValueError: it has no such layer.
    """
    silence()
    import bitsandbytes as bnb

    layers = _find_layers(model, others)
    if not layers:
        raise ValueError(f"quantise={bits}: expected a model with frozen linear layers, got {type(model).__name__}")
    for name, layer in layers.items():
        held: Any = layer
        weight = held.weight.data if isinstance(layer, nn.Linear) else held.weight.data.T
        num_out, num_in = weight.shape
        with torch.device("meta"):
            if bits == 8:
                made = bnb.nn.Linear8bitLt(num_in, num_out, has_fp16_weights=False, threshold=OUTLIER)
            else:
                made = bnb.nn.Linear4bit(num_in, num_out, compute_dtype=compute, quant_type="nf4")
        if bits == 8:
            source = weight if weight.is_meta else weight.cpu()  # from where `to` quantises
            made.weight = bnb.nn.Int8Params(source, requires_grad=False).to(weight.device)
        else:
            # Else an evaluation packs the weights again on some CPUs, and computes with fewer bits than training.
            made.support_avx512bf16_for_cpu = False
            made.weight = bnb.nn.Params4bit(weight, quant_type="nf4", module=made).to(weight.device)
        made.bias = held.bias
        if made.bias is not None:
            made.register_forward_pre_hook(_lend_bias)
            made.register_forward_hook(_return_bias, always_call=True)
        model.set_submodule(name, made.train(layer.training))
    for rest in model.parameters():
        if rest.is_floating_point():
            rest.data = rest.data.to(dtype)
    setattr(model, f"is_loaded_in_{bits}bit", True)  # by which peft chooses its layers


def _lend_bias(layer: Any, given: tuple[Tensor, ...]) -> None:
    """Compute with a bias of the type of the product: bitsandbytes would round that of the layer, which may train."""
    bias = vars(layer)["own_bias"] = layer.bias
    layer._parameters["bias"] = bias.to(getattr(layer, "compute_dtype", None) or given[0].dtype)


def _return_bias(layer: Any, *_: Any) -> None:
    layer._parameters["bias"] = vars(layer).pop("own_bias")


def bits_of(layer: nn.Module) -> int | None:
    """Return the bits of a weight of a quantised layer; None of any other."""
    return LAYERS.get(type(layer).__name__) if isinstance(layer, nn.Linear) else None  # peft has layers of these names


def num_bytes_of(bits: int, num_out: int, num_in: int) -> int:
    """Return the bytes of a quantised weight with its factors and tables."""
    size = num_out * num_in
    if bits == 8:
        return size + num_out * 4 + 1  # and the number of a format
    num_blocks = -(-size // BLOCK)
    return -(-size // 2) + num_blocks + -(-num_blocks // NESTED) * 4 + (16 + 256) * 4


def move_(model: nn.Module, device: torch.device) -> nn.Module:
    """Move a model to a device, with what torch does not see of weights in 8 bits."""
    model.to(device)
    for module in model.modules():
        weight = getattr(module, "weight", None)
        for held in (weight, getattr(module, "state", None)):
            if isinstance(getattr(held, "SCB", None), Tensor):
                held.CB, held.SCB = weight.data, held.SCB.to(device)  # type: ignore[union-attr]
    return model


def find_factors(model: nn.Module) -> dict[str, Tensor]:
    """Return the factors and tables of quantised weights by name, which are neither parameters nor buffers."""
    known = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    known |= {name for name, _ in model.named_buffers(remove_duplicate=False)}
    state = model.state_dict()
    return {name: tensor for name, tensor in state.items() if name not in known and isinstance(tensor, Tensor)}


def measure(model: nn.Module) -> tuple[int, int]:
    """Return how many weights a model has, in however few bits, and their bytes."""
    sizes = {id(weight): (weight.numel(), weight.nbytes) for weight in model.parameters()}
    for layer in model.modules():
        if (bits := bits_of(layer)) is not None:
            shape: Any = layer.out_features, layer.in_features
            sizes[id(layer.weight)] = math.prod(shape), num_bytes_of(bits, *shape)
    counts, num_bytes = zip(*sizes.values(), strict=True)
    return sum(counts), sum(num_bytes)


def widen_trained_(model: nn.Module, last: Collection[str] = ()) -> None:
    """Let modules that train whole have float32, and compute in it, beside a base in fewer bits.

    Args:
        model: with an adapter.
        last: names of weights whose products nothing of the base reads, so that they stay in float32.
    """

    def widen(_: nn.Module, given: tuple[Any, ...]) -> tuple[Any, ...]:
        return tuple(x.float() if isinstance(x, Tensor) and x.is_floating_point() else x for x in given)

    for place, module in model.named_modules():
        weights = module.named_parameters(prefix=place, recurse=False)
        narrow = {name: w for name, w in weights if w.requires_grad and w.dtype != torch.float32}
        if narrow:
            dtype = next(iter(narrow.values())).dtype
            module.register_forward_pre_hook(widen)
            if narrow.keys().isdisjoint(last):
                module.register_forward_hook(partial(_narrow, dtype))
        for weight in narrow.values():
            weight.data = weight.data.float()


def _narrow(dtype: torch.dtype, _: nn.Module, __: object, output: Any) -> Any:
    return output.to(dtype) if isinstance(output, Tensor) else output

"""How a model computes: the kernels of its attention, the activations that it keeps, the type of its products."""

from typing import Any

import torch

from scaling_fl.errors import one_line

ATTENTION = ("eager", "sdpa", "flex_attention")  # flash attention takes no float32


def set_attention(model: Any, implementation: str) -> None:
    """Let a model of transformers, or that under an adapter, compute attention by some kernels.

    Raises:
        ValueError: it has no such attention.
    """
    base = _base_of(model)
    expected = f"attn_implementation: expected one that {type(base).__name__} has"
    try:
        base.set_attn_implementation(implementation)
    except Exception as error:  # a package or an accelerator is missing
        raise ValueError(f"{expected}, got {implementation!r}: {one_line(error)}") from error
    if (found := base.config._attn_implementation) != implementation:
        raise ValueError(f"{expected}, such as {found!r}, got {implementation!r}")


def checkpoint_activations(model: Any) -> None:
    """Let a model, or that under an adapter, compute activations again in the backward pass in place of keeping them.

    Raises:
        ValueError: it cannot.
    """
    base = _base_of(model)
    if str(getattr(getattr(model, "active_peft_config", None), "peft_type", "")).endswith("PREFIX_TUNING"):
        raise ValueError("activation_checkpointing: expected False, as prefix tuning needs the cache, got True")
    if not base.supports_gradient_checkpointing:
        raise ValueError(f"activation_checkpointing: expected False, as {type(base).__name__} has none, got True")
    name = "activation_checkpointing_enable"  # the older one is deprecated
    enable = getattr(base, name if hasattr(base, name) else "gradient_checkpointing_enable")
    # bitsandbytes keeps the input of each layer of 8 bits where the newer way does not see it, and so would keep all.
    is_older = getattr(base, "is_loaded_in_8bit", False)
    if is_older:
        base.enable_input_require_grads()
    enable({"use_reentrant": is_older})


def check_bfloat16(device: torch.device) -> None:
    """Check that a device multiplies matrices of bfloat16 by instructions of its own.

    Raises:
        ValueError: it does not.
    """
    if device.type == "cpu":
        is_fast = torch.backends.mkldnn.is_available() and _multiplies_bfloat16()
    else:
        is_fast = device.type != "cuda" or torch.cuda.is_bf16_supported(including_emulation=False)
    if not is_fast:
        raise ValueError(
            f"autocast: expected None, as this {device.type} has no instructions for bfloat16 and is several times "
            "slower in it, got 'bfloat16'. force_autocast=True uses it all the same"
        )


def _multiplies_bfloat16() -> bool:
    """Tell whether this CPU has the instructions. Of x86, oneDNN also supports CPUs on which it imitates them."""
    is_x86 = torch.cpu._is_avx2_supported()
    on_x86 = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported()) and (on_x86 or not is_x86)


def _base_of(model: Any) -> Any:
    return model.get_base_model() if hasattr(model, "get_base_model") else model

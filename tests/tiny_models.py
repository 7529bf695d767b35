"""Tiny models of many families, in folders like those of the hub."""

import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedTokenizerFast

WORDS = "<unk> <s> </s> once upon a time there was the end".split()  # noqa: SIM905
SIZES = {
    "vocab_size": len(WORDS),
    **{"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16},
}
# The names of these sizes in many families; EXTRA has other names and required options of a family.
NAMES = {
    **dict.fromkeys(
        ("hidden_size", "d_model", "n_embd", "emb_dim", "dim", "embedding_size", "word_embed_proj_dim"), 16
    ),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "encoder_layers", "decoder_layers"), 1),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "num_key_value_heads"), 2),
    **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 2),
    **dict.fromkeys(("intermediate_size", "d_ff", "ffn_dim", "encoder_ffn_dim", "decoder_ffn_dim", "hidden_dim"), 16),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "max_position"), 40),
    **dict.fromkeys(("head_dim", "d_kv"), 8),
    "num_local_experts": 2,
}
EXTRA: dict[str, dict[str, Any]] = {
    "bart": {"eos_token_id": 2, "pad_token_id": 0},
    "gpt2": {"bos_token_id": None, "eos_token_id": 2},
    "t5": {"eos_token_id": 2, "pad_token_id": 0, "decoder_start_token_id": 0},
    "funnel": {"block_sizes": [1, 1], "num_decoder_layers": 1, "d_head": 8, "d_inner": 16},
    "mobilebert": {"true_hidden_size": 16, "intra_bottleneck_size": 16, "embedding_size": 16},
    "modernbert": {"pad_token_id": 0},
    "nystromformer": {"segment_means_seq_len": 64, "num_landmarks": 64},
    "reformer": {
        **{"axial_pos_embds": False, "attn_layers": ["local", "local"], "attention_head_size": 8},
        **{"local_attn_chunk_length": 4, "local_num_chunks_after": 0, "is_decoder": False},
    },
    "xlnet": {"d_inner": 16},
}
UNSETTABLE = {"funnel": ("num_hidden_layers", "n_layers"), "xlnet": ("max_position_embeddings",)}


def put_tokenizer(folder: Path, **options: object) -> str:
    """Write a tokenizer of ten words."""
    words = Tokenizer(WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = Whitespace()
    if options.pop("ends", False):
        words.post_processor = TemplateProcessing("$A </s>", special_tokens=[("</s>", 2)])
    PreTrainedTokenizerFast(tokenizer_object=words, **{"unk_token": "<unk>"} | options).save_pretrained(folder)
    return str(folder)


def make_config(family: str, **options: Any) -> PreTrainedConfig:
    """Return the configuration of the smallest model of a family."""
    default = AutoConfig.for_model(family)
    known = {name: size for name, size in {**NAMES, "vocab_size": len(WORDS)}.items() if hasattr(default, name)}
    for name in UNSETTABLE.get(family, ()):
        known.pop(name, None)
    return AutoConfig.for_model(family, **{**known, **EXTRA.get(family, {}), **options})


def put_model(folder: Path, family: str, auto: Any = AutoModel, **options: Any) -> str:
    """Write a random model of a family, without a classifier's head, and a tokenizer."""
    torch.manual_seed(0)
    model = auto.from_config(make_config(family, **options))
    for weight in model.parameters():
        if weight.dim() > 1:
            torch.nn.init.normal_(weight, std=0.3)  # so that what differs is seen
    model.save_pretrained(folder)
    return put_tokenizer(
        folder, pad_token="<unk>", eos_token="</s>", model_max_length=32, ends=family in ("bart", "t5")
    )


def edit(file: Path, **changes: object) -> None:
    """Change some keys of a JSON file."""
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))

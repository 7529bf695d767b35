"""The shared tensors of a model are views of one flat vector, and tied tensors stay tied."""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from helpers import make_bert, refusal
from torch import nn

from scaling_fl.models.flat import flatten_, lay_out


def two_layers() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))


def tied_by_data(model: nn.Sequential) -> None:
    model[1].weight.data = model[0].weight.data


def transposed(model: nn.Sequential) -> None:
    model[1].weight.data = model[0].weight.data.t()


def overlapping(model: nn.Sequential) -> None:
    both = torch.randn(7, 4)
    model[0].weight.data, model[1].weight.data = both[:4], both[3:]


def with_a_frozen_one(model: nn.Sequential) -> None:
    tied_by_data(model)
    model[1].weight.requires_grad_(False)


def with_a_buffer(model: nn.Sequential) -> None:
    model.register_buffer("first_row", model[0].weight.data[0])


def with_a_buffer_that_is_not_saved(model: nn.Sequential) -> None:
    model.register_buffer("first_row", model[0].weight.data[0], persistent=False)


def two_buffers(model: nn.Sequential) -> None:
    model.register_buffer("counts", torch.zeros(3, dtype=torch.int64))
    model.register_buffer("first_count", model.get_buffer("counts")[0])


@pytest.mark.parametrize(
    ("tie", "names"),
    [
        (tied_by_data, "0.weight and 1.weight"),
        (transposed, "0.weight and 1.weight"),
        (overlapping, "0.weight and 1.weight"),
        (with_a_frozen_one, "0.weight and 1.weight"),
        (with_a_buffer, "0.weight and first_row"),
        (with_a_buffer_that_is_not_saved, "0.weight and first_row"),
        (two_buffers, "counts and first_count"),
    ],
)
def test_tensors_that_share_memory_are_refused_by_name(tie: Callable[[nn.Sequential], None], names: str) -> None:
    model = two_layers()
    tie(model)
    sentence = refusal(lambda: flatten_(model))
    assert sentence.startswith(f"{names}: expected the same tensor, or memory for each, got two tensors that share")


def test_a_weight_with_overlapping_elements_is_refused_and_a_buffer_is_accepted() -> None:
    model = two_layers()
    model.register_buffer("ones", torch.ones(1).expand(5))
    model.register_buffer("position_ids", torch.arange(5).expand(1, -1))
    flatten_(model)
    assert model.get_buffer("ones").tolist() == [1.0] * 5
    for repeated in (torch.ones(1, 4).expand(4, 4), torch.ones(7).as_strided((4, 4), (1, 1))):
        model = two_layers()
        model[1].weight = nn.Parameter(repeated)
        sentence = refusal(partial(flatten_, model))
        assert sentence.startswith("1.weight: expected memory for each of its elements, got a view in which some are ")


def one_tensor(model: nn.Sequential) -> None:
    model[1].weight = model[0].weight


def columns_of_one_memory(model: nn.Sequential) -> None:
    for layer, part in zip(model, torch.randn(4, 8).chunk(2, dim=1), strict=True):
        layer.weight.data = part


def not_contiguous(model: nn.Sequential) -> None:
    model[1].weight = nn.Parameter(torch.randn(4, 4).t())


def frozen_ones_with_one_memory(model: nn.Sequential) -> None:
    model.append(nn.Linear(4, 4).requires_grad_(False)).append(nn.Linear(4, 4).requires_grad_(False))
    model[3].weight.data = model[2].weight.data


def one_buffer_of_two_modules(model: nn.Sequential) -> None:
    for layer in model:
        layer.register_buffer("seen", model.get_buffer("0.seen") if layer is model[1] else torch.ones(2))


@pytest.mark.parametrize(
    "change",
    [one_tensor, columns_of_one_memory, not_contiguous, frozen_ones_with_one_memory, one_buffer_of_two_modules],
)
def test_a_flattened_model_computes_the_same_and_follows_the_flat_vector(
    change: Callable[[nn.Sequential], None],
) -> None:
    model, x = two_layers(), torch.randn(3, 4)
    change(model)
    before, tensors = model(x), [*model.parameters(), *model.buffers()]
    vector = flatten_(model)
    assert torch.allclose(model(x), before)
    assert list(map(id, [*model.parameters(), *model.buffers()])) == list(map(id, tensors))
    shared = [*(weight for weight in model.parameters() if weight.requires_grad), *model.buffers()]
    assert len(vector) == sum(tensor.numel() for tensor in shared), "nothing is in it twice"
    vector.zero_()
    assert not any(tensor.any() for tensor in shared)


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.uint8, torch.bool, torch.complex128]
)
@pytest.mark.parametrize("shape", [(), (0, 2), (3,), (2, 5)])
def test_buffers_of_any_type_and_shape_follow_the_weights_in_the_flat_vector(
    dtype: torch.dtype, shape: tuple[int, ...]
) -> None:
    model = two_layers()
    before = {"odd": torch.ones(3), "any": torch.randn(shape).to(dtype), "last": torch.tensor(7)}
    for name, buffer in before.items():
        model.register_buffer(name, buffer.clone())
    vector = flatten_(model)
    assert [slot.name for slot in lay_out(model)] == ["0.weight", "1.weight", "odd", "any", "last"]
    assert all(torch.equal(model.get_buffer(name), buffer) for name, buffer in before.items())
    vector.zero_()
    assert not any(buffer.any() for buffer in model.buffers())


def test_only_dense_buffers_of_the_state_dict_are_averaged() -> None:
    model = two_layers()
    model.register_buffer("scratch", torch.ones(2), persistent=False)
    assert [slot.name for slot in lay_out(model)] == ["0.weight", "1.weight"]
    model.register_buffer("sparse", torch.eye(2).to_sparse())
    assert refusal(lambda: lay_out(model)).startswith("sparse: expected a dense tensor, got one of layout torch.sparse")


def test_flattening_does_not_change_the_model_and_makes_its_weights_views() -> None:
    plain, flat = make_bert(), make_bert()
    vector = flatten_(flat)
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), flat.parameters(), strict=True))
    vector.zero_()
    assert all(not weight.any() for weight in flat.parameters())


def test_weights_that_are_not_float32_and_models_with_nothing_to_train_are_refused() -> None:
    assert refusal(lambda: flatten_(nn.Linear(2, 2).bfloat16())) == (
        "weight: expected torch.float32, as of all trained weights, got torch.bfloat16"
    )
    assert "nothing to train" in refusal(lambda: flatten_(nn.Linear(2, 2).requires_grad_(False)))

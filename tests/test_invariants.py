"""The promises of the library, each as a property of a whole federation."""

import gc
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from helpers import OPTIMISERS_HERE, Play, long_but, make_bert, make_examples
from torch import nn

from scaling_fl.data.partition import iid, partition_indices
from scaling_fl.distributed.world import world
from scaling_fl.federation.strategies import STRATEGIES, fedavg
from scaling_fl.models.flat import trained_weights
from scaling_fl.training.optimisers import OPTIMISERS
from scaling_fl.training.scores import score_classes
from scaling_fl.training.seeds import derive_seed

QUIET = partial(make_bert, dropout=0.0)
# One with state proves what holds for all of them; the others take part in the long tests.
EACH_STRATEGY = long_but("fedadam", STRATEGIES)


@pytest.mark.parametrize("strategy", EACH_STRATEGY)
def test_where_a_site_runs_changes_no_bit(strategy: str) -> None:
    play = Play(strategy=strategy)
    alone = play.on_ranks(1)
    assert len(set(alone[1])) == play.num_rounds + 1, "the weights must move"
    for site_ids, num_ranks in [((0, 0, 0, 0, 0), 2), ((0, 1, 1, 0, 2), 3), ((0, 0, 0, 1, 1), 2)]:
        assert play.but(site_ids=site_ids).on_ranks(num_ranks) == alone


@pytest.mark.long
def test_more_ranks_than_sites_changes_no_bit() -> None:
    play = Play(site_ids=(0, 0, 0))
    assert play.on_ranks(4) == play.on_ranks(1)


def test_a_rank_with_two_devices_drives_each_with_a_thread_and_changes_no_bit(two_devices: Callable[[], None]) -> None:
    play = Play(make_model=QUIET)  # dropout draws from one generator for the whole CPU
    alone = play.on_ranks(1)
    two_devices()
    assert play.on_ranks(1) == alone


@pytest.mark.long
def test_a_float32_mean_is_close_but_depends_on_placement() -> None:
    play = Play(comm_dtype="float32", site_ids=(0,) * 6, num_rounds=1, watch=lambda server, _: server.weights.tolist())
    one, two = (torch.tensor(play.on_ranks(num_ranks)[1][-1]) for num_ranks in (1, 2))
    assert not torch.equal(one, two), "if these are equal, the exact mean is not needed"
    assert torch.allclose(one, two, atol=1e-6)


@pytest.mark.parametrize("strategy", EACH_STRATEGY)
def test_a_resumed_run_has_the_weights_and_metrics_of_the_uninterrupted_run(strategy: str, tmp_path: Path) -> None:
    play = Play(strategy=strategy, num_rounds=3)
    history, hashes = play.on_ranks(2)
    stopping = play.but(checkpoints_dir=str(tmp_path))
    for num_rounds, num_ranks in [(1, 2), (2, 1), (3, 3)]:
        resumed_history, resumed_hashes = stopping.but(num_rounds=num_rounds).on_ranks(num_ranks)
        assert resumed_hashes[-1] == hashes[num_rounds + 1]
    assert resumed_history == history


def train_plainly(play: Play, model: nn.Module) -> nn.Module:
    """Train without a federation: one model, one data set, and a new optimiser each round."""
    with world():
        examples = make_examples(play.num_examples)
        (indices,) = partition_indices(examples.labels, 1, iid, seed=0)
        model.train()
        for round_ in range(1, play.num_rounds + 1):
            optimiser = OPTIMISERS[play.optimiser](model.parameters(), lr=play.learning_rate)
            torch.manual_seed(derive_seed(3, "dropout", round_, 0))
            for epoch in range(play.num_epochs):
                seed = derive_seed(3, "order", round_, 0, epoch)
                for batch in examples.select(indices).shuffled_batches(play.batch_size, seed):
                    optimiser.zero_grad()
                    model(**batch).loss.backward()
                    optimiser.step()
    return model


def check_promises(make_model: Callable[[], nn.Module], folder: Path) -> None:
    """Check that ranks and stops change no bit of a federation of a model that trains in part, such as an adapter."""
    play = Play(make_model=make_model, site_ids=(0, 0, 0), num_examples=23)
    alone = play.on_ranks(1)
    assert len(set(alone[1])) == play.num_rounds + 1, "the weights must move"
    stopping = play.but(checkpoints_dir=str(folder))
    history, hashes = stopping.but(num_rounds=1).on_ranks(2)
    assert (history, hashes) == (alone[0][:-1], alone[1][:-1]), "where a site runs changes no bit"
    history, hashes = stopping.on_ranks(1)
    assert (history, hashes[-1]) == (alone[0], alone[1][-1]), "stopping changes no bit"
    saved = torch.load(folder / "round-2.pt")["server"]["weights"]
    assert saved.keys() == trained_weights(make_model()).keys(), "a checkpoint holds the adapter only"


def weights_of(server: object, federation: object) -> torch.Tensor:
    return server.weights.clone()  # type: ignore[attr-defined]


@pytest.mark.parametrize("optimiser", long_but("adamw", OPTIMISERS_HERE))
def test_a_federation_of_one_site_is_ordinary_training_bit_for_bit_on_any_rank(optimiser: str) -> None:
    play = Play(site_ids=(0,), num_rounds=3, num_epochs=2, optimiser=optimiser, watch=weights_of)
    expected = torch.cat([weight.detach().reshape(-1) for weight in train_plainly(play, make_bert()).parameters()])
    before, *_, after = play.play()[1]
    assert (after - before).abs().max() > 1e-2, "training must have moved the weights"
    assert torch.equal(after, expected)
    assert torch.equal(play.on_ranks(2)[1][-1], after)


def test_a_site_that_is_alone_and_fails_moves_nothing() -> None:
    play = Play(site_ids=(0,), broken=(0,), min_sites=0)
    assert len({*play.play()[1]}) == 1


def test_strategies_with_a_rate_or_a_state_of_their_own_do_not_take_the_weights_of_one_site(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    play = Play(site_ids=(0,), num_rounds=1, optimiser="sgd", watch=weights_of)
    start, _, taken = play.play()[1]
    monkeypatch.setitem(STRATEGIES, "halfway", partial(fedavg, learning_rate=0.5))
    assert torch.allclose(play.but(strategy="halfway").play()[1][-1], (start + taken) / 2, atol=1e-6, rtol=0)
    assert not torch.allclose(play.but(strategy="fedadam").play()[1][-1], taken, atol=1e-3)


def test_a_full_batch_step_of_many_sites_is_the_centralised_step() -> None:
    play = Play(num_rounds=1, batch_size=1_000, optimiser="sgd", learning_rate=0.1, make_model=QUIET, watch=weights_of)
    before, _, after = play.play()[1]
    model = QUIET()
    examples = make_examples(play.num_examples)
    optimiser = torch.optim.SGD(model.parameters(), lr=0.1)
    model(**examples.batch()).loss.backward()
    optimiser.step()
    expected = torch.cat([weight.detach().reshape(-1) for weight in model.parameters()])
    assert (after - before).abs().max() > 1e-3
    assert torch.allclose(after, expected, atol=1e-6)


def test_evaluation_does_not_depend_on_the_partition_of_the_test_set() -> None:
    play = Play(num_rounds=0)
    whole = play.on_ranks(1)[0][0]
    assert [play.on_ranks(num_ranks)[0][0] for num_ranks in (2, 3)] == [whole, whole]
    model, test = make_bert().eval(), make_examples(23, seed=1)
    with torch.inference_mode():
        output = model(**test.batch())
    assert whole["validation.loss"] == pytest.approx(output.loss.item(), rel=1e-5)
    right = (output.logits.argmax(-1) == torch.tensor(test.labels)).double().mean()
    assert whole["validation.accuracy"] == pytest.approx(right.item())


def list_new_objects_only() -> None:
    """Leave the objects of earlier tests out of Python's list."""
    gc.collect()
    gc.freeze()


def tensor_bytes() -> int:
    """Return the bytes of all tensors that Python can reach, each storage once."""
    storages = [thing.untyped_storage() for thing in gc.get_objects() if issubclass(type(thing), torch.Tensor)]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def test_memory_does_not_grow_with_the_number_of_sites(monkeypatch: pytest.MonkeyPatch) -> None:
    peaks: dict[int, int] = {}

    def measured(output: object, batch: object, means: object) -> None:
        peaks[num_sites] = max(peaks.get(num_sites, 0), tensor_bytes())
        score_classes(output, batch, means)

    monkeypatch.setattr("helpers.score_classes", measured)
    list_new_objects_only()
    for num_sites in (2, 16):
        Play(site_ids=(0,) * num_sites, num_examples=128, batch_size=4, num_rounds=1, optimiser="adamw").play()
        gc.collect()
    assert peaks[16] == pytest.approx(peaks[2], rel=0.01)


def test_every_site_starts_the_first_round_from_rank_0s_head() -> None:
    def different_heads() -> nn.Module:
        return make_bert(seed=torch.distributed.get_rank())

    hashes = Play(make_model=different_heads).on_ranks(3)[1]
    assert hashes == Play(make_model=make_bert).on_ranks(1)[1]


def test_the_local_optimiser_and_fedprox_act() -> None:
    play = Play(num_rounds=1, num_epochs=2, make_model=QUIET, watch=weights_of)
    finals = {
        (optimiser, mu): play.but(optimiser=optimiser, proximal_mu=mu).play()[1]
        for optimiser in OPTIMISERS_HERE
        for mu in (0.0, 1.0)
    }
    moved = {key: (watched[-1] - watched[0]).norm() for key, watched in finals.items()}
    assert moved["sgd", 0.0] != moved["adamw", 0.0]  # adamw8bit keeps the state of tensors as small as these in float32
    assert all(moved[optimiser, 1.0] != moved[optimiser, 0.0] for optimiser in OPTIMISERS_HERE)
    assert moved["sgd", 1.0] < moved["sgd", 0.0]

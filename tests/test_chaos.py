"""Killing ranks at random moments and resuming on other numbers of ranks changes no bit; see benchmarks/chaos.py."""

import multiprocessing
import os
import runpy
import signal
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from random import Random

import pytest
import torch
from chaos import (
    END_SECONDS,
    NUM_ROUNDS,
    PHASES,
    STRATEGIES,
    WRITING,
    Board,
    Result,
    campaign,
    finish,
    interruptions,
    start,
    wait,
)
from helpers import SCRIPT, Command, succeed, weights_hash
from processes import descendants
from waiting import state_of, wait_until

pytestmark = pytest.mark.long(seconds=35)
SEED = 5
NUM_KILLS = 7  # of each strategy: one at each target
torch.set_num_threads(1)

if not Path(f"/proc/self/task/{os.getpid()}/children").exists():
    pytest.skip("ranks are found in /proc, which is not here", allow_module_level=True)


@pytest.fixture(scope="module")
def settings(small_run: dict[str, object]) -> dict[str, object]:
    """A federation of six sites, with dropout, AdamW that goes on and only the last two checkpoints on disk."""
    runpy.run_path(str(SCRIPT))  # imports what the forks need
    return small_run | {"num_rounds": NUM_ROUNDS, "site_ids": [0] * 6, "keep_checkpoints": 2, "optimiser_state": "keep"}


def play(settings: dict[str, object], folder: Path, seed: int) -> tuple[Result, Result]:
    """Return the results of a run without interruption and of one with kills."""
    (folder / "alone").mkdir()
    alone = finish(settings, folder / "alone", num_ranks=2)
    return alone, campaign(settings, folder, NUM_KILLS, Random(seed))


@pytest.fixture(scope="module")
def results(
    settings: dict[str, object], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, tuple[Result, Result]]]:
    """The results of each strategy; all run in parallel, because a rank waits for seconds after the loss of a peer."""
    with ProcessPoolExecutor(len(STRATEGIES), multiprocessing.get_context("fork")) as pool:
        futures = {
            strategy: pool.submit(play, settings | {"strategy": strategy}, tmp_path_factory.mktemp(strategy), seed)
            for seed, strategy in enumerate(STRATEGIES, start=SEED)
        }
        yield {strategy: future.result() for strategy, future in futures.items()}


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_run_whose_ranks_are_killed_ends_with_the_result_of_the_uninterrupted_run(
    results: dict[str, tuple[Result, Result]], strategy: str
) -> None:
    alone, killed = results[strategy]
    assert killed.weights == alone.weights
    assert killed.num_rounds == alone.num_rounds == NUM_ROUNDS
    assert killed.metrics == alone.metrics
    assert {"train.loss", "train.accuracy", "validation.loss", "validation.accuracy"} <= killed.metrics.keys()
    assert killed.metrics["train.loss"][0] == list(range(1, NUM_ROUNDS + 1))


def test_ranks_are_killed_often_and_in_different_phases(results: dict[str, tuple[Result, Result]]) -> None:
    kills = [kill for _, killed in results.values() for kill in killed.kills]
    assert len(kills) >= 20
    # The phase depends on the machine: a kill planned for the optimiser's step may come in a collective.
    assert len({kill.phase for kill in kills} & set(PHASES) - {"other"}) >= 3
    assert {kill.num_ranks for kill in kills} == {1, 2, 3}
    assert any(kill.rank > 0 for kill in kills)
    assert sum(kill.next_ranks != kill.num_ranks for kill in kills) >= 5
    assert WRITING in {kill.phase for kill in kills}, "no checkpoint was half written"
    assert any(kill.is_torn for kill in kills)
    assert len({kill.last_round for kill in kills}) >= 3
    assert len({alone.weights for alone, _ in results.values()}) == len(STRATEGIES), "a strategy does not act"


def test_a_run_interrupted_at_random_moments_ends_with_the_result_of_the_uninterrupted_run(
    results: dict[str, tuple[Result, Result]], settings: dict[str, object], tmp_path: Path
) -> None:
    alone, _ = results["fedadam"]
    stopped = interruptions(settings | {"strategy": "fedadam"}, tmp_path, 2, Random(SEED), ranks=(1,))
    assert (stopped.weights, stopped.metrics) == (alone.weights, alone.metrics)
    assert len(stopped.stops) == 2


def test_the_benchmark_runs_the_same_federation_as_the_command(
    results: dict[str, tuple[Result, Result]], settings: dict[str, object], command: Command
) -> None:
    output = succeed(command(**settings, strategy="diloco"))
    assert weights_hash(output) == results["diloco"][0].weights


def test_ranks_do_not_outlive_the_process_that_started_them(settings: dict[str, object], tmp_path: Path) -> None:
    board = Board()
    pid = start(settings | {"num_rounds": 10_000}, tmp_path, 3, None, board)
    ranks: list[int] = []

    def starter() -> int | None:
        if not (tmp_path / "checkpoints/round-1.pt").exists() or 0 in [row.process for row in board.rows]:
            return None
        found = set(descendants(pid)) & {row.process for row in board.rows}
        if len(found) < 3:  # the system may leave out children while others end
            return None
        ranks.extend(found)
        return pid

    assert wait(pid, tmp_path, starter)[0] == -signal.SIGKILL
    wait_until(lambda: {*map(state_of, ranks)} <= {"Z", ""}, END_SECONDS)

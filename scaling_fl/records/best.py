"""The best round and the early end of a run, as functions of the history alone; the weights of the best round."""

import math
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import fsspec
from torch import Tensor

from scaling_fl.distributed.collectives import all_gather, broadcast_bytes, rank
from scaling_fl.records import checkpoint
from scaling_fl.records.checkpoint import History

BEST = "best.pt"

DIRECTIONS = {  # 1: more is better
    **{"validation.loss": -1, "validation.accuracy": 1},
    **{"validation.macro_f1": 1, "validation.balanced_accuracy": 1},
}


@dataclass(frozen=True)
class Choice:
    """How the best round is chosen.

    Args:
        metric: a key of DIRECTIONS; None chooses none.
        every: round 0 and every so many-th count, as a run of any length evaluates these.
        patience: a run ends once so many rounds that count have come after the best; None: it does not.
    """

    metric: str | None
    every: int = 1
    patience: int | None = None


def find_best(history: History, choice: Choice) -> int | None:
    """Return the best round, the first of equals; None if no value is finite."""
    values = {round_: history[round_][str(choice.metric)] for round_ in _counted(history, choice)}
    finite = [round_ for round_, value in values.items() if math.isfinite(value)]
    return max(finite, key=lambda round_: DIRECTIONS[str(choice.metric)] * values[round_], default=None)


def is_over(history: History, choice: Choice) -> bool:
    """Tell whether a run with this history ends early."""
    best = find_best(history, choice)
    if choice.patience is None or best is None:
        return False
    return sum(round_ > best for round_ in _counted(history, choice)) >= choice.patience


def _counted(history: History, choice: Choice) -> list[int]:
    """Return the rounds that count; without a metric, none."""
    return [round_ for round_ in range(0, len(history), choice.every) if choice.metric in history[round_]]


def save_best(directory: str | None, weights: dict[str, Tensor], history: History, settings: dict[str, Any]) -> None:
    """Write the weights of the last round as `best.pt`, which is like a checkpoint without an optimiser, likewise.

    Raises:
        CheckpointError, ValueError: as for `save`.
    """
    if directory is not None and rank() == 0:
        state = {"round": len(history) - 1, "server": {"weights": weights}, "history": history, "settings": settings}
        checkpoint.write(directory, BEST, state)


def load_best(directory: str | None, round_: int, metric: str, value: float) -> dict[str, Tensor] | None:
    """Return on rank 0 the weights of the best round by name, from the directory of the first rank that has them.

    All ranks call it. A run that was killed may have left the weights of a later round in `best.pt`.

    Args:
        directory: of this rank; None if it has none.
        round_: the best round.
        metric: by which it was chosen.
        value: of that metric in that round.

    Returns:
        The weights; None on other ranks, and if no file has them.
    """
    found = b""
    for name in (BEST, f"round-{round_}.pt") if directory is not None else ():
        with suppress(Exception):  # it is absent or damaged
            filesystem, path = fsspec.core.url_to_fs(directory)
            data = filesystem.cat_file(f"{path}/{name}")
            state = checkpoint.load(data)
            if state["round"] == round_ and state["history"][round_].get(metric) == value:
                found = data
                break
    sources = [number for number, has_it in enumerate(all_gather(bool(found))) if has_it]
    if sources and sources[0] > 0:
        found = broadcast_bytes(lambda: found, source=sources[0])
    return checkpoint.load(found)["server"]["weights"] if found and rank() == 0 else None

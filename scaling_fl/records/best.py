"""The best round and the early end of a run, as functions of the history alone; the weights of the best round."""

import logging
import math
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import fsspec
from torch import Tensor

from scaling_fl.distributed.collectives import all_gather, broadcast_bytes, rank
from scaling_fl.errors import one_line
from scaling_fl.records import checkpoint
from scaling_fl.records.checkpoint import History

log = logging.getLogger(__name__)

BEST = "best.pt"

DIRECTIONS = {  # 1: more is better
    "validation.loss": -1,
    "validation.accuracy": 1,
    "validation.perplexity": -1,
    "validation.exact_match": 1,
    "validation.macro_f1": 1,
    "validation.balanced_accuracy": 1,
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
    """Write the weights of the last round on rank 0 as `best.pt`, a checkpoint without an optimiser.

    Args:
        directory: of the checkpoints; None: nothing is written.
        weights: by name.
        history: the metrics of the rounds.
        settings: which the weights depend on.

    Raises:
        CheckpointError, ValueError: as for `save`.
    """
    if directory is not None and rank() == 0:
        checkpoint.write(directory, BEST, {"weights": weights}, history, settings)


def load_best(
    directory: str | None, round_: int, value: float, metric: str, settings: dict[str, Any]
) -> dict[str, Tensor] | None:
    """Return on rank 0 the weights of the best round by name, from the directory of the first rank that has them.

    All ranks call it. A run that was killed may have left the weights of a later round in `best.pt`.

    Args:
        directory: of this rank; None if it has none.
        round_: the best round.
        value: of the metric by which it was chosen.
        metric: the name of that.
        settings: on which the weights depend.

    Returns:
        The weights; None on other ranks, and if no file has them.
    """
    found = b""
    for name in (BEST, f"round-{round_}.pt") if directory is not None else ():
        data = _read(f"{directory}/{name}")
        with suppress(ValueError):  # it is absent or damaged
            state = checkpoint.load(data)
            of_round = state["history"][round_] if state["round"] == round_ else {}
            if of_round.get(metric) == value and state["settings"] == settings:
                found = data
                break
    sources = [number for number, has_it in enumerate(all_gather(bool(found))) if has_it]
    if sources and sources[0] > 0:
        found = broadcast_bytes(lambda: found, source=sources[0])
    return checkpoint.load(found)["server"]["weights"] if found and rank() == 0 else None


def copy_best(source: str | None, target: str) -> None:
    """Copy the weights of the best round, if there are any, to another directory, as far as that is possible."""
    if source is not None and (data := _read(f"{source}/{BEST}")):
        filesystem, path = fsspec.core.url_to_fs(target)
        with suppress(Exception):
            filesystem.pipe_file(f"{path}/{BEST}", data)


def _read(url: str) -> bytes:
    """Return the bytes of a file; none if it does not exist or cannot be read."""
    filesystem, path = fsspec.core.url_to_fs(url)
    try:
        return filesystem.cat_file(path)
    except FileNotFoundError:
        return b""
    except Exception as error:
        log.warning("%s cannot be read: %s", url, one_line(error))
        return b""

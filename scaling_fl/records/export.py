"""What a run leaves: whether it can be written is tried before training, and where else when it no longer can."""

import math
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fsspec
from fsspec.implementations.local import LocalFileSystem
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from scaling_fl.errors import one_line
from scaling_fl.records import checkpoint
from scaling_fl.storage import WriteError

RECORD = 100_000  # bytes that are spared for a run's record
MODEL = "model"  # the final model, in the folder of a run's files
CHECKPOINTS = "checkpoints"  # a folder for the weights of a run that had another place for them


@dataclass(frozen=True)
class SpaceNeeded:
    """What is about to be written into a folder of a local disk: bytes beyond those that are there now."""

    folder: str
    name: str  # of the folder, for users
    words: str
    most: int  # while it is written
    last: int  # at the end, which is less where old files are removed


def check(
    needs: Sequence[SpaceNeeded],
    folder: str | None,
    name: str,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    """Find out before training whether what a run leaves can be written. Leaves nothing.

    Args:
        needs: what is written before the final model.
        folder: where the model is to be saved; None saves none.
        name: the model's setting.
        model: to be saved.
        tokenizer: of the model.

    Raises:
        ValueError: a disk has too little space or cannot be written to, or the model or tokenizer cannot be saved.
    """
    if folder is None:
        check_disks(needs)
        return
    # A weight that two layers share is saved once.
    size = sum({tensor.data_ptr(): tensor.nbytes for tensor in model.state_dict().values()}.values())
    for beside in (lambda: RECORD, lambda: _try_model(folder, name, model, tokenizer)):
        size += beside()
        check_disks([*needs, SpaceNeeded(folder, folder, "the final model", size, size)])


def _try_model(folder: str, name: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> int:
    """Write what is saved beside a model's weights into a folder that is removed, and return its bytes."""
    try:
        with tempfile.TemporaryDirectory(prefix=f".{MODEL}-", dir=folder) as trial:
            model.config.save_pretrained(trial)
            if model.can_generate():
                model.generation_config.save_pretrained(trial)
            tokenizer.save_pretrained(trial)
            return sum(path.stat().st_size for path in Path(trial).rglob("*"))
    except OSError as error:
        raise ValueError(f"{folder}: expected a folder that can be written to, got {one_line(error)}") from error
    except Exception as error:  # a configuration is refused with errors of many classes
        reason = one_line(error.__cause__ or error).rstrip(".")
        raise ValueError(
            f"model={name!r}: expected a configuration and a tokenizer that can be saved, got '{reason}'. "
            "Change its config.json, generation_config.json or tokenizer_config.json"
        ) from error


def space_for_checkpoints(directory: str | None, size: int, num_rounds: int, keep: int | None) -> list[SpaceNeeded]:
    """Return what checkpoints take; nothing where they are on no local disk.

    Args:
        directory: of the checkpoints.
        size: of one of them, in bytes.
        num_rounds: that are still to be trained.
        keep: how many checkpoints are kept; None keeps all.
    """
    if directory is None or num_rounds == 0:
        return []
    filesystem, path = fsspec.core.url_to_fs(directory)
    if not isinstance(filesystem, LocalFileSystem):
        return []
    last = most = num_rounds
    if keep is not None:
        before = checkpoint.count(directory)
        last = min(before + num_rounds, keep) - before
        most = min(num_rounds, max(keep - before, 0) + 1)  # an old one is removed after a new one is written
    words = f"{most} more checkpoints" if most > 1 else "another checkpoint"
    return [SpaceNeeded(path, f"checkpoints_dir={directory!r}", words, most * size, last * size)]


def check_disks(needs: Sequence[SpaceNeeded]) -> None:
    """Find out whether each disk has the space for what is about to be written, one after the other.

    Raises:
        ValueError: it has not.
    """
    by_disk: dict[int, list[SpaceNeeded]] = {}
    for need in needs:
        by_disk.setdefault(os.stat(need.folder).st_dev, []).append(need)
    for here in by_disk.values():
        wanted = max(sum(before.last for before in here[:index]) + need.most for index, need in enumerate(here))
        free = free_bytes(here[0].folder)
        if wanted > free:
            raise ValueError(
                f"{here[0].name}: expected {math.ceil(wanted * 1e-5) / 10:,} MB free for "
                f"{' and '.join(need.words for need in here)}, got {math.floor(free * 1e-5) / 10:,} MB"
            )


def free_bytes(folder: str) -> float:
    """Return the free space of the disk that a folder is on; no end of it where a file system does not tell."""
    usage = shutil.disk_usage(folder)
    return usage.free if usage.total else math.inf


def save_model(folder: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> str:
    """Write a model and its tokenizer into a folder, whole or not at all; return where they are.

    Raises:
        WriteError: they cannot be written.
    """
    path, part = os.path.join(folder, MODEL), os.path.join(folder, f".{MODEL}.part")
    try:
        model.save_pretrained(part)
        tokenizer.save_pretrained(part)
        os.rename(part, path)
    except Exception as error:  # those of safetensors and tokenizers are no OSError
        raise WriteError(f"{path}: expected a disk that can be written to, got {one_line(error)}") from error
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return path


def save_elsewhere(
    saved: str | None, server: dict[str, Any], history: checkpoint.History, settings: dict[str, Any], folder: str | None
) -> str:
    """Return in a sentence where the weights of a run are that has to end, after saving them where that is possible.

    Args:
        saved: the directory that has them as a checkpoint already, if one has.
        server: the state of the global model.
        history: the metrics of all rounds.
        settings: what the weights depend on.
        folder: of the run's files, which is tried before `checkpoints`, if that is there, and the temporary directory.
    """
    round_ = len(history) - 1
    if round_ < 1:
        return "No round is lost"
    if saved is not None:
        return f"The weights of round {round_} are in {saved}/round-{round_}.pt: the same command goes on"
    for place in _places(folder):
        with suppress(WriteError):
            checkpoint.save(place, server, history, settings, keep=None)
            return (
                f"The weights of round {round_} are in {place}/round-{round_}.pt: the same command with "
                f"checkpoints_dir={place} goes on"
            )
        with suppress(OSError):
            os.rmdir(place)
    return f"The weights of round {round_} could not be written anywhere else either"


def _places(folder: str | None) -> Iterator[str]:
    if folder is not None:
        yield os.path.join(folder, CHECKPOINTS)
    # What a container has in its own temporary directory goes with it, but it is lent a folder of this name.
    for parent in (CHECKPOINTS, None):
        with suppress(OSError):
            yield tempfile.mkdtemp(prefix="scaling_fl-", dir=parent)

"""Save the final model. Check before training that results can be written, and save the weights if a disk fails."""

import json
import math
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from scaling_fl.errors import one_line
from scaling_fl.records import checkpoint
from scaling_fl.records.best import copy_best
from scaling_fl.storage import WriteError, inherit_access, local_path

RECORD_BYTES = 100_000  # reserved for a run's record
MODEL_FOLDER = "model"  # of the final model, in the run's folder
BEST_FOLDER = "best"  # of the best one
MERGED = "_merged"  # is added to the names of both, of models with their adapter added to the weights
STATE_DICT = "final_model.pt"  # the weights of the final model alone
CHECKPOINTS_FOLDER = "checkpoints"  # for the weights if the disk of `checkpoints_dir` fails


@dataclass(frozen=True)
class SpaceNeeded:
    """The additional bytes that a run needs in a folder of a local disk."""

    folder: str
    name: str  # of the folder, for users
    purpose: str
    peak: int
    final: int  # less than the peak if old files are removed


def check(
    needs: Sequence[SpaceNeeded],
    folder: str | None,
    name: str,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    num_bytes: int = 0,
    num_folders: int = 1,
) -> list[SpaceNeeded]:
    """Check before training that the results of a run can be written, and return what they need. Leaves no files.

    Args:
        needs: of the files that are written before the final model.
        folder: in which the model will be saved; None: it will not.
        name: the setting `model`.
        model: which will be saved.
        tokenizer: of the model.
        num_bytes: of all weights that will be in the folder.
        num_folders: how many folders with a model will be in it.

    Raises:
        ValueError: a disk has too little space or cannot be written to, or the model or tokenizer cannot be saved.
    """
    if folder is None:
        check_disks(needs)
        return [*needs]

    def with_models(size: int) -> list[SpaceNeeded]:
        return [*needs, SpaceNeeded(folder, folder, "the final model", size, size)]

    check_disks(with_models(size := num_bytes + RECORD_BYTES))  # before anything is tried there
    found = with_models(size + num_folders * _try_model(folder, name, model, tokenizer))
    check_disks(found)
    return found


def _try_model(folder: str, name: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> int:
    """Save all files of a model but its weights into a temporary folder, and return their bytes."""
    try:
        with tempfile.TemporaryDirectory(prefix=f".{MODEL_FOLDER}-", dir=folder) as trial:
            model.config.save_pretrained(trial)
            if model.can_generate():
                model.generation_config.save_pretrained(trial)
            tokenizer.save_pretrained(trial)
            for of_adapter in getattr(model, "peft_config", {}).values():
                of_adapter.save_pretrained(trial)
            return sum(path.stat().st_size for path in Path(trial).rglob("*"))
    except OSError as error:
        raise ValueError(f"{folder}: expected a folder that can be written to, got {one_line(error)}") from error
    except Exception as error:  # transformers refuses configurations with errors of many classes
        reason = one_line(error.__cause__ or error).rstrip(".")
        raise ValueError(
            f"model={name!r}: expected a configuration and a tokenizer that can be saved, got '{reason}'. "
            "Change its config.json, generation_config.json or tokenizer_config.json"
        ) from error


def space_for_checkpoints(directory: str | None, size: int, num_rounds: int, keep: int | None) -> list[SpaceNeeded]:
    """Return the space that checkpoints need, if they are on a local disk.

    Args:
        directory: of the checkpoints.
        size: of a checkpoint in bytes.
        num_rounds: the rounds that remain.
        keep: how many checkpoints to keep; None keeps all.
    """
    if directory is None or num_rounds == 0 or (path := local_path(directory)) is None:
        return []
    final = peak = num_rounds
    if keep is not None:
        before = len(checkpoint.list_rounds(directory))
        final = min(before + num_rounds, keep) - before
        peak = min(num_rounds, max(keep - before, 0) + 1)  # an old one is removed after a new one is written
    purpose = f"{peak} more checkpoints" if peak > 1 else "another checkpoint"
    return [SpaceNeeded(path, f"checkpoints_dir={directory!r}", purpose, peak * size, final * size)]


def check_disks(needs: Sequence[SpaceNeeded]) -> None:
    """Check that each disk has the space for all of its needs, which are written in this order.

    Raises:
        ValueError: a disk has too little space.
    """
    by_disk: dict[int, list[SpaceNeeded]] = {}
    for need in needs:
        by_disk.setdefault(os.stat(need.folder).st_dev, []).append(need)
    for group in by_disk.values():
        peak = max(sum(before.final for before in group[:index]) + need.peak for index, need in enumerate(group))
        free = free_bytes(group[0].folder)
        if peak > free:
            raise ValueError(
                f"{group[0].name}: expected {math.ceil(peak * 1e-5) / 10:,} MB free for "
                f"{' and '.join(need.purpose for need in group)}, got {math.floor(free * 1e-5) / 10:,} MB"
            )


def free_bytes(folder: str) -> float:
    """Return the free space of a folder's disk; infinity if the file system does not report it."""
    usage = shutil.disk_usage(folder)
    return usage.free if usage.total else math.inf


def save_state_dict(folder: str, weights: Mapping[str, Tensor]) -> None:
    """Save the weights of a model as a plain state dict into a folder, completely or not at all.

    Raises:
        WriteError: they cannot be written.
    """
    path, part = os.path.join(folder, STATE_DICT), os.path.join(folder, f".{STATE_DICT}.part")
    with complete(path, part):
        torch.save({name: weight.cpu() for name, weight in weights.items()}, part)


def save_model(
    folder: str,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    name: str = MODEL_FOLDER,
    beside: Mapping[str, Any] | None = None,
) -> str:
    """Save a model, its tokenizer and JSON files by name into the folder `name` of a folder, and return its path.

    It is there completely or not at all.

    Raises:
        WriteError: they cannot be written.
    """
    path, part = os.path.join(folder, name), os.path.join(folder, f".{name}.part")
    with complete(path, part):
        if hasattr(model, "peft_config"):  # it writes a card to be filled in, but no configuration of the model
            model.save_pretrained(part, save_embedding_layers=False)
            os.remove(os.path.join(part, "README.md"))
            if model.can_generate():  # transformers takes a folder with config.json for a whole model
                model.generation_config.save_pretrained(part)
            else:
                model.config.save_pretrained(part)  # it has the labels
        else:
            model.save_pretrained(part)
        tokenizer.save_pretrained(part)
        for file, content in (beside or {}).items():
            Path(part, file).write_text(json.dumps(content, indent=2) + "\n", "utf-8")
        inherit_access(Path(part))
    return path


@contextmanager
def complete(path: str, part: str) -> Iterator[None]:
    """Let the body write a file or folder under the name `part`, and rename it at the end."""
    try:
        yield
        os.rename(part, path)
    except Exception as error:  # the errors of torch, safetensors and tokenizers are not OSErrors
        disk = error.__context__ if isinstance(error.__context__, OSError) else error  # which torch replaces by its own
        raise WriteError(f"{path}: expected a disk that can be written to, got {one_line(disk)}") from error
    finally:
        shutil.rmtree(part, ignore_errors=True)
        with suppress(OSError):
            os.remove(part)


def save_elsewhere(
    saved: str | None,
    state: dict[str, Any],
    history: checkpoint.History,
    settings: dict[str, Any],
    folder: str | None,
    checkpoints_dir: str | None,
) -> str:
    """Save the weights of a run whose disk failed on another disk, and return a sentence that names the place.

    Args:
        saved: the directory that already has these weights as a checkpoint, if there is one.
        state: of the global model.
        history: the metrics of all rounds.
        settings: on which the weights depend.
        folder: of the run's files, which is tried before `checkpoints`, if that exists, and the temporary directory.
        checkpoints_dir: from which the weights of the best round are copied, too.
    """
    round_ = len(history) - 1
    if round_ < 1:
        return "No round is lost"
    if saved is not None:
        return f"The weights of round {round_} are in {saved}/round-{round_}.pt. Run the same command to resume"
    for place in _places(folder):
        with suppress(WriteError):
            checkpoint.save(place, state, history, settings, keep=None)
            copy_best(checkpoints_dir or folder, place)
            return (
                f"The weights of round {round_} are in {place}/round-{round_}.pt. Run the same command with "
                f"checkpoints_dir={place} to resume"
            )
        with suppress(OSError):
            os.rmdir(place)
    return f"The weights of round {round_} could not be saved on another disk either"


def _places(folder: str | None) -> Iterator[str]:
    if folder is not None:
        yield os.path.join(folder, CHECKPOINTS_FOLDER)
    # A container's temporary directory is removed with it, but this folder is mounted.
    for parent in (CHECKPOINTS_FOLDER, None):
        with suppress(OSError):
            yield tempfile.mkdtemp(prefix="scaling_fl-", dir=parent)

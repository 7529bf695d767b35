"""Save and restore the state of a run: one file a round, complete or absent, on any file system of fsspec."""

import io
import logging
import re
import warnings
from functools import partial
from typing import Any

import fsspec
import torch

from scaling_fl.distributed.collectives import all_gather, broadcast_bytes, rank
from scaling_fl.errors import one_line
from scaling_fl.records.checksum import SHA256, sha256, sign
from scaling_fl.storage import WriteError, check_reachable, retry, with_timeout, write_bytes, write_whole
from scaling_fl.training.metrics import Metrics

log = logging.getLogger(__name__)

NAME = re.compile(r"round-(\d+)\.pt")

History = list[Metrics]  # one entry a round, from round 0


class CheckpointError(WriteError):
    """A checkpoint cannot be written, so the weights of its round are not saved yet."""


def check(directory: str | None) -> None:
    """Check on rank 0, before training, that checkpoints can be written.

    Raises:
        ValueError: they cannot, or a store does not answer within `storage.ANSWER_SECONDS`.
    """
    if directory is None or rank() != 0:
        return
    try:
        filesystem, path = fsspec.core.url_to_fs(directory)
        with_timeout(filesystem, partial(write_bytes, filesystem), f"{path}/.writable.part", b"")
        filesystem.rm(f"{path}/.writable.part")
    except Exception as error:
        raise _refuse("written to", directory, error) from error


def save(
    directory: str | None, global_model: dict[str, Any], history: History, settings: dict[str, Any], keep: int | None
) -> None:
    """Write `round-N.pt` of the last round on rank 0; remove all but the last `keep`. No directory: do nothing.

    Args:
        directory: a local folder or fsspec URL.
        global_model: its state, `weights` by name and `optimiser`.
        history: the metrics of the finished rounds.
        settings: on which the weights depend.
        keep: how many checkpoints to keep; None keeps all.

    Raises:
        CheckpointError: the disk cannot be written to.
        WriteError: an old checkpoint cannot be removed from the disk.
        ValueError: the store refuses, or does not answer for `storage.RETRY_SECONDS`.
    """
    if directory is None or rank() != 0:
        return
    write(directory, f"round-{len(history) - 1}.pt", global_model, history, settings)
    filesystem, path = fsspec.core.url_to_fs(directory)

    def remove_old() -> None:
        for number in _find_rounds(filesystem, path)[keep:]:
            filesystem.rm(f"{path}/round-{number}.pt")

    if keep is not None:
        retry(filesystem, f"old checkpoints in {directory}", remove_old)


def write(directory: str, name: str, global_model: dict[str, Any], history: History, settings: dict[str, Any]) -> None:
    """Write the file `name` with a checksum, under a temporary name first; the arguments are those of `save`.

    Raises:
        CheckpointError: the disk cannot be written to.
        ValueError: the store refuses, or does not answer for `storage.RETRY_SECONDS`.
    """
    filesystem, path = fsspec.core.url_to_fs(directory)
    state = {"round": len(history) - 1, "server": global_model, "history": history, "settings": settings}
    data = io.BytesIO()  # torch's writer would replace the store's error by its own
    torch.save(sign(state), data)

    def write_and_rename() -> None:
        # One temporary name for all files, so that the file of a killed run is overwritten.
        write_whole(filesystem, f"{path}/{name}", data.getvalue(), part=f"{path}/.round.pt.part")

    try:
        retry(filesystem, f"{directory}/{name}", write_and_rename)
    except WriteError as error:
        raise CheckpointError(error) from error


def restore(directory: str | None, settings: dict[str, Any]) -> dict[str, Any] | None:
    """Read the last complete checkpoint of any rank's directory.

    Ranks need not share a disk: the rank with the last round sends its checkpoint to all.

    Returns:
        `server` (the state of the global model), `history` and `settings` as saved; None if there is no checkpoint.

    Raises:
        ValueError: the checkpoint has other settings, or all checkpoints are damaged.
    """
    if directory is None:
        return None
    last_rounds = all_gather(max(list_rounds(directory), default=0))
    if not any(last_rounds):
        return None
    sent: list[dict[str, Any]] = []  # the state, on the rank that sends it, which has loaded it already

    def read_file() -> bytes:
        data, state = _read_last(directory)
        sent.append(state)
        return data

    data = broadcast_bytes(read_file, source=last_rounds.index(max(last_rounds)))
    state = sent[0] if sent else load(data)
    _compare(directory, state["settings"], settings)
    return state


def exists(directory: str | None) -> bool:
    """Tell whether a directory has a checkpoint. Raises as `list_rounds`."""
    return directory is not None and bool(list_rounds(directory))


def list_rounds(directory: str) -> list[int]:
    """Return the rounds that have a checkpoint, the last one first.

    Raises:
        ValueError: the directory cannot be read, or a store does not answer within `storage.ANSWER_SECONDS`.
    """
    try:
        filesystem, path = fsspec.core.url_to_fs(directory)
        check_reachable(filesystem, path)
        return _find_rounds(filesystem, path)
    except Exception as error:
        raise _refuse("read", directory, error) from error


def _find_rounds(filesystem: fsspec.AbstractFileSystem, path: str) -> list[int]:
    try:
        paths = filesystem.ls(path, detail=False, refresh=True)  # its cache does not have the files of other processes
    except FileNotFoundError:
        return []
    names = (name.rsplit("/", 1)[-1] for name in paths)
    return sorted((int(match[1]) for name in names if (match := NAME.fullmatch(name))), reverse=True)


def _refuse(done: str, directory: str, error: Exception) -> ValueError:
    return ValueError(f"checkpoints_dir: expected a folder that can be {done}, got {directory!r} ({one_line(error)})")


def _read_last(directory: str) -> tuple[bytes, dict[str, Any]]:
    """Return the bytes of the last complete file, and the state in them."""
    filesystem, path = fsspec.core.url_to_fs(directory)
    rounds = _find_rounds(filesystem, path)
    for number in rounds:
        try:
            data = filesystem.cat_file(f"{path}/round-{number}.pt")
        except Exception as error:  # an error of the disk or store, so the file need not be damaged
            raise ValueError(
                f"{directory}/round-{number}.pt: expected a file that can be read, got {one_line(error)}"
            ) from error
        try:
            return data, load(data)
        except ValueError as error:
            log.warning("skipping %s/round-%d.pt, which is damaged: %s", directory, number, one_line(error))
    raise ValueError(
        f"checkpoints_dir: expected a checkpoint that is complete, got damaged files only in {directory!r}, the last "
        f"of round {rounds[0]}. Use another folder, or remove the files"
    )


def read(url: str) -> dict:
    """Read one checkpoint: `round`, `server` (`weights` by name, `optimiser`), `history`, `settings`.

    Raises:
        ValueError: it is damaged.
    """
    filesystem, path = fsspec.core.url_to_fs(url)
    return load(filesystem.cat_file(path))


def load(data: bytes | str) -> dict:
    """Return the state in a file, given its bytes or its path. Raises a ValueError if it is damaged."""
    source = data if isinstance(data, str) else io.BytesIO(data)
    try:
        with warnings.catch_warnings(action="ignore"):  # about other files than torch's, which the error repeats
            state = torch.load(source, map_location="cpu", weights_only=True)
        is_whole = isinstance(state, dict) and state.pop(SHA256, None) == sha256(state)
    except Exception as error:
        raise ValueError(f"expected a checkpoint, got another file ({one_line(error)})") from error
    if not is_whole:
        raise ValueError("expected contents that match the checksum, got others")
    return state


def _compare(directory: str, saved: dict[str, Any], ours: dict[str, Any]) -> None:
    changed = [
        f"{key} was {saved.get(key)!r} and is {ours.get(key)!r}"
        for key in {**saved, **ours}
        if saved.get(key) != ours.get(key)
    ]
    if changed:
        raise ValueError(
            f"checkpoints_dir: expected checkpoints with the same settings, got {directory!r}, where "
            f"{'; '.join(changed)}. Use the same settings or another folder"
        )

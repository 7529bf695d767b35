"""One file a round, whole or not there at all, on any file system that fsspec knows."""

import hashlib
import io
import json
import logging
import re
import warnings
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from typing import Any

import fsspec
import torch
from torch import Tensor

from scaling_fl.distributed.collectives import all_gather, broadcast_bytes, rank
from scaling_fl.errors import one_line
from scaling_fl.storage import WriteError, check_reachable, is_remote, retry, with_timeout, write_bytes
from scaling_fl.training.metrics import Metrics

log = logging.getLogger(__name__)

NAME = re.compile(r"round-(\d+)\.pt")

History = list[Metrics]  # of each round, from round 0


class CheckpointError(WriteError):
    """The weights of a round cannot be written, so that they are nowhere yet."""


def check(directory: str | None) -> None:
    """Find out from rank 0, before training, whether checkpoints can be written.

    Raises:
        ValueError: they cannot, or a store does not answer within half a minute.
    """
    if directory is None or rank() != 0:
        return
    try:
        filesystem, path = fsspec.core.url_to_fs(directory)
        with_timeout(filesystem, partial(write_bytes, filesystem), f"{path}/.writable.part", b"")
        filesystem.rm(f"{path}/.writable.part")
    except Exception as error:
        raise ValueError(f"checkpoints_dir={directory!r} cannot be written to: {one_line(error)}") from error


def save(
    directory: str | None, server: dict[str, Any], history: History, settings: dict[str, Any], keep: int | None
) -> None:
    """Write the last round's `round-N.pt` from rank 0, aside and then renamed.

    Removes all checkpoints but the last `keep`. Does nothing without a directory.

    Args:
        directory: a local folder or fsspec URL.
        server: the state of the global model, `weights` by name and `optimiser`.
        history: the metrics of the rounds that are done.
        settings: what the weights depend on.
        keep: how many checkpoints stay; None keeps all.

    Raises:
        CheckpointError: the disk refuses.
        WriteError: the disk refuses to remove an old one.
        ValueError: the store refuses, or is away for longer than `stores.PATIENCE`.
    """
    if directory is None or rank() != 0:
        return
    filesystem, path = fsspec.core.url_to_fs(directory)
    round_ = len(history) - 1
    state = {"round": round_, "server": server, "history": history, "settings": settings}
    data = io.BytesIO()  # torch's writer would hide what a store says behind an error of its own
    torch.save(state | {"sha256": _sha256(state)}, data)

    def write() -> None:
        # One name for all rounds: what a killed run has left is written over. A store's rename is a copy, which
        # is there whole or not at all, and a removal.
        part = f"{path}/.round.pt.part"
        try:
            write_bytes(filesystem, part, data.getvalue())
            filesystem.mv(part, f"{path}/round-{round_}.pt")
        except BaseException:
            if not is_remote(filesystem):
                with suppress(OSError):
                    filesystem.rm(part)
            raise

    def remove_old() -> None:
        for number in _rounds(filesystem, path)[keep:]:
            filesystem.rm(f"{path}/round-{number}.pt")

    try:
        retry(filesystem, f"{directory}/round-{round_}.pt", "cannot be written", write)
    except WriteError as error:
        raise CheckpointError(error) from error
    if keep is not None:
        retry(filesystem, f"old checkpoints in {directory}", "cannot be removed", remove_old)


def restore(directory: str | None, settings: dict[str, Any]) -> dict[str, Any] | None:
    """Read the last whole checkpoint that a rank finds in its directory of that name.

    Ranks need not share a disk: the one that has the last round reads it for all.

    Returns:
        What `save` was given, `server`, `history` and `settings`; None if there is no checkpoint.

    Raises:
        ValueError: the checkpoint is of other settings, or none there is whole.
    """
    if directory is None:
        return None
    lasts = all_gather(max(_list(directory), default=0))
    if not any(lasts):
        return None
    state = _load(broadcast_bytes(lambda: _read_last(directory), source=lasts.index(max(lasts))))
    _compare(directory, state["settings"], settings)
    return state


def exists(directory: str | None) -> bool:
    """Tell whether a directory has a checkpoint.

    Raises:
        ValueError: a store does not say.
    """
    return directory is not None and count(directory) > 0


def count(directory: str) -> int:
    """Return how many checkpoints a directory has.

    Raises:
        ValueError: a store does not say.
    """
    return len(_list(directory))


def _list(directory: str) -> list[int]:
    """Return the rounds that have a checkpoint, the last one first; a store must say soon."""
    try:
        filesystem, path = fsspec.core.url_to_fs(directory)
        check_reachable(filesystem, path)
        return _rounds(filesystem, path)
    except Exception as error:
        raise ValueError(f"checkpoints_dir={directory!r} cannot be read: {one_line(error)}") from error


def _read_last(directory: str) -> bytes:
    """Return the bytes of the last file that is whole."""
    filesystem, path = fsspec.core.url_to_fs(directory)
    rounds = _rounds(filesystem, path)
    for number in rounds:
        try:
            data = filesystem.cat_file(f"{path}/round-{number}.pt")
        except Exception as error:  # a store that does not answer says nothing about the file
            raise ValueError(f"{directory}/round-{number}.pt cannot be read: {one_line(error)}") from error
        try:
            _load(data)
        except ValueError as error:
            log.warning("skipping %s/round-%d.pt, which is damaged: %s", directory, number, one_line(error))
        else:
            return data
    raise ValueError(
        f"no checkpoint in checkpoints_dir={directory!r} is whole (round {rounds[0]} is the last): "
        "another folder, or removing the files, would do"
    )


def read(url: str) -> dict:
    """Read one checkpoint: `round`, `server` (`weights` by name, `optimiser`), `history`, `settings`.

    Raises:
        ValueError: it is not what was written.
    """
    filesystem, path = fsspec.core.url_to_fs(url)
    return _load(filesystem.cat_file(path))


def _load(data: bytes) -> dict:
    try:
        with warnings.catch_warnings(action="ignore"):  # of files that are not torch's, which the error says too
            state = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
        is_whole = isinstance(state, dict) and state.pop("sha256", None) == _sha256(state)
    except Exception as error:
        raise ValueError(f"it is no checkpoint: {one_line(error)}") from error
    if not is_whole:
        raise ValueError("its contents do not match their checksum")
    return state


def _rounds(filesystem: fsspec.AbstractFileSystem, path: str) -> list[int]:
    """Return the rounds that have a checkpoint, the last one first."""
    try:
        found = filesystem.ls(path, detail=False, refresh=True)  # others' files are not in what it remembers
    except FileNotFoundError:
        return []
    names = (name.rsplit("/", 1)[-1] for name in found)
    return sorted((int(match[1]) for name in names if (match := NAME.fullmatch(name))), reverse=True)


def _compare(directory: str, saved: dict[str, Any], ours: dict[str, Any]) -> None:
    changed = [
        f"{key} was {saved.get(key)!r} and is {ours.get(key)!r}"
        for key in {**saved, **ours}
        if saved.get(key) != ours.get(key)
    ]
    if changed:
        raise ValueError(
            f"checkpoints_dir={directory!r} belongs to a run with other settings: {'; '.join(changed)}. "
            "The same settings, or another folder, would do"
        )


def _sha256(state: dict) -> str:
    """Return the SHA-256 of all that a state holds, its tensors byte by byte."""
    digest = hashlib.sha256()

    def parts(value: Any) -> Iterator[bytes | memoryview]:
        if isinstance(value, Tensor):
            yield f"{value.dtype}{tuple(value.shape)}".encode()
            yield value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
        elif isinstance(value, dict) and all(isinstance(item, float | int) for item in value.values()):
            yield json.dumps(list(value.items())).encode()  # a number a site, of which there may be many
        elif isinstance(value, dict):
            yield f"dict of {len(value)}".encode()
            for key, item in value.items():
                yield repr(key).encode()
                yield from parts(item)
        elif isinstance(value, list | tuple):
            yield f"list of {len(value)}".encode()
            for item in value:
                yield from parts(item)
        else:
            yield f"{json.dumps(value)} ".encode()

    for part in parts(state):
        digest.update(part)
    return digest.hexdigest()

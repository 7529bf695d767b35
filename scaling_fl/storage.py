"""Disks, and stores over the network: how long to wait for one that is away, and when not to."""

import logging
import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import TypeVar

import fsspec

from scaling_fl.errors import one_line

CONTAINER_DATA = "/workspace/data"  # where Compose mounts DATA_MOUNT_DIR


def host_path(path: str) -> str:
    """Return where a path of a container's data folder is outside of one: in DATA_MOUNT_DIR, or ./data without it.

    Such are `/workspace/data/...`, also in the URL of a local file, where that folder is not here; and `data/...` where
    ./data is not here either, but such a file in DATA_MOUNT_DIR. All others are returned as they are.
    """
    folder = os.path.abspath(os.path.expanduser(os.environ.get("DATA_MOUNT_DIR") or "data"))
    if not os.path.exists(CONTAINER_DATA):
        # Behind the start, a scheme, or the `::` of a chain of URLs.
        path = re.sub(rf"(^|file://|local://|::){CONTAINER_DATA}(?=/|$)", lambda found: found[1] + folder, path)
    inside = re.fullmatch(r"(?:\./)*data(/.*)", path)
    if inside and not os.path.exists("data") and os.path.exists(folder + inside[1]):
        return folder + inside[1]
    return path


T = TypeVar("T")

ANSWER_SECONDS = 30.0  # seconds in which a store must answer a first question: s3fs alone might take half an hour
RETRY_SECONDS = 300.0  # seconds for which what failed is tried again, beside what s3fs and gcsfs try themselves
LONGEST_PAUSE = 30.0  # seconds from one try to the next, which start at one and double

log = logging.getLogger(__name__)


class WriteError(ValueError):
    """What a run leaves cannot be written on a disk of this machine: it ends, and its weights go elsewhere."""


@contextmanager
def naming_place(place: str) -> Iterator[None]:
    """Let an error of a disk in the body name the place.

    Raises:
        WriteError: the body raised such an error.
    """
    try:
        yield
    except OSError as error:
        raise WriteError(f"{place}: expected a disk that can be written to, got {one_line(error)}") from error


def is_remote(filesystem: fsspec.AbstractFileSystem) -> bool:
    """Tell stores of objects, such as s3 and gs, from disks: fsspec's classes for them are asynchronous."""
    return filesystem.async_impl


def with_timeout(filesystem: fsspec.AbstractFileSystem, question: Callable[..., T], *args: object) -> T:
    """Return the answer of a file system's method, for which a store has `ANSWER` seconds.

    Raises:
        TimeoutError: they are over.
    """
    if not is_remote(filesystem):
        return question(*args)
    try:
        return question(*args, timeout=ANSWER_SECONDS)
    except TimeoutError:
        raise TimeoutError(f"no answer within {ANSWER_SECONDS:.0f} seconds") from None


def write_bytes(filesystem: fsspec.AbstractFileSystem, path: str, data: bytes, timeout: float | None = None) -> None:
    """Write a file, and its folder on a disk. A bucket must be there: s3fs would make one of a name misspelt.

    Raises:
        FileNotFoundError: there is no such bucket.
    """
    if not is_remote(filesystem):
        filesystem.makedirs(path.rpartition("/")[0], exist_ok=True)
        filesystem.pipe_file(path, data)
        return
    try:
        filesystem.pipe_file(path, data, timeout=timeout)
    except FileNotFoundError:  # which names but a URL of the store's own
        raise FileNotFoundError("there is no such bucket") from None


def check_reachable(filesystem: fsspec.AbstractFileSystem, path: str) -> None:
    """Raise what keeps us from a store, if anything: `isfile` and `isdir` would take it for a no."""
    if is_remote(filesystem):
        with suppress(FileNotFoundError):
            with_timeout(filesystem, filesystem.info, path)


def retry(filesystem: fsspec.AbstractFileSystem, place: str, trouble: str, work: Callable[[], T]) -> T:
    """Return what `work` returns, which is called again while a store is away, for `PATIENCE` seconds.

    Args:
        filesystem: where it works. A disk is no better the second time.
        place: what it writes or removes.
        trouble: what is wrong with the place meanwhile, in words.
        work: may be called again after it got halfway.

    Raises:
        WriteError: the disk refuses.
        ValueError: the store refuses, or stays away.
    """
    if not is_remote(filesystem):
        with naming_place(place):
            return work()
    aim = f"{place} {trouble}"
    deadline, pause = time.monotonic() + RETRY_SECONDS, 1.0
    while True:
        try:
            return work()
        except Exception as error:  # botocore's and gcsfs's have no class in common
            if _is_refusal(error) or time.monotonic() + pause > deadline:
                raise ValueError(
                    f"{aim}: {one_line(error)}. What is there is kept: the same command goes on"
                ) from error
            log.warning("%s, the next try is in %.0f s: %s", aim, pause, one_line(error))
        time.sleep(pause)
        pause = min(2 * pause, LONGEST_PAUSE)


def _is_refusal(error: Exception) -> bool:
    """Tell whether a store does not let us in: s3fs raises PermissionError, gcsfs has no class for it."""
    return isinstance(error, PermissionError) or getattr(error, "code", 0) == 401 or str(error).startswith("Forbidden")

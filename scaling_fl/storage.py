"""Disks and object stores: paths, timeouts and retries."""

import logging
import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TypeVar

import fsspec

from scaling_fl.errors import one_line

CONTAINER_DATA = "/workspace/data"  # where Compose mounts DATA_MOUNT_DIR


def host_path(path: str) -> str:
    """Return where a file of a container's data folder is on this machine: in DATA_MOUNT_DIR (default: ./data).

    This changes `/workspace/data/...`, also inside the URL of a local file, if that folder does not exist; and
    `data/...`, if ./data does not exist but the file exists in DATA_MOUNT_DIR. Other paths are returned unchanged.
    """
    folder = os.path.abspath(os.path.expanduser(os.environ.get("DATA_MOUNT_DIR") or "data"))
    if not os.path.exists(CONTAINER_DATA):
        # At the start, or after a scheme or the `::` of a chain of URLs.
        path = re.sub(rf"(^|file://|local://|::){CONTAINER_DATA}(?=/|$)", lambda found: found[1] + folder, path)
    inside = re.fullmatch(r"(?:\./)*data(/.*)", path)
    if inside and not os.path.exists("data") and os.path.exists(folder + inside[1]):
        return folder + inside[1]
    return path


T = TypeVar("T")

ANSWER_SECONDS = 30.0  # seconds until a store must answer a first request: s3fs alone may take half an hour
RETRY_SECONDS = 300.0  # seconds of attempts, in addition to those of s3fs and gcsfs themselves
LONGEST_PAUSE = 30.0  # seconds between two attempts; the first pause is one second, and each one doubles

log = logging.getLogger(__name__)


class WriteError(ValueError):
    """A disk of this machine cannot be written to. The run ends, and saves its weights elsewhere."""


@contextmanager
def naming_place(place: str) -> Iterator[None]:
    """Name the place in an error of the disk that the body raises.

    Raises:
        WriteError: the body raised an OSError.
    """
    try:
        yield
    except BrokenPipeError as error:
        raise WriteError(f"{place}: expected a reader, got one that has closed it") from error
    except OSError as error:
        raise WriteError(f"{place}: expected a disk that can be written to, got {one_line(error)}") from error


def local_path(url: str) -> str | None:
    """Return the path of a file or folder on a disk of this machine; None if it is elsewhere."""
    if fsspec.core.split_protocol(url)[0] not in (None, "file", "local"):
        return None
    return fsspec.core.url_to_fs(url)[1]


def is_remote(filesystem: fsspec.AbstractFileSystem) -> bool:
    """Tell whether this is an object store, such as s3 and gs, whose classes in fsspec are asynchronous."""
    return filesystem.async_impl


def with_timeout(filesystem: fsspec.AbstractFileSystem, method: Callable[..., T], *args: object) -> T:
    """Return the result of a file system's method.

    Raises:
        TimeoutError: a store did not answer within `ANSWER_SECONDS`.
    """
    if not is_remote(filesystem):
        return method(*args)
    try:
        return method(*args, timeout=ANSWER_SECONDS)
    except TimeoutError:
        raise TimeoutError(f"no answer within {ANSWER_SECONDS:.0f} seconds") from None


def write_bytes(filesystem: fsspec.AbstractFileSystem, path: str, data: bytes, timeout: float | None = None) -> None:
    """Write a file, and on a disk its folder. A bucket must exist: s3fs would create one with a misspelt name.

    Raises:
        FileNotFoundError: the bucket does not exist.
    """
    if not is_remote(filesystem):
        filesystem.makedirs(path.rpartition("/")[0], exist_ok=True)
        filesystem.pipe_file(path, data)
        return
    try:
        filesystem.pipe_file(path, data, timeout=timeout)
    except FileNotFoundError:  # its message is only an internal URL of the store
        raise FileNotFoundError("there is no such bucket") from None


def write_whole(filesystem: fsspec.AbstractFileSystem, path: str, data: bytes, *, part: str) -> None:
    """Write a file under the name `part`, and rename it: `path` is there as a whole or not at all.

    A store renames by a copy, which is atomic, and a removal; after an error it may keep `part`.
    """
    try:
        write_bytes(filesystem, part, data)
        filesystem.mv(part, path)
    except BaseException:
        if not is_remote(filesystem):
            with suppress(OSError):
                filesystem.rm(part)
        raise


def inherit_access(folder: Path) -> None:
    """Let those who may read the folder around this one read its files: those of safetensors are for one user."""
    with suppress(OSError):  # of a file system without such rights
        mode = folder.parent.stat().st_mode & 0o777
        for path in (folder, *folder.rglob("*")):
            path.chmod(mode if path.is_dir() else mode & 0o666)


def check_reachable(filesystem: fsspec.AbstractFileSystem, path: str) -> None:
    """Raise the error of a store that does not answer or refuses; `isfile` and `isdir` would return False."""
    if is_remote(filesystem):
        with suppress(FileNotFoundError):
            with_timeout(filesystem, filesystem.info, path)


def retry(filesystem: fsspec.AbstractFileSystem, place: str, work: Callable[[], T]) -> T:
    """Return the result of `work`; on a store, call it again after errors, for `RETRY_SECONDS`.

    Args:
        filesystem: on which it works.
        place: what it writes or removes.
        work: may be called again after it failed halfway.

    Raises:
        WriteError: the disk cannot be written to.
        ValueError: the store refuses, or does not answer in time.
    """
    if not is_remote(filesystem):
        with naming_place(place):
            return work()
    deadline, pause = time.monotonic() + RETRY_SECONDS, 1.0
    while True:
        try:
            return work()
        except Exception as error:  # the errors of botocore and gcsfs have no common class
            problem = f"{place}: expected a store that can be written to, got {one_line(error)}"
            if _is_refusal(error) or time.monotonic() + pause > deadline:
                raise ValueError(f"{problem}. Run the same command to resume from the last checkpoint") from error
            log.warning("%s. The next attempt is in %.0f s", problem, pause)
        time.sleep(pause)
        pause = min(2 * pause, LONGEST_PAUSE)


def _is_refusal(error: Exception) -> bool:
    """Tell whether a store denied access: s3fs raises PermissionError, gcsfs has no class for it."""
    return isinstance(error, PermissionError) or getattr(error, "code", 0) == 401 or str(error).startswith("Forbidden")

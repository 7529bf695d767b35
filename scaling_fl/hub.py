"""What comes from the Hugging Face hub, without a wait where it does not answer or its cache cannot be written."""

import errno
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from tempfile import TemporaryDirectory
from threading import Thread
from typing import Any, TypeVar

import datasets
from datasets import Dataset, load_dataset
from huggingface_hub import constants
from huggingface_hub.utils import get_session

from scaling_fl.errors import one_line

T = TypeVar("T")

CONNECT, ANSWER = 3.0, 6.0  # seconds for a connection, and for a first answer: the client would try for a minute
AWAY = (502, 503, 504)  # what a gateway answers for a server that is not there
WRITING = (errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # errors that no reading meets

log = logging.getLogger(__name__)
_has_warned = False


def from_hub(name: str, load: Callable[[str | None], T]) -> T:
    """Return what `load` takes from the hub, from its cache where the hub does not answer, or from a local folder.

    Args:
        name: an id of the hub, or a local folder.
        load: is given the folder of the cache, None for the usual one. That cannot be written, or is full: then it is
            called again with a temporary one.

    Raises:
        ConnectionError: the hub does not answer, and the cache has not what is needed.
    """
    problem = None if os.path.exists(name) or constants.is_offline_mode() else _problem()
    if problem is None:
        return _load(load)
    try:
        with _offline():
            return _load(load)
    except Exception as error:
        raise ConnectionError(
            f"the hub, {constants.ENDPOINT}, does not answer: {problem}; and its cache: {one_line(error)}"
        ) from None


def load_split(name: str, split: str) -> Dataset:
    """Load a split of a data set of the hub or of a local folder. Raises errors of any kind."""
    return from_hub(
        name,
        lambda folder: load_dataset(name, split=split, cache_dir=folder, keep_in_memory=folder is not None or None),
    )


def _load(load: Callable[[str | None], T]) -> T:
    try:
        return load(None)
    except Exception as error:
        if not _is_of_cache(error):
            raise
        with TemporaryDirectory(prefix="scaling_fl-") as folder:
            try:
                loaded = load(folder)
            except Exception as again:
                if not _is_of_cache(again):
                    raise
                raise OSError(
                    f"HF_HOME: expected a folder that can be written, got {constants.HF_HOME!r}: {one_line(again)}"
                ) from None
        warn_of_cache(error, constants.HF_HUB_CACHE, "HF_HUB_CACHE")
        return loaded


def _is_of_cache(error: Exception) -> bool:
    """Tell whether a file of the cache could not be written."""
    cause = find_os_error(error)
    caches = constants.HF_HOME, constants.HF_HUB_CACHE, str(datasets.config.HF_DATASETS_CACHE)
    return cause is not None and (cause.errno in WRITING or str(cause.filename).startswith(caches))


@cache
def _problem() -> str | None:
    """Return why the hub cannot be reached, None if it can."""
    found: list[str | None] = []
    # The client's own patience counts where somebody has set it.
    seconds = max(ANSWER, constants.HF_HUB_ETAG_TIMEOUT if "HF_HUB_ETAG_TIMEOUT" in os.environ else 0)
    timeouts = CONNECT, seconds + 1, seconds + 1, seconds + 1

    def knock() -> None:
        try:
            status = get_session().head(constants.ENDPOINT, timeout=timeouts).status_code
            found.append(f"status {status}" if status in AWAY else None)
        except Exception as error:
            found.append(one_line(error))

    # In a thread, as a resolver of names takes as long as it likes.
    thread = Thread(target=knock, daemon=True)
    thread.start()
    thread.join(seconds)
    return found[0] if found else f"nothing within {seconds:.0f} seconds"


@contextmanager
def _offline() -> Iterator[None]:
    before = constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE = before


def warn_of_cache(error: Exception, folder: object = None, name: str = "HF_DATASETS_CACHE") -> None:
    """Say once, on the first rank of a node, that a cache cannot be written.

    Args:
        error: says why.
        folder: of the cache; None is that of data sets.
        name: the variable that names it. HF_HOME names them all.
    """
    global _has_warned
    if not _has_warned and os.environ.get("LOCAL_RANK", "0") == "0":
        log.warning(
            "%s: expected a folder where the cache can be written, got %r (%s). The run goes on without the cache",
            name if name in os.environ else "HF_HOME",
            str(folder or datasets.config.HF_DATASETS_CACHE),
            one_line(find_os_error(error) or error),
        )
    _has_warned = True


def find_os_error(error: BaseException | None) -> OSError | None:
    """Return the error of the system behind another one, which libraries make of it or meet while they clean up."""
    while (found := find_error(error, OSError)) is not None and not found.errno:
        error = found.__cause__ or found.__context__
    return found


def find_error(error: BaseException | None, kind: Any) -> Any:
    """Return the first error of a kind among one and those behind it."""
    while error is not None and not isinstance(error, kind):
        error = error.__cause__ or error.__context__
    return error

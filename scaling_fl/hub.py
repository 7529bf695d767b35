"""Load from the Hugging Face hub, without long waits if it does not answer, or if its cache cannot be written."""

import errno
import logging
import os
from collections.abc import Callable, Iterator
from functools import cache
from tempfile import TemporaryDirectory
from threading import Thread
from typing import TypeVar

import datasets
from datasets import Dataset, load_dataset
from huggingface_hub import constants
from huggingface_hub.utils import get_session

from scaling_fl.errors import one_line

T = TypeVar("T")

CONNECT_SECONDS, ANSWER_SECONDS = 3.0, 6.0  # until a connection and a first answer: the client would try for a minute
GATEWAY_ERRORS = (502, 503, 504)  # status of a gateway whose server does not answer
WRITE_ERRORS = (errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # only writing raises these

log = logging.getLogger(__name__)
_has_warned = False


def from_hub(name: str, load: Callable[[str | None], T]) -> T:
    """Return what `load` loads from the hub, from the cache if the hub does not answer, or from a local folder.

    Args:
        name: an id of the hub, or a local folder.
        load: takes the folder of the cache, None for the default. If the default folder is full or cannot be written,
            it is called again with a temporary folder.

    Raises:
        ConnectionError: the hub does not answer, and the cache does not have the files.
    """
    problem = None if os.path.exists(name) or constants.is_offline_mode() else _find_problem()
    if problem is None:
        return _load(load)
    before = constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True
    try:
        return _load(load)
    except Exception as error:
        raise ConnectionError(
            f"the hub, {constants.ENDPOINT}, does not answer: {problem}; and loading from its cache: {one_line(error)}"
        ) from None
    finally:
        constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE = before


def load_split(name: str, split: str) -> Dataset:
    """Load a split of a data set of the hub or of a local folder. This raises errors of any class."""
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
    """Tell whether the error means that the cache could not be written."""
    cause = _find_os_error(error)
    caches = constants.HF_HOME, constants.HF_HUB_CACHE, str(datasets.config.HF_DATASETS_CACHE)
    return cause is not None and (cause.errno in WRITE_ERRORS or str(cause.filename).startswith(caches))


@cache
def _find_problem() -> str | None:
    """Return why the hub cannot be reached, None if it can."""
    problems: list[str | None] = []
    # A timeout that the user has set for the client also counts here.
    seconds = max(ANSWER_SECONDS, constants.HF_HUB_ETAG_TIMEOUT if "HF_HUB_ETAG_TIMEOUT" in os.environ else 0)
    timeouts = CONNECT_SECONDS, seconds + 1, seconds + 1, seconds + 1

    def send_request() -> None:
        try:
            status = get_session().head(constants.ENDPOINT, timeout=timeouts).status_code
            problems.append(f"status {status}" if status in GATEWAY_ERRORS else None)
        except Exception as error:
            problems.append(one_line(error))

    # In a thread, as the name resolver has no timeout.
    thread = Thread(target=send_request, daemon=True)
    thread.start()
    thread.join(seconds)
    return problems[0] if problems else f"no answer within {seconds:.0f} seconds"


def warn_of_cache(error: Exception, folder: object = None, name: str = "HF_DATASETS_CACHE") -> None:
    """Warn once, on the first rank of a node, that a cache cannot be written.

    Args:
        error: the reason.
        folder: of the cache; None: the cache of data sets.
        name: the variable that sets the folder, if it is set; otherwise HF_HOME does.
    """
    global _has_warned
    if not _has_warned and os.environ.get("LOCAL_RANK", "0") == "0":
        log.warning(
            "%s: expected a folder where the cache can be written, got %r (%s). The run goes on without the cache",
            name if name in os.environ else "HF_HOME",
            str(folder or datasets.config.HF_DATASETS_CACHE),
            one_line(_find_os_error(error) or error),
        )
    _has_warned = True


def _find_os_error(error: Exception) -> OSError | None:
    return next((cause for cause in causes(error) if isinstance(cause, OSError) and cause.errno), None)


def causes(error: BaseException | None) -> Iterator[BaseException]:
    """Yield an error and its causes, the last one first."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__

"""How a process of a run ends: its error is printed once, or told to the caller in Python."""

import gc
import os
import sys
import traceback
from collections.abc import Callable
from contextlib import suppress
from typing import NoReturn

from scaling_fl.distributed import signals
from scaling_fl.distributed.caller import is_called, tell
from scaling_fl.distributed.heartbeat import PeerError


def print_error(error: BaseException) -> int:
    """Print an error that ends a program, in one write as several ranks may print; return the exit status."""
    if isinstance(error, SystemExit):
        text = error.code if isinstance(error.code, str) else ""
    elif isinstance(error, PeerError):
        text = f"error: {error}"
    elif isinstance(error, signals.Interrupted):
        text = str(error) if os.environ.get("RANK", "0") == "0" else ""
    else:
        where = f"error on rank {os.environ['RANK']}:\n" if "RANK" in os.environ else ""
        text = where + "".join(traceback.format_exception(error)).rstrip()
    if text and is_called():
        is_ours = isinstance(error, SystemExit) and not isinstance(error.__cause__, PeerError)
        kind = ValueError if is_ours else signals.Interrupted if isinstance(error, signals.Interrupted) else PeerError
        tell(error="\n".join(line.removeprefix("error: ") for line in text.splitlines()), kind=kind.__name__)
    elif text:
        with suppress(OSError):  # the terminal was closed
            print(f"{text}\n", end="", file=sys.stderr, flush=True)
    if isinstance(error, signals.Interrupted):
        return 128 + error.number
    if not isinstance(error, SystemExit):
        return 1
    return error.code if isinstance(error.code, int) else int(error.code is not None)


def run_program(program: Callable[[], object]) -> NoReturn:
    """Call `program` and exit with its status; exit at once after an error.

    Python's own exit would wait for a collective that a lost rank never joins.
    """
    status = 0
    try:
        program()
    except BaseException as error:
        status = print_error(error)
    if status:
        with suppress(OSError):  # the disk is full, or the reader has ended
            sys.stdout.flush()
        os._exit(status)
    gc.freeze()  # as Python ends, it would visit all objects, for memory that the system takes back anyway
    sys.exit()

"""A rank that waits for a debugger, if the environment asks for that. docs/debugging.md says how to attach one."""

import os
import sys

from scaling_fl.errors import one_line, whole_number_from_environment


def debugging() -> bool:
    """Tell whether a rank is debugged, so that any may stand still for as long as somebody thinks.

    Raises:
        ValueError: DEBUG is neither 0 nor 1.
    """
    value = os.environ.get("DEBUG") or "0"
    if value not in ("0", "1"):
        raise ValueError(f"DEBUG={value!r} was given: 1 to wait for a debugger, or 0, would do")
    return value == "1"


def await_debugger(rank: int, num_ranks: int) -> None:
    """Wait until a debugger has attached to this rank, if it is the one that `DEBUG_RANK` (0) names.

    It listens on `DEBUG_PORT` (5678) of `DEBUG_HOST` (127.0.0.1): whoever reaches that runs what they like.

    Raises:
        ValueError: there is no such rank, nothing to listen with, or no such address that is free.
    """
    number = whole_number_from_environment("DEBUG_RANK", "0", least=0)
    host, port = os.environ.get("DEBUG_HOST") or "127.0.0.1", whole_number_from_environment("DEBUG_PORT", "5678")
    if number >= num_ranks:
        raise ValueError(f"DEBUG_RANK={number} was given: a rank below {num_ranks}, the number of ranks, would do")
    if number != rank:
        return
    os.environ.setdefault("PYDEVD_DISABLE_FILE_VALIDATION", "1")  # or it warns that no breakpoint stops in os.py
    try:
        import debugpy

        debugpy.listen((host, port))
    except ImportError:
        raise ValueError("DEBUG=1 needs debugpy, which is not installed: pip install debugpy would do") from None
    except (RuntimeError, ValueError) as error:
        raise ValueError(f"no debugger can be waited for at {host}:{port} (DEBUG_PORT): {one_line(error)}") from None
    print(f"rank {rank} waits for a debugger at {host}:{port}\n", end="", file=sys.stderr, flush=True)
    debugpy.wait_for_client()

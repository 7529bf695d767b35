"""Let a rank wait for a debugger, if the environment asks for it; docs/debugging.md describes how to attach one."""

import os
import sys

from scaling_fl.errors import one_line, whole_number_from_environment


def is_debugging() -> bool:
    """Tell whether a rank is debugged, so that any rank may stand still without a limit.

    Raises:
        ValueError: DEBUG is neither 0 nor 1.
    """
    value = os.environ.get("DEBUG") or "0"
    if value not in ("0", "1"):
        raise ValueError(f"DEBUG: expected 1 to wait for a debugger, or 0, got {value!r}")
    return value == "1"


def await_debugger(rank: int, num_ranks: int) -> None:
    """Wait until a debugger has attached to this rank, if `DEBUG_RANK` (0) names it.

    It listens on `DEBUG_PORT` (5678) of `DEBUG_HOST` (127.0.0.1), and lets any program that reaches it run any code.

    Raises:
        ValueError: the rank does not exist, debugpy is not installed, or the address is not free.
    """
    debug_rank = whole_number_from_environment("DEBUG_RANK", "0", least=0)
    host, port = os.environ.get("DEBUG_HOST") or "127.0.0.1", whole_number_from_environment("DEBUG_PORT", "5678")
    if debug_rank >= num_ranks:
        raise ValueError(f"DEBUG_RANK: expected a rank below {num_ranks}, the number of ranks, got {debug_rank}")
    if debug_rank != rank:
        return
    os.environ.setdefault("PYDEVD_DISABLE_FILE_VALIDATION", "1")  # or it warns that no breakpoint stops in os.py
    try:
        import debugpy

        debugpy.listen((host, port))
    except ImportError:
        raise ValueError("DEBUG=1: expected the package debugpy, got none. Install it: pip install debugpy") from None
    except (RuntimeError, ValueError) as error:
        raise ValueError(f"DEBUG_PORT: expected a free port, got {host}:{port} ({one_line(error)})") from None
    print(f"rank {rank} waits for a debugger at {host}:{port}\n", end="", file=sys.stderr, flush=True)
    debugpy.wait_for_client()

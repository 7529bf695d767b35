"""The Python process that called `train`, if there is one: any process of the run can tell it something, or ask.

It listens at a socket in a folder of this user. A message is a line of JSON, and so is an answer.
"""

import json
import os
import signal
import socket
import threading
from contextlib import suppress
from typing import Any

ADDRESS = "SCALING_FL_CALLER"  # the variable with the path of the socket

_sockets: dict[int, socket.socket] = {}  # by process id, as a fork must not use its parent's
_lock = threading.Lock()  # of the threads of a rank's devices


def is_called() -> bool:
    """Tell whether Python code, and not a command line, has started this run."""
    return ADDRESS in os.environ


def tell(**message: Any) -> None:
    """Send a message; do nothing if there is no caller, or it has ended."""
    if is_called():
        with _lock, suppress(OSError):
            _connect().sendall(encode(message))


def ask(**message: Any) -> Any:
    """Send a message and return the answer; None if there is no caller, or it has ended."""
    if is_called():
        with _lock, suppress(OSError, ValueError):
            _connect().sendall(encode(message))
            return json.loads(_connect().makefile("rb").readline())
    return None


def encode(message: Any) -> bytes:
    """Return a message or an answer as it is sent."""
    return json.dumps(message).encode() + b"\n"


def end_with_caller() -> None:
    """Send this process SIGTERM when the caller ends, which closes our standard input."""

    def watch() -> None:
        while os.read(0, 1024):
            pass
        os.kill(os.getpid(), signal.SIGTERM)

    if is_called():
        threading.Thread(target=watch, name="caller", daemon=True).start()


def _connect() -> socket.socket:
    if os.getpid() not in _sockets:
        connection = socket.socket(socket.AF_UNIX)
        connection.connect(os.environ[ADDRESS])
        _sockets[os.getpid()] = connection
    return _sockets[os.getpid()]

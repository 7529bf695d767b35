"""A command in a process of its own, which tells this process what happens."""

import json
import os
import selectors
import signal
import socket
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory, gettempdir
from typing import Any

from scaling_fl.distributed.caller import ADDRESS, encode
from scaling_fl.distributed.heartbeat import PeerError
from scaling_fl.distributed.launch import python_path
from scaling_fl.distributed.signals import GRACE_SECONDS, set_handlers
from scaling_fl.experiment.result import sites_as_numbers
from scaling_fl.training.metrics import Metrics

COMMAND = "scaling_fl.command"
LAST_LINES = 20  # of what a process printed, shown if it ends without an error


class Caller:
    """This process, while a run started by it lasts: it shows what the run prints, and hears what it tells.

    Args:
        on_round: as for `train`.
        is_quiet: nothing is shown.
    """

    def __init__(self, on_round: Callable[[Metrics], object] | None, is_quiet: bool) -> None:
        self.folder = ""
        self.planned: dict[str, Any] = {}
        self._on_round, self._is_quiet = on_round, is_quiet
        self._errors: dict[str, str] = {}  # sentence -> kind
        self._last_lines: list[str] = []
        self._bar: Any = None

    def run(self, words: list[str], settings: Mapping[str, Any], ranks: int) -> None:
        """Run a command to its end.

        Args:
            words: of the command, before `with`.
            settings: those that are given.
            ranks: its processes.

        Raises:
            ValueError, PeerError: the command ended with an error.
        """
        # The path of a socket has some hundred bytes at most.
        place = "/tmp" if len(gettempdir()) > 60 else None
        with TemporaryDirectory(prefix="scaling_fl-", dir=place) as folder, socket.socket(socket.AF_UNIX) as listener:
            file, address = Path(folder, "settings.json"), os.path.join(folder, "caller")
            file.write_text(json.dumps(settings))
            listener.bind(address)
            listener.listen()
            # Modules are found where this process finds them, and the current folder is not searched first.
            environment = {**os.environ, "RANKS": str(ranks), "PYTHONPATH": python_path(), ADDRESS: address}
            command = [sys.executable, "-P", "-m", COMMAND, *words, "with", str(file)]
            with _started(command, environment) as process:
                try:
                    self._follow(process, listener)
                finally:
                    self._close_bar()
        if process.returncode != 0:
            raise self._error(process.returncode)

    def _follow(self, process: subprocess.Popen, listener: socket.socket) -> None:
        """Handle what the process prints and tells until it has ended."""
        with selectors.DefaultSelector() as selector:
            buffers: dict[Any, bytes] = {}

            def accept(_: Any) -> None:
                connection, _ = listener.accept()
                connection.setblocking(False)
                selector.register(
                    connection, selectors.EVENT_READ, partial(read, handle=partial(self._hear, connection))
                )

            def read(source: Any, handle: Callable[[bytes], None]) -> None:
                data = _read(source)
                *lines, buffers[source] = (buffers.get(source, b"") + data).split(b"\n")
                if not data:
                    lines = [buffers[source]] if buffers[source] and not isinstance(source, socket.socket) else []
                    selector.unregister(source)
                    source.close()
                for line in lines:
                    handle(line)

            selector.register(listener, selectors.EVENT_READ, accept)
            streams: Any = (process.stdout, sys.stdout), (process.stderr, sys.stderr)
            for stream, shown in streams:
                show = partial(self._show, shown)
                selector.register(stream, selectors.EVENT_READ, partial(read, handle=show))
            has_ended = False
            while True:
                ready = selector.select(timeout=0 if has_ended else 0.2)
                for key, _ in ready:
                    key.data(key.fileobj)
                if has_ended and not ready:
                    return
                has_ended = process.poll() is not None

    def _hear(self, connection: socket.socket, line: bytes) -> None:
        """Handle a message of the run: see `distributed.caller`."""
        message = json.loads(line)
        if "folder" in message:
            self.folder = message["folder"]
        elif "plan" in message:
            self.planned = message["plan"] or self.planned
        elif "error" in message:
            self._errors.setdefault(message["error"], message["kind"])
        elif "bar" in message:
            self._close_bar()
            self._bar = _make_bar(message["bar"], message["total"])
        elif "done" in message and self._bar is not None:
            self._bar.update(message["done"] - self._bar.n)
        elif "metrics" in message:
            self._close_bar()
            answer = None if self._on_round is None else self._on_round(sites_as_numbers(message["metrics"]))
            goes_on = answer is None or bool(answer)
            with suppress(OSError):  # the rank has ended meanwhile
                connection.sendall(encode(goes_on))

    def _show(self, stream: Any, line: bytes) -> None:
        """Print a line of the process to a stream of this one."""
        text = line.decode(errors="replace")
        self._last_lines = [*self._last_lines, text][-LAST_LINES:]
        if not self._is_quiet:
            self._close_bar()
            encoding = getattr(stream, "encoding", None) or "utf-8"
            print(text.encode(encoding, "backslashreplace").decode(encoding), file=stream, flush=True)

    def _close_bar(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def _error(self, status: int) -> Exception:
        """Return the error with which the command ended."""
        ours = [sentence for sentence, kind in self._errors.items() if kind == "ValueError"]
        if not self._errors:  # it ended before it could tell
            ours = [line.removeprefix("error: ") for line in self._last_lines if line.startswith("error: ")]
        if ours:
            return ValueError("\n".join(ours))
        others = list(self._errors) or [f"the run's process ended with status {status}", *self._last_lines]
        return PeerError("\n".join(others))


def _read(source: Any) -> bytes:
    """Return what there is to read from a pipe or socket, nothing at its end."""
    with suppress(OSError):  # the process at the other end was killed
        return source.recv(65536) if isinstance(source, socket.socket) else source.read1(65536)
    return b""


@contextmanager
def _started(command: list[str], environment: Mapping[str, str]) -> Iterator[subprocess.Popen]:
    """Start a process and let it end: after an error of the body, such as an interrupt, by SIGTERM."""
    pipe, process = subprocess.PIPE, None
    try:
        with _delaying_interrupts():
            # In a session of its own, so that the Ctrl-C of a terminal reaches this process alone.
            process = subprocess.Popen(
                command, env=environment, stdin=pipe, stdout=pipe, stderr=pipe, start_new_session=True
            )
        yield process
    except BaseException:
        if process is not None:
            _end(process)
        raise
    finally:
        for stream in (process.stdin, process.stdout, process.stderr) if process is not None else ():
            if stream is not None:
                stream.close()


@contextmanager
def _delaying_interrupts() -> Iterator[None]:
    """Let an interrupt that comes during the body come after it: it would lose a process that is being started."""
    came: list[tuple] = []
    before = set_handlers({signal.SIGINT: lambda *of: came.append(of)})
    try:
        yield
    finally:
        set_handlers(before)
    if came and callable(before[signal.SIGINT]):
        before[signal.SIGINT](*came[0])


def _end(process: subprocess.Popen) -> None:
    """Ask a process to end, and end it if it does not, or at a second interrupt."""
    process.send_signal(signal.SIGTERM)
    try:
        process.communicate(timeout=GRACE_SECONDS + 15)
    except BaseException:
        with suppress(ProcessLookupError):  # it ended at that moment
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _make_bar(name: str, total: int) -> Any:
    """Return a progress bar: a widget in a notebook that has widgets, else text on a terminal."""
    from tqdm import TqdmWarning, std

    with warnings.catch_warnings(action="ignore", category=TqdmWarning):
        from tqdm.autonotebook import tqdm

    class Bar(tqdm):
        monitor_interval = 0  # which starts no thread in the caller's process

    is_text = tqdm is std.tqdm
    return Bar(total=total, desc=name, unit=" examples", leave=False, disable=None if is_text else False)

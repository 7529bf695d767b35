"""A client of the Debug Adapter Protocol with a time limit on every wait."""

import json
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from helpers import ROOT

PATIENCE = 60.0  # seconds on a busy machine that a test waits for anything
RUN = ROOT / "scaling_fl" / "experiment" / "run.py"
LOOP = [line.strip() for line in RUN.read_text().splitlines()].index(
    "metrics |= evaluation.name(federation.score(round_))"
) + 1


class Debugger:
    """The client's side of the protocol."""

    def __init__(self, port: int) -> None:
        self._socket = socket.create_connection(("127.0.0.1", port), timeout=PATIENCE)
        self._stream = self._socket.makefile("rb")
        self._requests: dict[int, str] = {}
        self._unread: list[dict[str, Any]] = []

    def __enter__(self) -> "Debugger":
        return self

    def __exit__(self, *_: object) -> None:
        self._stream.close()
        self._socket.close()

    def send(self, command: str, **arguments: object) -> int:
        number = len(self._requests) + 1
        self._requests[number] = command
        message = {"seq": number, "type": "request", "command": command, "arguments": arguments}
        body = json.dumps(message).encode()
        self._socket.sendall(b"Content-Length: %d\r\n\r\n%s" % (len(body), body))
        return number

    def ask(self, command: str, **arguments: object) -> dict[str, Any]:
        """Send a request and return its response."""
        return self.answer(self.send(command, **arguments))

    def answer(self, number: int) -> dict[str, Any]:
        answer = self._await(lambda message: message.get("request_seq") == number)
        assert answer["success"], answer
        return answer.get("body", {})

    def event(self, name: str) -> dict[str, Any]:
        """Wait for an event."""
        return self._await(lambda message: message.get("event") == name).get("body", {})

    def _await(self, is_wanted: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
        end = time.monotonic() + PATIENCE
        while not (found := [message for message in self._unread if is_wanted(message)]):
            assert time.monotonic() < end, self._unread
            self._socket.settimeout(max(end - time.monotonic(), 0.01))
            length = 0
            while (line := self._stream.readline().strip()) or not length:
                assert line, "the connection is closed"
                length = int(line.partition(b":")[2])
            self._unread.append(json.loads(self._stream.read(length)))
        self._unread.remove(found[0])
        return found[0]


def stop_in_the_loop(debugger: Debugger) -> tuple[int, int]:
    """Attach, set a breakpoint in the loop of rounds and wait there. Returns the thread and the frame."""
    debugger.ask("initialize", adapterID="test", pathFormat="path")
    attached = debugger.send("attach", justMyCode=True)
    debugger.event("initialized")
    breakpoints = debugger.ask("setBreakpoints", source={"path": str(RUN)}, breakpoints=[{"line": LOOP}])
    assert [breakpoint["verified"] for breakpoint in breakpoints["breakpoints"]] == [True]
    debugger.ask("configurationDone")
    debugger.answer(attached)
    thread = debugger.event("stopped")["threadId"]
    return thread, top_frame(debugger, thread)


def top_frame(debugger: Debugger, thread: int) -> int:
    frame = debugger.ask("stackTrace", threadId=thread)["stackFrames"][0]
    assert (frame["line"], Path(frame["source"]["path"]).name) == (LOOP, RUN.name)
    return frame["id"]


def value(debugger: Debugger, frame: int, expression: str) -> str:
    return debugger.ask("evaluate", expression=expression, frameId=frame)["result"]


def local_variables(debugger: Debugger, frame: int) -> dict[str, str]:
    scope = debugger.ask("scopes", frameId=frame)["scopes"][0]
    variables = debugger.ask("variables", variablesReference=scope["variablesReference"])["variables"]
    return {variable["name"]: variable["value"] for variable in variables}

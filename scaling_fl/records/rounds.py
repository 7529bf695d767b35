"""What is on record of a run besides its scores: seconds, bytes, speed, machines; and a line a round in a file."""

import json
import os
import time
from contextlib import suppress

from scaling_fl.distributed.collectives import all_gather, bytes_sent
from scaling_fl.storage import naming_place
from scaling_fl.training.metrics import Metrics

ROUNDS = "rounds.jsonl"


class Clock:
    """The seconds and bytes of a round."""

    def __init__(self) -> None:
        self._last = time.perf_counter()
        self._sent = bytes_sent()

    def lap(self, name: str) -> Metrics:
        """Return the seconds since the last lap, as a metric."""
        last, self._last = self._last, time.perf_counter()
        return {f"time.{name}_s": self._last - last}

    def total(self, metrics: Metrics) -> Metrics:
        """Return the seconds of a round's laps, and the bytes that all ranks sent since the last total."""
        sent, self._sent = bytes_sent() - self._sent, bytes_sent()
        seconds = sum(value for name, value in metrics.items() if name.startswith("time."))
        return {"time.round_s": seconds, "comm.bytes": sum(all_gather(sent))}


def write_round(folder: str | None, round_: int, metrics: Metrics) -> None:
    """Append a round's line to `rounds.jsonl` in the folder of a run's files, if there is one, or no part of it.

    Raises:
        WriteError: it cannot be written.
    """
    if folder is not None:
        path = os.path.join(folder, ROUNDS)
        before = os.path.getsize(path) if os.path.exists(path) else 0
        with naming_place(path):
            try:
                with open(path, "a", encoding="utf-8") as file:
                    file.write(json.dumps({"round": round_, **metrics}, allow_nan=False) + "\n")
            except OSError:
                with suppress(OSError):
                    os.truncate(path, before)
                raise

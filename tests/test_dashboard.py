"""Omniboard as run-local.sh starts it, on a real MongoDB, read in a real browser. Both have to be installed."""

import os
import re
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers import PASSWORD, ROOT, Command, succeed

pytestmark = pytest.mark.long
PATIENCE = 60.0  # seconds on a busy machine
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
JOB = "a-job-to-be-seen"


@pytest.fixture
def dashboard(mongo: dict[str, str], command: Command, tmp_path: Path) -> Iterator[tuple[int, Path]]:
    """A dashboard of a database with one run: its port and its output."""
    if shutil.which("omniboard") is None:
        pytest.skip("omniboard is not on PATH: npm install omniboard@2.16.1 (532 MB) brings one, in node_modules/.bin")
    env = {**mongo, "SACRED_DATABASE": "dashboard"}
    succeed(command(env=env, job_name=JOB, num_rounds=1))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    output = tmp_path / "omniboard.txt"
    with output.open("w") as file:
        process = subprocess.Popen(
            [ROOT / "run-local.sh", "dashboard"],
            env={**os.environ, **env, "RUNTIME": "venv", "DASHBOARD_PORT": str(port)},
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        end = time.monotonic() + PATIENCE
        while not re.search("Connection to .* established", output.read_text()):
            assert process.poll() is None, output.read_text()
            assert time.monotonic() < end, output.read_text()
            time.sleep(0.1)
        yield port, output
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        print(output.read_text())


def test_the_dashboard_shows_a_run_on_this_machine_only_and_never_its_password(
    dashboard: tuple[int, Path], tmp_path: Path
) -> None:
    if BROWSER is None:
        pytest.skip("there is no chromium")
    port, output = dashboard
    command = [
        BROWSER,
        *("--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'browser'}"),
        "--window-size=12000,1000",  # the table has only those columns that are in view
        *("--virtual-time-budget=20000", "--dump-dom", f"http://127.0.0.1:{port}/sacred"),
    ]
    page = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE).stdout
    assert f">{JOB}<" in page
    assert ">COMPLETED<" in page
    with pytest.raises(OSError, match="refused"):
        socket.create_connection(("127.0.0.2", port), timeout=5)
    commands = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True).stdout
    assert "omniboard" in commands
    assert not [text for text in (commands, page, output.read_text()) if PASSWORD in text or "p%40ss" in text]

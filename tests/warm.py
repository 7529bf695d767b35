"""Python without its start: a fork of this process, which has imported all slow packages."""

import faulthandler
import logging
import os
import runpy
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any


def run_words(words: Sequence[str], environment: Mapping[str, str]) -> None:
    """Do in this fork what Python does with the words of a command line, and end."""
    status = 70
    try:
        sys.stdin = sys.__stdin__ = open(0, closefd=False)  # noqa: SIM115
        sys.stdout = sys.__stdout__ = open(1, "w", buffering=1, closefd=False)  # noqa: SIM115
        sys.stderr = sys.__stderr__ = open(2, "w", buffering=1, closefd=False)  # noqa: SIM115
        redirect_loggers()
        os.environ.clear()
        os.environ.update(environment)
        words = list(words)
        folders = [os.getcwd()]
        while words[0] in ("-P", "-u"):
            folders = [] if words.pop(0) == "-P" else folders
        kind = words.pop(0) if words[0] in ("-m", "-c") else ""
        folders = folders if kind else [str(Path(words[0]).parent.resolve())] * len(folders)
        sys.path[:0] = [*folders, *filter(None, environment.get("PYTHONPATH", "").split(os.pathsep))]
        program, sys.argv = words[0], words
        if kind == "-c":
            sys.argv[0] = kind
            main: dict[str, Any] = sys.modules["__main__"].__dict__
            main.pop("__file__", None)
            exec(program, main)
        elif kind == "-m":
            runpy.run_module(program, run_name="__main__", alter_sys=True)
        else:
            runpy.run_path(program, run_name="__main__")
        status = 0
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        sys.excepthook(*sys.exc_info())
        status = 1
    finally:
        sys.stdout.flush()
        os._exit(status)


def redirect_loggers() -> None:
    """Let loggers write to the standard error of this fork instead of that of the process that imported them."""
    for logger in [logging.root, *logging.root.manager.loggerDict.values()]:
        for handler in getattr(logger, "handlers", ()):
            if type(handler) is logging.StreamHandler:
                handler.setStream(sys.stderr)


def fork_script(script: Path, arguments: Sequence[str], output: Path, folder: Path, env: dict[str, str]) -> int:
    """Start a script in a fork of this process. Returns its process id."""
    file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    pid = os.fork()
    if pid == 0:
        os.dup2(file, 1)
        os.dup2(file, 2)
        os.chdir(folder)
        run_words([str(script), *arguments], os.environ | env)
    os.close(file)
    return pid


def wait_for_exit(pid: int) -> int:
    """Return the exit status of a child."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


class WarmPopen(subprocess.Popen):
    """Starts this Python as a fork of this process, and any other program as always."""

    def __init__(self, args: Any, *rest: Any, env: Mapping[str, str] | None = None, **options: Any) -> None:
        if isinstance(args, list | tuple) and str(args[0]) == sys.executable:
            words = [str(word) for word in args[1:]]
            options["preexec_fn"] = partial(run_fork, words, dict(os.environ if env is None else env))
        super().__init__(args, *rest, env=env, **options)


def run_fork(words: Sequence[str], environment: Mapping[str, str]) -> None:
    """Take the place of the program that was about to start in this fork."""
    signal.signal(signal.SIGPIPE, signal.SIG_IGN)  # as Python does when it starts
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT):  # of which torchrun's handlers are inherited here
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    faulthandler.disable()  # it writes to a file of the other process
    # Nothing of the other process stays open, such as the pipe that tells it of an error at the start. A number that
    # was free could be closed once more by an object of the other process, when it is another's.
    null = os.open(os.devnull, os.O_RDWR)
    for number in map(int, os.listdir("/dev/fd")):
        if number > 2:
            with suppress(OSError):  # that of the list itself
                os.dup2(null, number)
    run_words(words, environment)

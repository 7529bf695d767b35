"""Train and plan from Python: the command in a process of its own.

Training sets threads, generators, handlers of signals and the allocator of its process for good, so it is never that
of the caller.
"""

from collections.abc import Callable
from typing import Any

from scaling_fl.distributed.heartbeat import PeerError
from scaling_fl.distributed.world import launched
from scaling_fl.experiment.checks import check, find_changed
from scaling_fl.experiment.child import Caller
from scaling_fl.experiment.contradictions import find_contradictions
from scaling_fl.experiment.result import Run
from scaling_fl.experiment.settings import Settings
from scaling_fl.training.metrics import Metrics


def train(settings: Settings, ranks: int = 1, on_round: Callable[[Metrics], object] | None = None) -> Run:
    """Train as the command does, with the same record and the same bits, and return the run.

    A run with `checkpoints_dir` continues from the last checkpoint.

    Args:
        settings: of the run.
        ranks: processes of this machine that train.
        on_round: is given the metrics of each new round, with its number as `round`, in this process. If it returns
            something false but None, the run ends after that round as if it were the last.

    Raises:
        ValueError: a setting or the data is not what it should be, or a site failed.
        PeerError: a process of the run was lost.
        KeyboardInterrupt: as always; the run has ended, and continues from its checkpoints.
    """
    caller = Caller(on_round, is_quiet=False)
    caller.run([], _check(settings, ranks), ranks)
    if not caller.folder:
        raise PeerError("the run: expected a record, got none")
    return Run.load(caller.folder)


def plan(settings: Settings, ranks: int = 1) -> dict[str, Any]:
    """Return what would run where, and what it takes, without training.

    Args:
        settings: of the run.
        ranks: processes of this machine that would train.

    Returns:
        As `experiment.plan.plan`.

    Raises:
        ValueError: something of the run would be refused.
    """
    caller = Caller(None, is_quiet=True)
    caller.run(["plan"], _check(settings, ranks), ranks)
    return caller.planned


def _check(settings: Settings, ranks: int) -> dict[str, Any]:
    """Return the settings that differ from the defaults, if they can be those of a run."""
    if not isinstance(settings, Settings):
        raise ValueError(f"settings: expected Settings(...), got {settings!r:.100}")
    if launched():
        raise ValueError(
            "settings: expected to be called in a process without RANK in its environment, got a rank of torchrun. Run "
            "the command scaling-fl on the nodes instead"
        )
    if type(ranks) is not int or ranks < 1:
        raise ValueError(f"ranks: expected a whole number >= 1, got {ranks!r}")
    check(vars(settings))
    problems = find_contradictions(settings)
    if problems:
        raise ValueError("\n".join(problems))
    return {name: getattr(settings, name) for name in find_changed(vars(settings))}

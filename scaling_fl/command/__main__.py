"""The command `scaling-fl`, which imports what a subcommand needs when it is named."""

import signal
import sys
from importlib import import_module

SUBCOMMANDS = {"new": "scaling_fl.command.new"}  # beside those of Sacred, which start a run


def main() -> None:
    """Run a subcommand and exit with its status."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C while packages are imported ends without a stack trace
    if (name := next(iter(sys.argv[1:]), "")) in SUBCOMMANDS:
        import_module(SUBCOMMANDS[name]).main(sys.argv[2:])
        return
    from scaling_fl.command import experiment
    from scaling_fl.distributed.launch import run_program

    run_program(experiment.main)


if __name__ == "__main__":
    main()

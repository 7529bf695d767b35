"""The command `scaling-fl`, which imports what a subcommand needs when it is named."""

import gc
import signal
import sys
from importlib import import_module
from types import ModuleType
from typing import NamedTuple

TRAINING = "experiment"  # the module whose subcommands are Sacred's


class Subcommand(NamedTuple):
    """A module of this package with `main(arguments)`, and what `--help` says of it."""

    module: str
    example: str
    meaning: str


SUBCOMMANDS = {
    "with": Subcommand(
        TRAINING, "with site_ids=[0,0,0,0] num_rounds=5", "train; without settings, the first run of README.md"
    ),
    "centralised": Subcommand(
        TRAINING, "centralised with num_rounds=5", "train on all data in one place, as a baseline"
    ),
    "plan": Subcommand(
        TRAINING, "plan with partition=dirichlet", "print what would run, its memory and bytes, or all errors"
    ),
    "print_config": Subcommand(
        TRAINING, "print_config with task_name=text", "print each setting with its value and its meaning"
    ),
    "report": Subcommand(
        "report", "report runs/1 runs/2 --output report.html", "draw one or several runs on a page that opens offline"
    ),
    "generate": Subcommand(
        "generate", 'generate --model runs/3/model --question "..."', "let a language model answer questions"
    ),
    "predict": Subcommand("predict", "predict --model runs/3/model --texts file.csv", "let a classifier label texts"),
    "sweep": Subcommand("sweep", "sweep with model=a,b seed=1,2,3", "train a run for each combination, and compare"),
    "new": Subcommand("new", "new my_project", "write a project with a model, data and training of yours"),
}
OF_SACRED = {"train_federated", "save_config", "print_named_configs", "print_dependencies"}
PACKAGES = {"pkg_resources": '"setuptools<80.9"', "docopt": "docopt-ng"}  # which bring modules of other names


def main() -> None:
    """Run a subcommand and exit with its status."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C while packages are imported ends without a stack trace
    arguments = sys.argv[1:]
    if arguments[:1] == ["help"]:
        arguments = [*arguments[1:], "--help"]
    if arguments[-1:] == ["with"]:  # and no settings, which Sacred does not expect
        del sys.argv[-1], arguments[-1]
    if arguments[:1] == ["centralised"]:
        sys.argv[1:] = arguments = add_setting(arguments[1:], "centralised=True")
    name = arguments[0] if arguments else "with"
    is_option_or_setting = name.startswith("-") or "=" in name
    if not (is_option_or_setting or name in SUBCOMMANDS or name in OF_SACRED):
        known = ", ".join(SUBCOMMANDS)
        sys.exit(f"error: subcommand: expected one of {known}, got {name!r}. `scaling-fl --help` explains each")
    module = SUBCOMMANDS[name].module if name in SUBCOMMANDS else TRAINING
    if module != TRAINING:
        load(module).main(arguments[1:])
    elif {"-h", "--help"}.intersection(arguments):
        print(usage(), end="")
    else:
        experiment = load(module)
        load("scaling_fl.distributed.ending").run_program(experiment.main)


def add_setting(arguments: list[str], setting: str) -> list[str]:
    """Return the arguments of a run with one more setting."""
    end = arguments.index("with") if "with" in arguments else len(arguments)
    return [*arguments[:end], "with", setting, *arguments[end + 1 :]]


def load(module: str) -> ModuleType:
    """Import a module of this package, or end with what to install."""
    gc.disable()  # it would visit the objects of the packages again and again, now and while training
    try:
        return import_module(module if "." in module else f"scaling_fl.command.{module}")
    except ModuleNotFoundError as error:
        package = PACKAGES.get(str(error.name), error.name)
        sys.exit(f"error: {error.name}: expected an installed module, got none. Type: python -m pip install {package}")
    finally:
        gc.freeze()
        gc.enable()


def usage() -> str:
    """Return the screen that explains the command."""
    width = max(len(each.example) for each in SUBCOMMANDS.values())
    subcommands = "\n".join(f"  scaling-fl {each.example:<{width}}  {each.meaning}" for each in SUBCOMMANDS.values())
    return f"""\
scaling-fl fine-tunes one language model on the data of many sites, each of which keeps its data.
In a clone, ./run-local.sh scripts/train_federated.py is the same command.

{subcommands}

After `with`: files of settings in JSON or YAML, and settings as name=value, which replace those of files. print_config
lists all settings. -u leaves no record of the run, -c TEXT adds a comment to it; more options: sacred.readthedocs.io.
RANKS=2 in the environment trains on two processes, RANKS=auto on one per core.
"""


if __name__ == "__main__":
    main()

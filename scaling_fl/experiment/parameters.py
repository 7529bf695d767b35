"""Settings that are parameters of an option, which is the function that another setting names."""

import inspect
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from scaling_fl.data.partition import PARTITIONERS
from scaling_fl.federation.strategies import STRATEGIES
from scaling_fl.models.adapters import ADAPTERS
from scaling_fl.training.optimisers import OPTIMISERS
from scaling_fl.training.schedules import SCHEDULES

# By the setting that names the option; modules of `plugins` may add to these.
OPTIONS: dict[str, Mapping[str, Callable[..., Any]]] = {
    **{"strategy": STRATEGIES, "partition": PARTITIONERS, "adapter": ADAPTERS},
    **{"optimiser": OPTIMISERS, "lr_schedule": SCHEDULES},
}
# A setting that an option may have, and the name of the function's parameter.
PARAMETERS = {
    "strategy": {
        "server_learning_rate": "learning_rate",
        "server_momentum": "momentum",
        "server_beta2": "beta2",
        "server_tau": "tau",
    },
    "partition": {
        **{name: name for name in ("dirichlet_alpha", "shards_per_site", "labels_per_site", "sizes")},
        "site_column": "owners",
    },
    "adapter": {
        **{f"lora_{name}": name for name in ("rank", "alpha", "dropout", "targets", "modules_to_save")},
        **{"use_dora": "dora", "use_rslora": "rslora"},
    },
    "optimiser": {"weight_decay": "weight_decay"},
    "lr_schedule": {
        **{"warmup_steps": "warmup_steps", "min_learning_rate": "minimum"},
        **{"lr_schedule_rounds": "num_rounds", "lr_per_round": "per_round"},
    },
}
OF_OPTIONS = {name: choice for choice, names in PARAMETERS.items() for name in names}


def find_defaults(choice: str, option: object) -> dict[str, Any]:
    """Return the settings that are parameters of an option, with its defaults; None is a parameter without one.

    Args:
        choice: a key of OPTIONS.
        option: the name of the option; one that does not exist has no parameters.
    """
    if str(option) not in OPTIONS[choice]:
        return {}
    signature = inspect.signature(OPTIONS[choice][str(option)]).parameters
    return {
        name: None if signature[parameter].default is inspect.Parameter.empty else signature[parameter].default
        for name, parameter in PARAMETERS[choice].items()
        if parameter in signature
    }


def find_arguments(choice: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of the chosen option by the names of its parameters.

    Args:
        choice: a key of OPTIONS.
        values: of all settings.
    """
    return {PARAMETERS[choice][name]: values[name] for name in find_defaults(choice, values[choice])}


def bind(choice: str, values: Mapping[str, Any]) -> Callable[..., Any]:
    """Return the chosen option with its parameters."""
    return partial(OPTIONS[choice][values[choice]], **find_arguments(choice, values))


def check_parameters(values: Mapping[str, Any]) -> None:
    """Check that the chosen options use the parameters that are given, and have those that they need.

    Raises:
        ValueError: with a line for each that is ignored or missing.
    """
    problems = []
    for name, choice in OF_OPTIONS.items():
        chosen = f"{choice}={values[choice]!r}"
        if name in find_defaults(choice, values[choice]):
            parameter = inspect.signature(OPTIONS[choice][values[choice]]).parameters[PARAMETERS[choice][name]]
            if values[name] is None and parameter.default is inspect.Parameter.empty:
                problems.append(f"{name}: expected a value, as {chosen} has no default, got None")
        elif values[name] is not None:
            users = [option for option in OPTIONS[choice] if name in find_defaults(choice, option)]
            hint = f", or set {choice} to one of {', '.join(users)}" if users else ""
            problems.append(
                f"{name}: expected None, as {chosen} does not use it, got {values[name]!r}. Leave it out{hint}"
            )
    if problems:
        raise ValueError("\n".join(problems))

"""Every setting has a valid value, or a sentence states the expected one."""

import math
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from sacred.arg_parser import _convert_value
from torch import Tensor

from scaling_fl.data.tasks import TASKS
from scaling_fl.errors import one_line
from scaling_fl.experiment.checks import check, find_changed, quote_text
from scaling_fl.experiment.contradictions import find_contradictions
from scaling_fl.experiment.kinds import DEVICE_IDS, FLAG, TEXT, Kind, number, one_of, optional, whole_number
from scaling_fl.experiment.parameters import OF_OPTIONS, bind
from scaling_fl.experiment.settings import Settings
from scaling_fl.federation.strategies import STRATEGIES

NAN, INF = math.nan, math.inf


@pytest.mark.parametrize(
    ("kind", "wanted", "good", "bad"),
    [
        (TEXT, "a text", ["a", "20261121_0900", " "], ["", None, 1, True, ["a"]]),
        (FLAG, "True or False", [True, False], [None, 0, 1, "True", "false"]),
        (
            DEVICE_IDS,
            "a list of GPU ids such as [0,0,1,1]",
            [[0], (0, 0, 1), [7]],
            [[], None, 0, "0", [-1], [0.0], [True], ["0"], [[0]], {0: 0}],
        ),
        (whole_number(1), "a whole number >= 1", [1, 10**30], [0, -1, 1.0, "1", True, None, NAN]),
        (whole_number(0, below=2**32), "a whole number >= 0 and < 4294967296", [0, 2**32 - 1], [-1, 2**32, NAN]),
        (number(), "a number", [0, -1.5, 10**30], [NAN, INF, -INF, 10**400, -(10**400), "1", True, None]),
        (number(above=0), "a number > 0", [1, 1e-300], [0, 0.0, -1, NAN, INF]),
        (number(least=0), "a number >= 0", [0, 0.0, 3], [-1e-9, NAN, INF]),
        (number(least=0, below=1), "a number >= 0 and < 1", [0, 0.999], [1, 1.0, -0.1]),
        (number(above=-0.5), "a number > -0.5", [-0.4], [-0.5, -1]),
        (one_of({"iid": 0, "by_label": 1}), "one of iid, by_label", ["iid"], ["IID", "", None, 0, ["iid"]]),
        (optional(TEXT), "a text or None", [None, "a"], ["", 1]),
        (optional(number(above=0)), "a number > 0 or None", [None, 1], [0, NAN]),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_kind_accepts_the_values_that_it_describes(kind: Kind, wanted: str, good: list, bad: list) -> None:
    assert kind.wanted == wanted
    assert all(map(kind.accepts, good))
    assert not any(map(kind.accepts, bad))


def test_every_wrong_setting_is_reported() -> None:
    with pytest.raises(ValueError, match="expected") as caught:
        check({"learning_rate": "fast", "seed": 1, "num_rounds": -1, "learning_rat": 1, "zzz": 1})
    first, second, third, fourth = str(caught.value).splitlines()
    assert first == "learning_rate: expected a number > 0, got 'fast'"
    assert second == "num_rounds: expected a whole number >= 0, got -1"
    assert third == "'learning_rat': expected the name of a setting, got an unknown one. Did you mean learning_rate?"
    assert fourth == "'zzz': expected the name of a setting, got an unknown one. print_config lists all settings"


def test_every_default_is_valid() -> None:
    check(vars(Settings()))
    check(vars(Settings(task_name="agnews", model="distilbert")))


def test_paths_and_tuples_are_texts_and_lists() -> None:
    settings = Settings(train_path=Path("a.csv"), site_paths=(Path("b.csv"), (Path("c.csv"), "d.csv")), site_ids=(0, 1))
    assert (settings.train_path, settings.site_paths) == ("a.csv", ["b.csv", ["c.csv", "d.csv"]])
    assert settings.site_ids == [0, 1]


def test_a_default_cannot_be_changed() -> None:
    Settings().site_ids.append(7)
    assert Settings().site_ids == [0, 0, 0, 0]


def test_given_values_override_defaults_and_none_is_a_given_value() -> None:
    assert Settings().max_train_examples == 480
    assert Settings(max_train_examples=None).max_train_examples is None
    assert Settings(iid_split=False).partition == "by_label"
    assert Settings(iid_split=False, partition="dirichlet").partition == "dirichlet"


def test_a_parameter_of_an_option_has_the_default_of_the_option() -> None:
    for given in ({}, dict.fromkeys(OF_OPTIONS)):  # None too
        assert Settings(**given).server_momentum is Settings(**given).dirichlet_alpha is None
        assert Settings(strategy="diloco", **given).server_learning_rate == 0.7
        assert Settings(partition="dirichlet", **given).dirichlet_alpha == 0.5
    assert Settings(strategy="fedavgm", server_momentum=0.0).server_momentum == 0.0
    for settings in (Settings(), Settings(strategy="diloco", partition="dirichlet")):
        assert Settings(**vars(settings)) == settings, "as a record gives them"


def test_what_is_not_the_default_of_the_options_is_a_changed_setting() -> None:
    changed = {"strategy": "diloco", "partition": "dirichlet", "dirichlet_alpha": 0.1}
    assert find_changed(vars(Settings(**changed, server_momentum=0.9))) == changed.keys()
    assert find_changed(vars(Settings(iid_split=False))) == {"iid_split"}


def test_a_default_of_a_task_for_another_option_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    task = TASKS["text"]
    monkeypatch.setitem(TASKS, "text", replace(task, defaults={"partition": "dirichlet", "dirichlet_alpha": 3.0}))
    assert Settings(task_name="text").dirichlet_alpha == 3.0
    assert Settings(task_name="text", dirichlet_alpha=2.0).dirichlet_alpha == 2.0
    assert Settings(task_name="text", partition="iid").dirichlet_alpha is None


def test_parameters_that_an_option_ignores_or_lacks_are_refused_and_the_others_reach_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def half(weights: Iterable[Tensor], momentum: float, damping: float = 0.5) -> Any:
        return weights, momentum, damping

    monkeypatch.setitem(STRATEGIES, "half", half)
    assert find_contradictions(Settings(strategy="half", server_learning_rate=0.1, dirichlet_alpha=1.0)) == [
        "server_learning_rate: expected None, as strategy='half' does not use it, got 0.1. Leave it out, or set "
        f"strategy to one of {', '.join(name for name in STRATEGIES if name != 'half')}",
        "server_momentum: expected a value, as strategy='half' has no default, got None",
        "dirichlet_alpha: expected None, as partition='iid' does not use it, got 1.0. Leave it out, or set "
        "partition to one of dirichlet, dirichlet_sites",
    ]
    settings = Settings(strategy="half", server_momentum=0.25)
    assert find_contradictions(settings) == []
    assert bind("strategy", vars(settings))([]) == ([], 0.25, 0.5)


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("job_name=20261121_0900", "20261121_0900"),
        ("job_name=1", "1"),
        ("job_name=1e5", "1e5"),
        ("job_name=True", "True"),
        ("job_name=[a]", "[a]"),
        ("job_name=a=b", "a=b"),
        ("job_name=it's", "it's"),
        ('job_name=say "so"', 'say "so"'),
        ("job_name=C:\\new", "C:\\new"),
        ("job_name='quoted'", "quoted"),
        ('job_name="2026"', "2026"),
        ("job_name='tis", "'tis"),
        ("job_name=None", None),
        ("seed=20261121_0900", 202611210900),
        ("site_ids=[0,0]", [0, 0]),
    ],
)
def test_a_text_setting_is_the_text_that_was_typed(argument: str, value: Any) -> None:
    arrived = _convert_value(quote_text(argument).partition("=")[2])
    assert arrived == value
    assert type(arrived) is type(value)


@pytest.mark.parametrize("argument", ["with", "--unobserved", "job_name", "job_name=", "-m", "host:27017:job_name", ""])
def test_other_settings_than_texts_are_unchanged(argument: str) -> None:
    assert quote_text(argument) == argument


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (ValueError("no such\n  file\n"), "no such file"),
        (ValueError("long " * 100), ("long " * 40)[:196] + " ..."),
        (KeyError("hidden"), "KeyError: 'hidden'"),
        (KeyboardInterrupt(), "KeyboardInterrupt"),
        (OSError(2, "No such file", "a b"), "[Errno 2] No such file: 'a b'"),
    ],
)
def test_the_message_of_an_exception_is_one_line(error: BaseException, says: str) -> None:
    assert one_line(error) == says

"""Combinations of settings, each right by itself, that make no sense."""

from typing import Any

from scaling_fl.data.label_skew import BY_LABELS
from scaling_fl.data.partition import PARTITIONERS
from scaling_fl.data.tasks import is_generative, name_labels
from scaling_fl.experiment.checks import describe_value, expect, find_problems
from scaling_fl.experiment.parameters import check_parameters, find_defaults
from scaling_fl.experiment.settings import FIELDS, OF_SITES, Settings
from scaling_fl.experiment.trackers import check_trackers
from scaling_fl.models.quantised import check_bitsandbytes
from scaling_fl.records.best import DIRECTIONS
from scaling_fl.records.site_states import local_folder

EXACT_MATCH = "validation.exact_match"
OF_LABELS, OF_ANSWERS = ("validation.macro_f1", "validation.balanced_accuracy"), ("validation.perplexity", EXACT_MATCH)


def find_contradictions(settings: Settings) -> list[str]:
    """Return a line for each combination of settings, each right by itself, that makes no sense."""
    return find_problems(
        [
            lambda: _check_site_paths(settings),
            lambda: _check_site_settings(settings),
            lambda: _check_local_steps(settings),
            lambda: _check_switches(settings),
            lambda: _check_trainer(settings),
            lambda: _check_optimiser_state(settings),
            lambda: _check_learning_rate(settings),
            lambda: _check_evaluation(settings),
            lambda: name_labels(settings.task_name, settings.labels),
            lambda: _check_objective(settings),
            lambda: check_parameters(vars(settings)),
            lambda: _check_optimiser(settings),
            lambda: _check_adapter(settings),
            lambda: check_trackers(settings.trackers, with_sites=settings.track_sites),
        ]
    )


def _check_site_paths(settings: Settings) -> None:
    if settings.site_paths is None:
        return
    if len(settings.site_paths) != len(settings.site_ids):
        raise ValueError(
            f"site_paths: expected the files of {len(settings.site_ids)} sites, one for each of site_ids, got those of "
            f"{len(settings.site_paths)}"
        )
    of_data: dict[str, Any] = dict.fromkeys(("train_path", "test_path", "max_train_examples", "max_test_examples"))
    expect(settings, "site_paths names the data", **of_data)
    expect(settings, "the data of site_paths is not partitioned", min_examples=1, partition="iid")


def _check_site_settings(settings: Settings) -> None:
    problems = []
    for site, given in (settings.site_settings or {}).items():
        for name, value in given.items():
            place = f"site_settings[{site}]"
            if name not in OF_SITES:
                problems.append(f"{place}: expected one of {', '.join(OF_SITES)}, got {name!r}")
            elif not (kind := FIELDS[name]["kind"]).accepts(value):
                problems.append(f"{place}[{name!r}]: expected {kind.wanted}, got {describe_value(name, value)}")
    if problems:
        raise ValueError("\n".join(problems))


def _check_local_steps(settings: Settings) -> None:
    for site, given in (settings.site_settings or {}).items():
        if "num_local_epochs" in given and given.get("local_steps", settings.local_steps) is not None:
            raise ValueError(
                f"site_settings[{site}]['num_local_epochs']: expected none, as the site trains for local_steps, got "
                f"{given['num_local_epochs']}"
            )


def _check_optimiser(settings: Settings) -> None:
    if settings.optimiser == "adamw8bit":
        check_bitsandbytes("optimiser='adamw8bit'")


def _check_adapter(settings: Settings) -> None:
    if settings.adapter is not None:
        expect(settings, f"adapter={settings.adapter!r} is one", adapter_config=None)
    if settings.quantise is not None:
        check_bitsandbytes(f"quantise={settings.quantise}")


def _check_switches(settings: Settings) -> None:
    """Refuse settings that refine one that is off."""
    if settings.autocast is None:
        expect(settings, "there is no autocast", force_autocast=False)
    if settings.log_every_steps is None:
        expect(settings, "there is no log_every_steps", log_sites_by_step=False)


def _check_trainer(settings: Settings) -> None:
    """Refuse what the default trainer alone knows, if there is another one."""
    if settings.trainer == "default":
        return
    unset: dict[str, Any] = dict.fromkeys(
        ("site_deadline_s", "local_steps", "max_grad_norm", "autocast", "log_every_steps")
    )
    unset |= {"gradient_accumulation": 1, "lr_schedule": "constant", "warmup_steps": 0, "optimiser_state": "reset"}
    unset |= find_defaults("optimiser", settings.optimiser)
    problems = []
    for name, default in unset.items():
        by_site = [given[name] for given in (settings.site_settings or {}).values() if name in given]
        if found := [value for value in (getattr(settings, name), *by_site) if value != default]:
            problems.append(
                f"{name}: expected {default!r}, as trainer={settings.trainer!r} does not know it, got {found[0]!r}"
            )
    if problems:
        raise ValueError("\n".join(problems))


def _check_optimiser_state(settings: Settings) -> None:
    """Check that the states of the sites' optimisers can be kept, if they are to be."""
    if settings.optimiser_state != "keep" or settings.trainer != "default":
        return
    if settings.lora_mean == "alternate":
        expect(settings, "lora_mean='alternate' trains other weights in each round", optimiser_state="reset")
    directory = settings.checkpoints_dir
    if directory is not None and local_folder(str(directory)) is None:
        reason = f"the states of sites stay on their nodes, and checkpoints_dir={directory!r} is elsewhere"
        expect(settings, reason, optimiser_state="reset")


def _check_learning_rate(settings: Settings) -> None:
    """Check what a schedule of the learning rate needs of other settings."""
    by_site = settings.site_settings or {}
    rates = {f"site_settings[{site}]['learning_rate']": given.get("learning_rate") for site, given in by_site.items()}
    rates = {"learning_rate": settings.learning_rate} | rates
    rates = {name: rate for name, rate in rates.items() if FIELDS["learning_rate"]["kind"].accepts(rate)}
    lowest = min(rates, key=lambda name: rates[name])
    minimum, num_rounds, horizon = settings.min_learning_rate, settings.num_rounds, settings.lr_schedule_rounds
    problems = []
    if minimum is not None and minimum >= rates[lowest]:
        problems.append(f"min_learning_rate: expected less than {lowest}={rates[lowest]}, got {minimum}")
    if horizon is not None and num_rounds > horizon and not minimum:
        problems.append(
            f"num_rounds: expected at most {horizon}, as after lr_schedule_rounds={horizon} the learning rate is 0, "
            f"got {num_rounds}. Set min_learning_rate, or a larger lr_schedule_rounds, from the start"
        )
    if settings.lr_per_round and horizon == 1:
        problems.append("lr_per_round: expected False, as with lr_schedule_rounds=1 the rate never falls, got True")
    if settings.lr_per_round and settings.warmup_steps:
        problems.append(
            f"warmup_steps: expected 0, as with lr_per_round=True the rate does not change within a round, got "
            f"{settings.warmup_steps}"
        )
    if problems:
        raise ValueError("\n".join(problems))


def _check_objective(settings: Settings) -> None:
    of_task = f"task_name={settings.task_name!r}"
    if is_generative(settings.task_name):
        reason = f"{of_task} finds the columns of conversations itself"
        expect(settings, reason, text_column=None, label_column=None)
        if PARTITIONERS[settings.partition] in BY_LABELS:
            raise ValueError(
                f"partition: expected one without labels, as {of_task} has none, got {settings.partition!r}"
            )
        if settings.train_on_prompt:
            expect(settings, "with train_on_prompt=True no row tells where its answer begins", score_by=None)
        return
    if settings.weight_by == "tokens":
        raise ValueError(f"weight_by: expected examples or sites, as {of_task} predicts labels, got 'tokens'")
    of_conversations = {name: of["default"] for name, of in FIELDS.items() if of["page"] == "instruct"}
    expect(settings, f"{of_task} has no conversations", **of_conversations)


def _check_evaluation(settings: Settings) -> None:
    names = ("site_test_fraction", "validation_fraction", "max_test_examples_per_site")
    has_others = settings.site_paths is not None or any(getattr(settings, name) is not None for name in names)
    if not settings.central_evaluation and not has_others:
        raise ValueError(
            f"central_evaluation: expected True, as without {', '.join(names[:-1])} and {names[-1]} there is nothing "
            "else to evaluate on, got False"
        )
    draws = settings.max_test_examples_per_site is not None and settings.site_test_fraction is None
    if not settings.central_evaluation and not draws:
        expect(settings, "central_evaluation=False leaves out the common test set", max_test_examples=None)
    generates = is_generative(settings.task_name)
    others = {*(OF_LABELS if generates else OF_ANSWERS), *([EXACT_MATCH] if settings.score_by is None else [])}
    if settings.best_metric in others:
        known = ", ".join(name for name in DIRECTIONS if name not in others)
        hint = f". {EXACT_MATCH} needs score_by=exact_match" * generates
        raise ValueError(f"best_metric: expected one of {known}, got {settings.best_metric!r}{hint}")
    if settings.best_metric is None:
        expect(settings, "best_metric=None chooses no best round", early_stopping_rounds=None)

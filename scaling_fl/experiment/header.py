"""The first lines of a run and of a plan: what is about to run."""

from collections.abc import Sequence

from scaling_fl.data.sites import SiteData
from scaling_fl.distributed.collectives import world_size
from scaling_fl.experiment.build import Job
from scaling_fl.experiment.evaluation import describe_evaluation
from scaling_fl.experiment.messages import describe_message
from scaling_fl.experiment.parameters import find_arguments
from scaling_fl.experiment.settings import Settings, of_training
from scaling_fl.federation.cohorts import Cohorts
from scaling_fl.models.adapter_files import is_adapted
from scaling_fl.models.adapters import has_lora
from scaling_fl.models.flat import trained_weights
from scaling_fl.models.loading import OF_BASE
from scaling_fl.models.quantised import measure


def describe(settings: Settings, job: Job, unused: Sequence[str] = ()) -> list[str]:
    """Return lines on what is about to run.

    Args:
        settings: of the run.
        job: what it is made of.
        unused: names of settings that were given and do nothing.
    """
    loaded = job.loaded
    weights = trained_weights(loaded.model)
    num_trained = sum(weight.numel() for weight in weights.values())
    num_weights, num_bytes = measure(loaded.model)
    new = "all" if weights.keys() <= set(loaded.new) else ", ".join(loaded.new) or "none"
    sizes = [size.num_examples for size in job.data.sizes]
    return [
        f"model     {settings.model}: {num_weights:,} weights ({num_bytes * 1e-6:.1f} MB), "
        f"newly initialised: {new}" + f" ({loaded.note})" * bool(loaded.note),
        *describe_adapter(settings, job, num_trained, num_weights),
        *describe_training(settings),
        f"data      {settings.task_name}: {sum(sizes):,} examples to train on{describe_tokens(settings, job.data)}",
        *(describe_pool(settings, job, unused) if settings.centralised else describe_federation(settings, job)),
        *([job.states.describe()] if job.states else []),
        f"evaluated {describe_evaluation(settings, job.data)}",
        *([f"resumed   after round {len(job.history) - 1}, from {settings.checkpoints_dir}"] if job.history else []),
    ]


def describe_federation(settings: Settings, job: Job) -> list[str]:
    """Return lines on the sites and how they are averaged."""
    topology, sizes = job.topology, [size.num_examples for size in job.data.sizes]
    parameters = ", ".join(f"{key} {value:g}" for key, value in find_arguments("strategy", vars(settings)).items())
    how = settings.partition if settings.site_paths is None else "of their own"
    where = f"{topology.num_devices} device{'s' * (topology.num_devices > 1)} ({topology.devices[0].type})"
    where += f" of {world_size()} rank{'s' * (world_size() > 1)}"
    return [
        f"sites     {topology.num_sites} with {min(sizes):,} to {max(sizes):,} examples each ({how}), on {where}",
        f"strategy  {settings.strategy} ({parameters}), weighted by {settings.weight_by}, "
        f"sent as {settings.comm_dtype}",
        *describe_message(job.loaded.model, settings.comm_dtype),
        f"cohorts   {describe_cohorts(settings, job.schedule.cohorts)}",
    ]


def describe_pool(settings: Settings, job: Job, unused: Sequence[str]) -> list[str]:
    """Return lines on the training without a federation."""
    many = job.topology.num_sites
    return [
        f"sites     none: centralised, on the examples of {many} site{'s' * (many > 1)} together, on "
        f"{next(iter(job.topology.sites.values()))}",
        *([f"unused    {', '.join(unused)}, which are of a federation alone"] if unused else []),
        f"rounds    {settings.num_rounds}, each of {describe_amount(settings)}",
    ]


def describe_adapter(settings: Settings, job: Job, num_trained: int, num_weights: int) -> list[str]:
    """Return a line on the adapter, if there is one."""
    model = job.loaded.model
    if not is_adapted(model):
        return []
    kind = model.peft_config["default"].peft_type.value
    mean = f", lora_mean {settings.lora_mean or 'ab'}" if has_lora(model) else ""
    moving = job.global_model.num_moving
    in_turn = f", of which {' and '.join(f'{many:,}' for many in moving)} in turn" if len(moving) > 1 else ""
    return [
        f"adapter   {kind}{mean}: {num_trained:,} weights ({num_trained * 4e-6:.3f} MB) trained and shared{in_turn}, "
        f"{100 * num_trained / num_weights:.2f} % of all"
    ]


def describe_training(settings: Settings) -> list[str]:
    """Return a line for each setting that is another one than the model says it was trained with."""
    trained = of_training(settings.model)
    return [
        f"{name:<9} {given}, but {settings.model} was trained with {value}"
        for name, value in trained.items()
        if (given := getattr(settings, name)) != value and (given is not None or name in OF_BASE)
    ]


def describe_tokens(settings: Settings, data: SiteData) -> str:
    """Return in words how many tokens a language model learns to predict, and what was left out of its data."""
    num_tokens = sum(size.num_trained_tokens for size in data.sizes)
    lost = [f"{count:,} {name.replace('_', ' ')}" for name, count in data.lost.items() if count]
    tokens = f", {num_tokens:,} tokens to predict, template {settings.template}" * bool(num_tokens)
    return tokens + f" ({', '.join(lost)})" * bool(lost)


def describe_cohorts(settings: Settings, cohorts: Cohorts) -> str:
    """Return in words how many sites take part in a round, and how much they train."""
    many = len(cohorts.eligible)
    sampled = f"{cohorts.num_sites:,} of " if cohorts.are_sampled else "all "
    sites = f"{sampled}{many:,} {'' if settings.eligible_sites is None else 'eligible '}site{'s' * (many > 1)}"
    given = settings.sites_per_round
    minimum = f"min_sites {settings.min_sites}"
    limits = [f"sites_per_round {given}", minimum] if isinstance(given, float) else []
    limits = limits or [minimum] * (settings.on_site_failure == "skip")
    of_limits = f" ({', '.join(limits)})" * bool(limits)
    rounds = f"{settings.num_rounds} round{'s' * (settings.num_rounds != 1)}"
    others = ", but for sites in site_settings" * any(
        name in own for own in (settings.site_settings or {}).values() for name in ("local_steps", "num_local_epochs")
    )
    return f"{sites}{of_limits} in each of {rounds}, for {describe_amount(settings)}{others}"


def describe_amount(settings: Settings) -> str:
    """Return in words how much a site trains in a round."""
    count, unit = (settings.local_steps, "step") if settings.local_steps else (settings.num_local_epochs, "epoch")
    return f"{count} {unit}{'s' * (count > 1)}"

"""Data, model, global model and sites, built out of the settings."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor
from torch.optim import Optimizer

from scaling_fl.data.encoder import TextEncoder
from scaling_fl.data.sites import SiteData
from scaling_fl.data.tokens import ConversationEncoder
from scaling_fl.distributed.collectives import check_equal, local_first
from scaling_fl.distributed.placement import Topology, place_sites
from scaling_fl.distributed.world import num_threads
from scaling_fl.experiment.adapting import adapt, check_turns, find_turns, identity_of_adapter
from scaling_fl.experiment.answers import Question, count_right, tokenise_questions
from scaling_fl.experiment.centralised import check_ranks, pool
from scaling_fl.experiment.checks import expect
from scaling_fl.experiment.evaluation import Evaluation, check_held_out
from scaling_fl.experiment.local_training import find_autocast, make_step_log, make_training, prepare_model
from scaling_fl.experiment.objectives import ANSWERS, find_objective, make_encoder, make_model
from scaling_fl.experiment.optimiser_states import KeptStates, check_states, keep_states
from scaling_fl.experiment.parameters import bind
from scaling_fl.experiment.plugins import hash_plugins
from scaling_fl.experiment.reading import Rows, read_data, read_rows
from scaling_fl.experiment.schedule import Schedule, check_warmup, make_schedule
from scaling_fl.experiment.settings import FIELDS, Settings, of_site
from scaling_fl.federation.cohorts import Cohorts
from scaling_fl.federation.global_model import GlobalModel
from scaling_fl.federation.round import Federation
from scaling_fl.federation.site import Site
from scaling_fl.federation.step_log import StepLog
from scaling_fl.federation.turns import InTurn
from scaling_fl.models.pretrained import LoadedModel, load_pretrained
from scaling_fl.records import checkpoint
from scaling_fl.records.console import Progress
from scaling_fl.records.machine import version_of
from scaling_fl.storage import host_path
from scaling_fl.training.loop import Batch
from scaling_fl.training.scores import check_packing

OF_ALL_RANKS: tuple[str, ...] = (  # settings that a resumed run may change, but that are the same on all ranks
    *("num_rounds", "checkpoints_dir", "on_site_failure", "min_sites", "val_batch_size", "evaluation_sites"),
    *("evaluate_local", "evaluate_every", "best_metric", "early_stopping_rounds", "score_by", "sample_questions"),
    *("log_every_steps", "log_sites_by_step"),
)


@dataclass(frozen=True)
class Job:
    """What a run is made of."""

    data: SiteData
    topology: Topology
    schedule: Schedule
    encoder: TextEncoder | ConversationEncoder
    loaded: LoadedModel
    global_model: GlobalModel
    history: checkpoint.History  # of the rounds that are done
    identity: dict[str, Any]  # what the weights of a round depend on; the same when a run is resumed
    checkpoints_dir: str | None  # as this machine knows it
    step_log: StepLog | None  # collects what the sites of this rank train on in a round
    states: KeptStates | None  # of the sites' optimisers


def build(settings: Settings, *, may_be_empty: bool = False) -> Job:
    """Read and tokenise the data, load the model, and continue from the last checkpoint.

    Args:
        settings: of the run.
        may_be_empty: the model may be a folder without weights, of which the job then has the shapes.

    Raises:
        ValueError: something is missing or not what it should be, or ranks differ.
    """
    check_ranks(settings)
    check_turns(settings)
    check_states(settings)
    identity = identity_of_settings(settings)
    check_equal(identity | {name: getattr(settings, name) for name in OF_ALL_RANKS})
    checkpoints_dir = settings.checkpoints_dir and host_path(settings.checkpoints_dir)
    checkpoint.check(checkpoints_dir)
    rows = local_first(partial(read_rows, settings)) if settings.site_paths is None else None
    topology = make_topology(settings, rows)
    generates = find_objective(settings) is ANSWERS
    path = host_path(settings.model)
    load = partial(load_pretrained, path, settings.max_seq_len, generates=generates, may_be_empty=may_be_empty)
    pretrained = local_first(load)
    encoder = make_encoder(settings, pretrained)
    data, topology = read_data(settings, topology, encoder.encode, rows)
    check_held_out(settings, data)
    schedule = make_schedule(settings, data, topology)
    cohorts = schedule.cohorts
    if settings.centralised:
        data, schedule = pool(data, schedule)
    check_warmup(settings, data)
    loaded = local_first(partial(make_model, settings, pretrained, data.label_names, encoder.end_id))
    device = topology.devices[0]
    loaded = adapt(settings, pretrained, loaded, data.label_names, device)
    identity |= identity_of_data(settings, data, topology, cohorts)
    identity |= identity_of_adapter(settings, loaded.model)
    check_equal(identity)
    prepare_model(settings, loaded.model, device)
    turns = find_turns(settings, loaded.model)
    place = torch.device("meta") if pretrained.is_empty else device
    global_model = GlobalModel(loaded.model, server_optimiser(settings), settings.comm_dtype, place, turns)
    history = restore_(global_model, checkpoints_dir, identity)
    if len(history) > settings.num_rounds + 1:
        raise ValueError(f"num_rounds: expected at least {len(history) - 1}, which are done, got {settings.num_rounds}")
    step_log, states = make_step_log(settings), keep_states(schedule, loaded.model, history, identity, checkpoints_dir)
    return Job(
        data, topology, schedule, encoder, loaded, global_model, history, identity, checkpoints_dir, step_log, states
    )


def make_topology(settings: Settings, rows: Rows | None) -> Topology:
    """Assign the sites to ranks and devices: so many as the settings or, without them, the rows say."""
    num_owners = None if rows is None or rows.owners is None else len(set(rows.owners))
    topology = place_sites(settings.site_ids, settings.num_sites or num_owners)
    last = max(settings.site_settings or {}, default=0)
    if last >= topology.num_sites:
        raise ValueError(f"site_settings: expected numbers of sites from 0 to {topology.num_sites - 1}, got {last}")
    return topology


def restore_(global_model: GlobalModel, directory: str | None, identity: dict[str, Any]) -> checkpoint.History:
    """Load the last checkpoint, if there is one, and return the metrics of the rounds that are done."""
    state = checkpoint.restore(directory, identity)
    if state is None:
        return []
    global_model.load_state_dict(state["server"])
    return state["history"]


def make_evaluation(settings: Settings, job: Job, testing: Progress) -> Evaluation:
    """Return what evaluates the model of a run, and shows how far it is.

    Raises:
        ValueError: the model cannot answer a sample question, or its template does not end an answer.
    """
    encoder, score_answers = job.encoder, None
    if isinstance(encoder, ConversationEncoder):
        samples = [Question(text) for text in settings.sample_questions or ()]
        tokenise_questions(job.loaded.model, encoder, samples)  # so that no round is lost
    if settings.score_by == "exact_match":
        if encoder.end_id is None:
            reason = f"template={settings.template!r} does not end an answer"
            expect(settings, reason, ". Use another template", score_by=None)
        score_answers = partial(count_right, tokenizer=encoder.tokenizer, end_id=encoder.end_id)
    return Evaluation(job.data, find_objective(settings), testing, score_answers)


def make_federation(settings: Settings, job: Job, training: Progress, evaluation: Evaluation) -> Federation:
    """Bind the data to the sites of this rank, and try the model on the largest batch of each device.

    Raises:
        ValueError: the model does not take it.
    """

    def site_batches(site: Site, seed: int, start: int) -> Iterator[Batch]:
        return training.watch(site.data.shuffled_batches(site.settings["batch_size"], seed, start))

    states = job.states.files if job.states else None
    train_site = make_training(settings, site_batches, job.step_log, states)
    if len(turns := find_turns(settings, job.loaded.model)) > 1:
        train_site = InTurn(train_site, turns)
    federation = Federation(
        job.topology,
        job.schedule.train,
        job.loaded.model,
        job.global_model,
        train_site=train_site,
        evaluate_device=evaluation.evaluate_device if job.data.common else None,
        evaluate_site=evaluation.evaluate_site if job.data.test.counts or job.data.validation.counts else None,
        evaluation_sites=job.schedule.evaluate,
        seed=settings.seed,
        weight_by=settings.weight_by,
        min_sites=settings.min_sites if settings.on_site_failure == "skip" else None,
    )
    largest = {device: largest_training_batch(settings, job, device) for device in job.topology.devices}
    try:
        if settings.pack and job.data.train:
            check_packed(job, federation)
        federation.try_out(
            {device: batch for device, batch in largest.items() if batch is not None}, find_autocast(settings)
        )
    except ValueError as error:
        raise ValueError(f"model={settings.model!r}: {error}") from error
    return federation


def check_packed(job: Job, federation: Federation) -> None:
    """Check on one batch that the model tells texts in a row apart.

    Raises:
        ValueError: it does not.
    """
    examples = next(iter(job.data.train.values()))
    part = examples.select(np.arange(4) % len(examples))  # a single text may follow itself
    padded, packed = (replace(part, is_packed=is_packed).batch() for is_packed in (False, True))
    check_packing(federation.model, padded, packed)


def server_optimiser(settings: Settings) -> Callable[[Iterable[Tensor]], Optimizer]:
    """Return what makes the optimiser of the global weights."""
    return bind("strategy", vars(settings))


def largest_training_batch(settings: Settings, job: Job, device: torch.device) -> Batch | None:
    """Return the largest batch that the sites of a device train on; None if it has no site."""
    fixed = job.topology.is_fixed
    sites = [site for site in job.data.train if not fixed or job.topology.sites[site] == device]
    return find_largest(job.data.train[site].longest_batch(of_site(settings, site)["batch_size"]) for site in sites)


def find_largest(batches: Iterable[Batch]) -> Batch | None:
    """Return the batch with the most tokens, padding included; None if there is none."""
    return max(batches, key=lambda batch: batch["input_ids"].numel(), default=None)


def identity_of_settings(settings: Settings) -> dict[str, Any]:
    """Return the settings and versions that the weights of a round depend on."""
    values = {name: value for name, value in asdict(settings).items() if not FIELDS[name]["may_change"]}
    if settings.quantise is not None or settings.optimiser == "adamw8bit":
        values["version of bitsandbytes"] = version_of("bitsandbytes")
    return {
        **values,
        **hash_plugins(settings.plugins or ()),
        "data": "partitioned" if settings.site_paths is None else "of the sites (site_paths)",
        "OMP_NUM_THREADS": num_threads(),
        "versions": f"scaling_fl {version_of('scaling_fl')}, torch {torch.__version__}, "
        f"transformers {transformers.__version__}",
    }


def identity_of_data(settings: Settings, data: SiteData, topology: Topology, cohorts: Cohorts) -> dict[str, Any]:
    """Return what else the weights of a round depend on: the data, who takes part, and where it is trained on."""
    return data.sha256 | {
        "number of sites": topology.num_sites,
        "number of sites in a round": cohorts.num_sites,
        "eligible sites": "all" if len(cohorts.eligible) == topology.num_sites else list(cohorts.eligible),
        "kind of device": topology.devices[0].type,
        "number of devices": "any" if settings.comm_dtype == "exact" else topology.num_devices,
    }

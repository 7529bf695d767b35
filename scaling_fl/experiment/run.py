"""The loop: train, average, evaluate, record, save."""

import os
from collections.abc import Mapping
from typing import Any

from scaling_fl.data.site_files import files_of
from scaling_fl.data.tokens import ConversationEncoder
from scaling_fl.distributed.collectives import all_gather, rank
from scaling_fl.experiment.adapting import FROZEN
from scaling_fl.experiment.answers import answer_questions
from scaling_fl.experiment.build import Job, build, make_evaluation, make_federation
from scaling_fl.experiment.centralised import find_unused, without_federation
from scaling_fl.experiment.evaluation import find_gains, find_judged, is_evaluated
from scaling_fl.experiment.header import describe
from scaling_fl.experiment.messages import count_message
from scaling_fl.experiment.objectives import ANSWERS, find_objective
from scaling_fl.experiment.optimiser_states import closing
from scaling_fl.experiment.plan import check_output
from scaling_fl.experiment.saving import save_models
from scaling_fl.experiment.settings import Settings, of_site
from scaling_fl.federation.round import Federation
from scaling_fl.models.adapter_files import saved_weights
from scaling_fl.records import checkpoint, console
from scaling_fl.records.best import BEST, Choice, find_best, is_over, load_best, save_best
from scaling_fl.records.export import BEST_FOLDER, MODEL_FOLDER, save_elsewhere, save_state_dict
from scaling_fl.records.machine import describe_machine
from scaling_fl.records.rounds import Clock, Record, describe_metrics
from scaling_fl.storage import WriteError, host_path
from scaling_fl.training.metrics import Metrics

MAX_ANSWER_TOKENS = 100  # of the answer to a sample question
REPORT = "report.html"  # among a run's files


def train_on_rank(settings: Settings, record: Record | None = None) -> float:
    """Train as one of the ranks of a run, and return the last round's validation accuracy.

    Args:
        settings: of the run, the same on all ranks but for what names files and devices of a node.
        record: where the results go; None keeps none.

    Raises:
        ValueError: a setting or the data is not what it should be, or a site failed. All ranks raise it.
        PeerError: another rank failed.
    """
    record = record or Record()
    clock = Clock()
    given, settings = settings, without_federation(settings)
    with clock("setup"):
        job = build(settings)
        check_output(settings, job, record.folder)
        places = [*record.places, *([f"checkpoints in {job.checkpoints_dir}"] if job.checkpoints_dir else [])]
        console.print_once(
            *describe(settings, job, find_unused(given)), f"results   {', '.join(places) or 'not on record'}"
        )
        record.add_info(
            {
                "labels": list(job.data.label_names),
                "sites": job.data.describe_sites(job.topology),
                "machine": describe_machine(job.topology.devices),
                "message": count_message(job.loaded.model, settings.comm_dtype),
                **({"lost": job.data.lost} if job.data.lost else {}),
                **({"frozen_sha256": job.identity[FROZEN]} if FROZEN in job.identity else {}),
                "meanings": describe_metrics(),  # Sacred has its own `metrics` in there
            }
        )
    with closing(job.states):
        try:
            run_rounds(settings, job, record, clock)
        except WriteError as error:
            saved = None if isinstance(error, checkpoint.CheckpointError) else job.checkpoints_dir
            state = job.global_model.state_dict()
            where = save_elsewhere(saved, state, job.history, job.identity, record.folder, job.checkpoints_dir)
            if job.states is not None and saved is None and len(job.history) > 1:
                where += f". {job.states.files.leave()}"
            raise ValueError(f"{error}. {where}") from error
    evaluated = (metrics for metrics in reversed(job.history) if "validation.accuracy" in metrics)
    return next(evaluated)["validation.accuracy"]


def run_rounds(settings: Settings, job: Job, record: Record, clock: Clock) -> None:
    """Train, average, evaluate, record and save, round by round, and save the model."""
    history, global_model = job.history, job.global_model
    training, testing = console.Progress(), console.Progress()
    evaluation = make_evaluation(settings, job, testing)
    choice = Choice(settings.best_metric, settings.evaluate_every, settings.early_stopping_rounds)
    with clock("setup"):
        federation = make_federation(settings, job, training, evaluation)
        table = make_table(settings, job)
        for round_, metrics in enumerate(history):
            table.print_round(round_, metrics)
            record.add_round(round_, metrics)
    for round_ in range(len(history), settings.num_rounds + 1):
        if is_over(history, choice):
            break
        metrics, evaluates = {}, is_evaluated(settings, round_)
        if round_ > 0:
            num_examples = sum(job.schedule.count_examples(site.number) for site in job.schedule.train(round_))
            judges = settings.evaluate_local and evaluates
            evaluate_local = evaluation.evaluate_local(job.schedule.evaluated(round_)) if judges else None
            with clock("train"), training.display(f"round {round_}, training", num_examples):
                metrics |= federation.train(round_, evaluate_local)
            if job.states is not None:
                job.states.files.check_saved()
            with clock("aggregate"):
                global_model.step()
        if evaluates:
            with clock("evaluate"), testing.display(f"round {round_}, evaluating", job.schedule.count_tests(round_)):
                metrics |= evaluation.name(federation.score(round_))
                metrics |= answer_samples(settings, job, federation)
            metrics |= find_gains(metrics)
        metrics |= clock.read_round()
        if round_ > 0:
            metrics |= count_round(settings, job, metrics, training.take_counts())
        history.append(metrics)
        with clock("checkpoint"):
            save_round(settings, job, record, choice)
        metrics |= clock.read()
        table.print_round(round_, metrics)
        console.print_once(*console.describe_answers(settings.sample_questions, metrics))
        record.add_round(round_, metrics)
        if not all_gather(rank() > 0 or record.goes_on({"round": round_, **metrics}))[0]:
            break
    finish(settings, job, record, federation, choice)


def save_round(settings: Settings, job: Job, record: Record, choice: Choice) -> None:
    """Save the weights of the last round: its checkpoint, and those of the best round if it is that."""
    history, state, round_ = job.history, job.global_model.state_dict(), len(job.history) - 1
    if find_best(history, choice) == round_:
        save_best(job.checkpoints_dir or record.folder, state["weights"], history, job.identity)
    if round_ > 0:
        checkpoint.save(job.checkpoints_dir, state, history, job.identity, settings.keep_checkpoints)
    if job.states is not None:
        job.states.files.remove_old(job.topology.sites)


def make_table(settings: Settings, job: Job) -> console.Table:
    """Print the head of the table of rounds, and return it."""
    cohorts = job.schedule.cohorts
    return console.Table(
        len(cohorts.eligible) if cohorts.are_sampled else None,
        with_failures=settings.on_site_failure == "skip",
        with_answers=settings.score_by == "exact_match",
    )


def finish(settings: Settings, job: Job, record: Record, federation: Federation, choice: Choice) -> None:
    """Save the last and the best model, and print what came out."""
    history, best, metric = job.history, find_best(job.history, choice), str(choice.metric)
    weights = None
    if best == len(history) - 1:
        weights = job.global_model.state_dict()["weights"]
    elif best is not None:
        best_dir = job.checkpoints_dir or record.folder
        weights = load_best(best_dir, best, history[best][metric], metric, job.identity)
    if rank() > 0:
        return
    sha256 = job.global_model.sha256()
    best_is = {"round": best, "metric": choice.metric}
    record.add_info({"sha256": sha256, "best": best_is, "stopped_early": is_over(history, choice)})
    if record.folder is not None:
        model: Any = federation.model
        if find_objective(settings) is ANSWERS:
            model.config.use_cache = True  # for those who generate with the saved model
        saved = save_models(settings, job, record, model, MODEL_FOLDER)
        save_state_dict(record.folder, saved_weights(model))
        if weights is not None:
            model.load_state_dict(weights, strict=False)  # a weight that layers share has one name there
            saved |= save_models(settings, job, record, model, BEST_FOLDER)
            if job.checkpoints_dir is None:
                os.remove(os.path.join(record.folder, BEST))
        if settings.report:
            saved["report"] = os.path.join(record.folder, REPORT)
        console.print_once(*(f"{name:<9} {path}" for name, path in saved.items()))
    if best is not None and weights is None and (record.folder or job.checkpoints_dir):
        console.print_once(f"best      is not kept: no file has the weights of round {best} any more")
    lines = console.summarise(history, choice, *find_judged(job.data))
    console.print_once(f"weights   SHA-256 {sha256}", *lines)


def answer_samples(settings: Settings, job: Job, federation: Federation) -> Metrics:
    """Return what the global model answers to the questions of the settings, if there are any."""
    encoder = job.encoder
    if not settings.sample_questions or not isinstance(encoder, ConversationEncoder):
        return {}
    answers: list[str] = []
    if rank() == 0:
        answers = answer_questions(federation.model, encoder, settings.sample_questions, MAX_ANSWER_TOKENS)
    return {"sample.answers": all_gather(answers)[0]}


def count_round(settings: Settings, job: Job, metrics: Metrics, seen: tuple[int, int]) -> Metrics:
    """Return how much was trained on in a round, how fast, and how many bytes that should have sent; losses by step.

    Args:
        settings: of the run.
        job: what it is made of.
        metrics: of the round.
        seen: the examples and tokens that this rank trained on, as far as it saw them.
    """
    num_examples, num_tokens = map(float, map(sum, zip(*all_gather(seen), strict=True)))
    if settings.trainer != "default":  # which has batches of its own
        for site, trained in metrics["site.examples"].items():
            size, num_epochs = job.data.sizes[site], of_site(settings, site)["num_local_epochs"]
            num_examples += num_epochs * trained
            num_tokens += num_epochs * trained * size.num_tokens / size.num_examples
    by_step = {}
    if job.step_log is not None:
        by_step = job.step_log.gather(metrics["site.examples"], count_steps_before(job))
    return by_step | {
        "speed.examples_per_s": num_examples / metrics["time.train_s"],
        "speed.tokens_per_s": num_tokens / metrics["time.train_s"],
        "comm.expected_bytes": job.global_model.bytes_a_round,
    }


def count_steps_before(job: Job) -> int:
    """Return the steps of the rounds that are done: of each the most that a site took, or was to take if unknown."""
    last = max((round_ for round_, metrics in enumerate(job.history) if "train.steps" in metrics), default=0)
    rounds = range(last + 1, len(job.history))
    return job.history[last].get("train.steps", 0) + sum(map(job.schedule.most_steps, rounds))


def is_resumed(values: Mapping[str, Any]) -> bool:
    """Tell whether a run with these settings continues from a checkpoint."""
    return checkpoint.exists(values["checkpoints_dir"] and host_path(values["checkpoints_dir"]))


def explain_paths(settings: Settings, sentence: str) -> str:
    """Return what was given for the paths in a sentence that are at another place on this machine."""
    paths = [settings.model, settings.train_path, settings.test_path, settings.checkpoints_dir]
    paths += [path for entry in settings.site_paths or () for path in files_of(entry)]
    found = {path: host_path(path) for path in paths if path and host_path(path) != path}
    return "".join(
        f" ({place} stands for {path}: see DATA_MOUNT_DIR)" for path, place in found.items() if place in sentence
    )

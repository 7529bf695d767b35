"""A model in a folder or of the hub, with what turns texts into its tokens as in its training."""

import os
from dataclasses import dataclass
from typing import Any

import torch

from scaling_fl.data.tasks import is_generative
from scaling_fl.data.templates import TEMPLATES
from scaling_fl.experiment.adapting import adapt
from scaling_fl.experiment.objectives import make_encoder, make_model
from scaling_fl.experiment.result import Run, is_run
from scaling_fl.experiment.settings import Settings
from scaling_fl.models.adapter_files import CONFIG as ADAPTER_CONFIG
from scaling_fl.models.classifier import labels_of
from scaling_fl.models.loading import MODELS, model_defaults, read_file, trained_with, without_bars
from scaling_fl.models.pretrained import load_pretrained
from scaling_fl.models.quantised import move_
from scaling_fl.records.export import MODEL_FOLDER
from scaling_fl.storage import host_path

MODEL_CONFIG = "config.json"
MAX_SEQ_LEN = 128  # of the texts of a classifier without a run beside it
SHORT = 16  # of a language model without one: a value that any model takes, as no question is cut
HEAD = "ForSequenceClassification"
OTHER = {True: "predict", False: "generate"}  # the command for a model of the other kind


@dataclass(frozen=True)
class Saved:
    """A model that is to be used.

    Args:
        settings: its task, its template and the length of its texts.
        model: in evaluation mode, in float32, on a GPU if there is one.
        encoder: a `TextEncoder` or `ConversationEncoder`, as in training.
        labels: of a classifier, by their number in its output.
    """

    settings: Settings
    model: Any
    encoder: Any
    labels: list[str]


def load_for_use(place: str, *, generates: bool, template: str | None = None, max_seq_len: int | None = None) -> Saved:
    """Load a model. The run that a folder belongs to says how its texts are written and cut.

    Args:
        place: the folder of a run, or of a model in it, whole or an adapter; any other folder, a hub id or a nickname.
        generates: it is to be a language model, and not a classifier.
        template: of a language model that does not say how it was trained; None: that of the nickname.
        max_seq_len: of a classifier without a run beside it; None: 128.

    Raises:
        ValueError: there is no such model, it is of another kind, or what is given differs from its training.
    """
    path, run = find_run(host_path(place))
    settings = (
        _of_run(path, run, template, max_seq_len) if run else _without_run(path, generates, template, max_seq_len)
    )
    if is_generative(settings.task_name) != generates:
        kind, other = ("a language model", "a classifier") if generates else ("a classifier", "a language model")
        raise ValueError(f"model: expected {kind}, got {other}, {place!r}. Use scaling-fl {OTHER[generates]}")
    with without_bars():
        pretrained = load_pretrained(path, settings.max_seq_len, generates=generates)
        kinds = pretrained.config.architectures or [""]
        if generates and pretrained.adapter is None and kinds[0].endswith(HEAD):
            raise ValueError(f"model: expected a language model, got a classifier, {place!r}. Use scaling-fl predict")
        labels = [] if generates else labels_of(pretrained.config)
        encoder = make_encoder(settings, pretrained)
        end_id = encoder.end_id if generates else None
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        loaded = adapt(settings, pretrained, make_model(settings, pretrained, labels, end_id), labels, device)
    if loaded.new and pretrained.has_weights:
        without = ", ".join(loaded.new[:3])
        raise ValueError(f"model: expected a trained classifier, got {place!r}, whose files have no {without}")
    return Saved(settings, move_(loaded.model.eval(), device), encoder, labels)


def find_run(path: str) -> tuple[str, Run | None]:
    """Return the folder of the model, and the run that it belongs to, if there is one."""
    if is_run(path):
        folder = os.path.join(path, MODEL_FOLDER)
        run = Run.load(path)
        if not os.path.isdir(folder):
            raise ValueError(f"model: expected a run with a model, got {path!r}, which is {run.status}")
        return folder, run
    above = os.path.dirname(os.path.abspath(path))
    return path, Run.load(above) if os.path.isdir(path) and is_run(above) else None


def _of_run(path: str, run: Run, template: str | None, max_seq_len: int | None) -> Settings:
    of_run = run.settings
    for name, given in (("template", template), ("max_seq_len", max_seq_len)):
        _check_given(name, given, getattr(of_run, name), str(run.folder))
    return Settings(
        task_name=of_run.task_name,
        model=path,
        adapter=None,
        template=of_run.template,
        max_seq_len=of_run.max_seq_len,
        plugins=of_run.plugins,
        text_column=of_run.text_column,
    )


def _check_given(name: str, given: Any, trained: Any, place: str) -> None:
    if given not in (None, trained):
        raise ValueError(f"{name}: expected none, as {place} was trained with {trained!r}, got {given!r}")


def _without_run(path: str, generates: bool, template: str | None, max_seq_len: int | None) -> Settings:
    # A model that cannot be found is named before a missing template.
    has_config = path in MODELS or [name for name in (MODEL_CONFIG, ADAPTER_CONFIG) if read_file(path, name)]
    if not has_config and os.path.isdir(path):
        raise ValueError(f"model: expected a run or a model, got {path!r}, which has no {MODEL_CONFIG}")
    if not generates:
        return Settings(task_name="text", model=path, adapter=None, max_seq_len=max_seq_len or MAX_SEQ_LEN)
    trained = trained_with(path).get("template")
    if trained is not None:
        _check_given("template", template, trained, path)
    template = trained or template or model_defaults(path).get("template")
    if template not in TEMPLATES:
        why = ", as neither a run beside the model nor its files say with which it was trained" * (template is None)
        raise ValueError(f"template: expected one of {', '.join(TEMPLATES)}{why}, got {template or 'none'}")
    return Settings(task_name="instruct", model=path, adapter=None, template=template, max_seq_len=SHORT)

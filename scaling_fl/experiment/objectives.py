"""What a model is trained for: the labels of texts, or the answers of conversations."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from scaling_fl.data.encoder import TextEncoder
from scaling_fl.data.labels import find_rows
from scaling_fl.data.tasks import is_generative
from scaling_fl.data.tokens import ConversationEncoder
from scaling_fl.experiment.settings import Settings
from scaling_fl.models.classifier import labels_of, make_classifier
from scaling_fl.models.language_model import make_language_model
from scaling_fl.models.pretrained import LoadedModel, Pretrained
from scaling_fl.training.loop import Batch, Score
from scaling_fl.training.scores import (
    Totals,
    evaluate_classes,
    evaluate_tokens,
    score_classes,
    score_tokens,
    summarise_classes,
    summarise_tokens,
)


@dataclass(frozen=True)
class Objective:
    """How a model is scored, and of which kind it is.

    Args:
        score: adds the output of a training batch to the means.
        evaluate: returns the scores of a model on batches, without dropout.
        summarise: returns the means, and what is computed of them.
        auto_class: of transformers, that loads such a model.
        peft_task: what peft calls it.
    """

    score: Score
    evaluate: Callable[[nn.Module, Iterable[Batch]], Totals]
    summarise: Callable[[Mapping[str, Any]], dict[str, Any]]
    auto_class: Any
    peft_task: str


LABELS = Objective(
    score_classes, evaluate_classes, summarise_classes, AutoModelForSequenceClassification, peft_task="SEQ_CLS"
)
ANSWERS = Objective(score_tokens, evaluate_tokens, summarise_tokens, AutoModelForCausalLM, peft_task="CAUSAL_LM")


def find_objective(settings: Settings) -> Objective:
    """Return what the task of a run trains a model for."""
    return ANSWERS if is_generative(settings.task_name) else LABELS


def make_encoder(settings: Settings, pretrained: Pretrained) -> TextEncoder | ConversationEncoder:
    """Return what turns the rows of a run into tokens."""
    if find_objective(settings) is LABELS:
        limits = pretrained.num_ids, pretrained.width, pretrained.end_id
        return TextEncoder(pretrained.tokenizer, settings.max_seq_len, *limits)
    return ConversationEncoder(
        pretrained.tokenizer,
        str(settings.template),
        settings.max_seq_len,
        pretrained.num_ids,
        train_on_prompt=settings.train_on_prompt,
        skip_long=settings.skip_long,
    )


def find_dtype(settings: Settings) -> torch.dtype:
    """Return the type of frozen weights that are not quantised, and of all weights of a run without an adapter."""
    return getattr(torch, settings.base_dtype or "float32")


def make_model(
    settings: Settings, pretrained: Pretrained, label_names: Sequence[str], end_id: int | None
) -> LoadedModel:
    """Return the model of a run, without an adapter.

    Args:
        settings: of the run.
        pretrained: the model.
        label_names: in the order of the classes.
        end_id: of the token that ends an answer.
    """
    # What is quantised is loaded as its files have it, which takes the least memory and rounds nothing before.
    dtype = find_dtype(settings) if settings.quantise is None or pretrained.is_empty else "auto"
    if find_objective(settings) is ANSWERS:
        return make_language_model(pretrained, settings.seed, end_id, dtype)
    of_head = find_rows(label_names, labels_of(pretrained.config))
    return make_classifier(pretrained, label_names, settings.seed, of_head, dtype)

"""The labels that a classifier gives texts, and how probable it finds each."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from datasets import Dataset

from scaling_fl.data.columns import check_characters
from scaling_fl.data.encoder import TextEncoder
from scaling_fl.data.tasks import find_task
from scaling_fl.models.loading import without_bars


class Prediction(NamedTuple):
    """The most probable label of a text, and the probability of each."""

    label: str
    probability: dict[str, float]


def predict(
    model: Any, encoder: TextEncoder, task_name: str, labels: Sequence[str], texts: Iterable[str], batch_size: int
) -> Iterator[Prediction]:
    """Yield a prediction for each text, in their order, without dropout. The model is left as it was.

    Args:
        model: a classifier.
        encoder: as in training: long texts are cut.
        task_name: the task of the training, which may change texts before they are tokenised.
        labels: by their number in the model's output.
        texts: any number.
        batch_size: texts that are computed at once.

    Raises:
        ValueError: a text is none, or has tokens that the model does not take.
    """
    if isinstance(texts, str):
        raise ValueError("texts: expected a list of texts, got one text. Put it in brackets: [text]")
    texts = list(texts)
    for number, text in enumerate(texts, start=1):
        if not isinstance(text, str):
            raise ValueError(f"texts: expected texts, got {type(text).__name__} in place {number}")
        check_characters([text], f"texts: text {number}")
    if not texts:
        return
    clean = find_task(task_name).clean
    rows = {"text": texts}
    rows = {**(clean(rows) if clean else rows), "label": [labels[0]] * len(texts)}  # the encoder asks for one
    with without_bars():
        examples = encoder.encode(Dataset.from_dict(rows), labels).examples
    device = next(model.parameters()).device
    modes = [(module, module.training) for module in model.modules()]
    for first in range(0, len(texts), batch_size):
        batch = examples.select(np.arange(first, min(first + batch_size, len(texts)))).batch()
        batch = {name: tensor.to(device) for name, tensor in batch.items() if name != "labels"}
        model.eval()
        try:
            with torch.inference_mode():
                probabilities = model(**batch).logits.double().softmax(-1).tolist()
        finally:
            for module, was_training in modes:
                module.training = was_training
        for of_text in probabilities:
            yield Prediction(labels[int(np.argmax(of_text))], dict(zip(labels, of_text, strict=True)))

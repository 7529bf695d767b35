"""What a model's output scores."""

from typing import Any

from scaling_fl.training.loop import Batch
from scaling_fl.training.metrics import Means


def score_classes(output: Any, batch: Batch, means: Means) -> None:
    """Add a batch's loss (cross-entropy, summed over its examples) and its number of right answers."""
    count = len(batch["labels"])
    means.add("loss", output.loss.detach().double() * count, count)
    means.add("accuracy", (output.logits.argmax(-1) == batch["labels"]).sum(), count)

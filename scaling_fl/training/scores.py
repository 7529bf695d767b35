"""What a model's output scores, and what the confusions of all its answers score."""

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor, nn

from scaling_fl.training.loop import NOT_TRAINED, Batch, evaluate
from scaling_fl.training.metrics import Means

Totals = dict[str, tuple[Fraction, int]]  # name of a score -> sum, count
CONFUSION = "confusion"
PACKING_TOLERANCE = 1e-4  # between the losses of a batch packed and unpacked


def score_classes(output: Any, batch: Batch, means: Means) -> None:
    """Add a batch's loss (cross-entropy, summed over its examples) and its number of right answers."""
    count = len(batch["labels"])
    means.add("loss", output.loss.detach().double() * count, count)
    means.add("accuracy", (output.logits.argmax(-1) == batch["labels"]).sum(), count)


def score_tokens(output: Any, batch: Batch, means: Means) -> None:
    """Add the loss of a language model (cross-entropy, summed over its trained tokens) and its number of right tokens.

    The first token of a text has no prediction. A batch without a trained token adds nothing.
    """
    labels = batch["labels"][:, 1:]
    is_trained = labels != NOT_TRAINED
    count = is_trained.sum()
    logits = output.logits[:, -batch["labels"].shape[1] :]  # after those of virtual tokens
    right = (logits[:, :-1].argmax(-1) == labels) & is_trained
    loss = output.loss.detach().double()
    scores = {"loss": torch.where(count > 0, loss * count, torch.zeros_like(loss)), "accuracy": right.sum()}
    for name, total in scores.items():
        means.add(name, total, count)


def evaluate_tokens(model: nn.Module, batches: Iterable[Batch]) -> Totals:
    """Return the loss and accuracy of the trained tokens of the batches, without dropout: sums and counts."""
    return evaluate(model, batches, score_tokens).totals()


def summarise_tokens(totals: Mapping[str, tuple[Fraction, int]]) -> dict[str, Any]:
    """Return each mean by name, and `perplexity`, the exponential of the mean loss of a token."""
    means: dict[str, Any] = dict(Means.of(totals).result())
    if "loss" not in means:
        return means
    try:
        return means | {"perplexity": math.exp(means["loss"])}
    except OverflowError:
        return means | {"perplexity": math.inf}


def check_packing(model: nn.Module, batch: Batch, packed: Batch) -> None:
    """Check that a model tells the texts of a packed batch apart.

    Args:
        model: is left in the mode that it had.
        batch: texts, one a row.
        packed: the same in one row, with their positions.

    Raises:
        ValueError: the losses differ.
    """
    was_training = model.training
    losses = [evaluate(model, [of], score_tokens).result()["loss"] for of in (batch, packed)]
    model.train(was_training)
    if not abs(losses[0] - losses[1]) <= PACKING_TOLERANCE:
        raise ValueError(
            f"pack: expected a model that tells texts in a row apart by their positions, got a loss of {losses[1]:.6f} "
            f"in place of {losses[0]:.6f}. Use pack=False"
        )


def evaluate_classes(model: nn.Module, batches: Iterable[Batch]) -> Totals:
    """Return the loss and accuracy of the batches, without dropout, and their confusions.

    Returns:
        Sums and counts. `confusion 2 0` is how many examples of class 2 the model takes for class 0: a number of
        examples and no mean, so that its count is 0.
    """
    pairs: list[Tensor] = []

    def score(output: Any, batch: Batch, means: Means) -> None:
        score_classes(output, batch, means)
        pairs.append(torch.stack([batch["labels"], output.logits.argmax(-1)], dim=1))

    totals = evaluate(model, batches, score).totals()
    found = Counter(map(tuple, torch.cat(pairs).tolist())) if pairs else {}
    return totals | {f"{CONFUSION} {label} {answer}": (Fraction(n), 0) for (label, answer), n in found.items()}


def summarise_classes(totals: Mapping[str, tuple[Fraction, int]]) -> dict[str, Any]:
    """Return each mean, and the scores of the confusions, if there are any, as scikit-learn defines them.

    Returns:
        The means by name; `macro_f1`, the mean F1 of the classes that are the label or the answer of an example;
        `balanced_accuracy`, the mean recall of the classes that are the label of one; and `confusion`, a list of
        [label, answer, number of examples] of all pairs that occur.
    """
    confusions = sorted(
        (*map(int, name.split()[1:]), int(total))
        for name, (total, _) in totals.items()
        if name.startswith(f"{CONFUSION} ")
    )
    means = Means.of({name: total for name, total in totals.items() if not name.startswith(f"{CONFUSION} ")}).result()
    if not confusions:
        return dict(means)
    labels, answers, right = Counter[int](), Counter[int](), Counter[int]()
    for label, answer, number in confusions:
        labels[label] += number
        answers[answer] += number
        right[label] += number * (label == answer)
    f1 = [Fraction(2 * right[of], labels[of] + answers[of]) for of in labels | answers]
    recall = [Fraction(right[of], labels[of]) for of in labels]
    return {
        **means,
        "macro_f1": float(sum(f1) / len(f1)),
        "balanced_accuracy": float(sum(recall) / len(recall)),
        CONFUSION: [list(row) for row in confusions],
    }

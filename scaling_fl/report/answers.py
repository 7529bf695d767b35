"""The table of what a language model answers to the sample questions."""

from scaling_fl.report.runs import Run, as_list
from scaling_fl.report.tables import NONE, Row, Table

NAME = "sample.answers"  # of the metric
MAX_TEXT = 160  # letters of a cell
MAX_ROUNDS = 4  # of the table: the first and the last ones with answers


def answers(run: Run) -> Table | None:
    """Return the answers to each sample question before training and after the last rounds, None without any."""
    questions = as_list(run.config.get("sample_questions"))
    found = [(step, texts) for step, of in zip(run.steps, run.rounds, strict=True) if (texts := as_list(of.get(NAME)))]
    if not questions or not found:
        return None
    shown = found if len(found) <= MAX_ROUNDS else [found[0], *found[1 - MAX_ROUNDS :]]
    rows = [
        Row(_cut(question), [_cut(texts[number]) if number < len(texts) else NONE for _, texts in shown])
        for number, question in enumerate(questions)
    ]
    return Table(f"Answers of {run.name}", [f"after round {step:.0f}" for step, _ in shown], rows)


def _cut(text: object) -> str:
    return str(text) if len(str(text)) <= MAX_TEXT else f"{str(text)[: MAX_TEXT - 1]}…"

"""Questions and texts in files."""

from collections.abc import Iterator, Sequence

from scaling_fl.data.columns import check_characters, open_text
from scaling_fl.data.files import is_table, read_table
from scaling_fl.data.tasks import find_task
from scaling_fl.errors import one_line, preview
from scaling_fl.experiment.answers import Question
from scaling_fl.experiment.settings import Settings
from scaling_fl.storage import host_path

FIELDS = ("question", "context")


def read_questions(path: str) -> list[Question]:
    """Read questions: one a line, or a table with a column `question`, and perhaps one `context`.

    Raises:
        ValueError: the file cannot be read, or a row has no question.
    """
    if not is_table(path):
        found = [Question(line.strip()) for _, line in _read_lines(path)]
        if not found:
            raise ValueError(f"{path!r}: expected a question or more, got none")
        return found
    table = read_table(host_path(path), fields=FIELDS)
    if FIELDS[0] not in table.column_names:
        raise ValueError(f"{path!r}: expected a column {FIELDS[0]!r}, got {preview(map(repr, table.column_names))}")
    texts, contexts = (table[name][:] if name in table.column_names else [None] * len(table) for name in FIELDS)
    for number, text in enumerate(texts, start=1):
        if not (text or "").strip():
            raise ValueError(f"{path!r}: row {number}: expected a text in {FIELDS[0]!r}, got none")
    return [Question(text, context or "") for text, context in zip(texts, contexts, strict=True)]


def read_texts(path: str, settings: Settings, column: str | None = None) -> list[str]:
    """Read texts: a column of a table, or one a line of another file.

    Args:
        path: of the file.
        settings: of the training, whose column of the texts is taken.
        column: in place of that.

    Raises:
        ValueError: the file cannot be read, or a row has no text.
    """
    if not is_table(path):
        if column is not None:
            raise ValueError(f"text_column: expected none, as {path!r} is no table, got {column!r}")
        return [line for _, line in _read_lines(path)]
    column = column or settings.text_column or find_task(settings.task_name).columns[0]
    texts: Sequence[str | None] = read_table(host_path(path), columns=(column,))[column][:]
    if None in texts:
        raise ValueError(f"{path!r}: row {[*texts].index(None) + 1}: expected a value in {column!r}, got none")
    return [str(text) for text in texts]


def _read_lines(path: str) -> Iterator[tuple[int, str]]:
    """Yield the lines that are not blank, and their numbers."""
    try:
        with open_text(host_path(path)) as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    check_characters([line], f"{path!r}: line {number}")
                    yield number, line.rstrip("\r\n")
    except OSError as error:
        raise ValueError(f"{path!r}: expected a file that can be read, got {one_line(error)}") from error

"""Questions and texts in files."""

from collections.abc import Sequence

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
        return [Question(line.strip()) for line in _read_lines(path)]
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
        return _read_lines(path)
    column = column or settings.text_column or find_task(settings.task_name).columns[0]
    texts: Sequence[str | None] = read_table(host_path(path), columns=(column,))[column][:]
    if None in texts:
        raise ValueError(f"{path!r}: row {[*texts].index(None) + 1}: expected a value in {column!r}, got none")
    return [str(text) for text in texts]


def _read_lines(path: str) -> list[str]:
    """Return the lines that are not blank.

    Raises:
        ValueError: the file cannot be read, or all its lines are blank.
    """
    try:
        with open_text(host_path(path)) as file:
            lines = [line.rstrip("\r\n") for line in file]
    except OSError as error:
        raise ValueError(f"{path!r}: expected a file that can be read, got {one_line(error)}") from error
    for number, line in enumerate(lines, start=1):
        check_characters([line], f"{path!r}: line {number}")
    found = [line for line in lines if line.strip()]
    if not found:
        raise ValueError(f"{path!r}: expected a line with text, got none")
    return found

"""A CSV file is read as Python's csv module reads it, or refused."""

import csv
import io
import re
from collections.abc import Iterator
from itertools import count
from pathlib import Path

import datasets
import pytest
from helpers import refusal
from hypothesis import example, given, settings
from hypothesis import strategies as st

from scaling_fl.data.files import read_table

NAMES = st.lists(
    st.sampled_from(["text", "label", "a b", "Größe", 'the "id"', "x,y", "1", ""]), unique=True, min_size=1
)
FIELDS = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=12) | st.text(
    "\",\r\n; '\\", max_size=6
)
numbers = count()


@pytest.fixture(scope="module", autouse=True)
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A working folder for all examples of one test."""
    folder = tmp_path_factory.mktemp("scratch")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", str(folder / "cache"))
        yield


def put_csv(content: bytes) -> str:
    """Write a new file for each example, because readers cache by path."""
    name = f"{next(numbers)}.csv"
    Path(name).write_bytes(content)
    return name


@given(data=st.data(), names=NAMES, is_all_quoted=st.booleans(), has_mark=st.booleans())
@settings(deadline=None, max_examples=120)
def test_fields_are_read_as_python_wrote_them(
    data: st.DataObject, names: list[str], is_all_quoted: bool, has_mark: bool
) -> None:
    rows = data.draw(st.lists(st.lists(FIELDS, min_size=len(names), max_size=len(names)), min_size=1, max_size=5))
    file = io.StringIO(newline="")
    style = {"quoting": csv.QUOTE_ALL, "lineterminator": "\n"} if is_all_quoted else {}
    csv.writer(file, **style).writerows([names, *rows])
    table = read_table(put_csv(file.getvalue().encode("utf-8-sig" if has_mark else "utf-8")))
    assert table.column_names == names
    assert [list(row.values()) for row in table] == rows


def rows_of(content: bytes) -> list[list[str]] | None:
    """Return the rows as Python's csv module reads them, without empty fields at their ends; None if it refuses."""
    try:
        rows = [row for row in csv.reader(io.StringIO(content.decode("utf-8-sig"), newline=""), strict=True) if row]
    except (UnicodeDecodeError, csv.Error):
        return None
    for row in rows[1:]:
        while len(row) > len(rows[0]) and not row[-1].strip():
            row.pop()
        if not any(name.strip() for name in rows[0][len(row) :]):
            row += [""] * (len(rows[0]) - len(row))
    return rows


def is_table(rows: list[list[str]] | None) -> bool:
    """Return whether Python's csv module finds a table with the expected columns."""
    if rows is None or len(rows) < 2 or any("\0" in name for row in rows for name in row):
        return False
    if len(rows[0]) == 1 and re.search(r"[;\t|]", rows[0][0]):
        return False  # its delimiter is not a comma
    return len(set(rows[0])) == len(rows[0]) and {len(row) for row in rows} == {len(rows[0])}


ENCODINGS = st.sampled_from(["utf-8", "utf-8", "utf-8", "utf-8-sig", "latin-1", "utf-16", "utf-16-le"])


@given(
    content=st.binary(max_size=60)
    | st.builds(lambda text, encoding: text.encode(encoding), st.text('ab",\r\n é', max_size=30), ENCODINGS)
    | st.builds(lambda rows: "\n".join(map(",".join, rows)).encode(), st.lists(st.lists(st.sampled_from("abc"))))
)
@example(content=b"a,b\nc,\0\n")
@example(content=b"a\n\xff\n")
@example(content=b"a|b\nc\n")
@example(content=b"a,b,\nc,d\ne,f,,,\n")
@example(content=b"a,b\nc\n")
@example(content=b"a,b\nc,d,e\n")
@settings(deadline=None, max_examples=300)
def test_random_bytes_are_read_as_python_reads_them_or_refused(content: bytes) -> None:
    rows, name = rows_of(content), put_csv(content)
    if not is_table(rows):
        assert repr(name) in refusal(lambda: read_table(name))
        return
    assert rows is not None
    table = read_table(name)
    assert table.column_names == rows[0]
    assert [list(row.values()) for row in table] == rows[1:]

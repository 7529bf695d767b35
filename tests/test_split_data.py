"""The split of the spooky author file equals that of scikit-learn."""

import csv
import hashlib
import json
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent.parent / "scripts" / "spooky_author" / "split_data.py"
HEADER = ["id", "text", "author"]


def read(path: Path) -> list[list[str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.reader(file))


def write(path: Path, rows: list[list[str]]) -> None:
    """Write rows in Kaggle's format with all fields quoted."""
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file, quoting=csv.QUOTE_ALL, lineterminator="\n").writerows([HEADER, *rows])


def arguments(folder: Path, **paths: object) -> list[str]:
    given = {"full": folder / "full.csv", "train": folder / "train.csv", "test": folder / "test.csv"} | paths
    return [f"--{name}-path={path}" for name, path in given.items()]


def split(folder: Path) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, str(SCRIPT), *arguments(folder)], capture_output=True, text=True, check=False, cwd=folder
    )


def test_the_split_is_that_of_scikit_learn_and_overwrites_nothing(tmp_path: Path) -> None:
    train_test_split = pytest.importorskip("sklearn.model_selection").train_test_split
    texts = ['He said "no", and\nleft', "NA", "null", "", " ünïcode ", "1.0"]
    rows = [[f"id{i:05}", texts[i % len(texts)], ("EAP", "HPL", "MWS")[i % 3]] for i in range(103)]
    write(tmp_path / "full.csv", rows)
    done = split(tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [
        "77",
        "rows",
        "in",
        f"{tmp_path}/train.csv",
        "26",
        "rows",
        "in",
        f"{tmp_path}/test.csv",
    ]
    train, test = train_test_split(rows, train_size=0.75, shuffle=True, random_state=1)
    assert read(tmp_path / "train.csv") == [HEADER, *train]
    assert read(tmp_path / "test.csv") == [HEADER, *test]
    again = split(tmp_path)
    assert again.returncode == 1
    assert (
        again.stderr
        == f"error: '{tmp_path}/train.csv': expected a new file, got one that exists. Remove it, or name another\n"
    )


@pytest.mark.parametrize("num_rows", [*range(2, 30), 19_579])
def test_every_number_of_rows_is_split_as_scikit_learn_does(num_rows: int) -> None:
    train_test_split = pytest.importorskip("sklearn.model_selection").train_test_split
    ours = runpy.run_path(str(SCRIPT))["split"](num_rows)
    theirs = train_test_split(range(num_rows), train_size=0.75, shuffle=True, random_state=1)
    assert [part.tolist() for part in ours] == theirs


def test_the_real_file_is_split_as_the_paper_did(shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parts = {name: read(shared / "data" / "spooky_author" / f"{name}.csv")[1:] for name in ("train", "test")}
    places = runpy.run_path(str(SCRIPT))["split"](19_579)
    rows: list[list[str]] = [[]] * 19_579
    for name, indices in zip(parts, places, strict=True):
        for index, row in zip(indices, parts[name], strict=True):
            rows[index] = row
    write(tmp_path / "full.csv", rows)
    sources = json.loads((shared / "data" / "SOURCES.json").read_text())
    digest = hashlib.sha256((tmp_path / "full.csv").read_bytes()).hexdigest()
    assert digest == sources["spooky_author"]["raw_sha256"], "the rows are not back where Kaggle has them"
    monkeypatch.setattr(sys, "argv", ["split_data.py", *arguments(tmp_path)])
    runpy.run_path(str(SCRIPT), run_name="__main__")
    for name, expected in parts.items():
        assert read(tmp_path / f"{name}.csv")[1:] == expected


@pytest.mark.parametrize(
    ("content", "paths", "says"),
    [
        (None, {}, "full.csv': expected CSV, got an error: "),
        (b"", {}, "full.csv': expected CSV, got an error: No columns to parse from file"),
        (b"id,text,author\n1,caf\xe9,EAP\n", {}, "full.csv': expected CSV, got an error: 'utf-8' codec"),
        (b"id,text,author\n1,a,EAP\n2,a,b,EAP\n", {}, "full.csv': expected CSV, got an error: Error tokenizing data"),
        (
            b"id,text,author\n1,a,b,EAP\n2,a,b,EAP\n",
            {},
            "expected id, text and author in each row. Quote texts",
        ),
        (b"id,text,author\n1,a,EAP\n2,a\n", {}, "expected id, text and author in each row"),
        (b"id,text\n1,a\n", {}, "full.csv': expected the columns id, text, author, got id, text"),
        (b"id,text,author\n", {}, "full.csv': expected two rows or more, got 0"),
        (b"id,text,author\n1,a,EAP\n", {}, "full.csv': expected two rows or more, got 1"),
        (b"id,text,author\n1,a,EAP\n2,b,HPL\n", {"test": "{}/train.csv"}, "expected three files, got 2"),
        (b"id,text,author\n1,a,EAP\n2,b,HPL\n", {"train": "{}/x/../full.csv"}, "expected three files, got 2"),
        (b"id,text,author\n1,a,EAP\n2,b,HPL\n", {"test": "{}"}, "expected a new file, got one that exists. Remove it"),
        (
            b"id,text,author\n1,a,EAP\n2,b,HPL\n",
            {"train": "{}/none/train.csv"},
            "none/train.csv': expected a file that can be written, got an error: ",
        ),
    ],
)
def test_a_file_that_cannot_be_split_is_refused_in_one_line(
    content: bytes | None, paths: dict[str, str], says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if content is not None:
        (tmp_path / "full.csv").write_bytes(content)
    given = {name: path.format(tmp_path) for name, path in paths.items()}
    monkeypatch.setattr(sys, "argv", ["split_data.py", *arguments(tmp_path, **given)])
    with pytest.raises(SystemExit) as caught:
        runpy.run_path(str(SCRIPT), run_name="__main__")
    sentence = str(caught.value)
    assert sentence.startswith("error: ")
    assert says in sentence
    assert "\n" not in sentence
    assert not (tmp_path / "train.csv").exists()
    assert not (tmp_path / "test.csv").exists()

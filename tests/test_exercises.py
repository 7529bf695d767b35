"""The made exercises: their answers are right, and the same everywhere."""

import os
import re
import subprocess
import sys
from collections import Counter
from datetime import datetime, timedelta

import pytest
from helpers import ROOT, refusal

from scaling_fl.data.exercises import KINDS, ONES, TENS, UNITS, is_right, make_exercises, number_in_words

NUMBERS = dict(zip(ONES, range(20), strict=True)) | dict(zip(TENS, range(20, 100, 10), strict=True))


def value_of(words: str) -> int:
    total = 0
    for word in re.findall(r"[a-z]+", words):
        total = total * 100 if word == "hundred" else total + NUMBERS.get(word, 0)
    return total


def answer(kind: str, question: str) -> str:
    """Solve an exercise in another way than it was made."""
    if kind == "units":
        small, count, large = re.findall(r"How many (\w+) are (\d+) (\w+)\?", question)[0]
        (factor,) = [factor for *names, factor in UNITS if names == [large, small]]
        return f"{int(count) * factor} {small}"
    if kind == "dates":
        days, start = re.findall(r"(\d+) days after (.*)\?", question)[0]
        end = datetime.strptime(start, "%d %B %Y") + timedelta(days=int(days))
        return f"{end.day} {end:%B %Y}"
    if kind == "sorting":
        return ", ".join(sorted(question.partition(": ")[2].rstrip(".").split(", ")))
    first, second = re.findall(r"What is (.*) plus (.*)\? Answer", question)[0]
    return number_in_words(value_of(first) + value_of(second))


def test_every_answer_is_right_and_no_question_is_asked_twice() -> None:
    rows = make_exercises(2_000, seed=3)
    questions = [row["messages"][0]["content"] for row in rows]
    assert len(set(questions)) == len(rows) == 2_000
    assert Counter(row["kind"] for row in rows) == dict.fromkeys(KINDS, 500)
    for row in rows:
        user, assistant = row["messages"]
        assert (user["role"], assistant["role"]) == ("user", "assistant")
        assert answer(row["kind"], user["content"]) == assistant["content"]


def test_numbers_in_words_are_read_back() -> None:
    assert [value_of(number_in_words(number)) for number in range(1_000)] == list(range(1_000))
    assert number_in_words(164) == "one hundred and sixty-four"
    assert number_in_words(300) == "three hundred"


def test_a_seed_gives_the_same_exercises_in_any_process_and_more_of_them_begin_alike() -> None:
    rows = make_exercises(40, seed=5)
    assert make_exercises(80, seed=5)[:40] == rows != make_exercises(40, seed=6)
    code = "from scaling_fl.data.exercises import make_exercises; print(make_exercises(40, seed=5))"
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT,
        env=os.environ | {"PYTHONHASHSEED": "7"},
    )
    assert done.stdout.strip() == repr(rows)


def test_the_first_exercises_stay_as_they_are() -> None:
    """A comparison of two versions of the library needs the same exercises."""
    found = [[turn["content"] for turn in row["messages"]] for row in make_exercises(4)]
    assert found == [
        ["How many kilograms are 32 tonnes?", "32000 kilograms"],
        ["Which date is 7 days after 11 April 2019?", "18 April 2019"],
        ["Sort these words from A to Z: cotton, bottle, orange, saddle.", "bottle, cotton, orange, saddle"],
        ["What is twenty-eight plus eighteen? Answer in words.", "forty-six"],
    ]


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (" 7,000 Metres. ", "7000 metres"),
        ("Sixty four", "sixty-four"),
        ("apple,river , zebra\n", "apple, river, zebra"),
        ("3 MARCH 2021", "3 March 2021"),
    ],
)
def test_an_answer_is_right_however_it_is_written(given: str, expected: str) -> None:
    assert is_right(given, expected)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("700 metres", "7000 metres"),
        ("", "7000 metres"),
        ("7,0 metres", "70 metres"),
        ("river, apple", "apple, river"),
        ("sixtyfour", "sixty-four"),
        ("7000 metres are 7 kilometres", "7000 metres"),
        ("30 March 2021", "3 March 2021"),
    ],
)
def test_another_answer_is_wrong(given: str, expected: str) -> None:
    assert not is_right(given, expected)


def test_a_count_that_cannot_be_made_is_refused() -> None:
    assert refusal(lambda: make_exercises(0)).startswith("count: expected a whole number from 1 to 2,400, got 0")

"""Made exercises with answers that can be checked: units, dates, sorting of words, sums in words.

They show that a small model learns; they are no benchmark. All numbers come from hashes: the exercises of a seed are
the same on every machine and with every version of Python.
"""

import itertools
import re
import unicodedata
from collections.abc import Callable
from datetime import date, timedelta
from typing import Any

from scaling_fl.training.seeds import derive_seed

Below = Callable[[int], int]  # a whole number from 0, below the given one

UNITS = (
    *(("kilometres", "metres", 1000), ("metres", "centimetres", 100), ("centimetres", "millimetres", 10)),
    *(("kilograms", "grams", 1000), ("litres", "millilitres", 1000), ("tonnes", "kilograms", 1000)),
    *(("hours", "minutes", 60), ("minutes", "seconds", 60), ("days", "hours", 24), ("weeks", "days", 7)),
    *(("dozens", "pieces", 12), ("feet", "inches", 12), ("yards", "feet", 3), ("pounds", "ounces", 16)),
)
MONTHS = "January February March April May June July August September October November December".split()  # noqa: SIM905
WORDS = (  # noqa: SIM905
    "anchor apple basket bottle butter candle carpet castle cherry circle cotton danger desert dragon engine falcon "
    "finger flower forest garden guitar hammer harbour island jacket jungle kitchen ladder lantern lemon market mirror "
    "monkey mountain needle ocean orange paper pepper pillow planet pocket rabbit ribbon river rocket saddle school "
    "silver spider station summer table ticket tiger tunnel valley velvet violin wagon window winter yellow zebra"
).split()
ONES = (  # noqa: SIM905
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen nineteen"
).split()
TENS = "twenty thirty forty fifty sixty seventy eighty ninety".split()  # noqa: SIM905


def make_exercises(count: int = 2_000, seed: int = 0) -> list[dict[str, Any]]:
    """Return different exercises, of all kinds in turn.

    Args:
        count: of the exercises.
        seed: of the exercises; the first ones of a greater count are the same.

    Returns:
        Rows with `messages`, a question and its answer, and `kind`, a key of KINDS.

    Raises:
        ValueError: the count is not from 1 to 2,400.
    """
    if not 1 <= count <= MOST:
        raise ValueError(f"count: expected a whole number from 1 to {MOST:,}, got {count}")
    rows: list[dict[str, Any]] = []
    questions: set[str] = set()
    kinds = list(KINDS)
    attempt = 0
    while len(rows) < count:
        kind = kinds[len(rows) % len(kinds)]
        question, answer = KINDS[kind](_hashed(seed, kind, attempt))
        attempt += 1
        if question not in questions:
            questions.add(question)
            messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
            rows.append({"messages": messages, "kind": kind})
    return rows


def _hashed(seed: int, *purpose: str | int) -> Below:
    """Return a function that returns a number below the given one, another one at each call."""
    calls = itertools.count(1)
    return lambda limit: derive_seed(seed, "exercise", *purpose, next(calls)) % limit


def _convert_units(below: Below) -> tuple[str, str]:
    large, small, factor = UNITS[below(len(UNITS))]
    count = 2 + below(48)
    return f"How many {small} are {count} {large}?", f"{count * factor} {small}"


def _add_days(below: Below) -> tuple[str, str]:
    start, days = date(2001, 1, 1) + timedelta(below(9_000)), 2 + below(8)
    return f"Which date is {days} days after {_write_date(start)}?", _write_date(start + timedelta(days))


def _write_date(day: date) -> str:
    return f"{day.day} {MONTHS[day.month - 1]} {day.year}"  # strftime depends on the language of the machine


def _sort_words(below: Below) -> tuple[str, str]:
    left = list(WORDS)
    words = [left.pop(below(len(left))) for _ in range(3 + below(2))]
    return f"Sort these words from A to Z: {', '.join(words)}.", ", ".join(sorted(words))


def _add_words(below: Below) -> tuple[str, str]:
    numbers = 1 + below(29), 1 + below(29)
    first, second = map(number_in_words, numbers)
    return f"What is {first} plus {second}? Answer in words.", number_in_words(sum(numbers))


def number_in_words(number: int) -> str:
    """Return a number from 0 to 999 as it is spoken in British English."""
    if number >= 100:
        rest = f" and {number_in_words(number % 100)}" if number % 100 else ""
        return f"{ONES[number // 100]} hundred{rest}"
    if number < 20:
        return ONES[number]
    return TENS[number // 10 - 2] + (f"-{ONES[number % 10]}" if number % 10 else "")


KINDS: dict[str, Callable[[Below], tuple[str, str]]] = {
    "units": _convert_units,
    "dates": _add_days,
    "sorting": _sort_words,
    "sums": _add_words,
}
MOST = 2_400  # more would need most of the 672 conversions of units


def is_right(answer: str, expected: str) -> bool:
    """Tell whether an answer is the expected one, whatever its case, spaces, hyphens, separators and full stop."""
    return _normalise(answer) == _normalise(expected)


def _normalise(text: str) -> str:
    text = unicodedata.normalize("NFKC", text).casefold()
    text = re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", text)  # 7,000
    text = re.sub(r"\s*,\s*", ", ", text)
    text = re.sub(r"(?<=[a-z])[-\u2010\u2011](?=[a-z])", " ", text)  # sixty-four
    return " ".join(text.split()).removesuffix(".").rstrip()

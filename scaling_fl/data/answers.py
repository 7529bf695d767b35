"""Whether an answer is the expected one."""

import re
import unicodedata


def is_right(answer: str, expected: str) -> bool:
    """Tell whether an answer is the expected one, whatever its case, spaces, hyphens, separators and full stop."""
    return _normalise(answer) == _normalise(expected)


def _normalise(text: str) -> str:
    text = unicodedata.normalize("NFKC", text).casefold()
    text = re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", text)  # 7,000
    text = re.sub(r"\s*,\s*", ", ", text)
    text = re.sub(r"(?<=[a-z])[-\u2010\u2011](?=[a-z])", " ", text)  # sixty-four
    return " ".join(text.split()).removesuffix(".").rstrip()

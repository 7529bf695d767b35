"""The names of labels: one for each, however a file writes it, and the rules that the labels of files follow."""

import re
import unicodedata
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from decimal import Decimal
from fractions import Fraction

from scaling_fl.errors import preview, printable

NUMBER = re.compile(r"-?[0-9]+(\.[0-9]+)?")
MAX_EXPONENT = 400  # of a number that is written with all its digits
NEW_LINE = re.compile("\r\n?|[\v\f\x85\u2028\u2029]")
SPACE = re.compile("[\xa0\u1680\u2000-\u200a\u202f\u205f\u2800\u3000\u3164\uffa0]")  # no-break, thin, ideographic ...
# Prints nothing: control characters, the soft hyphen, zero-width spaces, marks of direction, the byte order mark.
NOTHING = re.compile(
    "[\0-\x08\x0e-\x1f\x7f-\x9f\xad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180e\u200b\u200e\u200f\u202a-\u202e\u2060-\u2064"
    "\u2066-\u206f\ufeff\ufff9-\ufffb\U0001bca0-\U0001bca3\U0001d159\U0001d173-\U0001d17a]"
)
# Prints nothing by itself, but changes how its neighbours print in some scripts and emoji: joiners and variants.
JOINER = re.compile("[\u180b-\u180d\u180f\u200c\u200d\ufe00-\ufe0f\U000e0000-\U000e007f\U000e0100-\U000e01ef]")


def label_name(value: object) -> str:
    """Return a label's name: 1, 1.0 and "1" are the same label; "" is none.

    Labels that print alike are one label too: the name is in Unicode's normal form NFC, a space of any kind is a
    space, and characters that print nothing are left out. Joiners and variation selectors stay within a name, where
    they may be visible.
    """
    if value is None or value != value:
        return ""
    name = SPACE.sub(" ", NEW_LINE.sub("\n", str(value)))
    name = unicodedata.normalize("NFC", NOTHING.sub("", name)).strip(" \t\n\u200c\u200d")
    name = re.sub(r"\.0*$", "", name) if re.fullmatch(r"-?[0-9]+\.0*", name) else name
    return "0" if name == "-0" else name


def name_site(value: str | None) -> str:
    """Return the name of a site: all letters that are written, so 007 is not 7; "" is none."""
    return unicodedata.normalize("NFC", value or "").strip()


def check_alike(names: Iterable[str]) -> None:
    """Check that names of labels differ in more than joiners.

    Raises:
        ValueError: two do not.
    """
    seen: dict[str, str] = {}
    for name in sorted(set(names)):
        other = seen.setdefault(JOINER.sub("", name), name)
        if other != name:
            raise ValueError(
                f"labels: expected names that can be told apart, got {printable(other):.40} ({code_points(other)}) and "
                f"{printable(name):.40} ({code_points(name)}). Write it one way in all files"
            )


def code_points(name: str) -> str:
    """Return the code points of a name's first characters."""
    points = [f"U+{ord(character):04X}" for character in name]
    return " ".join(points[:16] + ["..."] * (len(points) > 16))


def sort_labels(names: Iterable[str]) -> tuple[str, ...]:
    """Sort labels by number where all are numbers, by the alphabet otherwise."""
    names = sorted(names)
    return tuple(sorted(names, key=Fraction) if all(map(NUMBER.fullmatch, names)) else names)


def find_rows(names: Sequence[str], of_head: Sequence[object]) -> list[int] | None:
    """Return the row of each label in a model's own head, None if the head has other labels.

    Names are compared as they stand, then without regard to case.

    Args:
        names: of the labels.
        of_head: the labels of the head, in order.
    """
    for form in (str, str.casefold):
        position = {form(label_name(label)): index for index, label in enumerate(of_head)}
        if len(position) == len(of_head) == len(names) and position.keys() == {form(name) for name in names}:
            return [position[form(name)] for name in names]
    return None


def settle_labels(
    found: Iterable[tuple[str, str, Collection[str]]], known: Mapping[str, str] | None, *, may_lack: bool = False
) -> tuple[str, ...]:
    """Return the names of the labels of several files, in the order of the classes.

    Args:
        found: of each file to whom it belongs, whether it is for "train" or "test", and its labels.
        known: each possible label -> its name; None takes those that are trained on, sorted.
        may_lack: whether the training files may lack labels that are known.

    Raises:
        ValueError: labels print alike, or there is one only, or one is in the files of one owner only, or in test files
            only.
    """
    owners: defaultdict[str, set[str]] = defaultdict(set)
    in_split: dict[str, set[str]] = {"train": set(), "test": set()}
    all_owners: dict[str, None] = {}
    for owner, split, labels in found:
        all_owners[owner] = None
        in_split[split].update(labels)
        for label in labels:
            owners[label].add(owner)
    check_alike([*owners, *(known or {}), *(known or {}).values()])
    if len(in_split["train"]) < 2 and not may_lack:
        raise ValueError(f"labels: expected two or more in the training data, got {preview(in_split['train'])}")
    if known is None and len(all_owners) > 1:
        only: dict[str, list[str]] = {owner: [] for owner in all_owners}
        for label in sort_labels(label for label, of_label in owners.items() if len(of_label) == 1):
            only[min(owners[label])].append(label)
        shown = [f"{preview(labels)} only in {owner}" for owner, labels in only.items() if labels]
        if shown:
            raise ValueError(
                "labels: expected the same in train and test, or each at two sites or more, got "
                f"{', '.join(shown[:4])}. The setting labels can name those that there may be"
            )
    only_test = sort_labels(in_split["test"] - in_split["train"])
    if only_test and not may_lack:
        raise ValueError(
            f"labels: expected labels of the training data in the test data, got also {preview(only_test)}"
        )
    return tuple(dict.fromkeys(known.values())) if known is not None else sort_labels(in_split["train"])


def as_text(value: object) -> str | None:
    """Return a single value as people write it, None for none.

    Raises:
        TypeError: it is bytes, a list or a record.
    """
    if value is None or value != value:
        return None
    if isinstance(value, bytes | list | dict | tuple):
        raise TypeError
    return as_number(str(value)) if isinstance(value, float | Decimal) else str(value)


def as_number(text: str) -> str:
    """Return a number without an exponent and without zeros at its end, so that equal numbers are one label."""
    number = Decimal(text)
    if not number.is_finite() or abs(number.adjusted()) > MAX_EXPONENT:
        return text
    digits = f"{number:f}"
    return digits.rstrip("0").rstrip(".") if "." in digits else digits

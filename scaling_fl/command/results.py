"""What subcommands share: options, errors in one sentence, and rows in a file or printed."""

import argparse
import csv
import json
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any, NoReturn, TextIO

from scaling_fl.errors import escape_unprintable, one_line

ENDINGS = (".jsonl", ".csv")


class Parser(argparse.ArgumentParser):
    """Says in one sentence what is wrong with the options."""

    def error(self, message: str) -> NoReturn:
        """End with the sentence."""
        sys.exit(f"error: {message}. `{self.prog} --help` explains the options")


def add_common(parser: argparse.ArgumentParser) -> None:
    """Add the options of the subcommands that use a model."""
    parser.add_argument("--model", required=True, help="runs/3/model, runs/3, another folder, a hub id or a nickname")
    parser.add_argument("--output", metavar="FILE", help="write to this .jsonl or .csv (default: print JSON Lines)")
    parser.add_argument("--overwrite", action="store_true", help="replace that file if it exists")


def check_output(path: str | None, *, overwrite: bool) -> None:
    """Check that a file can be written, before its rows are computed.

    Raises:
        ValueError: it cannot, or it exists and is not to be replaced.
    """
    if path is None:
        if overwrite:
            raise ValueError("--overwrite: expected none without --output, got it")
        return
    if not path.endswith(ENDINGS):
        raise ValueError(f"--output: expected a file that ends in {' or '.join(ENDINGS)}, got {path!r}")
    if os.path.exists(path) and not overwrite:
        raise ValueError(f"--output: expected a new file, got {path!r}, which exists. --overwrite replaces it")
    folder = os.path.dirname(os.path.abspath(path))
    if os.path.isdir(path) or not os.access(folder, os.W_OK):
        raise ValueError(f"--output: expected a file that can be written, got {path!r}")


def write_rows(rows: Iterator[Mapping[str, Any]], path: str | None, what: str) -> None:
    """Print rows as they come, or write them into a file, and print how many there are of `what`.

    Rows of a run that is stopped stay in the file with `.part` added to its name.

    Raises:
        OSError: the file cannot be written.
    """
    count = 0
    with _target(path) as file:
        writer: Any = None
        for row in rows:
            count += 1
            if path is None or not path.endswith(".csv"):
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
            else:
                flat = _flatten(row)
                if writer is None:
                    writer = csv.DictWriter(file, list(flat), lineterminator="\n")
                    writer.writeheader()
                writer.writerow(flat)
            file.flush()
    if path is not None:
        print(f"{count:,} {what} in {path}")


@contextmanager
def _target(path: str | None) -> Iterator[TextIO]:
    if path is None:
        yield sys.stdout
        return
    part = f"{path}.part"
    with open(part, "w", encoding="utf-8", newline="") as file:
        yield file
    os.replace(part, path)


def _flatten(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return a row without mappings in it: their keys get its name as a prefix."""
    flat: dict[str, Any] = {}
    for name, value in row.items():
        flat |= {f"{name}_{key}": item for key, item in value.items()} if isinstance(value, Mapping) else {name: value}
    return flat


@contextmanager
def one_sentence() -> Iterator[None]:
    """End with one sentence where the body fails in a way that the user can change, and let it print any letter."""
    escape_unprintable()
    try:
        yield
    except BrokenPipeError:  # of `| head`
        with suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)  # as shells have it
    except ValueError as error:
        sys.exit(f"error: {error}")
    except OSError as error:
        place = repr(error.filename) if error.filename else "a file"
        sys.exit(f"error: {place} cannot be read or written: {error.strerror or one_line(error)}")

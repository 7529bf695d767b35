"""Write prompts and responses for training and validation, from the raw files of Dolly, Alpaca or OASST1.

Each path is a local path or any fsspec URL. `--source exercises` makes exercises whose answers can be checked.
"""

import argparse
import sys
from typing import Any

from scaling_fl.data.exercises import make_exercises
from scaling_fl.data.prepare import check_targets, read_pairs, split_pairs, write_rows
from scaling_fl.errors import escape_unprintable
from scaling_fl.storage import host_path

EXERCISES = "exercises"


def main(arguments: list[str] | None = None) -> None:
    """Read a source, split its rows and write both files."""
    escape_unprintable()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--source", type=host_path, required=True, help="JSON, JSON Lines or parquet, or 'exercises'")
    parser.add_argument("--validation-source", type=host_path, help="a file of its own, in place of a fraction")
    parser.add_argument("--train-path", type=host_path, required=True, help="where to write rows for training")
    parser.add_argument("--validation-path", type=host_path, required=True, help="where to write those for validation")
    parser.add_argument("--validation-fraction", type=float, help="of the rows of the source (default: 0.05)")
    parser.add_argument("--seed", type=int, default=0, help="of that choice and of exercises (default: 0)")
    parser.add_argument("--language", help="of OASST1, such as en (default: all)")
    parser.add_argument("--num-exercises", type=int, default=2_000, help="(default: 2000)")
    parser.add_argument("--overwrite", action="store_true", help="replace files that exist")
    try:
        _prepare(parser.parse_args(arguments))
    except ValueError as error:
        sys.exit(f"error: {error}")


def _prepare(given: argparse.Namespace) -> None:
    if given.validation_source is not None and given.validation_fraction is not None:
        raise ValueError("--validation-fraction: expected none with --validation-source, which has all its rows")
    if given.source == EXERCISES and given.language is not None:
        raise ValueError(f"--language: expected none for the exercises, which are English, got {given.language!r}")
    sources = [path for path in (given.source, given.validation_source) if path not in (None, EXERCISES)]
    targets = given.train_path, given.validation_path
    check_targets(targets, sources, overwrite=given.overwrite)
    rows, groups = _read(given.source, given)
    if given.validation_source is not None:
        sides = rows, _read(given.validation_source, given)[0]
    else:
        fraction = 0.05 if given.validation_fraction is None else given.validation_fraction
        train, validation = split_pairs(groups, fraction, given.seed)
        sides = [rows[index] for index in train], [rows[index] for index in validation]
    for path, side in zip(targets, sides, strict=True):
        write_rows(path, side)
        print(f"{len(side):,} rows in {path}")


def _read(source: str, given: argparse.Namespace) -> tuple[list[dict[str, Any]], list[str]]:
    """Return the rows of a source and the group of each."""
    if source == EXERCISES:
        rows = make_exercises(given.num_exercises, given.seed)
        return rows, [row["messages"][0]["content"] for row in rows]
    prepared = read_pairs(source, given.language)
    for why, count in prepared.left_out.items():
        print(f"{count:,} rows of {source} left out: {why}")
    return prepared.rows, prepared.groups


if __name__ == "__main__":
    main()

"""Split Kaggle's spooky author file into a training and a test file, 75 to 25, as the paper did.

The rows are those of scikit-learn's `train_test_split(rows, train_size=0.75, shuffle=True, random_state=1)`:
a permutation of NumPy's legacy generator, of which the test set takes the first quarter, rounded up.
"""

import argparse
import os
import sys

import fsspec
import numpy as np
import pandas as pd

from scaling_fl.storage import host_path


def split(num_rows: int, random_state: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """Return the indices of the training and of the test rows, in their order in the files."""
    num_train = int(0.75 * num_rows)
    order = np.random.RandomState(random_state).permutation(num_rows)
    num_test = num_rows - num_train
    return order[num_test:], order[:num_test]


def main() -> None:
    """Read the whole file and write the two parts."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--full-path", type=host_path, required=True, help="Kaggle's train.csv: id,text,author")
    parser.add_argument("--train-path", type=host_path, required=True, help="where to write three quarters of the rows")
    parser.add_argument("--test-path", type=host_path, required=True, help="where to write the rest")
    paths = parser.parse_args()
    targets = (paths.train_path, paths.test_path)
    if len({os.path.abspath(path) for path in (paths.full_path, *targets)}) < 3:
        sys.exit("error: --full-path, --train-path and --test-path must be three files")
    try:
        rows = pd.read_csv(paths.full_path, dtype=str, keep_default_na=False)
    except (OSError, ValueError, ImportError) as error:
        sys.exit(f"error: {paths.full_path!r} cannot be read as CSV: {' '.join(str(error).split())}")
    if list(rows.columns) != ["id", "text", "author"]:
        sys.exit(f"error: {paths.full_path!r} has the columns {', '.join(rows.columns)}, not id, text, author")
    # pandas completes short rows with nothing, and takes the first field for an index where rows are long.
    if (rows["author"] == "").any() or not isinstance(rows.index, pd.RangeIndex):
        sys.exit(f"error: {paths.full_path!r} has rows without id, text and author: quote texts that hold a comma")
    if len(rows) < 2:
        sys.exit(f"error: {paths.full_path!r} has {len(rows)} rows: two or more can be split")
    for path in targets:
        filesystem, inner = fsspec.core.url_to_fs(path)
        if filesystem.exists(inner):
            sys.exit(f"error: {path!r} is there already: remove it, or name another file")
    for path, indices in zip(targets, split(len(rows)), strict=True):
        try:
            rows.iloc[indices].to_csv(path, index=False)
        except OSError as error:
            sys.exit(f"error: {path!r} cannot be written: {' '.join(str(error).split())}")
        print(f"{len(indices):,} rows in {path}")


if __name__ == "__main__":
    main()

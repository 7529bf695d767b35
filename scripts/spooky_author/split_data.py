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

from scaling_fl.errors import one_line
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
    num_files = len({os.path.abspath(path) for path in (paths.full_path, *targets)})
    if num_files < 3:
        sys.exit(f"error: --full-path, --train-path, --test-path: expected three files, got {num_files}")
    try:
        rows = pd.read_csv(paths.full_path, dtype=str, keep_default_na=False)
    except (OSError, ValueError, ImportError) as error:
        sys.exit(f"error: {paths.full_path!r}: expected CSV, got an error: {one_line(error)}")
    if list(rows.columns) != ["id", "text", "author"]:
        sys.exit(f"error: {paths.full_path!r}: expected the columns id, text, author, got {', '.join(rows.columns)}")
    # pandas fills short rows with empty fields, and takes the first field for an index where rows are long.
    if (rows["author"] == "").any() or not isinstance(rows.index, pd.RangeIndex):
        sys.exit(f"error: {paths.full_path!r}: expected id, text and author in each row. Quote texts that hold a comma")
    if len(rows) < 2:
        sys.exit(f"error: {paths.full_path!r}: expected two rows or more, got {len(rows)}")
    for path in targets:
        filesystem, inner = fsspec.core.url_to_fs(path)
        if filesystem.exists(inner):
            sys.exit(f"error: {path!r}: expected a new file, got one that exists. Remove it, or name another")
    for path, indices in zip(targets, split(len(rows)), strict=True):
        try:
            rows.iloc[indices].to_csv(path, index=False)
        except OSError as error:
            sys.exit(f"error: {path!r}: expected a file that can be written, got an error: {one_line(error)}")
        print(f"{len(indices):,} rows in {path}")


if __name__ == "__main__":
    main()

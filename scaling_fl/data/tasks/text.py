"""Any labelled texts: a CSV, TSV, JSON Lines or parquet file, or a data set of the hub."""

from scaling_fl.data.files import is_file, read_split
from scaling_fl.data.tasks.task import Task

TASK = Task(read_split, is_whole=lambda path: not is_file(path))

"""Let a classifier label texts, and say how probable each label is: that of a run, or any other with a head."""

import argparse
from collections.abc import Sequence

from transformers.utils import logging

from scaling_fl.command.results import Parser, add_common, check_output, one_sentence, write_rows
from scaling_fl.experiment.inputs import read_texts
from scaling_fl.experiment.predictions import predict
from scaling_fl.experiment.saved import load_for_use


def main(arguments: Sequence[str]) -> None:
    """Label the texts that the arguments name."""
    logging.set_verbosity_error()
    with one_sentence():
        _predict(_make_parser().parse_args(arguments))


def _make_parser() -> argparse.ArgumentParser:
    parser = Parser(prog="scaling-fl predict", description=__doc__)
    add_common(parser)
    texts = parser.add_mutually_exclusive_group(required=True)
    texts.add_argument("--text", action="append", metavar="TEXT", help="may be given several times")
    texts.add_argument("--texts", metavar="FILE", help="a table such as .csv and .jsonl, or one text a line")
    parser.add_argument("--text-column", help="of that table (default: that of the training, or text)")
    parser.add_argument("--max-seq-len", type=int, help="of a model without a run beside it: tokens (default: 128)")
    parser.add_argument("--batch-size", type=int, default=64, help="texts that are computed at once (default: 64)")
    return parser


def _predict(given: argparse.Namespace) -> None:
    if given.text_column is not None and given.texts is None:
        raise ValueError(f"--text-column: expected none without --texts, got {given.text_column!r}")
    for name, value in (("--batch-size", given.batch_size), ("--max-seq-len", given.max_seq_len)):
        if value is not None and value < 1:
            raise ValueError(f"{name}: expected a whole number >= 1, got {value}")
    check_output(given.output, overwrite=given.overwrite)
    saved = load_for_use(given.model, generates=False, max_seq_len=given.max_seq_len)
    texts = given.text or read_texts(given.texts, saved.settings, given.text_column)
    found = predict(saved.model, saved.encoder, saved.settings.task_name, saved.labels, texts, given.batch_size)
    rows = ({"text": text, **prediction._asdict()} for text, prediction in zip(texts, found, strict=True))
    write_rows(rows, given.output, "texts")

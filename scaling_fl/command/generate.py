"""Let a language model answer questions: that of a run, by the template with which it was trained, or any other."""

import argparse
import io
import sys
from collections.abc import Iterator, Sequence

from transformers.utils import logging

from scaling_fl.command.results import Parser, add_common, check_output, one_sentence, write_rows
from scaling_fl.experiment.answers import Answering, Question, answer
from scaling_fl.experiment.inputs import read_questions
from scaling_fl.experiment.saved import Saved, load_for_use

PROMPT = "> "


def main(arguments: Sequence[str]) -> None:
    """Answer the questions that the arguments ask."""
    logging.set_verbosity_error()
    with one_sentence():
        _generate(_make_parser().parse_args(arguments))


def _make_parser() -> argparse.ArgumentParser:
    parser = Parser(prog="scaling-fl generate", description=__doc__)
    add_common(parser)
    asks = parser.add_mutually_exclusive_group(required=True)
    asks.add_argument("--question", metavar="TEXT", help="print its answer while it is generated")
    asks.add_argument("--questions", metavar="FILE", help="one a line, or a table such as .jsonl with question")
    asks.add_argument("--interactive", action="store_true", help="ask until the end of input; each question is alone")
    parser.add_argument("--template", help="as in training, such as chat; of a model that was trained elsewhere")
    parser.add_argument("--max-new-tokens", type=int, default=256, help="a longer answer is cut (default: 256)")
    parser.add_argument("--temperature", type=float, default=0.0, help="0, the default: the most probable tokens")
    parser.add_argument("--top-p", type=float, help="draw from the tokens that add up to this (default: 1)")
    parser.add_argument("--seed", type=int, help="of what is drawn (default: 0)")
    return parser


def _generate(given: argparse.Namespace) -> None:
    for name, value in (("--top-p", given.top_p), ("--seed", given.seed)):
        if value is not None and not given.temperature:
            raise ValueError(f"{name}: expected none without --temperature, as nothing is drawn, got {value}")
    top_p, seed = (1.0 if given.top_p is None else given.top_p), given.seed or 0
    how = Answering(given.max_new_tokens, given.temperature, top_p, seed)
    check_output(given.output, overwrite=given.overwrite)
    if given.interactive and given.output is not None:
        raise ValueError(f"--output: expected none with --interactive, got {given.output!r}")
    questions = read_questions(given.questions) if given.questions is not None else [Question(given.question or "")]
    saved = load_for_use(given.model, generates=True, template=given.template)
    if given.interactive:
        _converse(saved, how)
    elif given.output is None and given.questions is None:
        _print_answer(saved, questions[0], how)
    else:
        answers = answer(saved.model, saved.encoder, questions, how)
        write_rows(_rows(questions, answers), given.output, "answers")


def _rows(questions: Sequence[Question], answers: Iterator[str]) -> Iterator[dict[str, str]]:
    has_context = any(question.context for question in questions)
    for question, text in zip(questions, answers, strict=True):
        yield {"question": question.text, **({"context": question.context} if has_context else {}), "answer": text}


def _print_answer(saved: Saved, question: Question, how: Answering) -> None:
    """Print an answer while it is generated."""
    for _ in answer(saved.model, saved.encoder, [question], how, lambda text: print(text, end="", flush=True)):
        print()


def _converse(saved: Saved, how: Answering) -> None:
    """Answer each line of the input; a question that cannot be answered does not end this."""
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")  # bytes that are no text are a question like others
    prompt = PROMPT if sys.stdin.isatty() else ""
    while True:
        try:
            line = input(prompt)
        except EOFError:
            print(end="\n" * bool(prompt))
            return
        if line.strip():
            try:
                _print_answer(saved, Question(line), how)
            except ValueError as error:
                print(f"error: {error}", file=sys.stderr)

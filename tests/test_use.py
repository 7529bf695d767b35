"""The result is used as it was trained: questions by its template, texts as long as in training."""

import csv
import io
import json
import random
import re
import shlex
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import LABELS, ROOT, Command, fork_script, refusal, succeed, wait_for_exit
from test_answers import LEARNED, encoder, learned
from test_instruct import PAIRS, put_model, put_rows
from test_readme import commands_of
from tiny_llm import make_llama, make_tokenizer
from transformers import pipeline

from scaling_fl import Run
from scaling_fl.command import generate, predict
from scaling_fl.command.experiment import with_text_keys
from scaling_fl.distributed.world import world
from scaling_fl.experiment.answers import Answering, Question, _Stream, answer, tokenise_questions
from scaling_fl.experiment.predictions import predict as label
from scaling_fl.experiment.run import train_on_rank
from scaling_fl.experiment.saved import load_for_use
from scaling_fl.experiment.settings import Settings
from scaling_fl.records.rounds import Record

pytest.importorskip("peft")
QUESTIONS = [question for question, _ in PAIRS[:3]]
TEXTS = ["goal match team", "chip code disk and was very old", "soup", "the bread in the disk " * 20]
DRAWN = Answering(12, temperature=4.0, top_p=0.9, seed=3)


def keep_run(folder: Path, settings: Settings) -> str:
    """Train in this process, and write what the command writes of a run."""
    folder.mkdir()
    info: dict[str, Any] = {}
    with world():
        train_on_rank(settings, Record(folder=str(folder), add_info=info.update))
    found = {"config.json": with_text_keys(vars(settings)), "run.json": {"status": "COMPLETED"}, "info.json": info}
    for name, values in found.items():
        (folder / name).write_text(json.dumps(values, default=str))
    return str(folder)


@pytest.fixture(scope="module")
def of_answers(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The run of a language model that has an adapter and was merged, too."""
    folder = tmp_path_factory.mktemp("answers")
    settings = Settings(
        task_name="instruct",
        model=put_model(folder, make_llama(num_positions=512)),
        train_path=put_rows(folder, "train.jsonl", PAIRS),
        test_path=put_rows(folder, "test.jsonl", PAIRS[:2]),
        **{"template": "chat", "max_seq_len": 256, "site_ids": [0], "num_rounds": 1, "learning_rate": 0.02},
        **{"batch_size": 2, "report": False, "adapter": "lora", "lora_targets": "all-linear", "merge": True},
    )
    return keep_run(folder / "run", settings)


@pytest.fixture(scope="module")
def of_labels(tmp_path_factory: pytest.TempPathFactory, small_run: dict[str, Any]) -> str:
    """The run of a classifier."""
    values = {name: str(value) if isinstance(value, Path) else value for name, value in small_run.items()}
    settings = Settings(**values | {"num_rounds": 1, "num_local_epochs": 8, "site_ids": [0], "max_seq_len": 16})
    return keep_run(tmp_path_factory.mktemp("labels") / "run", settings)


def say(capsys: pytest.CaptureFixture[str], command: Any, *arguments: str) -> str:
    """Run a subcommand in this process and return what it prints."""
    capsys.readouterr()
    command.main(arguments)
    printed = capsys.readouterr()
    assert printed.err == ""
    return printed.out


def refuse(command: Any, *arguments: str) -> str:
    """Return the sentence with which a subcommand ends."""
    with pytest.raises(SystemExit) as caught:
        command.main(arguments)
    sentence = str(caught.value.code)
    assert sentence.startswith("error: ")
    assert "\n" not in sentence
    return sentence.removeprefix("error: ")


def rows_of(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


@pytest.mark.parametrize("how", [Answering(12), DRAWN], ids=["greedy", "drawn"])
def test_answers_of_a_file_are_those_to_each_question_alone(of_answers: str, how: Answering) -> None:
    saved = load_for_use(of_answers, generates=True)
    questions = [Question(text) for text in [*QUESTIONS, *(f"Name {number} animals." for number in range(8))]]
    together = list(answer(saved.model, saved.encoder, questions, how))
    assert together == [next(answer(saved.model, saved.encoder, [question], how)) for question in questions]
    assert len(set(together)) > 3


def test_a_question_that_is_asked_again_draws_another_answer_and_the_seed_decides(of_answers: str) -> None:
    saved = load_for_use(of_answers, generates=True)
    often = [Question(QUESTIONS[0])] * 5
    found = list(answer(saved.model, saved.encoder, often, DRAWN))
    assert len(set(found)) > 1
    assert list(answer(saved.model, saved.encoder, often, DRAWN)) == found
    assert list(answer(saved.model, saved.encoder, often, Answering(12, 4.0, 0.9, seed=4))) != found
    assert len(set(answer(saved.model, saved.encoder, often, Answering(12)))) == 1


def test_a_run_its_model_its_merged_model_and_python_answer_alike_and_not_as_the_base(of_answers: str) -> None:
    questions, run = list(map(Question, QUESTIONS)), Run.load(of_answers)
    places = [of_answers, f"{of_answers}/model", f"{of_answers}/model_merged", f"{of_answers}/best"]
    found = []
    for place in places:
        saved = load_for_use(place, generates=True)
        assert (saved.encoder.template, saved.settings.max_seq_len) == ("chat", 256)
        assert not saved.model.training
        found.append(list(answer(saved.model, saved.encoder, questions, Answering(12))))
    base = load_for_use(run.settings.model, generates=True, template="chat")
    untrained = list(answer(base.model, base.encoder, questions, Answering(12)))
    assert found[0] == found[1] == found[2] != untrained
    assert [run.ask(text, max_new_tokens=12) for text in QUESTIONS] == found[0]
    saved = load_for_use(of_answers, generates=True)
    drawn = next(answer(saved.model, saved.encoder, questions[:1], DRAWN))
    assert run.ask(QUESTIONS[0], max_new_tokens=12, temperature=4.0, top_p=0.9, seed=3) == drawn


@pytest.mark.parametrize("name", ["model", "model_merged", "best"])
def test_a_copied_folder_says_how_it_was_trained(
    of_answers: str, tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    copied = str(shutil.copytree(f"{of_answers}/{name}", tmp_path / "copied"))
    given = ["--model", copied, "--question", QUESTIONS[0], "--max-new-tokens", "12"]
    expected = say(capsys, generate, "--model", f"{of_answers}/{name}", *given[2:])
    assert say(capsys, generate, *given) == say(capsys, generate, *given, "--template", "chat") == expected
    assert refuse(generate, *given, "--template", "plain") == (
        f"template: expected none, as {copied} was trained with 'chat', got 'plain'"
    )
    settings = partial(Settings, task_name="instruct", model=copied, site_ids=[0], num_rounds=0, max_seq_len=64)
    assert settings(train_path="exercises").template == "chat", "and not that of the data"
    rows = {name: getattr(Run.load(of_answers).settings, name) for name in ("train_path", "test_path")}
    for template, says in ((None, False), ("chat", False), ("plain", True)):
        with world():
            train_on_rank(settings(**rows, **({"template": template} if template else {})))
        printed = capsys.readouterr().out
        assert f", template {template or 'chat'}" in printed
        assert (f"template  plain, but {copied} was trained with chat\n" in printed) == says
    Path(copied, "scaling_fl.json").unlink()
    assert settings(**rows).template == "alpaca", "the default of the task"
    assert refuse(generate, *given).startswith("template: expected one of alpaca, ")
    assert say(capsys, generate, *given, "--template", "chat") == expected


def test_a_model_of_the_hub_says_how_it_was_trained(
    of_answers: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    repository = tmp_path / "models--user--mine"
    shutil.copytree(f"{of_answers}/model", repository / "snapshots" / "a-commit")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("a-commit")
    assert load_for_use("user/mine", generates=True).encoder.template == "chat"


def test_what_a_model_says_of_its_training_is_an_object_and_of_classifiers_nothing(
    of_answers: str, of_labels: str, tmp_path: Path
) -> None:
    assert not Path(of_labels, "model", "scaling_fl.json").exists()
    copied = shutil.copytree(f"{of_answers}/model_merged", tmp_path / "copied")
    (copied / "scaling_fl.json").write_text(json.dumps({"template": "alpaca", "of_a_later_version": 1}))
    assert Settings(task_name="instruct", model=str(copied)).template == "alpaca"
    assert Settings(model=str(copied)).template is None, "the task has no conversations"
    for content in ("{", "[1]", "null", '"template"'):
        (copied / "scaling_fl.json").write_text(content)
        assert refuse(generate, "--model", str(copied), "--question", "Q").startswith(
            f"{copied}/scaling_fl.json: expected an object in JSON, got "
        )


def test_answers_end_with_the_token_of_the_template_though_the_model_lists_another_one() -> None:
    """As in `test_answers`, in pieces that joined are the answer."""
    questions = [Question(row.turns[0].content) for row in LEARNED[:3]]
    pieces: list[str] = []
    side, mode = encoder().tokenizer.padding_side, learned().training
    found = list(answer(learned(), encoder(), questions, Answering(40), pieces.append))
    assert found == [row.turns[1].content for row in LEARNED[:3]]
    assert "".join(pieces) == "".join(found)
    assert len(pieces) > 3 * len(found)
    assert (encoder().tokenizer.padding_side, learned().training) == (side, mode)


def test_a_context_is_written_as_in_training(of_answers: str) -> None:
    saved = load_for_use(of_answers, generates=True)
    both, joined = Question("Which?", "It is red."), Question("Which?\n\nIt is red.")
    found = tokenise_questions(saved.model, saved.encoder, [both, joined, Question("Which?")])
    assert found[0] == found[1] != found[2]


@pytest.mark.parametrize("kind", ["bytes", "pieces"])
def test_what_streams_is_never_half_a_character_and_is_all_of_the_text(kind: str) -> None:
    text, pieces = "A dög \U0001f415 ran, the r\ufffdd one", list[str]()
    tokenizer = make_tokenizer(kind)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    stream = _Stream(tokenizer, pieces.append)
    whole = tokenizer.decode(ids, skip_special_tokens=True).strip()
    for length in range(1, len(ids) + 1):
        stream.add(ids[:length])
    stream.finish(whole)
    assert "".join(pieces) == whole == text
    assert len(pieces) > 5


def test_the_command_answers_one_question_a_file_and_standard_input(
    of_answers: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    given = ["--model", f"{of_answers}/model", "--max-new-tokens", "12"]
    alone = [say(capsys, generate, *given, "--question", text) for text in QUESTIONS]
    run = Run.load(of_answers)
    expected = [run.ask(text, max_new_tokens=12) for text in QUESTIONS]
    assert alone == [f"{text}\n" for text in expected]
    (tmp_path / "q.txt").write_text("\n".join(QUESTIONS) + "\n\n")
    (tmp_path / "q.jsonl").write_text("".join(json.dumps({"question": text, "id": 1}) + "\n" for text in QUESTIONS))
    (tmp_path / "q.csv").write_text("id,question\n" + "".join(f"1,{text}\n" for text in QUESTIONS))
    wanted = [{"question": text, "answer": found} for text, found in zip(QUESTIONS, expected, strict=True)]
    for name in ("q.txt", "q.jsonl", "q.csv"):
        assert rows_of(say(capsys, generate, *given, "--questions", str(tmp_path / name))) == wanted
    for name in ("a.jsonl", "a.csv"):
        target = tmp_path / name
        said = say(capsys, generate, *given, "--questions", str(tmp_path / "q.txt"), "--output", str(target))
        assert said == f"3 answers in {target}\n"
        text = target.read_text()
        assert (rows_of(text) if name == "a.jsonl" else list(csv.DictReader(io.StringIO(text)))) == wanted
        assert not Path(f"{target}.part").exists()
    monkeypatch.setattr("sys.stdin", io.StringIO(f"{QUESTIONS[0]}\n\n{QUESTIONS[1]}\n"))
    assert say(capsys, generate, *given, "--interactive") == "".join(alone[:2])


def test_a_question_that_cannot_be_answered_does_not_end_a_conversation(
    of_answers: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    typed = io.BytesIO(b"Who? " * 999 + b"\n\xff\nWhich?\n")
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(typed, "utf-8"))
    generate.main(["--model", of_answers, "--max-new-tokens", "12", "--interactive"])
    printed = capsys.readouterr()
    first, second = printed.err.splitlines()
    assert first.startswith("error: questions: question 1: expected a prompt of 1 to 512 tokens, got ")
    assert second.startswith("error: questions: question 1: its text: expected UTF-8, got ")
    assert printed.out == f"{Run.load(of_answers).ask('Which?', max_new_tokens=12)}\n"


def test_predictions_are_those_of_transformers(of_labels: str, capsys: pytest.CaptureFixture[str]) -> None:
    run = Run.load(of_labels)
    run.model.train()
    before = random.getstate(), repr(np.random.get_state()), torch.get_rng_state().tolist()
    found = run.predict(TEXTS)
    assert run.model.training
    assert before == (random.getstate(), repr(np.random.get_state()), torch.get_rng_state().tolist())
    theirs = pipeline("text-classification", model=run.model.eval(), tokenizer=run.tokenizer, top_k=None)
    for prediction, scores in zip(found, theirs(TEXTS, truncation=True, max_length=16), strict=True):
        assert prediction.label == scores[0]["label"]
        assert list(prediction.probability) == run.labels == sorted(LABELS)
        assert prediction.probability == pytest.approx({of["label"]: of["score"] for of in scores}, abs=1e-6)
    assert len({prediction.label for prediction in found}) > 1
    assert run.predict([]) == []
    arguments = [word for text in TEXTS for word in ("--text", text)]
    for place in (of_labels, f"{of_labels}/model"):
        rows = rows_of(say(capsys, predict, "--model", place, *arguments, "--batch-size", "3"))
        assert [row["text"] for row in rows] == TEXTS
        assert [row["label"] for row in rows] == [prediction.label for prediction in found]
        for row, prediction in zip(rows, found, strict=True):
            assert row["probability"] == pytest.approx(prediction.probability, abs=1e-6)


def test_an_adapter_of_a_classifier_labels_as_the_merged_model(tmp_path: Path, small_run: dict[str, Any]) -> None:
    values = {name: str(value) if isinstance(value, Path) else value for name, value in small_run.items()}
    adapter = {"adapter": "lora", "lora_targets": "all-linear", "merge": True, "learning_rate": 0.02}
    folder = keep_run(tmp_path / "run", Settings(**values | adapter | {"num_rounds": 1, "site_ids": [0]}))
    found = []
    for name in ("model", "model_merged"):
        saved = load_for_use(f"{folder}/{name}", generates=False)
        found.append(list(label(saved.model, saved.encoder, "text", saved.labels, TEXTS, 4)))
    assert Run.load(folder).predict(TEXTS) == found[0]
    for adapted, merged in zip(*found, strict=True):
        assert adapted.probability == pytest.approx(merged.probability, abs=1e-6)


def test_a_model_with_prompt_tuning_answers_a_file_as_each_question_alone(tmp_path: Path) -> None:
    settings = Settings(
        task_name="instruct",
        model=put_model(tmp_path, make_llama(num_positions=256)),
        train_path=put_rows(tmp_path, "train.jsonl", PAIRS),
        test_path=put_rows(tmp_path, "test.jsonl", PAIRS[:2]),
        **{"template": "chat", "max_seq_len": 128, "site_ids": [0], "num_rounds": 0, "report": False},
        adapter_config={"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 4},
    )
    saved = load_for_use(keep_run(tmp_path / "run", settings), generates=True)
    questions = [Question(text) for text in [*QUESTIONS, "Who?"]]
    for how in (Answering(12), DRAWN):
        pieces: list[str] = []
        alone = [next(answer(saved.model, saved.encoder, [question], how)) for question in questions]
        assert list(answer(saved.model, saved.encoder, questions, how)) == alone
        assert list(answer(saved.model, saved.encoder, questions, how, pieces.append)) == alone
        assert "".join(pieces) == "".join(alone)


def test_texts_of_a_file_are_labelled_in_their_order(
    of_labels: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = ["goal, match", "chip", 'say "soup"', "old disk"]
    with (tmp_path / "t.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("id", "text"), *enumerate(texts)])
    (tmp_path / "t.jsonl").write_text("".join(json.dumps({"review": text}) + "\n" for text in texts))
    (tmp_path / "t.txt").write_text("\n".join(texts))
    expected = Run.load(of_labels).predict(texts)
    for name, options in (("t.csv", []), ("t.jsonl", ["--text-column", "review"]), ("t.txt", [])):
        target = tmp_path / f"of-{name}.csv"
        given = ["--model", of_labels, "--texts", str(tmp_path / name), *options, "--output", str(target)]
        assert say(capsys, predict, *given) == f"4 texts in {target}\n"
        rows = list(csv.DictReader(target.open(newline="")))
        assert [row["text"] for row in rows] == texts
        for row, prediction in zip(rows, expected, strict=True):
            assert row["label"] == prediction.label
            for class_, probability in prediction.probability.items():
                assert float(row[f"probability_{class_}"]) == pytest.approx(probability, abs=1e-6)


def test_a_text_is_changed_as_the_task_of_the_training_changes_it(tmp_path: Path, tiny_model: str) -> None:
    """A new line of Yelp's files is written as a backslash and an n."""
    for name in ("train.csv", "test.csv"):
        rows = [f"{stars},good\\nsoup {number}" for number, stars in enumerate("1234512345")]
        (tmp_path / name).write_text("\n".join(rows))
    paths = {"train_path": str(tmp_path / "train.csv"), "test_path": str(tmp_path / "test.csv")}
    settings = Settings(task_name="yelp", model=tiny_model, max_seq_len=16, site_ids=[0], num_rounds=0, **paths)
    run = Run.load(keep_run(tmp_path / "run", settings))
    one, other, third = run.predict(["good\\nsoup", "good\nsoup", "good n soup"])
    assert one == other != third


REFUSED_ANSWERS = [
    (["--question", " "], "questions: question 1: expected a text, got none"),
    (["--question", "Who? " * 999], "questions: question 1: expected a prompt of 1 to 512 tokens, got "),
    (["--question", "Q", "--template", "alpaca"], "template: expected none, as {run} was trained with 'chat', got "),
    (["--question", "a\udcff"], "questions: question 1: its text: expected UTF-8, got an invalid start byte"),
    (["--question", "Q", "--temperature", "-1"], "temperature: expected 0 or a number >= 1e-06 and < 1e+06, got -1.0"),
    (["--question", "Q", "--temperature", "nan"], "temperature: expected 0 or a number >= 1e-06 and < 1e+06, got nan"),
    (
        ["--question", "Q", "--temperature", "1e-40"],
        "temperature: expected 0 or a number >= 1e-06 and < 1e+06, got 1e-40",
    ),
    (["--question", "Q", "--top-p", "0.5"], "--top-p: expected none without --temperature, as nothing is drawn"),
    (["--question", "Q", "--seed", "0"], "--seed: expected none without --temperature, as nothing is drawn"),
    (["--question", "Q", "--temperature", "1", "--top-p", "0"], "top_p: expected a number > 0 and <= 1, got 0.0"),
    (["--question", "Q", "--max-new-tokens", "0"], "max_new_tokens: expected a whole number >= 1, got 0"),
    (["--question", "Q", "--max-new-tokens", "x"], "argument --max-new-tokens: invalid int value: 'x'"),
    (["--question", "Q", "--interactive"], "argument --interactive: not allowed with argument --question"),
    ([], "one of the arguments --question --questions --interactive is required"),
    (["--interactive", "--output", "{tmp}/a.jsonl"], "--output: expected none with --interactive, got "),
    (["--question", "Q", "--output", "{tmp}/a.txt"], "--output: expected a file that ends in .jsonl or .csv, got "),
    (["--question", "Q", "--output", "{run}/rounds.jsonl"], "--output: expected a new file, got "),
    (["--question", "Q", "--output", "{tmp}/none/a.csv"], "--output: expected a file that can be written, got "),
    (["--question", "Q", "--overwrite"], "--overwrite: expected none without --output"),
    (["--questions", "{tmp}/none.txt"], "'{tmp}/none.txt': expected a file that can be read, got "),
    (["--questions", "{tmp}/empty.txt"], "'{tmp}/empty.txt': expected a line with text, got none"),
    (["--questions", "{tmp}/bad.jsonl"], "'{tmp}/bad.jsonl': row 2: expected a text in 'question', got none"),
    (["--questions", "{tmp}/broken.jsonl"], "'{tmp}/broken.jsonl': row 1: expected JSON, got an error: "),
    (["--questions", "{tmp}/bad.csv"], "'{tmp}/bad.csv': expected a column 'question', got 'prompt'"),
    (["--questions", "{tmp}/latin.txt"], "'{tmp}/latin.txt': line 1: expected UTF-8, got "),
]


@pytest.mark.parametrize(("options", "says"), REFUSED_ANSWERS)
def test_what_cannot_be_asked_is_one_sentence(of_answers: str, tmp_path: Path, options: list[str], says: str) -> None:
    (tmp_path / "empty.txt").write_text("\n \n")
    (tmp_path / "bad.jsonl").write_text('{"question": "Q"}\n{"prompt": "Q"}\n')
    (tmp_path / "broken.jsonl").write_text('{"question": "Q')
    (tmp_path / "bad.csv").write_text("prompt\nWho?\n")
    (tmp_path / "latin.txt").write_bytes("Où?\n".encode("latin-1"))
    places = {"tmp": str(tmp_path), "run": of_answers}

    def fill(text: str) -> str:
        return text.replace("{tmp}", places["tmp"]).replace("{run}", places["run"])

    assert refuse(generate, "--model", of_answers, *map(fill, options)).startswith(fill(says))


def test_a_model_of_the_other_kind_or_none_is_one_sentence(
    of_answers: str, of_labels: str, tiny_model: str, tmp_path: Path
) -> None:
    ask, labels = ["--question", "Q"], ["--text", "soup"]
    assert "expected a language model, got a classifier" in refuse(generate, "--model", of_labels, *ask)
    assert "expected a classifier, got a language model" in refuse(predict, "--model", of_answers, *labels)
    base = Run.load(of_answers).settings.model
    assert refuse(generate, "--model", base, *ask).startswith(
        "template: expected one of alpaca, vicuna, flowertune, plain, chat, as neither a run beside the model nor "
    )
    assert refuse(generate, "--model", base, *ask, "--template", "chta").startswith(
        "template: expected one of alpaca, "
    )
    says = refuse(generate, "--model", tiny_model, *ask, "--template", "plain")
    assert says.startswith("model: expected a language model, got a classifier")
    assert refuse(predict, "--model", base, *labels, "--max-seq-len", "32").startswith("model")
    assert refuse(predict, "--model", "no/where", *labels).startswith("model: expected a nickname (")
    (tmp_path / "runs").mkdir()
    for command, given in ((generate, ask), (predict, labels)):
        says = refuse(command, "--model", f"{tmp_path}/runs", *given)
        assert says == f"model: expected a run or a model, got '{tmp_path}/runs', which has no config.json"
    for template in ([], ["--template", "chat"]):
        says = refuse(generate, "--model", f"{of_answers}/modle", *ask, *template)
        assert says.startswith("model: expected a nickname (")


def test_what_python_cannot_ask_or_label_is_one_sentence(of_answers: str, of_labels: str, tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("id,review\n1,good\n")
    given = ["--model", of_labels, "--texts", str(tmp_path / "t.csv")]
    assert refuse(predict, *given).startswith("text_column: expected a column of ")
    assert refuse(predict, "--model", of_labels, "--text", "a", "--max-seq-len", "8").startswith(
        f"max_seq_len: expected none, as {of_labels} was trained with 16, got 8"
    )
    assert refuse(predict, *given, "--batch-size", "0").startswith("--batch-size: expected a whole number >= 1")
    assert refuse(predict, "--model", of_labels, "--text", "a", "--text-column", "b").startswith("--text-column: ")
    run = Run.load(of_labels)
    assert refusal(lambda: run.predict("soup")).startswith("texts: expected a list of texts, got one text")
    assert refusal(lambda: run.predict(["soup", 3])) == "texts: expected texts, got int in place 2"
    assert refusal(lambda: run.predict(["soup", "\ud800"])).startswith("texts: text 2: expected whole characters, got ")
    (tmp_path / "blank.txt").write_text("\n \n")
    says = refuse(predict, "--model", of_labels, "--texts", f"{tmp_path}/blank.txt")
    assert says == f"'{tmp_path}/blank.txt': expected a line with text, got none"
    assert run.predict(text for text in ["soup"]) == run.predict(["soup"])
    assert refusal(lambda: run.ask("Who?")).startswith("ask: expected a run of a language model, got ")
    llm = Run.load(of_answers)
    assert refusal(lambda: llm.ask(["Who?"])) == "questions: question 1: expected a text, got list"  # type: ignore[arg-type]
    assert refusal(lambda: llm.ask("Who?", top_p=None)) == "top_p: expected a number, got None"  # type: ignore[arg-type]


def test_a_run_that_did_not_end_is_one_sentence(of_answers: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text((Path(of_answers) / "config.json").read_text())
    (tmp_path / "run.json").write_text('{"status": "FAILED"}')
    says = refuse(generate, "--model", str(tmp_path), "--question", "Q")
    assert says == f"model: expected a run with a model, got {str(tmp_path)!r}, which is FAILED"
    assert refusal(lambda: Run.load(tmp_path).ask("Who?")).startswith(f"{tmp_path}: expected a run with a model, got ")
    (tmp_path / "run.json").write_text('{"status": "RUN')
    says = refuse(generate, "--model", str(tmp_path), "--question", "Q")
    assert says.startswith(f"'{tmp_path}/run.json': expected JSON, got an error: ")


def test_rows_of_a_run_that_is_stopped_stay(of_answers: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_: Any) -> Any:
        yield "one"
        raise KeyboardInterrupt

    monkeypatch.setattr(generate, "answer", stop)
    (tmp_path / "q.txt").write_text("Who?\nWhich?\n")
    with pytest.raises(SystemExit, match="130"):
        generate.main(["--model", of_answers, "--questions", f"{tmp_path}/q.txt", "--output", f"{tmp_path}/a.jsonl"])
    assert not (tmp_path / "a.jsonl").exists()
    assert rows_of((tmp_path / "a.jsonl.part").read_text()) == [{"question": "Who?", "answer": "one"}]


@pytest.mark.parametrize("words", [["generate.py"], ["train_federated.py", "generate"]])
def test_the_scripts_and_the_command_do_the_same(
    of_answers: str, tmp_path: Path, words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["--model", of_answers, "--question", "Which?", "--max-new-tokens", "5"]
    output = tmp_path / "output.txt"
    pid = fork_script(ROOT / "scripts" / words[0], [*words[1:], *given], output, tmp_path, {})
    assert succeed((wait_for_exit(pid), output.read_text())) == say(capsys, generate, *given)


def test_a_run_of_the_command_labels_texts(command: Command, tmp_path: Path) -> None:
    succeed(command(num_rounds=0, site_ids=[0]))
    output = tmp_path / "labels.txt"
    arguments = ["--model", f"{tmp_path}/runs/1/model", "--text", "soup"]
    pid = fork_script(ROOT / "scripts" / "predict.py", arguments, output, tmp_path, {})
    (row,) = rows_of(succeed((wait_for_exit(pid), output.read_text())))
    assert row["label"] in LABELS
    assert sum(row["probability"].values()) == pytest.approx(1)


def test_the_commands_and_the_python_of_the_page_run(
    of_answers: str, of_labels: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("runs").mkdir()
    Path("runs/3").symlink_to(of_answers)
    Path("runs/1").symlink_to(of_labels)
    Path("questions.txt").write_text("Who?\n")
    Path("questions.jsonl").write_text('{"question": "Who?", "context": "It is red."}\n')
    Path("texts.csv").write_text("text\nsoup\n")
    monkeypatch.setattr("sys.stdin", io.StringIO("Who?\n"))
    commands = commands_of("docs/use_the_model.md")
    assert len(commands) == 6
    for command in commands:
        _, name, *arguments = shlex.split(command)
        short = ["--max-new-tokens", "5"] if name == "generate" else []
        assert say(capsys, {"generate": generate, "predict": predict}[name], *arguments, *short)
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs/use_the_model.md").read_text(), re.DOTALL)
    exec("\n".join(blocks).replace("max_new_tokens=100", "max_new_tokens=5"), {})
    merged = load_for_use("merged", generates=True, template="chat")
    answers = list(answer(merged.model, merged.encoder, list(map(Question, QUESTIONS)), Answering(12)))
    run = Run.load("runs/3")
    assert answers == [run.ask(text, max_new_tokens=12) for text in QUESTIONS]
    for place in ("runs/3/model_merged", "runs/3/model"):
        text = pipeline("text-generation", place, max_new_tokens=5)("Which?")[0]["generated_text"]
        assert text.startswith("Which?")

"""A run that has ended, read from its folder."""

import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from scaling_fl.data.tasks import is_generative
from scaling_fl.errors import one_line
from scaling_fl.experiment.settings import FIELDS, Settings
from scaling_fl.records.export import BEST_FOLDER, MODEL_FOLDER
from scaling_fl.records.rounds import ROUNDS
from scaling_fl.training.metrics import Metrics

CONFIG, RECORD, INFO = "config.json", "run.json", "info.json"  # Sacred's files of a run


def is_run(folder: str) -> bool:
    """Tell whether a folder is that of a run."""
    return all(os.path.isfile(os.path.join(folder, name)) for name in (CONFIG, RECORD))


@dataclass(frozen=True)
class Run:
    """A run in a folder, such as runs/3, whether it was finished or interrupted.

    Args:
        folder: of the run's files.
    """

    folder: str

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> "Run":
        """Return the run in a folder.

        Raises:
            ValueError: the folder is not that of a run.
        """
        path = os.path.abspath(folder)
        if not is_run(path):
            raise ValueError(
                f"{os.fspath(folder)!r}: expected the folder of a run, such as runs/1, got one without config.json and "
                "run.json"
            )
        return cls(path)

    @cached_property
    def settings(self) -> Settings:
        """The settings; `train(run.settings)` continues the run if it has `checkpoints_dir`, or else repeats it."""
        values = self._read(CONFIG)
        unknown = [name for name in values if name not in FIELDS and not name.startswith("__")]
        if unknown:
            raise ValueError(f"{self.folder}: expected settings of this version, got others: {', '.join(unknown)}")
        return Settings(**{name: value for name, value in values.items() if name in FIELDS})

    @property
    def status(self) -> str:
        """How the run ended: COMPLETED, INTERRUPTED or FAILED; or RUNNING."""
        return self._read(RECORD)["status"]

    @cached_property
    def history(self) -> list[Metrics]:
        """The metrics of each round from round 0, with its number as `round`; see docs/metrics.md."""
        path = os.path.join(self.folder, ROUNDS)
        if not os.path.exists(path):
            return []
        with open(path, encoding="utf-8") as file:
            lines = [json.loads(line) for line in file if line.endswith("\n")]  # the last may be half written
        return [sites_as_numbers(metrics) for metrics in {line["round"]: line for line in lines}.values()]

    @property
    def rounds(self) -> Any:
        """The history as a pandas frame, a row a round; a metric by site is a dict."""
        import pandas

        return pandas.DataFrame(self.history).set_index("round") if self.history else pandas.DataFrame()

    @cached_property
    def labels(self) -> list[str]:
        """The names of the classes, by their number in the model's output; none of a language model."""
        found = self._read(INFO).get("labels")
        return self._miss("labels") if found is None else found

    @cached_property
    def sha256(self) -> str:
        """The SHA-256 of the last global weights.

        Raises:
            ValueError: the run did not reach its end.
        """
        return self._read(INFO).get("sha256") or self._miss("the SHA-256 of its weights")

    @property
    def best_round(self) -> int | None:
        """The best round by the setting `best_metric`; None if there is none.

        Raises:
            ValueError: the run did not reach its end.
        """
        return (self._read(INFO).get("best") or self._miss("a best round"))["round"]

    @cached_property
    def model(self) -> Any:
        """The model with the last global weights, a `PreTrainedModel` in evaluation mode.

        Raises:
            ValueError: the run did not reach its end.
        """
        return self._load_model(MODEL_FOLDER, "a model")

    @cached_property
    def best_model(self) -> Any:
        """The model with the global weights of the best round, in evaluation mode.

        Raises:
            ValueError: there is no best round, or the run did not reach its end.
        """
        if self.status == "COMPLETED" and not os.path.isdir(os.path.join(self.folder, BEST_FOLDER)):
            why = "best_metric=None" if self.settings.best_metric is None else "one whose weights are not kept any more"
            raise ValueError(f"{self.folder}: expected a run with a best model, got {why}")
        return self._load_model(BEST_FOLDER, "a best model")

    @cached_property
    def tokenizer(self) -> Any:
        """The tokenizer of the model.

        Raises:
            ValueError: the run did not reach its end.
        """
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(self._folder_of(MODEL_FOLDER, "a model"))

    def ask(
        self,
        question: str,
        *,
        context: str = "",
        max_new_tokens: int = 256,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
    ) -> str:
        """Return what the language model answers, by the template with which it was trained.

        Args:
            question: alone: no answer depends on earlier ones.
            context: what it is about.
            max_new_tokens: a longer answer is cut.
            temperature: 0 takes the most probable tokens; above it they are drawn by `seed`.
            top_p: out of the most probable tokens whose probabilities add up to so much.
            seed: of what is drawn.

        Raises:
            ValueError: it is no run of a language model, or did not reach its end, or the question is too long.
        """
        from scaling_fl.experiment.answers import Answering, Question, answer

        self._check_kind("ask", is_a_language_model=True)
        how = Answering(max_new_tokens, temperature, top_p, seed)
        return next(answer(self.model, self._encoder, [Question(question, context)], how))

    def predict(self, texts: Iterable[str]) -> list[Any]:
        """Return the label of each text, and the probability of each label, as `label` and `probability`.

        Raises:
            ValueError: it is no run of a classifier, or did not reach its end, or a text is none.
        """
        from scaling_fl.experiment.predictions import predict

        self._check_kind("predict", is_a_language_model=False)
        settings = self.settings
        return list(predict(self.model, self._encoder, settings.task_name, self.labels, texts, settings.val_batch_size))

    def report(self, output: str | os.PathLike[str]) -> list[str]:
        """Write the report of the run, a page and its charts beside it.

        Args:
            output: path of the page, such as report.html.

        Returns:
            The paths of the written files, the page first.

        Raises:
            ValueError: the run has no finished round.
            OSError: the files cannot be written.
        """
        from scaling_fl import report

        return report.write([self.folder], os.fspath(output))

    @cached_property
    def _encoder(self) -> Any:
        """What turns texts into tokens, as in training."""
        from scaling_fl.experiment.objectives import make_encoder
        from scaling_fl.models.pretrained import load_pretrained

        folder, settings = self._folder_of(MODEL_FOLDER, "a model"), self.settings
        generates = is_generative(settings.task_name)
        return make_encoder(settings, load_pretrained(folder, settings.max_seq_len, generates=generates))

    def _check_kind(self, method: str, *, is_a_language_model: bool) -> None:
        if is_generative(self.settings.task_name) != is_a_language_model:
            wanted = "a language model" if is_a_language_model else "a classifier"
            raise ValueError(
                f"{method}: expected a run of {wanted}, got {self.folder} with task_name={self.settings.task_name!r}"
            )

    def _load_model(self, name: str, what: str) -> Any:
        from scaling_fl.experiment.objectives import find_dtype, find_objective
        from scaling_fl.models.adapter_files import load_saved
        from scaling_fl.models.loading import without_bars

        folder, loader = self._folder_of(name, what), find_objective(self.settings).auto_class.from_pretrained
        with without_bars():
            return load_saved(folder, loader, self.settings.quantise, find_dtype(self.settings))

    def _folder_of(self, name: str, what: str) -> str:
        folder = os.path.join(self.folder, name)
        return folder if os.path.isdir(folder) else self._miss(what)

    def _miss(self, what: str) -> Any:
        raise ValueError(
            f"{self.folder}: expected a run with {what}, got one that is {self.status}. train(run.settings) continues "
            "it from its checkpoints, or repeats it"
        )

    def _read(self, name: str) -> dict[str, Any]:
        """Return the JSON of a file, of which a run that failed early may have none."""
        path = os.path.join(self.folder, name)
        if not os.path.exists(path):
            return {}
        try:
            with open(path, encoding="utf-8") as file:
                return json.load(file)
        except ValueError as error:
            raise ValueError(f"{path!r}: expected JSON, got an error: {one_line(error)}") from error


def sites_as_numbers(metrics: Metrics) -> Metrics:
    """Return metrics read from JSON, in which the numbers of sites are texts."""
    return {
        name: {int(site): number for site, number in value.items()} if isinstance(value, dict) else value
        for name, value in metrics.items()
    }

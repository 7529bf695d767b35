"""How conversations become tokens, and which of these a model is to learn."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from datasets import Dataset
from datasets.fingerprint import Hasher
from transformers import PreTrainedTokenizerBase

from scaling_fl.data.backend import Backend, find_start_ids, make_backend
from scaling_fl.data.conversation import Conversation, Turn
from scaling_fl.data.encoder import check_ids, name_row, read_column, read_tokens, tokenise_once
from scaling_fl.data.examples import Encoded, Examples
from scaling_fl.data.templates import RESERVED, TEMPLATES
from scaling_fl.training.loop import NOT_TRAINED

VERSION = 2  # of how conversations are tokenised: another one ignores the tokens in the cache
PROBE = Conversation((Turn("user", "Name an animal."), Turn("assistant", "A dog.")))


class UnusableError(ValueError):
    """A row is a conversation, but there is nothing to learn from it."""


@dataclass(frozen=True)
class ConversationEncoder:
    """How conversations become the numbers that a model takes.

    Args:
        tokenizer: a fast one, which knows the place of each token in its text.
        template: a key of TEMPLATES.
        max_seq_len: longer conversations are cut to so many tokens.
        num_ids: ids of tokens are below it; None if the model has no such limit.
        train_on_prompt: train all tokens, those of prompts too.
        skip_long: leave out rows without an answer, or whose answer has no tokens of its own, and count them.

    Raises:
        ValueError: the tokenizer is not fast, or does not fit the template.
    """

    tokenizer: PreTrainedTokenizerBase
    template: str
    max_seq_len: int
    num_ids: int | None = None
    train_on_prompt: bool = False
    skip_long: bool = False
    fingerprint: str = field(init=False)  # of what tokens depend on
    backend: Backend = field(init=False)  # finds control tokens where a template has them, and not in contents
    start_ids: list[int] = field(init=False)  # that the tokenizer puts before a text
    end_id: int | None = field(init=False)  # of the control token after each answer, which ends a generated one

    def __post_init__(self) -> None:
        if not self.tokenizer.is_fast:
            raise ValueError("model: expected a fast tokenizer (tokenizer.json), got one that is not")
        chosen = VERSION, self.tokenizer, self.tokenizer.chat_template, self.template, self.max_seq_len
        object.__setattr__(self, "fingerprint", Hasher.hash((*chosen, self.train_on_prompt)))
        object.__setattr__(self, "backend", make_backend(self.tokenizer))
        object.__setattr__(self, "start_ids", find_start_ids(self.tokenizer))
        try:
            labels = self.tokenise(PROBE)[1]
        except ValueError as error:
            raise ValueError(f"template={self.template!r}: {error}") from None
        last = next(label for label in reversed(labels) if label != NOT_TRAINED)
        object.__setattr__(self, "end_id", last if last in self.backend.control_ids else None)

    def encode(self, rows: Dataset, label_names: Sequence[str] = ()) -> Encoded:
        """Tokenise conversations once (datasets caches the result on disk).

        Args:
            rows: of `conversation` and `group`.
            label_names: are not used, as there are none.

        Raises:
            ValueError: a row is no conversation that the template takes, or has no token to train, or one that the
                model does not take.
        """
        tokens = tokenise_once(rows, self._tokenise_rows, self.fingerprint)
        for problem, advice in (("error", ""), ("unusable", ", or use skip_long=True, which counts such rows")):
            found = np.array([text != "" for text in tokens[problem][:]], bool)
            if found.any() and not (self.skip_long and advice):
                index = int(found.argmax())
                raise ValueError(f"{name_row(rows, index)}: {tokens[problem][index]}{advice}")
        kept = np.flatnonzero(~found)
        if len(kept) == 0:
            raise ValueError("expected a row with a token to train, got none")
        columns, starts, lengths = read_tokens(tokens, ("input_ids", "labels"))
        check_ids(self.num_ids, rows, columns["input_ids"], starts)
        sums = np.cumsum(columns["labels"] != NOT_TRAINED)
        examples = Examples(
            columns,
            starts,
            lengths,
            np.zeros(len(rows), np.int64),
            padding={"input_ids": self._padding(), "labels": NOT_TRAINED},
            num_trained=sums[starts + lengths - 1] - sums[starts],  # nothing predicts the first token
        )
        examples = examples.select(kept).with_groups(np.array(rows["group"][:], object)[kept].tolist())
        cut = [read_column(tokens, name).to_numpy(zero_copy_only=False)[kept] for name in ("prompt_cut", "answer_cut")]
        lost = {"rows_left_out": found, "prompts_cut": cut[0], "answers_cut": cut[1]}
        return Encoded(examples, kept, {name: int(of_rows.sum()) for name, of_rows in lost.items()})

    def tokenise(self, conversation: Conversation) -> tuple[list[int], list[int], int]:
        """Return the tokens of a whole conversation and their labels, and how many come before the first answer.

        Raises:
            UnusableError: there is no answer, or the tokenizer joins it with its prompt.
            ValueError: the template does not take the conversation.
        """
        given = [turn.content.strip() for turn in conversation.turns if turn.role == "assistant"]
        if not given or not all(given):
            raise UnusableError("expected an answer, got none. Leave the row out")
        if RESERVED.search("".join(turn.content for turn in conversation.turns) + conversation.context):
            raise ValueError("expected characters of Unicode up to U+10FFEF, got others")
        text, answers = self._write(conversation)
        ids, places = self.backend.encode(text)
        firsts = np.searchsorted(places, [start for start, _ in answers])
        for first, (start, _) in zip(firsts.tolist(), answers, strict=True):
            if self.backend.encode(text[:start])[0] != ids[:first]:
                raise UnusableError(
                    "expected an answer whose first token begins where the prompt ends, got one that the tokenizer "
                    "joins with the end of the prompt. Remove the space between them"
                )
        is_answer = np.logical_or.reduce([(start <= places) & (places < end) for start, end in answers])
        if self.train_on_prompt:
            is_answer = np.arange(len(ids)) <= np.flatnonzero(is_answer).max(initial=-1)
        starts = [] if ids[: len(self.start_ids)] == self.start_ids else self.start_ids
        labels = np.where(is_answer, ids, NOT_TRAINED).tolist()
        return starts + ids, [NOT_TRAINED] * len(starts) + labels, len(starts) + int(firsts[0])

    def tokenise_prompt(self, conversation: Conversation) -> list[int]:
        """Return the tokens after which a model is to answer a conversation, the last turn of which is the user's."""
        asked = Conversation((*conversation.turns, *PROBE.turns[1:]), conversation.context, conversation.is_continued)
        text, answers = self._write(asked)
        ids, _ = self.backend.encode(text[: answers[-1][0]])
        return ids if ids[: len(self.start_ids)] == self.start_ids else self.start_ids + ids

    def _write(self, conversation: Conversation) -> tuple[str, list[tuple[int, int]]]:
        """Return the text of a conversation for the backend, and where its answers are."""
        text, answers = "", list[tuple[int, int]]()
        for piece in TEMPLATES[self.template](conversation, self.tokenizer):
            start = len(text)
            text += piece.text if piece.is_content else self.backend.rename(piece.text)
            if piece.is_answer:
                begins_before = answers and answers[-1][1] == start
                answers.append((answers.pop()[0] if begins_before else start, len(text)))
        return text, answers

    def _tokenise_rows(self, rows: dict[str, list[str]]) -> dict[str, list[Any]]:
        found = [self._tokenise_row(text) for text in rows["conversation"]]
        return {name: [row[name] for row in found] for name in found[0]}

    def _tokenise_row(self, text: str) -> dict[str, Any]:
        """Return the tokens of a row, cut to `max_seq_len`, or why there are none."""
        row = {"input_ids": [0], "labels": [NOT_TRAINED], "prompt_cut": False, "answer_cut": False}
        row |= {"error": "", "unusable": ""}
        try:
            ids, labels, num_before = self.tokenise(Conversation.from_json(text))
            ids, labels, num_prompt, num_answer = self._cut(ids, labels, num_before)
            labels[0] = NOT_TRAINED  # which nothing predicts, but the virtual tokens of an adapter
            if all(label == NOT_TRAINED for label in labels):
                raise UnusableError("expected a token to train after the first token, got none. Leave the row out")
        except UnusableError as error:
            return row | {"unusable": str(error)}
        except ValueError as error:
            return row | {"error": str(error)}
        return row | {"input_ids": ids, "labels": labels, "prompt_cut": num_prompt > 0, "answer_cut": num_answer > 0}

    def _cut(self, ids: list[int], labels: list[int], num_before: int) -> tuple[list[int], list[int], int, int]:
        """Cut a long prompt from the left, but for the start token, and what follows from the right.

        The prompt keeps half of the tokens if it needs them, and all that the answers leave.
        """
        num_after = len(ids) - num_before
        answers_cut = max(0, num_after + min(num_before, self.max_seq_len // 2) - self.max_seq_len)
        prompt_cut = max(0, len(ids) - answers_cut - self.max_seq_len)
        head = min(len(self.start_ids), num_before - prompt_cut)
        kept = [*range(head), *range(head + prompt_cut, len(ids) - answers_cut)]
        return [ids[at] for at in kept], [labels[at] for at in kept], prompt_cut, answers_cut

    def _padding(self) -> int:
        """Return an id that the model takes: attention masks and labels leave padding out, whichever token it is."""
        candidates = (self.tokenizer.pad_token_id, self.tokenizer.eos_token_id, 0)
        return next(id_ for id_ in candidates if id_ is not None and (self.num_ids is None or id_ < self.num_ids))

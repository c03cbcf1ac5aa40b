"""Turns single rows into prompts, exactly as in `fit`."""

from dataclasses import dataclass, replace
from typing import Any

from transformers import PreTrainedTokenizerBase

from lspade_train.errors import TaskError
from lspade_train.models.labels import Fork, Paths
from lspade_train.models.tokenization import choose_prefix, tokenize
from lspade_train.recipe import DataConfig
from lspade_train.tasks.base import Question, Record
from lspade_train.tasks.jsonl import JSONL
from lspade_train.tasks.prompts import Prompter
from lspade_train.tasks.registry import find_task
from lspade_train.tasks.rows import labels_of, load_rows, rename, shot_questions

RAW = "Use --raw for prompts without a template."
ROW_FAULTS = (ValueError, TypeError, KeyError, AttributeError)


@dataclass(frozen=True)
class Asked:
    """One prompt, ready for the runtime.

    Args:
        prompt: text, or token ids with the start token first.
        choices: answer -> its tokens after the prompt; None: any token may be the answer.
        texts: answers as text, for the runtime to resolve; None if `choices` is given.
        answer: the correct answer; None if the row has none.
        group: subgroup of the task; "" for none.
    """

    prompt: str | tuple[int, ...]
    choices: Paths | None = None
    texts: tuple[str, ...] | None = None
    answer: str | None = None
    group: str = ""


class Asker:
    """Renders rows by a recipe: its template, labels, solved examples and chat format.

    Args:
        config: the recipe's data section.
        tokenizer: the model's tokenizer.
        prefix: text between prompt and answer that the heads were fitted with; None if unknown:
            then it is chosen by each row's own answers, as by those of all rows in `fit`.

    Raises:
        TaskError: the task has no questions, or its solved examples cannot be loaded.
    """

    def __init__(
        self, config: DataConfig, tokenizer: PreTrainedTokenizerBase, prefix: str | None
    ) -> None:
        self.task = find_task(config.task)
        if self.task.to_question is None:
            raise TaskError(f"Task {self.task.name} has no questions. {RAW}")
        self.config, self.tokenizer = config, tokenizer
        given = config.prompt.answer_prefix
        self.prefix = prefix if given is None else given
        shots: list[Question] = []
        if config.prompt.shots:
            shots = shot_questions(config, load_rows(replace(config, limit=1), "train"))
        self.prompter = Prompter(config.prompt, self.task.template, tokenizer, shots)
        self.shown = tuple(dict.fromkeys(shot.answer or "" for shot in shots))

    @property
    def text_keys(self) -> frozenset[str]:
        """Keys of a row that contain the question, its options and its answer."""
        renamed = (self.config.columns or {}).values()
        return frozenset({"prompt", "question", "choices", "answer", *self.task.columns, *renamed})

    def row_of(self, text: str) -> Record:
        """The row for a line of plain text."""
        template = self.config.prompt.template or self.task.template
        return {"question" if "{question" in template else "prompt": text}

    def __call__(self, row: Record) -> Asked:
        """The prompt of a row.

        Args:
            row: a row of the task's data, answer optional, or `{"question", "choices"}`.

        Raises:
            TaskError: the row does not fit the task, or its answers' tokens are not distinct.
        """
        try:
            question = self._question(row)
        except ROW_FAULTS as error:
            raise TaskError(f"The row does not fit {self.task.name}: {error}. {RAW}") from error
        free = tuple(filter(None, [question.answer])) or self.shown
        lists = [question.labels] if question.labels else [(answer,) for answer in free]
        prefix, paths = "", {}
        if lists:
            prefix, paths = choose_prefix(
                self.tokenizer, lambda text: self.prompter(question, text), lists, self.prefix
            )
        (tokens,) = tokenize(self.tokenizer, [self.prompter(question, prefix)])
        if not question.labels:
            return Asked(tuple(tokens), answer=question.answer, group=question.group)
        shared = Fork.of(paths).shared
        rest = {label: path[len(shared) :] for label, path in paths.items()}
        return Asked((*tokens, *shared), rest, answer=question.answer, group=question.group)

    def _question(self, row: Record) -> Question:
        columns = {n: c for n, c in (self.config.columns or {}).items() if c in row}
        row = rename(row, columns)
        own = isinstance(row.get("choices"), list) or "prompt" in row
        build = JSONL.to_question if own else self.task.to_question
        assert build is not None  # __init__ refuses tasks without questions
        absent = dict.fromkeys(self.task.columns)
        question = build({**absent, **row}, labels_of(self.config, self.task))
        missing = [name for name, text in question.fields.items() if not _is_text(text)]
        if missing:
            raise ValueError(f"needs text under {missing[0]!r} (found: {', '.join(row)})")
        return question


def _is_text(value: Any) -> bool:
    """Whether a field is text; users write rows of benchmarks by hand, so it may be anything."""
    return isinstance(value, str)

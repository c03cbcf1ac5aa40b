"""Types shared by all tasks. Independent of any particular task, tokenizer or data set."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from jaxtyping import Int32, Int64

Record = Mapping[str, Any]
Split = Literal["train", "validation", "test"]
SPLITS: tuple[Split, ...] = ("train", "validation", "test")

MULTIPLE_CHOICE = "Question: {question}\n{choices}\nAnswer:"


@dataclass(frozen=True)
class Question:
    """A row's question, before any template or tokenizer.

    Args:
        fields: fields that a template may use.
        labels: answer strings to choose from; () if any token may be the answer.
        answer: the correct answer string; None if the row has no label.
        group: subgroup that results are broken down by; "" for none.
    """

    fields: Mapping[str, str]
    labels: tuple[str, ...]
    answer: str | None
    group: str = ""

    @property
    def stem(self) -> str:
        """The text that identifies the question: rows with the same text are duplicates."""
        return self.fields.get("question") or self.fields["prompt"]


def group_of(row: Record) -> str:
    """The row's subgroup, from `group` or else `difficulty`; "" for none."""
    group = row.get("difficulty") if row.get("group") is None else row["group"]
    return "" if group is None else str(group)


@dataclass(frozen=True)
class Task:
    """A data set's columns, and how a row of them becomes a question.

    Args:
        name: `data.task` of a recipe.
        dataset: Hub id; None if the user provides the data.
        subset: the Hub data set's configuration; None for its only one.
        columns: columns used; () keeps whole rows.
        template: default prompt template, a format string over `Question.fields`.
        labels: default answer strings; () if the rows have their own.
        to_question: (row, configured or default labels) -> question; raises ValueError for a row
            that does not fit; None for running text.
    """

    name: str
    dataset: str | None
    subset: str | None
    columns: tuple[str, ...]
    template: str
    labels: tuple[str, ...]
    to_question: Callable[[Record, tuple[str, ...]], Question] | None


@dataclass(frozen=True)
class Rows:
    """A split as loaded, before tokenisation.

    Args:
        split: train, validation or test.
        records: the used columns of each row.
        dataset: Hub id; None for local data.
        revision: commit of a Hub data set; None for local data or if unknown.
        digest: SHA-256 over `records`, independent of the file format.
        shots: labelled training rows to draw solved examples from, one more than a prompt shows.
    """

    split: Split
    records: Sequence[Record]
    dataset: str | None
    revision: str | None
    digest: str
    shots: Sequence[Record]


@dataclass(frozen=True, eq=False)
class Example:
    """One tokenised prompt: the model's input to decide an answer, or a step of it.

    Args:
        input_ids: prompt tokens, including BOS, and the answer's tokens that are already decided.
        positions: answer positions, indices into `input_ids`; the last one for a question.
        answer_ids: correct token at each position; None if the row has no label.
        choice_ids: candidate tokens in the order of the labels; () for any token.
        row: index of the data row it comes from, from 0.
        group: subgroup that results are broken down by; "" for none.
    """

    input_ids: Int32[np.ndarray, " tokens"]
    positions: Int64[np.ndarray, " positions"]
    answer_ids: Int64[np.ndarray, " positions"] | None
    choice_ids: tuple[int, ...]
    row: int
    group: str = ""


@dataclass(frozen=True)
class Encoded:
    """A tokenised split.

    Args:
        examples: prompts in the order of the rows; several for an answer of several steps.
        skipped: number of skipped rows: over the model's context, or too short for one position.
        prefix: text between prompt and answer that every label was resolved with; "" for text.
        labels: how labels of several tokens are decided, in words; "" if each is one token.
    """

    examples: list[Example]
    skipped: int
    prefix: str
    labels: str = ""


def multiple_choice(
    question: str,
    options: Sequence[str],
    right: int | None,
    labels: tuple[str, ...],
    group: str = "",
) -> Question:
    """A question whose options are listed with one label each, as in `A. a warm front`.

    Args:
        question: the question.
        options: texts of the options.
        right: index of the correct option; None if the row has no label.
        labels: labels, at least as many as options.
        group: subgroup that results are broken down by.

    Raises:
        ValueError: fewer than two options, or more options than labels.
    """
    if not 2 <= len(options) <= len(labels):
        raise ValueError(
            f"{len(options)} options, {len(labels)} labels ({', '.join(labels)}): two options or "
            "more are needed, and a label for each (--data.prompt.labels)"
        )
    lines = [f"{label}. {option}" for label, option in zip(labels, options, strict=False)]
    return Question(
        fields={"question": question, "choices": "\n".join(lines)},
        labels=labels[: len(options)],
        answer=None if right is None else labels[right],
        group=group,
    )

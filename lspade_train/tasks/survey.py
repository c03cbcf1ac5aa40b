"""Guesses the columns of unknown rows: the question, the answer, and the labels to choose from.

`lspade-train init` writes a recipe from it, and prints what it guessed from names and values.
"""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from lspade_train.errors import TaskError
from lspade_train.tasks.base import Record

ASKS = ("prompt", "question", "text", "sentence", "query", "input", "review", "content")
ANSWERS = ("answer", "label", "target", "output", "class", "intent")
CHOICES = ("choices", "options")
GROUPS = ("group", "difficulty", "subject", "category", "topic", "domain")
MOST_CLASSES = 50


@dataclass(frozen=True)
class Survey:
    """What a recipe needs to know about rows.

    Attributes:
        task: jsonl for questions, text for running text.
        columns: the task's name -> the data's, if they differ.
        asks: the data's column with the question, the prompt or the text.
        labels: answers to choose from that rows do not list; () if they do, or for free answers.
        balance: answer -> number of rows, most frequent first; empty for free answers.
        listed: whether each row lists its own choices.
    """

    task: str
    columns: dict[str, str]
    asks: str
    labels: tuple[str, ...] = ()
    balance: dict[str, int] = field(default_factory=dict[str, int])
    listed: bool = False

    @property
    def template(self) -> str | None:
        """A prompt template that lists the answers; None for the task's own."""
        if not self.labels or self.asks == "prompt":
            return None
        return f"{{question}}\nAnswer with one of {', '.join(self.labels)}.\nAnswer:"


def survey(rows: Sequence[Record]) -> Survey:
    """Survey rows.

    Raises:
        TaskError: there are no rows, no column contains text, or an answer is neither a text nor an
            index.
    """
    names = list(dict.fromkeys(name for row in rows for name in row))
    texts = [name for name in names if all(isinstance(row.get(name), str) for row in rows)]
    asks = next((name for name in ASKS if name in texts), None) or _longest(texts, rows)
    if asks is None:
        raise TaskError(
            f"No column holds text in every row (found: {', '.join(names) or 'no rows'}). "
            "Expected a question, a prompt or a text under one name."
        )
    answers = next((name for name in ANSWERS if name in names and name != asks), None)
    choices = next((name for name in CHOICES if _are_lists(name, rows)), None)
    if answers is None and choices is None:
        return Survey("text", {}, asks)
    given = [row.get(answers or "") for row in rows]
    _require_answers(answers or "", given, indices=choices is None)
    found = Counter(answer for answer in given if answer is not None)
    free = choices is None and len(found) > min(MOST_CLASSES, max(2, len(rows) // 2))
    mapped = {
        "prompt" if free or asks == "prompt" else "question": asks,
        "answer": answers,
        "choices": choices,
        "group": next((name for name in GROUPS if _is_group(name, rows)), None),
    }
    columns = {name: column for name, column in mapped.items() if column not in (None, name)}
    columns.pop("group", None) if mapped["group"] == "difficulty" else None
    balance = {str(value): count for value, count in found.most_common()}
    if choices is not None:
        return Survey("jsonl", columns, asks, balance=balance, listed=True)
    if free:
        return Survey("jsonl", columns, asks)
    labels = _labels(answers or "", list(found), names, rows)
    counts = {labels[key]: found[key] for key, _ in found.most_common()}
    return Survey("jsonl", columns, asks, tuple(labels.values()), counts)


def _require_answers(column: str, given: Sequence[Any], *, indices: bool) -> None:
    """Refuse answers that `fit` would refuse later; `indices`: whole numbers number the labels."""
    known = [answer for answer in given if answer is not None]
    for answer in known:
        if isinstance(answer, bool) or not isinstance(answer, str | int):
            raise TaskError(
                f"{column!r} holds {answer!r}; expected one text, or one whole number, per row. "
                "Convert it, for example to a text."
            )
    numbers = sorted({answer for answer in known if isinstance(answer, int)})
    if indices and numbers and numbers != [*range(len(numbers))]:
        raise TaskError(
            f"{column!r} holds the whole numbers {numbers[0]} to {numbers[-1]}, which would number "
            f'the labels from 0; expected all of 0 to {len(numbers) - 1}, or texts, such as "3".'
        )


def _longest(texts: Sequence[str], rows: Sequence[Record]) -> str | None:
    free = [name for name in texts if name not in ANSWERS]
    return max(free, key=lambda name: sum(len(row[name]) for row in rows), default=None)


def _are_lists(name: str, rows: Sequence[Record]) -> bool:
    return any(isinstance(row.get(name), list) for row in rows)


def _is_group(name: str, rows: Sequence[Record]) -> bool:
    values = {str(row[name]) for row in rows if row.get(name) is not None}
    return 2 <= len(values) <= max(MOST_CLASSES, len(rows) // 10)


def _labels(
    answers: str, values: list[str | int], names: Sequence[str], rows: Sequence[Record]
) -> dict[str | int, str]:
    """A text for each value: itself, or its name in another column, if that is consistent."""
    if not all(re.fullmatch(r"[0-9]{1,9}", str(value)) for value in values):
        return {value: str(value) for value in sorted(values, key=str)}
    in_order = sorted(values, key=int)
    for name in names:
        called = {(row.get(answers), row.get(name)) for row in rows if row.get(name) is not None}
        called = {(number, text) for number, text in called if isinstance(text, str)}
        if name != answers and len(called) == len(values) == len(dict(called)):
            return {value: dict(called)[value] for value in in_order}
    return {value: str(value) for value in in_order}

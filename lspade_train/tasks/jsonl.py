"""The user's own task: one JSON object per line (or CSV with a header), of either kind.

    {"prompt": "Review: ... Sentiment:", "choices": ["good", "bad"], "answer": "good"}
    {"question": "...", "choices": ["first option", "second option"], "answer": 0}

A prompt is used as it is and answered by one of its choices; without choices, by one of
`data.prompt.labels`; without those, by any token. A question lists its options under A, B, C, ...;
one without choices is answered by one of `data.prompt.labels`, as a prompt is.
`data.prompt.labels` renames the choices of either, in their order. The answer is a choice's index
(from 0), its label or its text, and may be omitted in a split without labels. `group` (or
`difficulty`) names a subgroup that results are broken down by; a template may use every other key
with a text value. `data.columns` maps these names to those of the data.

`data.dataset` is one file, a folder of `train.jsonl`, `validation.jsonl` and `test.jsonl`, or a
Hub data set. If there is no validation split, one is cut from the training rows.
"""

import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from lspade_train.tasks.base import (
    MULTIPLE_CHOICE,
    Question,
    Record,
    Task,
    group_of,
    multiple_choice,
)

LETTERS = tuple("ABCDEFGHIJ")
INDEX = re.compile(r"[0-9]{1,9}")
ONLY_QUESTION = "Question: {question}\nAnswer:"


def to_question(row: Record, labels: tuple[str, ...]) -> Question:
    """Tell the two kinds apart by their keys, and check their values."""
    choices = _choices(row.get("choices"))
    texts = {
        key: text for key, text in row.items() if isinstance(text, str) and text and key != "answer"
    }
    kinds = [key for key in ("prompt", "question") if key in texts]
    if len(kinds) != 1:
        raise ValueError(f"needs text under 'prompt' or 'question' (found: {', '.join(row)})")
    listed = kinds == ["question"] and (choices or not labels)
    question = _question(row, choices, labels) if listed else _prompt(row, choices, labels)
    return replace(question, fields={**texts, **question.fields}, group=group_of(row))


def _prompt(row: Record, choices: Sequence[str], labels: tuple[str, ...]) -> Question:
    """A prompt and its answers, which are not listed in it."""
    answer = row.get("answer")
    fields = {"prompt": row.get("prompt") or ONLY_QUESTION.format(question=row["question"])}
    if not choices and not labels:
        if answer is not None and (not isinstance(answer, str) or not answer):
            raise ValueError(
                f"answer {answer!r} is not a string, and there are no choices that it could index "
                "(--data.prompt.labels)"
            )
        return Question(fields, (), answer)
    if len(set(choices)) < len(choices):
        raise ValueError(f"choices {list(choices)!r} holds a text twice")
    choices = choices or labels
    labels = labels or tuple(choices)
    if not 2 <= len(choices) <= len(labels):
        raise ValueError(f"{len(choices)} choices, {len(labels)} labels (--data.prompt.labels)")
    right = _right(answer, choices, labels)
    return Question(fields, labels[: len(choices)], None if right is None else labels[right])


def _question(row: Record, choices: Sequence[str], labels: tuple[str, ...]) -> Question:
    """A question with its options listed under labels; options may have the same text."""
    if not choices:
        raise ValueError(
            "a question needs choices, in its row or for all rows with --data.prompt.labels"
        )
    labels = labels or LETTERS
    question = multiple_choice(
        row["question"], choices, _right(row.get("answer"), choices, labels), labels
    )
    prompt = MULTIPLE_CHOICE.format_map(question.fields)
    return replace(question, fields={**question.fields, "prompt": prompt})


def _choices(value: Any) -> tuple[str, ...]:
    """A row's choices, () if it has none."""
    if value is None:
        return ()
    if not isinstance(value, list) or not all(isinstance(choice, str) for choice in value):
        raise ValueError(f"choices {value!r} is not a list of strings")
    if not value:
        raise ValueError("choices is an empty list; leave the key out of an open question")
    if not all(choice.strip() for choice in value):
        raise ValueError(f"choices {value!r} holds an empty text")
    return tuple(value)


def _right(answer: Any, choices: Sequence[str], labels: tuple[str, ...]) -> int | None:
    """Index of the correct option, given in any form; raises if the answer is ambiguous."""
    if answer is None:
        return None
    if isinstance(answer, int) and not isinstance(answer, bool):
        named = {answer} & set(range(len(choices)))
    else:
        named = {i for i, choice in enumerate(choices) if choice == answer}
        named |= {i for i, label in enumerate(labels[: len(choices)]) if label == answer}
        if not named and isinstance(answer, str) and INDEX.fullmatch(answer):
            named = {int(answer)} & set(range(len(choices)))  # a CSV file contains strings only
    if len(named) != 1:
        raise ValueError(
            f"answer {answer!r} names {len(named)} of the {len(choices)} choices; one is needed: "
            "its index from 0, its label or its text"
        )
    return named.pop()


JSONL = Task(
    name="jsonl",
    dataset=None,
    subset=None,
    columns=(),
    template="{prompt}",
    labels=(),
    to_question=to_question,
)

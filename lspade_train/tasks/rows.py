"""Splits of a task's data, and what identifies them. Knows nothing of tokens."""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from lspade_train.errors import TaskError
from lspade_train.io.storage import json_digest
from lspade_train.recipe import DataConfig
from lspade_train.tasks.base import SPLITS, Question, Record, Rows, Split, Task
from lspade_train.tasks.registry import find_task
from lspade_train.tasks.sources import Source, open_source, read_jsonl, read_paragraphs
from lspade_train.tasks.text import split_of

# Which training rows are shown as solved examples; fixed, so that every command shows the same.
SHOT_SEED = 20250717


def splits(config: DataConfig) -> tuple[Split, ...]:
    """The splits that the data set has, in the order train, validation, test.

    Raises:
        TaskError: the data set cannot be found or read.
    """
    task = find_task(config.task)
    source = _source(config, task)
    if _is_cut(task, source):
        return SPLITS
    return tuple(split for split in SPLITS if split in source.splits)


def evaluation_split(config: DataConfig) -> Split:
    """The split that results are reported on: test if it has labels, else validation.

    Raises:
        TaskError: there is neither.
    """
    available = splits(config)
    if "test" in available:
        task = find_task(config.task)
        rows = load_rows(config, "test")
        if task.to_question is None or any(q.answer for q in to_questions(config, rows)):
            return "test"
    if "validation" in available:
        return "validation"
    raise TaskError(
        f"{_name(config, find_task(config.task))} has no labelled test split and no validation "
        "split to evaluate on. Set --data.dataset to a folder that has one."
    )


def load_rows(config: DataConfig, split: Split) -> Rows:
    """Load a split's rows, first those that `limit` keeps, and the rows for solved examples.

    Raises:
        TaskError: the split is missing or empty, or a row lacks what the task needs.
    """
    task = find_task(config.task)
    if config.limit is not None and config.limit < 1:
        raise TaskError(f"A limit of {config.limit} rows leaves none. Set --data.limit to 1 or up.")
    source = _source(config, task)
    records = _read(config, task, source, split)[: config.limit]
    shots = _shots(config, task, source) if config.prompt.shots else []
    return Rows(
        split=split,
        records=records,
        dataset=source.name if source.hub else None,
        revision=source.revision,
        digest=_digest(records),
        shots=shots,
    )


def to_questions(config: DataConfig, rows: Rows) -> list[Question]:
    """The rows as questions.

    Raises:
        TaskError: a row does not fit the task; names it.
    """
    return _questions(config, rows.records, f"the {rows.split} split")


def shot_questions(config: DataConfig, rows: Rows) -> list[Question]:
    """The rows to draw solved examples from, as questions."""
    return _questions(config, rows.shots, "the train split")


def identity(config: DataConfig, rows: Rows) -> dict[str, Any]:
    """What decides the prompts, apart from the tokenizer, as flat JSON.

    A local data set is identified by its rows, not by where they lie. The tokenizer's own chat
    template is not here: it belongs to the tokenizer's digest.

    Args:
        config: the recipe's data section.
        rows: a split loaded with it.
    """
    task = find_task(config.task)
    common: dict[str, Any] = {
        "task": task.name,
        "dataset": rows.dataset,
        "dataset_revision": rows.revision,
        "subset": config.subset or task.subset,
        "split": rows.split,
        "rows": len(rows.records),
        "rows_digest": rows.digest,
        "limit": config.limit,
    }
    if task.to_question is None:
        text = config.text
        return common | {
            "text_column": text.column,
            "text_length": text.length,
            "text_first_position": text.first_position,
            "text_positions_per_sequence": text.positions_per_sequence,
        }
    prompt = config.prompt
    return common | {
        "overlong": config.overlong,
        "template": prompt.template or task.template,
        "labels": list(prompt.labels or task.labels) or None,
        "shots": prompt.shots,
        "shots_digest": _digest(rows.shots) if rows.shots else None,
        "chat": prompt.chat,
        "chat_template": prompt.chat_template,
        "system": prompt.system,
        "answer_prefix": prompt.answer_prefix,
    }


def labels_of(config: DataConfig, task: Task) -> tuple[str, ...]:
    """The configured labels, or the task's own."""
    return tuple(config.prompt.labels or task.labels)


def _digest(records: Sequence[Record]) -> str:
    # A digest of digests: a corpus need not be one string in memory.
    return json_digest([json_digest(record) for record in records])


def _name(config: DataConfig, task: Task) -> str:
    name = config.dataset or task.dataset
    if name is None:
        raise TaskError(
            f"Task {task.name} needs data. Set --data.dataset to a file, a folder or a Hub id."
        )
    return name


def _source(config: DataConfig, task: Task) -> Source:
    return open_source(
        _name(config, task),
        config.subset or task.subset,
        config.dataset_revision,
        _readers(config, task),
    )


def _readers(config: DataConfig, task: Task) -> dict[str, Callable[[Path], list[Record]]]:
    """Readers of the files that a task's users write themselves, by suffix."""
    column = config.text.column
    to_question = task.to_question
    if to_question is None:
        check = partial(_check_text, column=column)
        return {
            ".jsonl": partial(read_jsonl, check=check),
            ".txt": partial(read_paragraphs, column=column),
        }
    if task.dataset is None:
        labels = labels_of(config, task)
        return {".jsonl": partial(read_jsonl, check=lambda row: to_question(row, labels))}
    return {}


def _check_text(row: Record, column: str) -> None:
    if not isinstance(row.get(column), str):
        found = ", ".join(row) or "nothing"
        raise ValueError(f"no text under {column!r} (found: {found}; see --data.text.column)")


def _is_cut(task: Task, source: Source) -> bool:
    return task.to_question is None and set(source.splits) == {"train"}


def _read(config: DataConfig, task: Task, source: Source, split: Split) -> list[Record]:
    cut = _is_cut(task, source)
    if not cut and split not in source.splits:
        raise TaskError(
            f"{source.name} has no {split} split (it has: {', '.join(source.splits) or 'none'}). "
            "Set --data.dataset to data that has one."
        )
    records = source.splits["train" if cut else split]()
    columns = (config.text.column,) if task.to_question is None else task.columns
    if columns:
        records = [_select(record, columns, source.name) for record in records]
    if task.to_question is None:
        # A Hub corpus may hold empty entries and nulls.
        texts = ((record, record[config.text.column]) for record in records)
        records = [record for record, text in texts if isinstance(text, str) and text]
    if cut:
        records = [record for record in records if split_of(record, config.text.column) == split]
    if not records:
        raise TaskError(
            f"The {split} split of {source.name} is empty. Set --data.dataset to data with rows."
        )
    return records


def _select(record: Record, columns: Sequence[str], name: str) -> Record:
    missing = [column for column in columns if column not in record]
    if missing:
        raise TaskError(
            f"{name} has no column {missing[0]!r} (found: {', '.join(record)}). Set --data.dataset "
            "to data laid out like the task's, or --data.text.column for text."
        )
    return {column: record[column] for column in columns}


def _shots(config: DataConfig, task: Task, source: Source) -> list[Record]:
    """The first labelled, distinct training rows in a seeded order: one spare per prompt."""
    train = _read(config, task, source, "train")
    wanted = config.prompt.shots + 1
    found: dict[str, Record] = {}
    for index in np.random.default_rng(SHOT_SEED).permutation(len(train)):
        question = _questions(config, [train[index]], "the train split", int(index))[0]
        if question.answer is not None:
            found.setdefault(question.stem, train[index])
        if len(found) == wanted:
            return list(found.values())
    raise TaskError(
        f"{config.prompt.shots} solved examples need {wanted} labelled training rows; "
        f"{source.name} has {len(found)}. Lower --data.prompt.shots."
    )


def _questions(
    config: DataConfig, records: Sequence[Record], where: str, first: int = 0
) -> list[Question]:
    task = find_task(config.task)
    if task.to_question is None:
        raise TaskError(f"Task {task.name} has no questions, only text.")
    labels = labels_of(config, task)
    questions: list[Question] = []
    for number, record in enumerate(records, start=first + 1):
        try:
            questions.append(task.to_question(record, labels))
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise TaskError(
                f"Row {number} of {where} does not fit {task.name}: {error}."
            ) from error
    return questions

"""Splits of a task's data, row by row. Independent of tokens."""

from collections.abc import Mapping, Sequence
from functools import partial

import numpy as np

from lspade_train.errors import TaskError
from lspade_train.io.storage import json_digest
from lspade_train.recipe import DataConfig
from lspade_train.tasks.base import SPLITS, Question, Record, Rows, Split, Task
from lspade_train.tasks.cut import cut_sides, side_of
from lspade_train.tasks.files import read_csv, read_jsonl, read_paragraphs
from lspade_train.tasks.prompts import fill
from lspade_train.tasks.registry import find_task
from lspade_train.tasks.sources import Reader, Source, open_source

# Seed for choosing solved examples; fixed, so that every command shows the same.
SHOT_SEED = 20250717


def splits(config: DataConfig) -> tuple[Split, ...]:
    """The splits that the data set has, in the order train, validation, test.

    Raises:
        TaskError: the data set cannot be found or read.
    """
    task = find_task(config.task)
    source = _source(config, task)
    shares = sides(config, source)
    return tuple(split for split in SPLITS if split in source.splits or split in shares)


def require_splits(config: DataConfig, wanted: Sequence[Split], *, choices: bool = False) -> None:
    """Load and check the rows of several splits, before any model is loaded for them.

    Args:
        config: the recipe's data section.
        wanted: the splits.
        choices: require choices in every row.

    Raises:
        TaskError: a split is missing or empty, or a row does not fit the task.
    """
    task = find_task(config.task)
    for split in wanted:
        rows = load_rows(config, split)
        if task.to_question is not None:
            first = to_questions(config, rows)[0]
            fill(config.prompt.template or task.template, first.fields)
        if choices:
            require_choices(config, rows)


def require_choices(config: DataConfig, rows: Rows) -> None:
    """Refuse a split in which a row has no choices.

    Raises:
        TaskError: the task is running text, or a row has no choices.
    """
    if find_task(config.task).to_question is None:
        where = f"the task {config.task} has none"
    else:
        questions = to_questions(config, rows)
        bare = next((n for n, q in enumerate(questions, start=1) if not q.labels), None)
        if bare is None:
            return
        where = f"row {bare} of {rows.split} has none"
    raise TaskError(
        f"model.scope is choices, and {where}; expected choices in every row.\n"
        "Give the rows choices (or --data.prompt.labels), or fit with --model.scope vocabulary."
    )


def evaluation_split(config: DataConfig) -> Split:
    """The split that results are reported on: test if it has labels, else validation.

    Raises:
        TaskError: the data has neither.
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
    """Load a split's rows, up to `limit`, and the rows for solved examples.

    Raises:
        TaskError: the split is missing or empty, or a row lacks a required column.
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
        digest=records_digest(records),
        shots=shots,
    )


def to_questions(config: DataConfig, rows: Rows) -> list[Question]:
    """The rows as questions.

    Raises:
        TaskError: a row does not fit the task.
    """
    return _questions(config, rows.records, f"the {rows.split} split")


def shot_questions(config: DataConfig, rows: Rows) -> list[Question]:
    """The rows to draw solved examples from, as questions."""
    return _questions(config, rows.shots, "the train split")


def labels_of(config: DataConfig, task: Task) -> tuple[str, ...]:
    """The configured labels, or the task's own."""
    return tuple(config.prompt.labels or task.labels)


def records_digest(records: Sequence[Record]) -> str:
    """SHA-256 of rows, as hex."""
    # A digest of digests, so that a corpus need not be one string in memory.
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
        partial(rename, columns=config.columns),
    )


def sides(config: DataConfig, source: Source) -> dict[Split, float]:
    """The splits to cut from the training rows; a benchmark's own splits are kept."""
    task = find_task(config.task)
    return cut_sides(config, source.splits) if task.dataset is None else {}


def _readers(config: DataConfig, task: Task) -> dict[str, Reader]:
    """Readers of users' own files, by suffix."""
    if task.dataset is not None:
        return {}
    adapt = partial(_adapt, config, task)
    readers: dict[str, Reader] = {
        ".jsonl": partial(read_jsonl, adapt=adapt),
        ".csv": partial(read_csv, adapt=adapt),
        ".tsv": partial(read_csv, adapt=adapt),
    }
    if task.to_question is None:
        readers[".txt"] = partial(read_paragraphs, adapt=adapt, column=config.text.column)
    return readers


def _adapt(config: DataConfig, task: Task, row: Record) -> Record:
    """A row of the user's own file with the task's column names, checked to fit the task."""
    row = rename(row, config.columns)
    if task.to_question is not None:
        task.to_question(row, labels_of(config, task))
        return row
    column = config.text.column
    if not isinstance(row.get(column), str):
        found = ", ".join(row) or "nothing"
        raise ValueError(f"no text under {column!r} (found: {found}; see --data.text.column)")
    return row


def rename(row: Record, columns: Mapping[str, str] | None) -> Record:
    """A row with the task's names in place of the data's.

    Raises:
        ValueError: a column in `columns` is missing.
    """
    if not columns:
        return row
    missing = [column for column in columns.values() if column not in row]
    if missing:
        raise ValueError(f"no column {missing[0]!r} (found: {', '.join(row)}; see --data.columns)")
    rest = {name: value for name, value in row.items() if name not in columns.values()}
    return rest | {name: row[column] for name, column in columns.items()}


def _read(config: DataConfig, task: Task, source: Source, split: Split) -> list[Record]:
    shares = sides(config, source)
    if split not in source.splits and split not in shares:
        raise TaskError(_no_split(task, source, split))
    records = source.splits["train" if split in shares else split]()
    records = _columns(config, task, records, source.name)
    if not records:
        raise TaskError(
            f"The {split} split of {source.name} is empty. Set --data.dataset to data with rows."
        )
    if split not in shares:
        return records
    texts = (_text_of(config, task, record) for record in records)
    mine = [r for r, text in zip(records, texts, strict=True) if side_of(text, shares) == split]
    if not mine:
        raise TaskError(
            f"The {split} split of {source.name} is empty: none of its {len(records)} rows fell "
            f"into the {shares[split]:.0%} cut off for it. Use more rows, or other fractions "
            "(--data.validation_fraction, --data.test_fraction)."
        )
    return mine


def _no_split(task: Task, source: Source, split: Split) -> str:
    has = f"{source.name} has no {split} split (it has: {', '.join(source.splits) or 'none'}). "
    if task.dataset is None and split != "train" and "train" in source.splits:
        return has + f"Cut one from the training rows with --data.{split}_fraction 0.1."
    return has + "Set --data.dataset to data that has one."


def _columns(config: DataConfig, task: Task, records: list[Record], name: str) -> list[Record]:
    """The rows with the task's column names, and only the columns that it uses."""
    wanted = (config.text.column,) if task.to_question is None else task.columns
    if wanted:
        records = [_select(record, wanted, name) for record in records]
    if task.to_question is None:
        # A Hub corpus may contain empty entries and nulls.
        texts = ((record, record[config.text.column]) for record in records)
        records = [record for record, text in texts if isinstance(text, str) and text]
    return records


def _text_of(config: DataConfig, task: Task, record: Record) -> str:
    """The text that determines a row's split: the question, regardless of other columns."""
    if task.to_question is None:
        return record[config.text.column]
    return _questions(config, [record], "the train split")[0].stem


def _select(record: Record, columns: Sequence[str], name: str) -> Record:
    missing = [column for column in columns if column not in record]
    if missing:
        raise TaskError(
            f"{name} has no column {missing[0]!r} (found: {', '.join(record)}). Set --data.dataset "
            "to data laid out like the task's, --data.columns for other names, or "
            "--data.text.column for text."
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

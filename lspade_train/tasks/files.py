"""Reads users' own files of rows: JSONL, CSV and plain text."""

import csv
import io
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from lspade_train.errors import TaskError
from lspade_train.io.text import parse_object, read_text, require_text
from lspade_train.tasks.base import Record

Adapt = Callable[[Record], Record]
"""Converts a file's row for a task; raises ValueError for a row that it cannot use."""


def read_jsonl(path: Path, adapt: Adapt) -> list[Record]:
    """The objects of a JSONL file; empty lines are skipped.

    Args:
        path: the file.
        adapt: converts a row for the task.

    Raises:
        TaskError: a line is not an object that the task can use.
    """

    def records() -> Iterator[Record]:
        for number, line in enumerate(read_text(path, TaskError).split("\n"), start=1):
            if line.strip():
                yield _adapted(path, number, adapt, lambda line=line: parse_object(line))

    return list(records())


def read_csv(path: Path, adapt: Adapt) -> list[Record]:
    """The rows of a CSV file with a header, or of a .tsv file; an empty cell is a missing value.

    A cell under `choices` contains a JSON list of texts.

    Raises:
        TaskError: as for `read_jsonl`.
    """
    text = io.StringIO(read_text(path, TaskError), newline="")
    reader = csv.reader(text, delimiter="\t" if path.suffix == ".tsv" else ",", strict=True)

    def records() -> Iterator[Record]:
        names: list[str] = []
        while True:
            try:
                cells = next(reader, None)
            except csv.Error as error:
                raise TaskError(
                    f"{path}, line {reader.line_num}: {error}. Correct the line."
                ) from error
            if cells is None:
                return
            if not names:
                names = _header(path, cells)
            elif any(cells):
                row = (names, cells)
                yield _adapted(path, reader.line_num, adapt, lambda row=row: _csv_record(*row))

    return list(records())


def read_paragraphs(path: Path, adapt: Adapt, column: str) -> list[Record]:
    """The texts of a plain text file, separated by blank lines."""
    texts = (text.strip() for text in re.split(r"\n\s*\n", read_text(path, TaskError)))
    return [adapt({column: text}) for text in texts if text]


def _adapted(path: Path, line: int, adapt: Adapt, parse: Callable[[], Record]) -> Record:
    try:
        return adapt(parse())
    except ValueError as error:
        raise TaskError(f"{path}, line {line}: {error}. Correct the line.") from error


def _header(path: Path, cells: list[str]) -> list[str]:
    names = [cell.strip() for cell in cells]
    if "" in names or len(set(names)) < len(names):
        raise TaskError(
            f"{path}, line 1 names its columns {names}; expected one name each, all different. "
            "Correct the header."
        )
    return names


def _csv_record(names: list[str], cells: list[str]) -> dict[str, Any]:
    if len(cells) != len(names):
        raise ValueError(f"{len(cells)} cells under {len(names)} columns")
    record: dict[str, Any] = {n: cell or None for n, cell in zip(names, cells, strict=True)}
    require_text("".join(cells))
    choices = record.get("choices")
    if choices is not None:
        try:
            record["choices"] = json.loads(choices)
        except ValueError as error:
            raise ValueError(f"choices {choices!r} is not a JSON list of texts") from error
    return record

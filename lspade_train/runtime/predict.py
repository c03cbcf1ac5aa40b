"""Lines in, answers out: in order, a bounded number at a time, a bad line without losing the rest.

Knows nothing of files or of the command line.
"""

import json
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any

from lspade_train.errors import LSpadeError, TaskError
from lspade_train.runtime.decide import Decision
from lspade_train.runtime.exit_runtime import ExitRuntime

Row = dict[str, Any]


def predict_lines(
    runtime: ExitRuntime, lines: Iterable[str], *, done: int = 0, window: int = 256
) -> Iterator[Row]:
    """Answer every line, in input order.

    A line is a JSON object, `{"prompt": ..., "choices": [...]}` with any further keys, which are
    echoed; anything that does not begin with `{` is a prompt as it stands. Blank lines are passed
    over. A bad line gives `{"line": n, "error": ...}` with its further keys.

    Args:
        runtime: answers.
        lines: read as they are needed.
        done: leading answers that exist already (lines of the output so far), not given again.
        window: lines held, and batched, at a time.

    Yields:
        line (from 1), the echoed keys, token_id, text, layer, entropy, exited and scores.
    """
    numbered = ((n, line.rstrip("\n")) for n, line in enumerate(lines, 1) if line.strip())
    # From the window's beginning: in another batch a number may round to another last digit.
    given = done % window
    yield from islice(_windows(runtime, islice(numbered, done - given, None), window), given, None)


def _windows(
    runtime: ExitRuntime, waiting: Iterator[tuple[int, str]], window: int
) -> Iterator[Row]:
    while chunk := list(islice(waiting, window)):
        yield from _answer([_parse(number, text) for number, text in chunk], runtime)


def _parse(number: int, text: str) -> Row:
    """`prompt`, `choices` and `echo` of a line, or its `error`."""
    if not text.lstrip().startswith("{"):
        return {"echo": {"line": number}, "prompt": text, "choices": None}
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as cause:
        return {"echo": {"line": number}, "error": f"Not a JSON object ({cause})."}
    prompt, choices = value.pop("prompt", None), value.pop("choices", None)
    echo = value | {"line": number}
    if not isinstance(prompt, str) or not _words(choices):
        wanted = 'Expected {"prompt": text, "choices": [text, ...] or left out}.'
        return {"echo": echo, "error": wanted}
    return {"echo": echo, "prompt": prompt, "choices": choices}


def _words(choices: Any) -> bool:
    if choices is None:
        return True
    return isinstance(choices, list) and all(isinstance(choice, str) for choice in choices)


def _answer(rows: list[Row], runtime: ExitRuntime) -> Iterator[Row]:
    good = [row for row in rows if "error" not in row]
    found = iter(_decide(good, runtime))
    for row in rows:
        result = TaskError(row["error"]) if "error" in row else next(found)
        yield row["echo"] | _fields(result)


def _decide(rows: list[Row], runtime: ExitRuntime) -> list[Decision | LSpadeError]:
    """All at once; where that fails, halves, down to the rows that are to blame."""
    if not rows:
        return []
    try:
        prompts, choices = [row["prompt"] for row in rows], [row["choices"] for row in rows]
        return list(runtime.decide(prompts, choices))
    except LSpadeError as cause:
        if len(rows) == 1:
            return [cause]
    middle = len(rows) // 2
    return _decide(rows[:middle], runtime) + _decide(rows[middle:], runtime)


def _fields(result: Decision | LSpadeError) -> Row:
    return {"error": str(result)} if isinstance(result, LSpadeError) else vars(result)

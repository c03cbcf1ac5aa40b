"""Answers a stream of lines in order, a bounded number at a time; a bad line affects only itself.

Independent of files, recipes and the command line.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, fields
from itertools import islice
from typing import Any, Protocol

from lspade_train.errors import LSpadeError, TaskError
from lspade_train.io.text import parse_object, require_text
from lspade_train.runtime.decide import Decision
from lspade_train.runtime.exit_runtime import ExitRuntime
from lspade_train.tasks.asking import Asked
from lspade_train.tasks.base import group_of

Row = dict[str, Any]

ANSWER_KEYS = frozenset({"line", "error", "answer", "correct", *(f.name for f in fields(Decision))})
"""Keys of an output line that are not echoed from the input."""

EXPECTED = 'Expected {"prompt": text, "choices": [text, ...] or left out}.'


class Ask(Protocol):
    """Turns a row into a prompt for the model."""

    @property
    def text_keys(self) -> frozenset[str]:
        """Keys of a row that are not echoed."""
        ...

    def row_of(self, text: str) -> Mapping[str, Any]:
        """The row for a line of plain text."""
        ...

    def __call__(self, row: Mapping[str, Any]) -> Asked:
        """The prompt of a row; raises `TaskError`."""
        ...


class RawPrompts:
    """Uses prompts as they are: no template, no solved examples, no chat format."""

    text_keys = frozenset({"prompt", "choices", "answer"})

    def row_of(self, text: str) -> Row:
        """A line of text is a prompt."""
        return {"prompt": text}

    def __call__(self, row: Mapping[str, Any]) -> Asked:
        """From `{"prompt", "choices", "answer"}`, of which only the prompt is required."""
        prompt, choices, answer = (row.get(name) for name in ("prompt", "choices", "answer"))
        if not isinstance(prompt, str) or not _is_texts(choices):
            raise TaskError(EXPECTED)
        texts = None if choices is None else tuple(choices)
        if isinstance(answer, int) and texts and answer in range(len(texts)):
            answer = texts[answer]
        return Asked(
            prompt,
            texts=texts,
            answer=None if answer is None else str(answer),
            group=group_of(row),
        )


@dataclass(frozen=True)
class Line:
    """An input line: its prompt or an error, and the keys to echo."""

    echo: Row
    asked: Asked | None
    error: str = ""


def predict_lines(
    runtime: ExitRuntime,
    lines: Iterable[str],
    *,
    ask: Ask | None = None,
    done: int = 0,
    window: int = 256,
) -> Iterator[Row]:
    """Answer every line, in input order.

    A line is a JSON object or, if it does not begin with `{`, plain text. Blank lines are skipped.
    A bad line gives `{"line": n, "error": ...}`. Other keys are echoed; one that has the name of an
    output key is echoed as `input_KEY`.

    Args:
        runtime: computes the answers.
        lines: input lines, read lazily.
        ask: turns a row into a prompt; None uses prompts as they are.
        done: number of leading answers that already exist (lines of the output so far), to skip.
        window: number of lines to hold in memory and batch at a time.

    Yields:
        line (from 1), the echoed keys, token_id, text, layer, entropy, exited and scores; steps if
        there were several; answer and correct if the row has the correct answer.
    """
    ask = RawPrompts() if ask is None else ask
    numbered = ((n, line.rstrip("\n")) for n, line in enumerate(lines, 1) if line.strip())
    # Start at the window's beginning: in a different batch, results may round differently.
    given = done % window
    waiting = islice(numbered, done - given, None)
    yield from islice(_windows(runtime, ask, waiting, window, given), given, None)


def _windows(
    runtime: ExitRuntime, ask: Ask, waiting: Iterator[tuple[int, str]], window: int, given: int
) -> Iterator[Row]:
    while chunk := list(islice(waiting, window)):
        lines = [parse_line(number, text, ask) for number, text in chunk]
        yield from _answer(lines, runtime, given)
        given = 0


def parse_line(number: int, text: str, ask: Ask) -> Line:
    """Parse a line into its prompt, or an error."""
    echo: Row = {"line": number}
    try:
        if text.lstrip().startswith("{"):
            row: Mapping[str, Any] = parse_object(text)
            echo = _echo(row, ask.text_keys) | echo
        else:
            require_text(text)
            row = ask.row_of(text)
        return Line(echo, ask(row))
    except ValueError as error:
        return Line(echo, None, f"The line is not used: {error}.")
    except LSpadeError as error:
        return Line(echo, None, str(error))


def _echo(row: Mapping[str, Any], used: frozenset[str]) -> Row:
    echo = {key: value for key, value in row.items() if key not in used | ANSWER_KEYS}
    for key in row:
        if key in ANSWER_KEYS - used:
            name = f"input_{key}"
            while name in row:
                name = f"input_{name}"
            echo[name] = row[key]
    return echo


def _is_texts(choices: Any) -> bool:
    if choices is None:
        return True
    return isinstance(choices, list) and all(isinstance(choice, str) for choice in choices)


def _answer(lines: list[Line], runtime: ExitRuntime, given: int) -> Iterator[Row]:
    counted = sum(line.asked is not None for line in lines[:given])
    asked = [line.asked for line in lines if line.asked is not None]
    found = iter(_decide(asked, runtime, counted))
    for line in lines:
        result = TaskError(line.error) if line.asked is None else next(found)
        if isinstance(result, LSpadeError):
            yield line.echo | {"error": str(result)}
        else:
            said = {**vars(result), "steps": [*result.steps]}
            if not result.steps:
                del said["steps"]
            yield line.echo | said | _marked(result, line.asked)


def _marked(decision: Decision, asked: Asked | None) -> Row:
    """The correct answer, if known, and whether it was given."""
    answer = None if asked is None else asked.answer
    if answer is None:
        return {}
    return {"answer": answer, "correct": (decision.text or "").strip() == answer.strip()}


def _decide(asked: list[Asked], runtime: ExitRuntime, counted: int) -> list[Decision | LSpadeError]:
    """Decide all rows at once; if that fails, in halves, down to the rows that cause the error.

    The first `counted` were already counted by an audit.
    """
    if not asked:
        return []
    try:
        choices = [one.texts if one.choices is None else one.choices for one in asked]
        groups = [one.group for one in asked]
        prompts = [one.prompt for one in asked]
        return [*runtime.decide(prompts, choices, groups=groups, counted=counted)]
    except LSpadeError as cause:
        if len(asked) == 1:
            return [cause]
    middle = len(asked) // 2
    return [
        *_decide(asked[:middle], runtime, min(counted, middle)),
        *_decide(asked[middle:], runtime, max(counted - middle, 0)),
    ]

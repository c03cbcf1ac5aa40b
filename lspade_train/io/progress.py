"""Progress on standard error: a bar on a terminal, otherwise a line every half minute."""

import logging
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any, ClassVar, Self, TypeVar

from lspade_train.io.text import duration

if TYPE_CHECKING:
    from rich.progress import Progress as Bar

Item = TypeVar("Item")

EVERY = 30.0
"""Seconds between two lines without a terminal."""
OFTEN = 0.1
"""Seconds between two updates of a bar."""

log = logging.getLogger(__name__)


class Progress:
    """Shows the progress of work; a context manager. Nested progress is not shown.

    Args:
        name: name of the work; None shows nothing.
        total: number of units; None if unknown.
        unit: name of the units, in the plural.
    """

    _shown: "ClassVar[Progress | None]" = None
    """The progress that is currently shown."""

    def __init__(self, name: str | None, total: int | None, unit: str = "rows") -> None:
        self.name, self.total, self.unit = name, total, unit
        self.done = self.skipped = 0
        self._began = self._told = time.monotonic()
        self._resumed = False
        self._bar: Bar | None = None

    def __enter__(self) -> Self:
        self._began = self._told = time.monotonic()
        if Progress._shown is not None:
            self.name = None
        if self.name is None:
            return self
        Progress._shown = self
        if sys.stderr.isatty():
            self._bar = _bar(self.unit)
            self._bar.start()
            self._bar.add_task(self.name, total=self.total, rate="", note="")
        return self

    def __exit__(self, *_: object) -> None:
        if Progress._shown is self:
            Progress._shown = None
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def skip(self, count: int) -> None:
        """Count units that an earlier run has completed."""
        self.done += count
        self.skipped += count
        self._began = time.monotonic()

    def advance(self, count: int = 1, note: Callable[[], str] | None = None) -> None:
        """Count completed units.

        Args:
            count: number of units.
            note: returns a text to show beside the rate, such as a loss; called only when shown.
        """
        if self.skipped and not self._resumed and self.name is not None:
            self._resumed = True
            word = self.unit.removesuffix("s")
            self._say(f"{self.name}: resumed at {word} {self.done:,}{self._of}")
        self.done += count
        self.show(note)

    def counted(self, items: Iterable[Item]) -> Iterator[Item]:
        """Yield `items`, counting each when the next one is requested."""
        for item in items:
            yield item
            self.advance()

    def show(self, note: Callable[[], str] | None = None) -> None:
        """Show the progress, if the last update is old enough."""
        now = time.monotonic()
        due = EVERY if self._bar is None else OFTEN
        if self.name is None or (now - self._told < due and self.done != self.total):
            return
        rate = (self.done - self.skipped) / max(now - self._began, 1e-9)
        words = note() if note is not None else ""
        if self._bar is not None:
            self._told = now
            shown: dict[str, Any] = {"rate": f"{_digits(rate)} {self.unit}/s", "note": words}
            self._bar.update(self._bar.task_ids[0], completed=self.done, **shown)
        elif now - self._told >= due:
            self._told = now
            parts = [f"{self.done:,}{self._of} {self.unit}", f"{_digits(rate)} {self.unit}/s"]
            if self.total is not None:
                time_left = duration((self.total - self.done) / rate) if rate else "unknown time"
                parts.append(f"{time_left} left")
            self._say(f"{self.name}: {', '.join([*parts, words] if words else parts)}")

    @property
    def _of(self) -> str:
        return "" if self.total is None else f" of {self.total:,}"

    def _say(self, line: str) -> None:
        if self._bar is not None:
            self._bar.console.print(line, highlight=False)
        else:
            log.info("%s", line)


def track(items: Iterable[Item], name: str, total: int, unit: str) -> Iterator[Item]:
    """Yield `items`, counting each when the next one is requested."""
    with Progress(name, total, unit) as progress:
        yield from progress.counted(items)


def _digits(rate: float) -> str:
    """Format a rate with at least three digits."""
    return f"{rate:,.0f}" if rate >= 100 else f"{rate:.3g}"


def _bar(unit: str) -> "Bar":
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    return Bar(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn(unit),
        TextColumn("{task.fields[rate]}"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
        console=Console(stderr=True),
        transient=True,
    )

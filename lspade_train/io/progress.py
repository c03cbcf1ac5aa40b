"""Long work told on standard error: a bar on a terminal, elsewhere a line every half minute."""

import logging
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any, Self, TypeVar

from lspade_train.io.text import duration

if TYPE_CHECKING:
    from rich.progress import Progress as Bar

Item = TypeVar("Item")

EVERY = 30.0
"""Seconds between two lines where there is no terminal."""
OFTEN = 0.1
"""Seconds between two states of a bar."""

log = logging.getLogger(__name__)


class Progress:
    """Work that is counted while it is done; a context manager.

    Args:
        name: what is done; None shows nothing.
        total: how many units there are.
        unit: what they are, in the plural.
    """

    def __init__(self, name: str | None, total: int, unit: str = "rows") -> None:
        self.name, self.total, self.unit = name, total, unit
        self.done = self.skipped = 0
        self._began = self._told = time.monotonic()
        self._resumed = False
        self._bar: Bar | None = None

    def __enter__(self) -> Self:
        self._began = self._told = time.monotonic()
        if self.name is not None and sys.stderr.isatty():
            self._bar = _bar(self.unit)
            self._bar.start()
            self._bar.add_task(self.name, total=self.total, rate="", note="")
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def skip(self, count: int) -> None:
        """Count what an earlier run has done already."""
        self.done += count
        self.skipped += count
        self._began = time.monotonic()

    def advance(self, count: int = 1, note: Callable[[], str] | None = None) -> None:
        """Count what was done just now.

        Args:
            count: units.
            note: gives what is shown beside the rate, such as a loss; called only where it is.
        """
        if self.skipped and not self._resumed and self.name is not None:
            self._resumed = True
            word = self.unit.removesuffix("s")
            self._say(f"{self.name}: resumed at {word} {self.done:,} of {self.total:,}")
        self.done += count
        self.show(note)

    def show(self, note: Callable[[], str] | None = None) -> None:
        """Show how far it is, if what was shown last is old enough."""
        now = time.monotonic()
        due = EVERY if self._bar is None else OFTEN
        if self.name is None or (now - self._told < due and self.done < self.total):
            return
        rate = (self.done - self.skipped) / max(now - self._began, 1e-9)
        words = note() if note is not None else ""
        if self._bar is not None:
            self._told = now
            shown: dict[str, Any] = {"rate": f"{_digits(rate)} {self.unit}/s", "note": words}
            self._bar.update(self._bar.task_ids[0], completed=self.done, **shown)
        elif now - self._told >= due:
            self._told = now
            left = duration((self.total - self.done) / rate) if rate else "unknown time"
            self._say(
                f"{self.name}: {self.done:,} of {self.total:,} {self.unit}, {_digits(rate)} "
                f"{self.unit}/s, {left} left{f', {words}' if words else ''}"
            )

    def _say(self, line: str) -> None:
        if self._bar is not None:
            self._bar.console.print(line, highlight=False)
        else:
            log.info("%s", line)


def track(items: Iterable[Item], name: str, total: int, unit: str = "files") -> Iterator[Item]:
    """Yield `items`, each counted once the next one is asked for."""
    with Progress(name, total, unit) as progress:
        for item in items:
            yield item
            progress.advance()


def _digits(rate: float) -> str:
    """Three digits of a small rate, all of a large one's."""
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

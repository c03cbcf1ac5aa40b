"""Progress bars on standard error, for work that takes longer than a moment."""

from collections.abc import Iterable, Iterator
from typing import TypeVar

Item = TypeVar("Item")


def track(items: Iterable[Item], description: str, total: int) -> Iterator[Item]:
    """Yield `items` under a progress bar with the time left; silent where there is no terminal."""
    from rich.console import Console
    from rich.progress import track as rich_track

    console = Console(stderr=True)
    yield from rich_track(
        items, description, total, console=console, transient=True, disable=not console.is_terminal
    )

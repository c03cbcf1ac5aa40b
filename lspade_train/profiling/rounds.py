"""Times several pieces of work alternately, round by round, under equal conditions."""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch

from lspade_train.io.progress import Progress
from lspade_train.profiling.clock import seconds_of

ROUNDS = (5, 40)
"""Fewest and most timed rounds."""
ENOUGH = 20.0
"""Seconds after which no further round is started."""


@dataclass(frozen=True)
class Work:
    """Work to time, a number of times in a row, in a context that is not timed."""

    run: Callable[[], object]
    times: int = 1
    within: Callable[[], AbstractContextManager[None]] = nullcontext

    def seconds(self, device: torch.device) -> float:
        """Seconds of one run."""

        def runs() -> None:
            for _ in range(self.times):
                self.run()

        with self.within():
            return seconds_of(runs, device) / self.times


def time_rounds(
    work: Mapping[str, Work], device: torch.device, rounds: int | None
) -> dict[str, list[float]]:
    """Seconds of all work, round by round.

    Args:
        work: work to time, by name.
        device: device it runs on.
        rounds: number of rounds; None: as many as fit into some seconds, at least 5.
    """
    for one in work.values():  # warm up
        one.run()
    least, most = ROUNDS if rounds is None else (rounds, rounds)
    found: dict[str, list[float]] = {name: [] for name in work}
    began = time.monotonic()
    with Progress("measuring", most, "rounds") as progress:
        for done in range(most):
            if done >= least and time.monotonic() - began > ENOUGH:
                break
            for name, one in work.items():
                found[name].append(one.seconds(device))
            progress.advance()
    return found


def spread_of(values: Sequence[float]) -> float:
    """Interquartile range as a fraction of the median."""
    if len(values) < 2:
        return 0.0
    low, middle, high = statistics.quantiles(values, n=4)
    return (high - low) / middle

"""Coordinates the processes of one run, over torch.distributed. Independent of their work.

The launcher (Lightning, torchrun, SLURM) sets up the process group; without one, there is a single
process, and everything here is a plain call.
"""

import re
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from datetime import timedelta
from functools import cache
from typing import Any, TypeVar

from torch import distributed

from lspade_train.errors import LSpadeError, PeerError, StoppedError

Result = TypeVar("Result")

PATIENCE = timedelta(days=30)
"""How long processes wait for each other's work, such as hashing a terabyte."""

LOST = re.compile(r"gloo/transport|connectFullMesh|ncclRemoteError|collective operation timeout")
"""Matches the backends' errors for a lost peer, which have no type of their own."""


def ranks() -> tuple[int, int]:
    """This process's rank and the number of processes."""
    if not (distributed.is_available() and distributed.is_initialized()):
        return 0, 1
    return distributed.get_rank(), distributed.get_world_size()


def together(work: Callable[[], Result]) -> list[Result]:
    """Run `work` on every process; all return the results of all, or all raise.

    Args:
        work: this process's work; may itself call `together`.

    Returns:
        The results, in order of rank. They are pickled between processes of one user's run.

    Raises:
        LSpadeError: on rank 0, the first error of any process.
        PeerError: on the other ranks, which need not report it again.
        StoppedError: another process exited without reporting an error.
    """
    rank, world = ranks()
    if world == 1:
        return [work()]
    result: Result | None = None
    error: LSpadeError | None = None
    try:
        result = work()
    except LSpadeError as caught:
        if getattr(caught, "everywhere", False):  # already known to all from an inner call
            raise
        error = caught
    answers = _exchange((result, error), world)
    errors = [found for _, found in answers if found is not None]
    if errors:
        shared = errors[0] if rank == 0 else PeerError("Another process of this run has failed.")
        shared.__dict__["everywhere"] = True
        raise shared
    return [found for found, _ in answers]


def first_alone(work: Callable[[], Result]) -> Result:
    """Run `work` on rank 0, then on the others, which find the files that it has written.

    Raises:
        LSpadeError: as for `together`.
    """
    kept: list[Result] = []
    for turn in (True, False):
        together(lambda turn=turn: kept.append(work()) if (ranks()[0] == 0) is turn else None)
    return kept[0]


@contextmanager
def lost_peers_named(advice: str) -> Generator[None]:
    """Turn a backend's error for a lost peer into a named one; other errors pass through.

    Args:
        advice: what to do in that case, one line.

    Raises:
        StoppedError: another process of this run exited without reporting an error.
    """
    try:
        yield
    except RuntimeError as cause:
        if not LOST.search(str(cause)):
            raise
        what = "Another process of this run ended before its work was done."
        raise StoppedError(f"{what}\n{advice}") from cause


def _exchange(mine: object, world: int) -> list:
    answers: list = [None] * world
    with lost_peers_named("What is complete is kept: run the same command again to resume."):
        group = _group(distributed.group.WORLD)
        # Polled, since signals are not handled inside a blocking call.
        everyone: Any = distributed.barrier(group, async_op=True)
        while not everyone.is_completed():
            time.sleep(0.002)
        everyone.wait()
        distributed.all_gather_object(answers, mine, group)
    return answers


@cache
def _group(_: Any) -> Any:
    """A gloo group, which detects a lost peer at once, for any backend of the gradients."""
    return distributed.new_group(backend="gloo", timeout=PATIENCE)

"""Agreement among the processes of one run, over torch.distributed. Knows nothing of their work.

The launcher (Lightning, torchrun, SLURM) has set up the process group; without one a process is
alone, and everything here is a plain call.
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
"""How long processes wait for each other's work, which may be to hash a terabyte."""

LOST = re.compile(r"gloo/transport|connectFullMesh|ncclRemoteError|collective operation timeout")
"""Found in the backends' errors of a lost peer, whose types are those of any other error."""


def ranks() -> tuple[int, int]:
    """This process's number and how many there are."""
    if not (distributed.is_available() and distributed.is_initialized()):
        return 0, 1
    return distributed.get_rank(), distributed.get_world_size()


def together(work: Callable[[], Result]) -> list[Result]:
    """Run `work` on every process; all return with the results of all, or all with an error.

    Args:
        work: what this process does; may itself call `together`.

    Returns:
        The results, in order of rank. They are pickled between processes of one user's run.

    Raises:
        LSpadeError: on the first process, the first error of any.
        PeerError: on the others, which need not report it again.
        StoppedError: another process ended without reporting an error.
    """
    rank, world = ranks()
    if world == 1:
        return [work()]
    result: Result | None = None
    error: LSpadeError | None = None
    try:
        result = work()
    except LSpadeError as caught:
        if getattr(caught, "everywhere", False):  # they all know from an inner call
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
    """Run `work` on the first process, then on the others, which find what it has written.

    Raises:
        LSpadeError: as `together` does.
    """
    kept: list[Result] = []
    for turn in (True, False):
        together(lambda turn=turn: kept.append(work()) if (ranks()[0] == 0) is turn else None)
    return kept[0]


@contextmanager
def lost_peers_named(advice: str) -> Generator[None]:
    """Turn a backend's error of a lost peer into a named one; every other error passes.

    Args:
        advice: what to do then, one line.

    Raises:
        StoppedError: another process of this run ended without reporting an error.
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
        # Polled, since a signal is not handled inside a call that waits.
        everyone: Any = distributed.barrier(group, async_op=True)
        while not everyone.is_completed():
            time.sleep(0.002)
        everyone.wait()
        distributed.all_gather_object(answers, mine, group)
    return answers


@cache
def _group(_: Any) -> Any:
    """Over gloo, which notices a lost peer at once, whatever carries the gradients."""
    return distributed.new_group(backend="gloo", timeout=PATIENCE)

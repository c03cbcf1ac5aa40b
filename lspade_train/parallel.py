"""What the processes of one run agree on, over torch.distributed. Knows nothing of their work.

Whoever starts the processes (Lightning, torchrun, SLURM) has set up the process group; without one
a process is alone, and everything here is a plain call.
"""

from collections.abc import Callable
from typing import TypeVar

from torch import distributed

from lspade_train.errors import LSpadeError, PeerError, StoppedError

Result = TypeVar("Result")


def ranks() -> tuple[int, int]:
    """This process's number and how many there are."""
    if not (distributed.is_available() and distributed.is_initialized()):
        return 0, 1
    return distributed.get_rank(), distributed.get_world_size()


def together(work: Callable[[], Result]) -> list[Result]:
    """Run `work` on every process; all leave with everybody's results, or all with an error.

    Args:
        work: what this process does; may itself call `together`.

    Returns:
        The results, in order of rank. They are pickled between processes of one user's run.

    Raises:
        LSpadeError: on the first process, the first error of any.
        PeerError: on the others, which need not say it again.
        StoppedError: another process ended without a word.
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
    """Run `work` on the first process, then on the others, which find what it left behind.

    Raises:
        LSpadeError: as `together` does.
    """
    kept: list[Result] = []
    for turn in (True, False):
        together(lambda turn=turn: kept.append(work()) if (ranks()[0] == 0) is turn else None)
    return kept[0]


def _exchange(mine: object, world: int) -> list:
    answers: list = [None] * world
    try:
        distributed.all_gather_object(answers, mine)
    except RuntimeError as cause:  # the backends' errors of a lost peer, and of waiting in vain
        raise StoppedError(
            "Another process of this run ended before its work was done.\n"
            "What is complete is kept: run the same command again to go on."
        ) from cause
    return answers

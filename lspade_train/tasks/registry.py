"""The tasks by name."""

from lspade_train.errors import TaskError
from lspade_train.tasks.arc import ARC_CHALLENGE, ARC_EASY
from lspade_train.tasks.base import Task
from lspade_train.tasks.boolq import BOOLQ
from lspade_train.tasks.headqa import HEADQA
from lspade_train.tasks.jsonl import JSONL
from lspade_train.tasks.text import TEXT

TASKS = {task.name: task for task in (ARC_EASY, ARC_CHALLENGE, BOOLQ, HEADQA, JSONL, TEXT)}


def find_task(name: str) -> Task:
    """The task of that name.

    Raises:
        TaskError: there is none.
    """
    if name not in TASKS:
        raise TaskError(f"Unknown task {name!r}. Set data.task to one of {', '.join(TASKS)}.")
    return TASKS[name]

"""The registry of tasks. Tasks from outside the package are added with `register_task`."""

from lspade_train.errors import TaskError
from lspade_train.tasks.arc import ARC_CHALLENGE, ARC_EASY
from lspade_train.tasks.base import Task
from lspade_train.tasks.boolq import BOOLQ
from lspade_train.tasks.headqa import HEADQA
from lspade_train.tasks.jsonl import JSONL
from lspade_train.tasks.text import TEXT

TASKS = {task.name: task for task in (ARC_EASY, ARC_CHALLENGE, BOOLQ, HEADQA, JSONL, TEXT)}


def register_task(task: Task) -> Task:
    """Register a task under its name, for use as `data.task`.

    Raises:
        TaskError: the name is taken.
    """
    if task.name in TASKS:
        raise TaskError(f"A task named {task.name!r} is registered already. Choose another name.")
    TASKS[task.name] = task
    return task


def find_task(name: str) -> Task:
    """The task with that name.

    Raises:
        TaskError: no task has that name.
    """
    if name not in TASKS:
        raise TaskError(f"Unknown task {name!r}. Set data.task to one of {', '.join(TASKS)}.")
    return TASKS[name]

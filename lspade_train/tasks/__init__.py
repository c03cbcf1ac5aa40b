"""Data rows to tokenised prompts with one-token answers.

One file per benchmark says what its rows mean; templates, labels and chat format are data in the
recipe. Importing this package does not load `datasets`.
"""

from lspade_train.models.tokenization import resolve_choices, tokenize
from lspade_train.tasks.base import SPLITS, Encoded, Example, Question, Rows, Split, Task
from lspade_train.tasks.encoding import encode
from lspade_train.tasks.identity import identity
from lspade_train.tasks.registry import TASKS, register_task
from lspade_train.tasks.rows import (
    evaluation_split,
    load_rows,
    require_choices,
    require_splits,
    splits,
)

__all__ = [
    "SPLITS",
    "TASKS",
    "Encoded",
    "Example",
    "Question",
    "Rows",
    "Split",
    "Task",
    "encode",
    "evaluation_split",
    "identity",
    "load_rows",
    "register_task",
    "require_choices",
    "require_splits",
    "resolve_choices",
    "splits",
    "tokenize",
]

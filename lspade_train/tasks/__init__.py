"""Turns data rows into tokenised prompts with one-token answers.

One file per benchmark defines its rows; templates, labels and chat format come from the recipe.
Importing this package loads neither `datasets` nor `transformers`: rows are checked before anything
is tokenised.
"""

import importlib
from typing import TYPE_CHECKING, Any

from lspade_train.tasks.base import SPLITS, Encoded, Example, Question, Rows, Split, Task
from lspade_train.tasks.registry import TASKS, register_task
from lspade_train.tasks.rows import (
    evaluation_split,
    load_rows,
    require_choices,
    require_splits,
    splits,
)

if TYPE_CHECKING:
    from lspade_train.models.tokenization import resolve_choices, tokenize
    from lspade_train.tasks.encoding import encode
    from lspade_train.tasks.fingerprint import identity

_MODULES = {
    "encode": "tasks.encoding",
    "identity": "tasks.fingerprint",
    "resolve_choices": "models.tokenization",
    "tokenize": "models.tokenization",
}
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


def __getattr__(name: str) -> Any:
    """Import modules that need a tokenizer on first use."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"lspade_train.{_MODULES[name]}"), name)

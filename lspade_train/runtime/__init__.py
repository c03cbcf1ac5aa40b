"""SPADE-EXIT: answer as soon as a linear head is sure. Loads no Lightning, datasets or wandb."""

from lspade_train.runtime.audit import Audit
from lspade_train.runtime.decide import Decision
from lspade_train.runtime.exit_runtime import ExitRuntime
from lspade_train.runtime.generate import Drafts, Generation

__all__ = ["Audit", "Decision", "Drafts", "ExitRuntime", "Generation"]

"""Any Hugging Face decoder, driven block by block by its own code."""

from lspade_train.adapters.adapter import ModelAdapter
from lspade_train.adapters.loading import load_unembedding, resolve_device
from lspade_train.adapters.plan import Plan, StartCache
from lspade_train.adapters.unembedding import Unembedding

__all__ = [
    "ModelAdapter",
    "Plan",
    "StartCache",
    "Unembedding",
    "load_unembedding",
    "resolve_device",
]

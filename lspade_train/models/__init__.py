"""Runs any Hugging Face decoder block by block, with its own code."""

from lspade_train.models.adapter import ModelAdapter
from lspade_train.models.loading import hub_commit, load_unembedding, model_folder, resolve_device
from lspade_train.models.plan import Plan, StartCache
from lspade_train.models.prefix import length_batches
from lspade_train.models.sharing import prefix_refusal, shared_groups, sharing_told
from lspade_train.models.unembedding import Unembedding

__all__ = [
    "ModelAdapter",
    "Plan",
    "StartCache",
    "Unembedding",
    "hub_commit",
    "length_batches",
    "load_unembedding",
    "model_folder",
    "prefix_refusal",
    "resolve_device",
    "shared_groups",
    "sharing_told",
]

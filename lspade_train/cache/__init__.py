"""Hidden states and SPADE targets on disk: manifest with identity, shards, memory-mapped reads."""

from lspade_train.cache.extract import Extraction, extract, row_count
from lspade_train.cache.manifest import Identity, Manifest, require_same
from lspade_train.cache.online import OnlineDataset
from lspade_train.cache.reader import (
    StateBatch,
    StateDataset,
    open_cache,
    split_folders,
    verify,
)
from lspade_train.cache.shards import estimate, require_memory
from lspade_train.cache.writer import build, discard

__all__ = [
    "Extraction",
    "Identity",
    "Manifest",
    "OnlineDataset",
    "StateBatch",
    "StateDataset",
    "build",
    "discard",
    "estimate",
    "extract",
    "open_cache",
    "require_memory",
    "require_same",
    "row_count",
    "split_folders",
    "verify",
]

"""Hidden states and SPADE targets on disk: manifest, shards, memory-mapped reads."""

from lspade_train.cache.added_targets import add_targets
from lspade_train.cache.dataset import StateDataset
from lspade_train.cache.extract import Extraction, extract, row_count, spade_targets
from lspade_train.cache.job import Build
from lspade_train.cache.manifest import Identity, Manifest, require_same
from lspade_train.cache.online import OnlineDataset
from lspade_train.cache.reader import open_cache, split_folders, verify
from lspade_train.cache.shards import Estimate, estimate, require_memory
from lspade_train.cache.states import StateBatch
from lspade_train.cache.writer import build, discard

__all__ = [
    "Build",
    "Estimate",
    "Extraction",
    "Identity",
    "Manifest",
    "OnlineDataset",
    "StateBatch",
    "StateDataset",
    "add_targets",
    "build",
    "discard",
    "estimate",
    "extract",
    "open_cache",
    "require_memory",
    "require_same",
    "row_count",
    "spade_targets",
    "split_folders",
    "verify",
]

"""Writes the files of a cache: what each contains, how it is computed, and where it is uploaded.

A file depends on its rows only: batches do not cross shards, so neither an interruption nor the
number of processes changes its bytes. Independent of manifests.
"""

import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from torch import Tensor

from lspade_train.cache.extract import Extraction, row_count
from lspade_train.cache.manifest import Shard
from lspade_train.cache.unfinished import SUFFIX, Unfinished
from lspade_train.errors import CacheError
from lspade_train.io.progress import Progress
from lspade_train.io.storage import file_digest, file_stamp
from lspade_train.io.tensors import file_tag, write_tensors
from lspade_train.io.text import byte_size
from lspade_train.models import ModelAdapter
from lspade_train.tasks import Example

LABEL_BYTES = 40
"""Approximate size of a row's labels and ids, in addition to its states."""


class RemoteStore(Protocol):
    """A remote place that finished files are copied to and may be fetched from."""

    def fetch_files(self, *paths: Path) -> None:
        """Make local files equal to the remote ones, if those exist."""

    def publish_file(self, path: Path) -> None:
        """Upload a complete file."""


class LocalStore:
    """No remote store: files are only in the local folder."""

    def fetch_files(self, *paths: Path) -> None:
        """Do nothing."""

    def publish_file(self, path: Path) -> None:
        """Do nothing."""


@dataclass(frozen=True)
class Estimate:
    """Size of a cache, known before the model runs.

    Attributes:
        rows: cached rows.
        state_bytes: bytes per row, hidden states and labels.
        target_bytes: bytes per row of SPADE's targets; 0 if none are needed.
        prompts_per_shard: prompts in one shard.
        shards: number of shards.
    """

    rows: int
    state_bytes: int
    target_bytes: int
    prompts_per_shard: int
    shards: int

    @property
    def row_bytes(self) -> int:
        """Bytes per row, states and targets."""
        return self.state_bytes + self.target_bytes

    @property
    def bytes(self) -> int:
        """Size of the whole cache."""
        return self.rows * self.row_bytes


def estimate(
    adapter: ModelAdapter, examples: Sequence[Example], what: Extraction, shard_mb: float
) -> Estimate:
    """Size and shards of a cache, without running the model."""
    vectors = (len(what.layers) + 1) * adapter.hidden_size
    states = vectors * adapter.dtype.itemsize + LABEL_BYTES + 4 * what.max_choices
    targets = target_bytes(adapter, what)
    rows = row_count(examples)
    # Targets are counted even if they are not stored: they may be added to these shards later.
    per_prompt = (states + targets) * rows / max(len(examples), 1)
    per_shard = max(int(shard_mb * 1_000_000 / per_prompt), 1)
    shards = -(-len(examples) // per_shard)
    return Estimate(rows, states, targets if what.spade else 0, per_shard, shards)


def target_bytes(adapter: ModelAdapter, what: Extraction) -> int:
    """Bytes per row of SPADE's targets."""
    per_layer = {
        "hidden": adapter.hidden_size * adapter.dtype.itemsize,
        "logits": adapter.vocab_size * 2,
        "topk": min(what.topk, adapter.vocab_size) * 6,
    }
    return len(what.layers) * per_layer[what.targets]


def require_memory(size: Estimate) -> None:
    """Raise if the states do not fit in this machine's memory.

    Raises:
        CacheError: they do not fit.
    """
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if size.bytes > total:
        raise CacheError(
            f"These states take {byte_size(size.bytes)} and this machine has {byte_size(total)} of "
            "memory.\nUse --data.mode disk, fewer --model.layers, or --data.limit."
        )


@dataclass(frozen=True)
class Part:
    """One file of rows.

    Attributes:
        path: the file.
        rows: number of rows in it.
        tag: everything that determines its bytes, to tell it from other versions of the file.
        compute: computes its tensors, step by step.
    """

    path: Path
    rows: int
    tag: str
    compute: Callable[[Unfinished], dict[str, Tensor]]


def write_parts(
    parts: Iterable[Part], store: RemoteStore, progress: Progress, *, overwrite: bool
) -> dict[Shard, list[int]]:
    """Compute and write files; those that already exist are only checked.

    While the model computes one file, a thread writes, syncs, hashes and uploads the previous one,
    so the device never waits for disk or network, and at most two are in memory.

    Args:
        parts: the files, in order.
        store: where each is uploaded as soon as it is complete.
        progress: counts the rows.
        overwrite: recompute files that exist.

    Returns:
        The files, each with its stamp.

    Raises:
        CacheError: a file cannot be written; the files before it are complete.
        NumericsError: a state is NaN or Inf; the files before it are complete.
    """
    done: list[tuple[Shard, list[int]]] = []
    writing: Future[tuple[Shard, list[int]]] | None = None
    # Leaving the block, even by an error, waits for the file that is being written.
    with ThreadPoolExecutor(1, thread_name_prefix="shards") as disk:
        for part in parts:
            tensors = None
            if not overwrite and _exists(part, store):
                progress.skip(part.rows)
            else:
                tensors = part.compute(Unfinished(part.path, part.tag, progress))
            # Handed over before waiting for the one before: an interruption here loses nothing.
            following = disk.submit(_store, part, tensors, store)
            if writing is not None:
                done.append(writing.result())
            writing = following
        if writing is not None:
            done.append(writing.result())
    return dict(done)


def _exists(part: Part, store: RemoteStore) -> bool:
    store.fetch_files(part.path)
    return file_tag(part.path) == part.tag


def _store(
    part: Part, tensors: dict[str, Tensor] | None, store: RemoteStore
) -> tuple[Shard, list[int]]:
    if tensors is None:
        stamp = file_stamp(part.path)
        digest = file_digest(part.path, CacheError)
    else:
        digest = write_tensors(part.path, tensors, part.tag, CacheError)
        stamp = file_stamp(part.path)
        part.path.with_suffix(SUFFIX).unlink(missing_ok=True)
    store.publish_file(part.path)
    return Shard(part.path.name, part.rows, stamp[0], digest), stamp

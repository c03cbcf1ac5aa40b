"""Reduces a whole data set's targets before a fit, into an unlinked memory-mapped file.

Two products over the vocabulary per row and layer, done once, are saved in every step. Independent
of heads and Lightning.
"""

import errno
import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from lspade_train.cache import StateBatch, StateDataset
from lspade_train.cache.states import TARGETS
from lspade_train.io.text import byte_size
from lspade_train.models import Unembedding
from lspade_train.training.numerics import chunk_memory, wide
from lspade_train.training.targets import reduce_target, target_logits
from lspade_train.training.tiles import tile_of

log = logging.getLogger(__name__)


def pays_off(epochs: int, processes: int) -> bool:
    """Whether reducing all rows costs less than it saves.

    Each process reduces all rows, with two products each, and saves as many per epoch for its share
    of the rows.
    """
    return epochs > processes


def reduce_dataset(
    dataset: StateDataset,
    unembed: Unembedding,
    folder: Path,
    track: Callable[[Sequence[int]], Iterable[int]] = iter,
) -> StateDataset | None:
    """The same rows with SPADE's targets reduced.

    The file is mapped like the cache itself, so that the system may evict it from memory, and is
    freed with the last tensor that uses it.

    Args:
        dataset: rows with SPADE's targets.
        unembed: the frozen norm and head; must satisfy `targets.is_reducible`.
        folder: folder for the file.
        track: wraps the shard numbers in a progress bar.

    Returns:
        The rows, or None if the file would take over half of the free space (heads and checkpoints
        need some, too) or cannot be written.
    """
    layers, width = len(dataset.layers), unembed.weight.shape[1]
    try:
        shape = int(dataset.starts[-1]), layers, width
        means = _mapped(folder, shape, wide(unembed.weight.dtype))
    except OSError as cause:
        log.info("targets are recomputed in every step (%s)", cause.strerror or cause)
        return None
    stored = "target" not in dataset.shards[0]
    memory = chunk_memory(unembed) if stored else None
    shards: list[dict[str, Tensor]] = []
    for number in track(range(len(dataset.shards))):
        shard = dataset.shards[number]
        mean = means[int(dataset.starts[number]) : int(dataset.starts[number + 1])]
        kept = {name: value for name, value in shard.items() if name not in TARGETS}
        shards.append(kept | _reduce_shard(shard, mean, unembed, memory))
    return dataset.with_shards(shards)


def _reduce_shard(
    shard: dict[str, Tensor], mean: Tensor, unembed: Unembedding, memory: Tensor | None
) -> dict[str, Tensor]:
    """Reduced targets by their names in `StateBatch`; the large one is written to `mean`."""
    rows, layers = mean.shape[:2]
    step = max(tile_of(unembed)[0] // layers, 1)
    parts: list[tuple[Tensor, ...]] = []
    for first in range(0, rows, step):
        chosen = slice(first, first + step)
        rows_of = {name: value[chosen] for name, value in shard.items()}
        moved = {n: v.to(unembed.weight.device) for n, v in rows_of.items() if n in TARGETS}
        batch = StateBatch(**rows_of | moved)
        target = target_logits(batch, "spade", unembed)
        found = reduce_target(target, len(batch) * layers, unembed, memory)
        mean[chosen] = found.mean.reshape(-1, layers, mean.shape[-1])
        numbers = (found.offset, found.entropy, found.best.int())
        parts.append(tuple(number.reshape(-1, layers).cpu() for number in numbers))
    offset, entropy, best = (torch.cat(numbers) for numbers in zip(*parts, strict=True))
    return {
        "target_mean": mean,
        "target_offset": offset,
        "target_entropy": entropy,
        "target_best": best,
    }


def _mapped(folder: Path, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """A tensor mapped to an unlinked file.

    Raises:
        OSError: not enough space, or the folder is not writable.
    """
    size = int(np.prod(shape)) * dtype.itemsize
    if size > shutil.disk_usage(folder).free // 2:
        raise OSError(errno.ENOSPC, f"{byte_size(size)} is over half of the free space")
    with tempfile.TemporaryFile(dir=folder) as file:
        # Allocate now: a disk that fills up later would kill the process with a signal.
        if hasattr(os, "posix_fallocate"):  # not on macOS
            os.posix_fallocate(file.fileno(), 0, size)
        else:
            file.truncate(size)
        content = np.memmap(file, dtype=np.uint8, mode="r+", shape=(size,))
    return torch.from_numpy(content).view(dtype).view(shape)

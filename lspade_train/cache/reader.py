"""Read a cache: memory-mapped shards, checked once, gathered by row. Knows nothing of models."""

import contextlib
import math
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from copy import copy
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, get_type_hints

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, jaxtyped
from torch import Tensor

from lspade_train.cache.manifest import (
    MANIFEST,
    REBUILD,
    STARTS,
    Identity,
    Manifest,
    Shard,
    require_same,
)
from lspade_train.errors import CacheError
from lspade_train.io.storage import file_digest, file_stamp, read_json, read_tensors, write_json

VERIFIED = ".verified.json"

STATES = {"hidden", "final", "target", "target_logits", "target_values", "target_tokens"}
"""What makes a row large; the rest are labels."""

READ_MB = 16
"""Hidden states that a shuffled epoch reads at once: finding them is then a few percent of it."""

Track = Callable[[Iterable[Shard]], Iterable[Shard]]


@dataclass
class StateBatch:
    """Cached rows. One row is one answer position of one prompt.

    Attributes:
        hidden: h_a^l, (rows, layers, d).
        final: h_a^L, (rows, d).
        start_id: first real token of the prompt.
        position_id: index of the answer among the prompt's real tokens.
        answer_id: right token; meaningless where not `labelled`.
        labelled: whether the row has a right answer.
        choice_ids: candidate tokens, padded by repeating the first.
        choice_count: number of candidates; 0 where any token may be the answer.
        group: index into the manifest's groups.
        target: SPADE's hidden state before the final norm (`targets: hidden`).
        target_logits: SPADE's logits (`targets: logits`).
        target_values: SPADE's k best logits (`targets: topk`).
        target_tokens: their tokens.
    """

    hidden: Float[Tensor, "rows layers d"]
    final: Float[Tensor, "rows d"]
    start_id: Int[Tensor, " rows"]
    position_id: Int[Tensor, " rows"]
    answer_id: Int[Tensor, " rows"]
    labelled: Bool[Tensor, " rows"]
    choice_ids: Int[Tensor, "rows choices"]
    choice_count: Int[Tensor, " rows"]
    group: Int[Tensor, " rows"]
    target: Float[Tensor, "rows layers d"] | None = None
    target_logits: Float[Tensor, "rows layers vocab"] | None = None
    target_values: Float[Tensor, "rows layers k"] | None = None
    target_tokens: Int[Tensor, "rows layers k"] | None = None

    def __len__(self) -> int:
        return len(self.final)

    def rows(self, which: slice) -> "StateBatch":
        """Some of the rows: views."""
        return replace(self, **{name: value[which] for name, value in self._tensors().items()})

    def of_layers(self, which: slice) -> "StateBatch":
        """The same rows, some of the layers: views."""
        by_layer = STATES - {"final"}
        cut = {name: v[:, which] for name, v in self._tensors().items() if name in by_layer}
        return replace(self, **cut)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "StateBatch":
        """The same rows on another device."""
        moved = {
            name: value.to(device, non_blocking=non_blocking)
            for name, value in self._tensors().items()
        }
        return replace(self, **moved)

    def _tensors(self) -> dict[str, Tensor]:
        found = ((field.name, getattr(self, field.name)) for field in fields(self))
        return {name: value for name, value in found if value is not None}


class StateDataset:
    """Rows over one or more shards, on disk or in memory.

    Args:
        shards: per shard, tensors by the names of `StateBatch`.
        groups: names of the subgroups.
        layers: the layers of `StateBatch.hidden`.
    """

    def __init__(
        self, shards: Sequence[dict[str, Tensor]], groups: Sequence[str], layers: Sequence[int]
    ) -> None:
        self.shards = list(shards)
        self.groups = tuple(groups)
        self.layers = tuple(layers)
        sizes = torch.tensor([len(shard["final"]) for shard in self.shards])
        self.starts = torch.cat([sizes.new_zeros(1), sizes.cumsum(0)])
        self._chosen: Tensor | None = None  # places of the rows among the shards'; None: all
        self._memory = _Memory()
        # A few bytes a row: in one piece, since a call per shard would cost more than the reading.
        self.labels = {
            name: torch.cat([shard[name] for shard in self.shards])
            for name in self.shards[0]
            if name not in STATES
        }

    def __len__(self) -> int:
        return int(self.starts[-1]) if self._chosen is None else len(self._chosen)

    @property
    def rows_at_once(self) -> int:
        """How many rows are best read together."""
        return rows_at_once(self.shards[0]["hidden"][:1].nbytes)

    def arrange(self, rows: Int[Tensor, " rows"]) -> Int[Tensor, " rows"]:
        """Shard by shard, so that each is read in one piece; within a shard as given."""
        return rows[self._shard_of(rows).argsort(stable=True)]

    def deal(self, rows: Int[Tensor, " rows"], count: int) -> Iterator[StateBatch]:
        """`rows[j::count]` for every j, read at once."""
        block = self.gather(rows)
        return (block.rows(slice(first, None, count)) for first in range(count))

    def first(self, rows: int) -> "StateDataset":
        """The leading rows, without a copy of their states."""
        return self.select(torch.arange(min(rows, len(self))))

    def select(self, rows: Int[Tensor, " rows"]) -> "StateDataset":
        """Some of the rows, in the given order, without a copy of their states."""
        found = copy(self)
        found._chosen = self._places(rows)
        found.labels = {name: label[rows] for name, label in self.labels.items()}
        return found

    def gather(self, rows: Int[Tensor, " rows"]) -> StateBatch:
        """The asked rows in the asked order, copied out of the maps once."""
        rows = rows.contiguous()
        which, places = self._shard_of(rows), self._places(rows)
        out = {name: label.index_select(0, rows) for name, label in self.labels.items()}
        states = {name: value for name, value in self.shards[0].items() if name in STATES}
        for name, value in states.items():
            out[name] = self._memory.take((len(rows), *value.shape[1:]), value.dtype)
        for number in which.unique().tolist():
            place = (which == number).nonzero()[:, 0]
            local = places[place] - self.starts[number]
            first, last = int(place[0]), int(place[-1]) + 1
            for name in states:
                value = self.shards[number][name]
                if last - first == len(place):  # one piece of the batch: no second copy
                    torch.index_select(value, 0, local, out=out[name][first:last])
                else:
                    out[name][place] = value[local]
        return StateBatch(**out)

    def _places(self, rows: Tensor) -> Tensor:
        """Where rows stand among those of all shards."""
        return rows if self._chosen is None else self._chosen[rows]

    def _shard_of(self, rows: Tensor) -> Tensor:
        return torch.bucketize(self._places(rows), self.starts, right=True) - 1


class _Memory:
    """Memory for what is read, used again once nobody holds a tensor of it.

    Fresh memory has to be mapped by the system, page by page: that takes longer than the reading.
    """

    KEPT = 8
    """Buffers at most: hidden, target and final of two blocks, and of a batch between."""
    MOST = 64 * 2**20
    """Bytes of one at most."""

    def __init__(self) -> None:
        self._kept: list[np.ndarray] = []

    def take(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """A tensor of undefined content."""
        size = math.prod(shape) * dtype.itemsize
        if not 0 < size <= self.MOST:
            return torch.empty(shape, dtype=dtype)
        for number in range(len(self._kept)):
            if self._kept[number].nbytes >= size and _references(self._kept, number) == UNHELD:
                buffer = self._kept[number]
                break
        else:
            buffer = np.empty(size, dtype=np.uint8)
            if len(self._kept) < self.KEPT:
                self._kept.append(buffer)
        return torch.from_numpy(buffer[:size]).view(dtype).view(shape)


def _references(buffers: list[np.ndarray], number: int) -> int:
    """How many hold a buffer; a tensor over it, or a view of that, is one of them."""
    return sys.getrefcount(buffers[number])


UNHELD = _references([np.empty(0)], 0)
"""Of a buffer that only its list holds, as this Python counts."""


def rows_at_once(row_bytes: int) -> int:
    """How many rows with so many bytes of hidden states are best read together."""
    return READ_MB * 2**20 // row_bytes


def open_cache(
    folder: Path, identity: Identity | None = None, *, track: Track = iter
) -> tuple[Manifest, StateDataset]:
    """Open a finished cache of one split.

    Every shard's checksum is compared the first time it is opened after a change.

    Args:
        folder: holds `manifest.json`.
        identity: what it must have been built for; None accepts any.
        track: wraps the shards in a progress bar.

    Raises:
        CacheError: missing, damaged, or built for something else.
    """
    manifest = Manifest.read(folder)
    if identity is not None:
        require_same(manifest.identity, identity, folder)
    verify(folder, manifest, track=track, trust_unchanged=True)
    layers = _layers(manifest, folder)
    shards = [read_tensors(folder / shard.file, CacheError, REBUILD) for shard in manifest.shards]
    first = _shapes(shards[0])
    for shard, tensors in zip(manifest.shards, shards, strict=True):
        right = _is_batch(tensors, shard.rows, len(layers)) and _shapes(tensors) == first
        if not right:
            raise CacheError(_damaged(folder / shard.file, "does not hold the rows of a cache"))
    return manifest, StateDataset(shards, manifest.groups, layers)


def _layers(manifest: Manifest, folder: Path) -> list[int]:
    layers = manifest.identity.get("layers")
    if not isinstance(layers, list) or not all(type(layer) is int for layer in layers):
        raise CacheError(_damaged(folder / MANIFEST, "names no layers"))
    return layers


def _is_batch(tensors: dict[str, Tensor], rows: int, layers: int) -> bool:
    """Whether tensors have the names, kinds and shapes of `StateBatch`."""
    hints = get_type_hints(StateBatch)
    if not tensors.keys() <= hints.keys():
        return False
    with jaxtyped("context"):  # one `rows`, one `d` for all of them
        right = all(isinstance(tensors.get(name), hint) for name, hint in hints.items())
    return right and tensors["hidden"].shape[:2] == (rows, layers)


def _shapes(tensors: dict[str, Tensor]) -> dict[str, Any]:
    return {name: (value.dtype, value.shape[1:]) for name, value in tensors.items()}


def verify(
    folder: Path, manifest: Manifest, *, track: Track = iter, trust_unchanged: bool = False
) -> None:
    """Compare every file with its checksum in the manifest.

    Args:
        folder: holds the files.
        manifest: what they must be.
        track: wraps the shards in a progress bar.
        trust_unchanged: skip files whose size and times are those of the last check. Times are only
            compared for equality, so that a clock may jump.

    Raises:
        CacheError: a file is missing, truncated or changed; names it and the remedy.
    """
    known: dict[str, list[int]] = {}
    if trust_unchanged and (folder / VERIFIED).exists():
        with contextlib.suppress(CacheError):
            known = read_json(folder / VERIFIED, CacheError)
    starts = Shard(STARTS, 0, -1, manifest.starts_sha256)
    seen: dict[str, list[int]] = {}
    for shard in track([*manifest.shards, starts]):
        path = folder / shard.file
        if not path.is_file() or path.is_symlink():
            raise CacheError(_damaged(path, "is missing"))
        size, *_ = seen[shard.file] = file_stamp(path)
        if known.get(shard.file) == seen[shard.file]:
            continue
        if shard.bytes not in (-1, size):
            raise CacheError(_damaged(path, f"has {size} bytes, not {shard.bytes}"))
        if file_digest(path, CacheError) != shard.sha256:
            raise CacheError(_damaged(path, "does not have its checksum"))
    if seen != known:
        note_verified(folder, seen)


def note_verified(folder: Path, seen: dict[str, list[int]]) -> None:
    """Keep the stamps that files had when they were last hashed, so that `verify` may trust them.

    A read-only cache keeps none, and is checked every time.
    """
    with contextlib.suppress(CacheError):
        write_json(folder / VERIFIED, seen, CacheError)


def split_folders(folder: Path) -> list[Path]:
    """The split caches in a folder: itself, or its direct children.

    Raises:
        CacheError: there is none.
    """
    found = [p.parent for p in sorted([*folder.glob(MANIFEST), *folder.glob(f"*/{MANIFEST}")])]
    if not found:
        raise CacheError(
            f"No finished cache in {folder} (no {MANIFEST}). "
            "Build one: lspade-train cache --config RECIPE.yaml"
        )
    return found


def _damaged(path: Path, what: str) -> str:
    return f"{path} {what}: this cache is damaged.\n{REBUILD}"

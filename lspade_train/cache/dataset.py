"""`StateDataset`: rows of cached states over shards, gathered by row. Independent of files."""

from collections.abc import Iterator, Sequence
from copy import copy

import torch
from jaxtyping import Int
from torch import Tensor

from lspade_train.cache.buffers import BufferPool
from lspade_train.cache.states import STATES, StateBatch

READ_MB = 16
"""Hidden states read at once in a shuffled epoch; the lookup then takes a few percent of it."""


class StateDataset:
    """Rows over one or more shards, on disk or in memory.

    Args:
        shards: per shard, tensors by their names in `StateBatch`.
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
        self._chosen: Tensor | None = None  # indices of the rows in the shards; None: all
        self._buffers = BufferPool()
        # A few bytes per row: concatenated, since a call per shard would cost more than reading.
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

    def order_by_shard(self, rows: Int[Tensor, " rows"]) -> Int[Tensor, " rows"]:
        """Order rows by shard, so that each is read at once; within a shard as given."""
        return rows[self._shard_of(rows).argsort(stable=True)]

    def split_batches(self, rows: Int[Tensor, " rows"], count: int) -> Iterator[StateBatch]:
        """Batches of `rows[j::count]` for every j, read at once."""
        block = self.gather(rows)
        return (block.rows(slice(first, None, count)) for first in range(count))

    def first(self, rows: int) -> "StateDataset":
        """The leading rows, without copying their states."""
        return self.select(torch.arange(min(rows, len(self))))

    def select(self, rows: Int[Tensor, " rows"]) -> "StateDataset":
        """Some of the rows, in the given order, without copying their states."""
        found = copy(self)
        found._chosen = self._places(rows)
        found.labels = {name: label[rows] for name, label in self.labels.items()}
        return found

    def copied(self) -> "StateDataset":
        """The same rows, copied into memory."""
        batch = self.gather(torch.arange(len(self)))
        tensors = {name: value for name, value in vars(batch).items() if value is not None}
        return StateDataset([tensors], self.groups, self.layers)

    def with_shards(self, shards: Sequence[dict[str, Tensor]]) -> "StateDataset":
        """The same rows and labels over other states."""
        found = copy(self)
        found.shards = list(shards)
        return found

    def gather(self, rows: Int[Tensor, " rows"]) -> StateBatch:
        """The requested rows in the requested order, copied once out of the mapped files."""
        rows = rows.contiguous()
        which, places = self._shard_of(rows), self._places(rows)
        out = {name: label.index_select(0, rows) for name, label in self.labels.items()}
        states = {name: value for name, value in self.shards[0].items() if name in STATES}
        for name, value in states.items():
            out[name] = self._buffers.take((len(rows), *value.shape[1:]), value.dtype)
        for number in which.unique().tolist():
            place = (which == number).nonzero()[:, 0]
            local = places[place] - self.starts[number]
            first, last = int(place[0]), int(place[-1]) + 1
            for name in states:
                value = self.shards[number][name]
                if last - first == len(place):  # contiguous in the batch: no second copy
                    torch.index_select(value, 0, local, out=out[name][first:last])
                else:
                    out[name][place] = value[local]
        return StateBatch(**out)

    def _places(self, rows: Tensor) -> Tensor:
        """Indices of rows among those of all shards."""
        return rows if self._chosen is None else self._chosen[rows]

    def _shard_of(self, rows: Tensor) -> Tensor:
        return torch.bucketize(self._places(rows), self.starts, right=True) - 1


def rows_at_once(row_bytes: int) -> int:
    """How many rows, given their bytes of hidden states, are best read together."""
    return READ_MB * 2**20 // row_bytes

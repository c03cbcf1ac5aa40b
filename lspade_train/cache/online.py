"""Rows that are computed when they are asked for. Knows nothing of files."""

from collections.abc import Iterator

import torch
from torch import Tensor

from lspade_train.cache.extract import Extraction, extract
from lspade_train.cache.reader import StateBatch, rows_at_once
from lspade_train.models import ModelAdapter
from lspade_train.tasks import Example


class OnlineDataset:
    """Prompts whose states are computed when asked for; nothing is stored.

    A row here is a prompt; a gathered batch holds all its answer positions. Rows are read in the
    order of a stored data set, so that the batches are the same.

    Args:
        adapter: the frozen model.
        examples: the tokenised prompts.
        what: layers and targets.
        tokens: padded prompt tokens per forward.
        per_shard: prompts in a shard of a stored data set.
    """

    def __init__(
        self,
        adapter: ModelAdapter,
        examples: list[Example],
        what: Extraction,
        *,
        tokens: int,
        per_shard: int,
    ) -> None:
        self.adapter, self.examples, self.what = adapter, examples, what
        self.tokens, self.per_shard = tokens, per_shard
        self.groups, self.layers = what.groups, what.layers

    @property
    def rows_at_once(self) -> int:
        """How many rows a stored data set would read together."""
        size = torch.empty(0, dtype=self.adapter.dtype).element_size()
        return rows_at_once(len(self.layers) * self.adapter.hidden_size * size)

    def arrange(self, rows: Tensor) -> Tensor:
        """Shard by shard, as if there were shards."""
        return rows[(rows // self.per_shard).argsort(stable=True)]

    def deal(self, rows: Tensor, count: int) -> Iterator[StateBatch]:
        """`rows[j::count]` for every j, each computed when asked for."""
        return (self.gather(rows[first::count]) for first in range(count))

    def __len__(self) -> int:
        return len(self.examples)

    def extract(self, examples: list[Example]) -> dict[str, Tensor]:
        """Tensors by the names of `StateBatch`, in the host's memory."""
        return extract(self.adapter, examples, self.what, self.tokens)

    def gather(self, rows: Tensor) -> StateBatch:
        """All answer positions of the asked prompts, in their order, states where the model is."""
        asked = [self.examples[int(row)] for row in rows]
        return StateBatch(**extract(self.adapter, asked, self.what, self.tokens, to_host=False))

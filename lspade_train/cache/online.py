"""Rows that are computed when they are asked for. Knows nothing of files."""

from collections.abc import Iterator

import torch
from torch import Tensor

from lspade_train.adapters import ModelAdapter
from lspade_train.cache.extract import Extraction, extract
from lspade_train.cache.reader import StateBatch, rows_at_once
from lspade_train.tasks import Example


class OnlineDataset:
    """Prompts whose states are computed when asked for; nothing is stored.

    A row here is a prompt; a gathered batch holds all its answer positions.
    """

    def __init__(
        self, adapter: ModelAdapter, examples: list[Example], what: Extraction, tokens: int
    ) -> None:
        """Keep the tokenised prompts; `tokens` bounds one forward."""
        self.adapter, self.examples, self.what, self.tokens = adapter, examples, what, tokens
        self.groups, self.layers = what.groups, what.layers

    @property
    def rows_at_once(self) -> int:
        """As of a stored data set, so that the batches are the same."""
        size = torch.empty(0, dtype=self.adapter.dtype).element_size()
        return rows_at_once(len(self.layers) * self.adapter.hidden_size * size)

    def arrange(self, rows: Tensor) -> Tensor:
        """As given."""
        return rows

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

"""Rows that are computed on demand. Independent of files."""

from collections.abc import Iterator
from copy import copy

from jaxtyping import Int
from torch import Tensor

from lspade_train.cache.dataset import rows_at_once
from lspade_train.cache.extract import Extraction, extract, spade_targets
from lspade_train.cache.states import StateBatch
from lspade_train.cache.unfinished import Unfinished
from lspade_train.models import ModelAdapter
from lspade_train.tasks import Example


class OnlineDataset:
    """Prompts whose states are computed on demand; nothing is stored.

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
        """How many rows a stored data set would read at once."""
        vectors = len(self.layers) * self.adapter.hidden_size
        return rows_at_once(vectors * self.adapter.dtype.itemsize)

    def order_by_shard(self, rows: Tensor) -> Tensor:
        """Order rows as if they were stored in shards."""
        return rows[(rows // self.per_shard).argsort(stable=True)]

    def split_batches(self, rows: Tensor, count: int) -> Iterator[StateBatch]:
        """Batches of `rows[j::count]` for every j, each computed on demand."""
        return (self.gather(rows[first::count]) for first in range(count))

    def __len__(self) -> int:
        return len(self.examples)

    def select(self, rows: Int[Tensor, " rows"]) -> "OnlineDataset":
        """Some of the prompts, in the given order."""
        found = copy(self)
        found.examples = [self.examples[int(row)] for row in rows]
        return found

    def extract(self, examples: list[Example], unfinished: Unfinished) -> dict[str, Tensor]:
        """Tensors by their names in `StateBatch`, on the host; `unfinished` counts the rows."""
        return self._compute(examples, unfinished, to_host=True)

    def gather(self, rows: Tensor) -> StateBatch:
        """All answer positions of the requested prompts in order, states on the model's device.

        `rows` may be empty, as for a process that shares a short split with others.
        """
        asked = self.select(rows).examples
        return StateBatch(**self._compute(asked, Unfinished(), to_host=False))

    def _compute(
        self, examples: list[Example], unfinished: Unfinished, *, to_host: bool
    ) -> dict[str, Tensor]:
        states = extract(
            self.adapter, examples, self.what, self.tokens, to_host=to_host, unfinished=unfinished
        )
        return states | (spade_targets(self.adapter, states, self.what) if self.what.spade else {})

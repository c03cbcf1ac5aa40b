"""`RowLoader`: batches of rows in a seeded order that survives interruption. Knows no files."""

from collections.abc import Iterator

import torch
from torch import Tensor

from lspade_train.cache import OnlineDataset, StateBatch, StateDataset
from lspade_train.errors import RecipeError


class RowLoader:
    """Batches of rows, gathered straight from the maps: no worker processes, resumable.

    Every process draws the same permutation and takes its part of each global batch, so that the
    global batches do not depend on the number of processes.

    Args:
        dataset: has `__len__` and `gather`.
        batch_size: rows per batch and process.
        seed: seed of the permutation; None keeps the order.
        rank: this process.
        world: number of processes.
    """

    def __init__(
        self,
        dataset: StateDataset | OnlineDataset,
        batch_size: int,
        *,
        seed: int | None,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        if batch_size < 1:
            raise RecipeError(f"data.batch_size is {batch_size}; expected 1 or more.")
        self.dataset = dataset
        self.batch_size = batch_size
        self.seed = seed
        self.rank, self.world = rank, world
        self.epoch = 0
        self._batch = 0  # batches handed out this epoch
        self._resume_at = 0

    def __len__(self) -> int:
        return -(-self._usable // (self.batch_size * self.world))

    def __iter__(self) -> Iterator[StateBatch]:
        order = self._order()
        step = self.batch_size * self.world
        first, self._resume_at = self._resume_at, 0
        for number in range(first, len(self)):
            part = order[number * step : (number + 1) * step]
            self._batch = number + 1
            # Ascending within the batch: a shard's rows are then read in one piece.
            yield self.dataset.gather(part[self.rank :: self.world].sort().values)
        self.set_epoch(self.epoch + 1)

    @property
    def sampler(self) -> "RowLoader":
        """Where Lightning looks for `set_epoch`."""
        return self

    batch_sampler = None  # what Lightning asks for where there is a `sampler`

    def set_epoch(self, epoch: int) -> None:
        """Begin another epoch; Lightning says which, since it may leave one before its end."""
        if epoch != self.epoch:
            self.epoch, self._batch, self._resume_at = epoch, 0, 0

    @property
    def _usable(self) -> int:
        """Training rows that divide evenly among the processes; all rows otherwise."""
        rows = len(self.dataset)
        return rows - rows % self.world if self.seed is not None else rows

    def _order(self) -> Tensor:
        if self.seed is None:
            return torch.arange(len(self.dataset))
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        return torch.randperm(len(self.dataset), generator=generator)[: self._usable]

    def state_dict(self) -> dict[str, int]:
        """Where in which epoch the loader is; Lightning puts it into checkpoints."""
        return {"epoch": self.epoch, "batch": self._batch}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue where `state_dict` was taken."""
        self.epoch, self._batch = state["epoch"], state["batch"]
        self._resume_at = self._batch

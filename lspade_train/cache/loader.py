"""`RowLoader`: batches of rows in a seeded order that survives interruption. Knows no files.

A shuffled epoch reads the rows of several batches at once, shard by shard, and splits them evenly:
the cost of finding a batch's rows is shared, and a batch is a view.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from lspade_train.cache.dataset import StateDataset
from lspade_train.cache.online import OnlineDataset
from lspade_train.cache.states import StateBatch
from lspade_train.errors import RecipeError


class RowLoader:
    """Batches of rows, copied straight out of mapped files: no worker processes, resumable.

    Every process draws the same permutation and takes its part of each global batch, so that the
    global batches do not depend on the number of processes.

    Args:
        dataset: finds the rows; says how many are best read at once, and in which order.
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
        self._batch = 0  # batches given this epoch
        self._resume_at = 0

    def __len__(self) -> int:
        return -(-self._usable // (self.batch_size * self.world))

    def __iter__(self) -> Iterator[StateBatch]:
        order = self._order()
        step = self.batch_size * self.world
        resume_at, self._resume_at = self._resume_at, 0
        for first, count in self._blocks():
            if first + count <= resume_at:
                continue
            rows = self.dataset.order_by_shard(order[first * step : (first + count) * step])
            # Batch j is rows[j::count]; of that, this process has every world-th row.
            turn = torch.arange(len(rows)) // count % self.world
            skip = max(resume_at - first, 0)
            batches = self.dataset.split_batches(rows[turn == self.rank], count)
            for number, batch in enumerate(batches):
                if number >= skip:
                    self._batch = first + number + 1
                    yield batch
        self.set_epoch(self.epoch + 1)

    def _blocks(self) -> Iterator[tuple[int, int]]:
        """First batch and number of batches of what is read at once; a smaller last one alone."""
        step = self.batch_size * self.world
        whole = self._usable // step
        size = max(self.dataset.rows_at_once // step, 1) if self.seed is not None else 1
        for first in range(0, whole, size):
            yield first, min(size, whole - first)
        if len(self) > whole:
            yield whole, 1

    @property
    def sampler(self) -> "RowLoader":
        """Where Lightning looks for `set_epoch`."""
        return self

    batch_sampler = None  # what Lightning asks for where there is a `sampler`

    def set_epoch(self, epoch: int) -> None:
        """Begin another epoch; Lightning calls it, since it may leave one before its end."""
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

    def state_dict(self) -> dict[str, int | None]:
        """Where in which epoch the loader is, and what decides the order of its rows."""
        return {"epoch": self.epoch, "batch": self._batch, **self._order_settings}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state_dict` was taken.

        Raises:
            RecipeError: it was taken of rows in another order or in other batches: continuing
                would leave some of them out and repeat others.
        """
        for name, value in self._order_settings.items():
            if state.get(name) != value:
                raise RecipeError(
                    f"The checkpoint was written with {name} {state.get(name)}, and this run has "
                    f"{value}: resuming would skip rows and repeat others.\n"
                    "Resume with the data.batch_size, number of processes, rows and seed of the "
                    "fit that wrote it, or start over without --ckpt_path."
                )
        self.epoch, self._batch = state["epoch"], state["batch"]
        self._resume_at = self._batch

    @property
    def _order_settings(self) -> dict[str, int | None]:
        """What the batches of an epoch depend on."""
        return {
            "rows_per_step": self.batch_size * self.world,
            "training_rows": self._usable,
            "seed": self.seed,
        }

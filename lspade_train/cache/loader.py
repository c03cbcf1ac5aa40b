"""`RowLoader`: resumable batches of rows in a seeded order. Independent of files.

A shuffled epoch reads the rows of several batches at once, shard by shard, and splits them evenly:
this amortises the cost of looking up rows, and makes a batch a view.
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

    Every process draws the same permutation and takes its part of each global batch, so the global
    batches do not depend on the number of processes.

    Args:
        dataset: reads the rows; decides how many to read at once, and in which order.
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
        self._batch = 0  # batches returned in this epoch
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
        """First batch and number of batches per read; a smaller last batch is read separately."""
        step = self.batch_size * self.world
        whole = self._usable // step
        size = max(self.dataset.rows_at_once // step, 1) if self.seed is not None else 1
        for first in range(0, whole, size):
            yield first, min(size, whole - first)
        if len(self) > whole:
            yield whole, 1

    @property
    def sampler(self) -> "RowLoader":
        """Lightning looks for `set_epoch` here."""
        return self

    batch_sampler = None  # Lightning expects it next to a `sampler`

    def set_epoch(self, epoch: int) -> None:
        """Begin an epoch; called by Lightning, which may leave one before its end."""
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
        """The loader's epoch and position in it, and the settings that decide its order."""
        return {"epoch": self.epoch, "batch": self._batch, **self._order_settings}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from where `state_dict` was called.

        Raises:
            RecipeError: the state is of rows in another order or in other batches: continuing would
                skip some of them and repeat others.
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
        """The settings that an epoch's batches depend on."""
        return {
            "rows_per_step": self.batch_size * self.world,
            "training_rows": self._usable,
            "seed": self.seed,
        }

"""The arguments that a model's decoder passed to each block, for replay. Independent of models."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask
from transformers import DynamicCache

from lspade_train.errors import TaskError, UnsupportedModelError

Rows = Int[Tensor, " rows"] | slice


def token_mask(
    input_ids: Int[Tensor, "rows tokens"], attention_mask: Tensor | None
) -> Int[Tensor, "rows tokens"]:
    """A mask of 0 and 1 over prompts, from a mask of any dtype; None means all ones.

    Raises:
        TaskError: its shape differs from the prompts'.
    """
    if attention_mask is None:
        return torch.ones_like(input_ids)
    if attention_mask.shape != input_ids.shape:
        raise TaskError(
            f"attention_mask is {tuple(attention_mask.shape)}, the prompts are "
            f"{tuple(input_ids.shape)}; expected one number per token."
        )
    return (attention_mask != 0).long()


class StartCache(DynamicCache):
    """Read-only keys and values of the rows' prefixes, shared by all rows.

    With causal attention, the states of a prefix (a start token, or a longer prefix that prompts
    share) do not depend on later tokens, so they are constants of the model: the same ones serve
    every row and every block of a sweep.
    """

    def __init__(self, starts: Sequence[DynamicCache], rows: Int[Tensor, " rows"]) -> None:
        """Store prefilled caches of equal length; `rows` holds the index of each row's cache."""
        super().__init__()
        self.starts = starts
        self.rows = rows
        # The decoder asks this when it builds masks: the number of tokens seen at every layer.
        self.layers = starts[0].layers
        self._stacked: dict[int, tuple[Tensor, Tensor]] = {}

    def select(self, rows: Rows) -> "StartCache":
        """The same constants for a subset of the rows."""
        other = StartCache(self.starts, self.rows[rows])
        other._stacked = self._stacked
        return other

    def at(self, block: int) -> "BlockStart":
        """The argument for one block: its rows' prefixes."""
        if len(self.starts) == 1:
            only: Any = self.starts[0].layers[block]
            count = len(self.rows)
            shared = (it.expand(count, *it.shape[1:]) for it in (only.keys, only.values))
            return BlockStart(self.layers, *shared)  # a view: `update` is the only copy
        if block not in self._stacked:
            layers: list[Any] = [start.layers[block] for start in self.starts]
            keys, values = [it.keys for it in layers], [it.values for it in layers]
            self._stacked[block] = torch.cat(keys), torch.cat(values)
        keys, values = self._stacked[block]
        rows = self.rows.to(keys.device)
        return BlockStart(self.layers, keys[rows], values[rows])


class BlockStart(DynamicCache):
    """One block's prefixes, without a block number, so that all blocks share compiled code."""

    def __init__(self, layers: list[Any], keys: Tensor, values: Tensor) -> None:
        """Store what `update` prepends, (rows, heads, seen, d); `layers` know the length seen."""
        super().__init__()
        self.layers = layers
        self.keys, self.values = keys, values

    def update(
        self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor]:
        """The prefix's keys and values, followed by the row's own, (rows, heads, tokens, d)."""
        return (
            torch.cat([self.keys, key_states], dim=-2),
            torch.cat([self.values, value_states], dim=-2),
        )


@dataclass(frozen=True)
class Plan:
    """The arguments that the model's decoder passed to each block, for one batch.

    Attributes:
        hidden: input of the first block, (rows, tokens, d).
        calls: for each block, the other positional and keyword arguments.
        per_row: entries per row in the first dimension of an argument, if not one.
    """

    hidden: Float[Tensor, "rows tokens d"]
    calls: tuple[tuple[tuple[Any, ...], dict[str, Any]], ...]
    per_row: Mapping[str | int, int] = field(default_factory=dict[str | int, int])

    def call(self, block: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The other arguments of one block, with that block's start tokens."""
        args, kwargs = self.calls[block]

        def seen(value: Any) -> Any:
            return value.at(block) if isinstance(value, StartCache) else value

        return tuple(map(seen, args)), {name: seen(value) for name, value in kwargs.items()}

    def select(self, rows: Rows) -> "Plan":
        """The plan for a subset of the rows: every tensor with rows is indexed, once each."""
        chosen = _Selection(rows, self.hidden.shape[0])

        def picked(name: str | int, value: Any) -> Any:
            return chosen.of(value, self.per_row.get(name, 1))

        calls = tuple(
            (
                tuple(picked(place, value) for place, value in enumerate(args)),
                {name: picked(name, value) for name, value in kwargs.items()},
            )
            for args, kwargs in self.calls
        )
        return Plan(chosen.of(self.hidden, 1), calls, self.per_row)


class _Selection:
    """Selects rows of the blocks' arguments; arguments that blocks share are indexed once."""

    def __init__(self, rows: Rows, batch: int) -> None:
        self.rows, self.batch = rows, batch
        self.done: dict[int, Any] = {}

    def of(self, value: Any, count: int) -> Any:
        """The rows of a value that has `count` entries per row."""
        if isinstance(value, tuple | list):
            return type(value)(self.of(item, count) for item in value)
        if isinstance(value, dict):
            return {name: self.of(item, count) for name, item in value.items()}
        if id(value) not in self.done:
            self.done[id(value)] = self._pick(value, count)
        return self.done[id(value)]

    def _pick(self, value: Any, count: int) -> Any:
        if isinstance(value, StartCache):
            return value.select(self.rows)
        if isinstance(value, BlockMask):
            # Its function gets a row's index in the batch, inside a compiled kernel.
            raise UnsupportedModelError(
                "flex_attention's masks apply to the whole batch, so rows cannot be dropped.\n"
                "Call model.set_attn_implementation('sdpa') first."
            )
        # One-dimensional tensors are over tokens, for any length.
        if not isinstance(value, Tensor) or value.ndim < 2 or len(value) != self.batch * count:
            return value
        rows = self.rows.to(value.device) if isinstance(self.rows, Tensor) else self.rows
        if count == 1:
            return value[rows]
        return value.unflatten(0, (self.batch, count))[rows].flatten(0, 1)

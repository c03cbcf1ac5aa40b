"""What a model's decoder gave each block, kept to be replayed. Knows nothing of models."""

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
    """A mask of 0 and 1 over prompts, from one of any dtype; None is all ones.

    Raises:
        TaskError: it has another shape than the prompts.
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
    """Keys and values of what rows begin with, read by any row and written by none.

    Causal attention makes the states of a beginning, be it a start token alone or a prefix that
    prompts share, depend on nothing behind it, so they are constants of the model: the same ones
    serve every row and every block of a sweep.
    """

    def __init__(self, starts: Sequence[DynamicCache], rows: Int[Tensor, " rows"]) -> None:
        """Keep prefilled caches of one length; `rows` says which one a row uses."""
        super().__init__()
        self.starts = starts
        self.rows = rows
        # What the decoder asks when it builds masks: so many tokens have been seen at every layer.
        self.layers = starts[0].layers
        self._stacked: dict[int, tuple[Tensor, Tensor]] = {}

    def select(self, rows: Rows) -> "StartCache":
        """The same constants for a subset of the rows."""
        other = StartCache(self.starts, self.rows[rows])
        other._stacked = self._stacked
        return other

    def at(self, block: int) -> "BlockStart":
        """What one block is given: its rows' beginnings."""
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
    """One block's beginnings; knows no block number, so that all blocks compile to one thing."""

    def __init__(self, layers: list[Any], keys: Tensor, values: Tensor) -> None:
        """Keep what `update` puts in front, (rows, heads, seen, d); `layers` say what is seen."""
        super().__init__()
        self.layers = layers
        self.keys, self.values = keys, values

    def update(
        self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor]:
        """The beginning's keys and values in front of the row's own, (rows, heads, tokens, d)."""
        return (
            torch.cat([self.keys, key_states], dim=-2),
            torch.cat([self.values, value_states], dim=-2),
        )


@dataclass(frozen=True)
class Plan:
    """What the model's decoder gave each block, for one batch.

    Attributes:
        hidden: input of the first block, (rows, tokens, d).
        calls: per block, the further arguments and keyword arguments.
        per_row: entries per row in the first dimension of an argument, where it is not one.
    """

    hidden: Float[Tensor, "rows tokens d"]
    calls: tuple[tuple[tuple[Any, ...], dict[str, Any]], ...]
    per_row: Mapping[str | int, int] = field(default_factory=dict[str | int, int])

    def call(self, block: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The further arguments of one block, start tokens as that block sees them."""
        args, kwargs = self.calls[block]

        def seen(value: Any) -> Any:
            return value.at(block) if isinstance(value, StartCache) else value

        return tuple(map(seen, args)), {name: seen(value) for name, value in kwargs.items()}

    def select(self, rows: Rows) -> "Plan":
        """The plan of a subset of the rows: every tensor that has rows is indexed, once each."""
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
    """Some rows of whatever a block is given; what several blocks share is indexed once."""

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
            # Its function sees a row by its place in the batch, inside a compiled kernel.
            raise UnsupportedModelError(
                "flex_attention's masks hold for the whole batch: rows cannot leave it.\n"
                "Call model.set_attn_implementation('sdpa') first."
            )
        # One-dimensional tensors run over tokens, whatever their length.
        if not isinstance(value, Tensor) or value.ndim < 2 or len(value) != self.batch * count:
            return value
        rows = self.rows.to(value.device) if isinstance(self.rows, Tensor) else self.rows
        if count == 1:
            return value[rows]
        return value.unflatten(0, (self.batch, count))[rows].flatten(0, 1)

"""What a model's decoder gave each block, kept to be replayed. Knows nothing of models."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import DynamicCache

Rows = Int[Tensor, " rows"] | slice


class StartCache(DynamicCache):
    """Keys and values of start tokens alone, read by any row and written by none.

    Causal attention makes a start token's states depend on that token only, so they are constants
    of the model. `update` returns the row's start token followed by the row's own token and keeps
    nothing, so the same constants serve every row and every block of a sweep.
    """

    def __init__(self, starts: Sequence[DynamicCache], rows: Int[Tensor, " rows"]) -> None:
        """Keep one prefilled cache per distinct start token; `rows` says which one a row uses."""
        super().__init__()
        self.starts = starts
        self.rows = rows
        # What the decoder asks when it builds masks: one token has been seen at every layer.
        self.layers = starts[0].layers
        self._stacked: dict[int, tuple[Tensor, Tensor]] = {}

    def select(self, rows: Rows) -> "StartCache":
        """The same constants for a subset of the rows."""
        other = StartCache(self.starts, self.rows[rows])
        other._stacked = self._stacked
        return other

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor]:
        """Start token's keys and values in front of the row's own, shape (rows, heads, 2, d)."""
        if layer_idx not in self._stacked:
            layers: list[Any] = [start.layers[layer_idx] for start in self.starts]
            keys, values = [it.keys for it in layers], [it.values for it in layers]
            self._stacked[layer_idx] = torch.cat(keys), torch.cat(values)
        keys, values = self._stacked[layer_idx]
        rows = self.rows.to(keys.device)
        return (
            torch.cat([keys[rows], key_states], dim=-2),
            torch.cat([values[rows], value_states], dim=-2),
        )


@dataclass(frozen=True)
class Plan:
    """What the model's decoder gave each block, for one batch.

    Attributes:
        hidden: input of the first block, (rows, tokens, d).
        calls: per block, the further arguments and keyword arguments.
    """

    hidden: Float[Tensor, "rows tokens d"]
    calls: tuple[tuple[tuple[Any, ...], dict[str, Any]], ...]

    def select(self, rows: Rows) -> "Plan":
        """The plan of a subset of the rows: every batch-first tensor is indexed, once each."""
        batch = self.hidden.shape[0]
        done: dict[int, Any] = {}

        def pick(value: Any) -> Any:
            if isinstance(value, tuple | list):
                return type(value)(pick(item) for item in value)
            if isinstance(value, dict):
                return {name: pick(item) for name, item in value.items()}
            if isinstance(value, StartCache):
                return done.setdefault(id(value), value.select(rows))
            # One-dimensional tensors run over tokens, whatever their length.
            if isinstance(value, Tensor) and value.ndim > 1 and value.shape[0] == batch:
                if id(value) not in done:
                    index = rows.to(value.device) if isinstance(rows, Tensor) else rows
                    done[id(value)] = value[index]
                return done[id(value)]
            return value

        calls = tuple((pick(args), pick(kwargs)) for args, kwargs in self.calls)
        return Plan(pick(self.hidden), calls)

"""`StateBatch`: rows of cached states and labels, by name. Independent of files and models."""

from dataclasses import dataclass, fields, replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

TARGETS = {"target", "target_logits", "target_values", "target_tokens"}
"""Fields of `StateBatch` that may store SPADE's answer."""

REDUCED = {"target_mean", "target_offset", "target_entropy", "target_best"}
"""Fields of reduced targets, for training without the target's logits; never cached."""

BY_LAYER = {"hidden", *TARGETS, *REDUCED}
"""Tensors whose second dimension is the layer."""

STATES = {"final", *BY_LAYER}
"""The large tensors of a row; the rest are labels."""


@dataclass
class StateBatch:
    """Cached rows. One row is one answer position of one prompt.

    Attributes:
        hidden: h_a^l, (rows, layers, d).
        final: h_a^L, (rows, d).
        start_id: first real token of the prompt.
        position_id: index of the answer among the prompt's real tokens.
        answer_id: correct token; undefined if not `labelled`.
        labelled: whether the row has a correct answer.
        choice_ids: candidate tokens, padded by repeating the first.
        choice_count: number of candidates; 0 if any token may be the answer.
        group: index into the manifest's groups.
        target: SPADE's hidden state before the final norm (`targets: hidden`).
        target_logits: SPADE's logits (`targets: logits`).
        target_values: SPADE's k best logits (`targets: topk`).
        target_tokens: their tokens.
        target_mean: mean of the head's rows under a target distribution (`training.targets`).
        target_offset: mean of the head's bias under it.
        target_entropy: its entropy, nats.
        target_best: its most probable token.
    """

    hidden: Float[Tensor, "rows layers d"]
    final: Float[Tensor, "rows d"]
    start_id: Int[Tensor, " rows"]
    position_id: Int[Tensor, " rows"]
    answer_id: Int[Tensor, " rows"]
    labelled: Bool[Tensor, " rows"]
    choice_ids: Int[Tensor, "rows choices"]
    choice_count: Int[Tensor, " rows"]
    group: Int[Tensor, " rows"]
    target: Float[Tensor, "rows layers d"] | None = None
    target_logits: Float[Tensor, "rows layers vocab"] | None = None
    target_values: Float[Tensor, "rows layers k"] | None = None
    target_tokens: Int[Tensor, "rows layers k"] | None = None
    target_mean: Float[Tensor, "rows layers d_head"] | None = None
    target_offset: Float[Tensor, "rows layers"] | None = None
    target_entropy: Float[Tensor, "rows layers"] | None = None
    target_best: Int[Tensor, "rows layers"] | None = None

    def __len__(self) -> int:
        return len(self.final)

    def rows(self, which: slice) -> "StateBatch":
        """Some of the rows: views."""
        return replace(self, **{name: value[which] for name, value in self.tensors().items()})

    def of_layers(self, which: slice) -> "StateBatch":
        """The same rows, some of the layers: views."""
        cut = {name: v[:, which] for name, v in self.tensors().items() if name in BY_LAYER}
        return replace(self, **cut)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "StateBatch":
        """The same rows on another device."""
        moved = {
            name: value.to(device, non_blocking=non_blocking)
            for name, value in self.tensors().items()
        }
        return replace(self, **moved)

    def tensors(self) -> dict[str, Tensor]:
        """The tensors that are present, by name."""
        found = ((field.name, getattr(self, field.name)) for field in fields(self))
        return {name: value for name, value in found if value is not None}

"""Metrics of a fit by layer: sums over rows that become an epoch's means, and the answers."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lspade_train.cache import StateBatch
from lspade_train.training.losses import Distilled

METRICS = ("loss", "kl", "agreement", "accuracy")


@dataclass(frozen=True)
class LayerSums:
    """Sums over rows, per layer, from which an epoch's means are computed."""

    sums: Tensor  # (metrics, layers), float64
    rows: Tensor  # (2,): all rows, labelled rows

    def __add__(self, other: "LayerSums") -> "LayerSums":
        return LayerSums(self.sums + other.sums, self.rows + other.rows)

    @classmethod
    def beside(cls, parts: "Sequence[LayerSums]") -> "LayerSums":
        """Join the sums of groups of layers over the same rows."""
        return cls(torch.cat([part.sums for part in parts], 1), parts[0].rows)

    def means(self) -> dict[str, Tensor]:
        """Mean per layer by metric; accuracy only if rows have labels."""
        counts = [self.rows[0]] * 3 + [self.rows[1]]
        return {
            name: total / count
            for name, total, count in zip(METRICS, self.sums, counts, strict=True)
            if count > 0
        }


def answers(batch: StateBatch, result: Distilled) -> Tensor:
    """The student's answers, (rows x layers): the best choice, or token if there are no choices."""
    if batch.choice_ids.shape[1] == 0:
        return result.best
    layers = batch.hidden.shape[1]
    chosen = result.token_logits.argmax(-1).reshape(len(batch), layers)
    best = batch.choice_ids.long().gather(1, chosen)
    has_choices = (batch.choice_count > 0)[:, None]
    return torch.where(has_choices, best, result.best.reshape_as(best)).reshape(-1)

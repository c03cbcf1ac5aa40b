"""Training FLOPs of a fine-tuning and of a fit of heads; a backward pass counts as two forwards."""

from dataclasses import dataclass

import torch

from lspade_train.policies.flops import count_flops
from lspade_train.recipe import HeadConfig
from lspade_train.training.datamodule import HiddenStateDataModule


@dataclass(frozen=True)
class Cost:
    """FLOPs of one pass over the training rows.

    Attributes:
        forward: the model on every token; the last position alone is unembedded.
        own_heads: final norm and head at the answer position, at layers 1..L-1.
        maps: the maps and heads that a fit trains, at the answer position, at the recipe's layers.
    """

    forward: float
    own_heads: float
    maps: float

    def fine_tune(self, epochs: int) -> float:
        """Forward and backward of model and own heads, and the original's forward."""
        return epochs * (3 * self.forward + self.forward + 3 * self.own_heads)

    def fit(self, epochs: float) -> float:
        """A forward pass to cache the states, then forward and backward of the maps."""
        return self.forward + epochs * 3 * self.maps

    def epochs(self, flops: float) -> float:
        """Epochs of a fit that costs that much."""
        return (flops - self.forward) / (3 * self.maps)


def count(data: HiddenStateDataModule, heads: HeadConfig) -> Cost:
    """Count on the model itself and on the training prompts."""
    counts, examples = count_flops(data.adapter), data.encoded("train").examples
    lengths = torch.tensor([int(p) + 1 for example in examples for p in example.positions])
    d, rows = counts.width, len(lengths)
    outputs = counts.vocab
    if heads.scope == "choices":
        outputs = max(len(example.choice_ids) for example in examples)
    form = {"full": 2 * d * d, "low_rank": 4 * d * heads.rank, "bias": d}[heads.form]
    return Cost(
        forward=float(counts.full(lengths).sum()),
        own_heads=rows * (data.adapter.num_layers - 1) * float(counts.readout()),
        maps=rows * len(data.layers) * len(heads.targets) * (form + 2 * d * outputs),
    )

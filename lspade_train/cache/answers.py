"""Cached rows a few hundred at a time, and the answer that logits give to each of them.

Knows nothing of lenses, heads or policies.
"""

from collections.abc import Iterator

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lspade_train.cache.dataset import StateDataset
from lspade_train.cache.states import StateBatch

CHUNK_ROWS = 256


def chunks(dataset: StateDataset) -> Iterator[StateBatch]:
    """All rows in order, a few hundred at a time: logits of all of them would not fit."""
    for first in range(0, len(dataset), CHUNK_ROWS):
        yield dataset.gather(torch.arange(first, min(first + CHUNK_ROWS, len(dataset))))


def pick_answer(logits: Float[Tensor, "rows vocab"], batch: StateBatch) -> Int[Tensor, " rows"]:
    """The best of a row's choices, or of the vocabulary where it has none."""
    best = logits.argmax(-1)
    if batch.choice_ids.shape[1] == 0:
        return best
    choices = batch.choice_ids.long()
    chosen = choices.gather(1, logits.gather(1, choices).argmax(-1, keepdim=True)).squeeze(1)
    return torch.where(batch.choice_count > 0, chosen, best)


def choice_logits(
    logits: Float[Tensor, "rows vocab"], batch: StateBatch
) -> Float[Tensor, "rows choices"]:
    """Logits of each row's choices; -inf where a row has fewer than the others."""
    chosen = logits.gather(1, batch.choice_ids.long())
    padding = torch.arange(chosen.shape[1], device=chosen.device) >= batch.choice_count[:, None]
    return chosen.masked_fill(padding, -torch.inf)

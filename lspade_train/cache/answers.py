"""Iterates over cached rows a few hundred at a time, and picks each row's answer from its logits.

Independent of lenses, heads and policies.
"""

from collections.abc import Iterator

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from lspade_train.cache.dataset import StateDataset
from lspade_train.cache.states import StateBatch

CHUNK_ROWS = 256


def chunks(dataset: StateDataset, rows: int | None = None) -> Iterator[StateBatch]:
    """All rows in order, a few hundred at a time: the logits of all would not fit in memory."""
    step = CHUNK_ROWS if rows is None else rows
    for first in range(0, len(dataset), step):
        yield dataset.gather(torch.arange(first, min(first + step, len(dataset))))


def pick_answer(logits: Float[Tensor, "rows vocab"], batch: StateBatch) -> Int[Tensor, " rows"]:
    """The best of a row's choices, or of the vocabulary if it has none."""
    if batch.choice_ids.shape[1] == 0:
        return logits.argmax(-1)
    choices = batch.choice_ids.long()
    chosen = choices.gather(1, logits.gather(1, choices).argmax(-1, keepdim=True)).squeeze(1)
    free = batch.choice_count == 0
    if free.any():  # otherwise skip the argmax over the vocabulary
        chosen[free] = logits[free].argmax(-1)
    return chosen


def choice_logits(
    logits: Float[Tensor, "rows vocab"], batch: StateBatch
) -> Float[Tensor, "rows choices"]:
    """Logits of each row's choices, padded with -inf."""
    chosen = logits.gather(1, batch.choice_ids.long())
    return chosen.masked_fill(~choice_mask(batch), -torch.inf)


def choice_mask(batch: StateBatch) -> Bool[Tensor, "rows choices"]:
    """False for padding, in rows with fewer choices than others."""
    places = torch.arange(batch.choice_ids.shape[1], device=batch.choice_ids.device)
    return places < batch.choice_count[:, None]

"""The logits that heads are fitted to, from whatever a cache stores of them.

Imports neither Lightning nor `datasets`: exit tables read SPADE's answers with it.
"""

from lspade_train.cache import StateBatch
from lspade_train.models import Unembedding
from lspade_train.training.losses import TargetLogits, hidden_target, logits_target, topk_target


def target_logits(batch: StateBatch, target: str, unembed: Unembedding) -> TargetLogits:
    """The target's logits of rows x layers, flattened row by row, whatever was stored."""
    layers = batch.hidden.shape[1]
    if target == "final":
        final = batch.final[:, None].expand(-1, layers, -1).reshape(-1, batch.final.shape[-1])
        return hidden_target(final, unembed)
    if batch.target is not None:
        return hidden_target(batch.target.flatten(0, 1), unembed)
    if batch.target_logits is not None:
        return logits_target(batch.target_logits.flatten(0, 1))
    assert batch.target_values is not None
    assert batch.target_tokens is not None
    return topk_target(
        batch.target_values.flatten(0, 1),
        batch.target_tokens.flatten(0, 1),
        unembed.weight.shape[0],
    )

"""The softmax of linear logits, tile by tile: a row's logits never exist as a whole.

Independent of losses and targets.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lspade_train.models import Unembedding
from lspade_train.training.numerics import VOCABULARY_PARTS

TILE = {"cpu": (512, 4096), "cuda": (4096, 32768)}
"""Rows and tokens of a tile of fp32 logits: many rows for fast products, few bytes for the passes
between them."""


@dataclass(frozen=True)
class Softmax:
    """A softmax over the vocabulary, summed up per row; p are its probabilities.

    Attributes:
        log_z: log partition function, nats.
        mean: W^T p, the mean of the head's rows, fp64; None if it was not asked for.
        offset: b . p, the mean of the head's bias, fp64.
        best: the most probable token; None if no tokens were asked for.
        token_logits: logits of the requested tokens; None if no tokens were asked for.
    """

    log_z: Float[Tensor, " rows"]
    mean: Float[Tensor, "rows d_head"] | None
    offset: Float[Tensor, " rows"]
    best: Int[Tensor, " rows"] | None
    token_logits: Float[Tensor, "rows tokens"] | None


def tile_of(unembed: Unembedding) -> tuple[int, int]:
    """Rows and tokens of a tile."""
    rows, tokens = TILE.get(unembed.weight.device.type, TILE["cpu"])
    return rows, min(tokens, -(-unembed.weight.shape[0] // VOCABULARY_PARTS))


@torch.no_grad()
def softmax_of(
    unembed: Unembedding,
    normed: Float[Tensor, "rows d_head"],
    *,
    mean: bool = True,
    token_ids: Int[Tensor, "rows tokens"] | None = None,
) -> Softmax:
    """The softmax of linear logits in full precision, without ever holding a row's logits.

    One pass over the vocabulary, tile by tile, as in FlashAttention (Dao et al. 2022): the sums so
    far are rescaled whenever the maximum grows. They are kept in fp64. Tall tiles make the two
    products fast, and what is done between them stays in the cache: 1.4 times faster than chunks of
    whole rows on a CPU with V = 49,152.

    Args:
        unembed: a frozen norm and head without soft-capping, in fp32 or fp64.
        normed: states after the final norm.
        mean: also compute W^T p, the second product.
        token_ids: tokens whose logits are returned; None skips these and the best token.

    Raises:
        UnsupportedModelError: the head is not linear.
    """
    unembed.require_linear()
    weight, bias = unembed.weight, unembed.bias
    scaled, rows, step = normed * unembed.scale, len(normed), tile_of(unembed)[1]
    spare = normed.new_empty(rows * step)
    top = normed.new_full((rows, 1), -torch.inf)
    total = normed.new_zeros(rows, 1, dtype=torch.float64)
    offset = torch.zeros_like(total)
    means = total.new_zeros(rows, weight.shape[1]) if mean else None
    best, found = normed.new_zeros(rows, dtype=torch.long), None
    if token_ids is not None:
        found = normed.new_zeros(token_ids.shape)
    for first in range(0, len(weight), step):
        some = weight[first : first + step]
        tile = torch.mm(scaled, some.T, out=spare[: rows * len(some)].view(rows, len(some)))
        if bias is not None:
            tile.add_(bias[first : first + step], alpha=unembed.scale)
        if found is None or token_ids is None:
            highest = tile.amax(-1, keepdim=True)
        else:
            highest, place = tile.max(-1, keepdim=True)
            best = torch.where(highest > top, place + first, best[:, None])[:, 0]
            local = token_ids - first
            here = (local >= 0) & (local < len(some))
            found = torch.where(here, tile.gather(-1, local.clamp(0, len(some) - 1)), found)
        highest = torch.maximum(highest, top)
        shrunk, top = (top - highest).exp(), highest
        tile.sub_(top).exp_()
        total.mul_(shrunk).add_(tile.sum(-1, keepdim=True))
        if bias is not None:
            offset.mul_(shrunk).add_(tile @ bias[first : first + step, None].to(tile.dtype))
        if means is not None:
            means.mul_(shrunk).add_(tile @ some)
    return Softmax(
        log_z=(top + total.log())[:, 0].to(normed.dtype),
        mean=None if means is None else means.div_(total),
        offset=(offset / total)[:, 0],
        best=None if found is None else best,
        token_logits=found,
    )

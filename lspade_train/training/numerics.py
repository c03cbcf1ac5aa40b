"""Passes and products over a vocabulary, in fp32 or better for any dtype of the head.

Independent of losses and targets.
"""

from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.func import functional_call

from lspade_train.models import Unembedding

CHUNK_MB = {"cpu": 16, "cuda": 512}
"""Size of a chunk of fp32 logits: fits a CPU's cache, or keeps a GPU's cores busy."""

TILE = {"cpu": (512, 4096), "cuda": (4096, 32768)}
"""Rows and tokens of a tile of fp32 logits: many rows for fast products, few bytes for the passes
between them."""

VOCABULARY_PARTS = 12
"""Vocabulary sums are split into parts that are added in fp64: one fp32 sum rounds too much."""

FP16_SCALE = 1024.0
"""Scales small probabilities out of fp16's subnormal range, without overflow in sums."""


def chunk_memory(unembed: Unembedding, rows: int | None = None) -> Float[Tensor, "3 chunk vocab"]:
    """A buffer for the logits of one chunk; reusing it saves allocating memory for each chunk.

    Args:
        unembed: the frozen norm and head.
        rows: rows of a chunk; None means `chunk_rows`.
    """
    weight = unembed.weight
    shape = (3, rows or chunk_rows(unembed), weight.shape[0])
    with torch.inference_mode(False):  # validation may allocate it, and training write to it
        return torch.empty(shape, dtype=wide(weight.dtype), device=weight.device)


def chunk_rows(unembed: Unembedding) -> int:
    """Rows whose logits exist at once."""
    vocab = unembed.weight.shape[0]
    return max(CHUNK_MB.get(unembed.weight.device.type, 16) * 2**20 // (4 * vocab), 1)


def tile_of(unembed: Unembedding) -> tuple[int, int]:
    """Rows and tokens of a tile."""
    rows, tokens = TILE.get(unembed.weight.device.type, TILE["cpu"])
    return rows, min(tokens, -(-unembed.weight.shape[0] // VOCABULARY_PARTS))


def wide(dtype: torch.dtype) -> torch.dtype:
    """fp64 if `dtype` is fp64, else fp32."""
    return torch.promote_types(dtype, torch.float32)


def wide_norm(
    unembed: Unembedding, states: Float[Tensor, "rows d"]
) -> Float[Tensor, "rows d_head"]:
    """The final norm in the precision of `states`, for any dtype of its weights."""
    norm = unembed.norm
    if not isinstance(norm, nn.Module) or all(p.dtype == states.dtype for p in norm.parameters()):
        return norm(states)
    weights = {name: weight.to(states.dtype) for name, weight in norm.named_parameters()}
    return functional_call(norm, weights, (states,))


def write_logits(
    unembed: Unembedding, normed: Float[Tensor, "rows d_head"], out: Float[Tensor, "rows vocab"]
) -> None:
    """Logits of normed states, before soft-capping, into `out`."""
    linear = replace(unembed, softcap=None)
    dtype = unembed.weight.dtype
    found = linear.into(normed.to(dtype), out if out.dtype == dtype else None)
    if found is not out:
        out.copy_(found)


def add_logits(
    unembed: Unembedding, step: Float[Tensor, "rows d_head"], out: Float[Tensor, "rows vocab"]
) -> None:
    """Add the change that a step of the normed states causes in the logits before soft-capping."""
    weight = unembed.weight
    if out.dtype == weight.dtype:
        out.addmm_(step, weight.T, alpha=unembed.scale)
    else:
        out.add_(step.to(weight.dtype) @ weight.T, alpha=unembed.scale)


def softcapped(
    unembed: Unembedding, logits: Float[Tensor, "rows vocab"], out: Float[Tensor, "rows vocab"]
) -> Float[Tensor, "rows vocab"]:
    """The model's soft-capping, written into `out`; the logits themselves if it has none."""
    if unembed.softcap is None:
        return logits
    return torch.div(logits, unembed.softcap, out=out).tanh_().mul_(unembed.softcap)


def exponentials(
    logits: Float[Tensor, "rows vocab"], out: Float[Tensor, "rows vocab"]
) -> tuple[Float[Tensor, "rows 1"], Float[Tensor, " rows"]]:
    """exp(logits - their maximum) into `out`, which may be `logits`.

    Returns:
        The sum of the exponentials, and the log partition function of each row.
    """
    top = logits.amax(-1, keepdim=True)
    # torch.sum is pairwise; softmax's own sum loses several bits over a large vocabulary.
    total = torch.sub(logits, top, out=out).exp_().sum(-1, keepdim=True)
    return total, (top + total.log()).squeeze(-1)


def softmax(
    logits: Float[Tensor, "rows vocab"], out: Float[Tensor, "rows vocab"]
) -> Float[Tensor, " rows"]:
    """Probabilities into `out`, which may be `logits`; returns the log partition function."""
    total, log_z = exponentials(logits, out)
    out.div_(total)
    return log_z


def times_weight(
    values: Float[Tensor, "rows vocab"], unembed: Unembedding
) -> Float[Tensor, "rows d_head"]:
    """`values @ W`, summed in fp64 over parts of the vocabulary if W is in fp32.

    In half precision it is one product, which accumulates in fp32 but rounds inputs and result.
    """
    weight = unembed.weight
    if weight.dtype not in (torch.float32, torch.float64):
        scale = FP16_SCALE if weight.dtype == torch.float16 else 1.0
        scaled = values.mul(scale) if scale != 1.0 else values
        return (scaled.to(weight.dtype) @ weight).to(values.dtype) / scale
    total = values.new_zeros(len(values), weight.shape[1], dtype=torch.float64)
    parts = zip(values.chunk(VOCABULARY_PARTS, 1), weight.chunk(VOCABULARY_PARTS), strict=True)
    for some, rows in parts:
        total.add_(some @ rows)
    return total


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
    """
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

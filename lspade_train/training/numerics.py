"""Passes and products over a vocabulary, in fp32 or better whatever the head's dtype.

Knows nothing of losses or targets.
"""

from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import functional_call

from lspade_train.models import Unembedding

CHUNK_MB = {"cpu": 16, "cuda": 512}
"""One chunk of fp32 logits: on a CPU it stays in the cache, on a GPU it fills the cores."""

VOCABULARY_PARTS = 12
"""Sums over the vocabulary are made in parts, added in fp64: one fp32 sum rounds too much."""

FP16_SCALE = 1024.0
"""In fp16 small probabilities are subnormal; times this they are not, and no sum overflows."""


def chunk_memory(unembed: Unembedding, rows: int | None = None) -> Float[Tensor, "3 chunk vocab"]:
    """Memory for the logits of one chunk; whoever keeps it saves mapping it anew.

    Args:
        unembed: the frozen norm and head.
        rows: of a chunk; None: `chunk_rows`.
    """
    weight = unembed.weight
    shape = (3, rows or chunk_rows(unembed), weight.shape[0])
    with torch.inference_mode(False):  # validation may ask first, and training writes to it later
        return torch.empty(shape, dtype=wide(weight.dtype), device=weight.device)


def chunk_rows(unembed: Unembedding) -> int:
    """Rows whose logits exist at once."""
    vocab = unembed.weight.shape[0]
    return max(CHUNK_MB.get(unembed.weight.device.type, 16) * 2**20 // (4 * vocab), 1)


def wide(dtype: torch.dtype) -> torch.dtype:
    """fp32, or fp64 where that is given."""
    return torch.promote_types(dtype, torch.float32)


def wide_norm(
    unembed: Unembedding, states: Float[Tensor, "rows d"]
) -> Float[Tensor, "rows d_head"]:
    """The final norm in the precision of `states`, whatever that of its weights."""
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
    """Add to logits before soft-capping what a step of the normed states changes in them."""
    weight = unembed.weight
    if out.dtype == weight.dtype:
        out.addmm_(step, weight.T, alpha=unembed.scale)
    else:
        out.add_(step.to(weight.dtype) @ weight.T, alpha=unembed.scale)


def softcapped(
    unembed: Unembedding, logits: Float[Tensor, "rows vocab"], out: Float[Tensor, "rows vocab"]
) -> Float[Tensor, "rows vocab"]:
    """The family's soft-capping, written into `out`; the logits themselves where it has none."""
    if unembed.softcap is None:
        return logits
    return torch.div(logits, unembed.softcap, out=out).tanh_().mul_(unembed.softcap)


def exponentials(
    logits: Float[Tensor, "rows vocab"], out: Float[Tensor, "rows vocab"]
) -> tuple[Float[Tensor, "rows 1"], Float[Tensor, " rows"]]:
    """exp(logits - their maximum) into `out`, which may be `logits`.

    Returns:
        Their sums, and the log partition function of each row.
    """
    top = logits.amax(-1, keepdim=True)
    # torch.sum adds in pairs, while softmax's own sum loses several bits over a large vocabulary.
    total = torch.sub(logits, top, out=out).exp_().sum(-1, keepdim=True)
    return total, (top + total.log()).squeeze(-1)


def softmax(
    logits: Float[Tensor, "rows vocab"], out: Float[Tensor, "rows vocab"]
) -> Float[Tensor, " rows"]:
    """Probabilities into `out`, which may be `logits`; gives the log partition function."""
    total, log_z = exponentials(logits, out)
    out.div_(total)
    return log_z


def times_weight(
    values: Float[Tensor, "rows vocab"], unembed: Unembedding
) -> Float[Tensor, "rows d_head"]:
    """`values @ W`, summed in fp64 over parts of the vocabulary where W is in fp32.

    In half precision one product, which accumulates in fp32 but rounds `values` and the result.
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

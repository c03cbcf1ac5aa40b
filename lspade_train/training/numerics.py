"""Passes and products over a vocabulary, in fp32 or better for any dtype of the head.

Independent of losses and targets.
"""

from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import functional_call

from lspade_train.models import Unembedding

CHUNK_MB = {"cpu": 16, "cuda": 512}
"""Size of a chunk of fp32 logits: fits a CPU's cache, or keeps a GPU's cores busy."""

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


def softmax(
    logits: Float[Tensor, "rows vocab"], out: Float[Tensor, "rows vocab"]
) -> Float[Tensor, " rows"]:
    """Probabilities into `out`, which may be `logits`; returns the log partition function."""
    top = logits.amax(-1, keepdim=True)
    # torch.sum is pairwise; softmax's own sum loses several bits over a large vocabulary.
    total = torch.sub(logits, top, out=out).exp_().sum(-1, keepdim=True)
    out.div_(total)
    return (top + total.log()).squeeze(-1)


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

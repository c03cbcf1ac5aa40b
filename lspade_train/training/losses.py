"""The distillation loss: cross-entropy against a frozen target, chunked, with its own gradient.

The product with the unembedding dominates everything else, and the logits of all rows and layers
must never exist at once. So the loss and its gradient are computed together, chunk by chunk: only
the hidden state needs a gradient, `W^T (p_student - p_target)`. Losses, gradients and their scaling
are in fp32 or better for any dtype of the head. Independent of layers and training.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from lspade_train.models import Unembedding
from lspade_train.training.numerics import (
    add_logits,
    chunk_memory,
    softcapped,
    softmax,
    times_weight,
    wide,
    wide_norm,
    write_logits,
)
from lspade_train.training.targets import (
    HiddenTarget,
    ReducedTarget,
    Target,
    TargetLogits,
    is_reducible,
    reduce_target,
)
from lspade_train.training.tiles import softmax_of, tile_of

Memory = Callable[[], Float[Tensor, "3 chunk vocab"]]
"""Provides a buffer from `chunk_memory`, which targets that are reduced never need."""


@dataclass(frozen=True)
class Distilled:
    """Results of one pass over the vocabulary, per row.

    Attributes:
        loss: cross-entropy against the target, nats; differentiable.
        kl: KL(target || student) in nats: the loss minus the target's entropy.
        best: the student's most probable token.
        agrees: whether it is the target's most probable token, too.
        token_logits: the student's logits of the requested tokens.
    """

    loss: Float[Tensor, " rows"]
    kl: Float[Tensor, " rows"]
    best: Int[Tensor, " rows"]
    agrees: Bool[Tensor, " rows"]
    token_logits: Float[Tensor, "rows tokens"]


def distillation(
    student: Float[Tensor, "rows d"],
    target: Target,
    unembed: Unembedding,
    *,
    token_ids: Int[Tensor, "rows tokens"] | None = None,
    memory: Memory | None = None,
) -> Distilled:
    """Cross-entropy of the student's distribution against the target's, with its statistics.

    Args:
        student: translated hidden states, before the final norm.
        target: the target of the same rows.
        unembed: the frozen norm and head applied to the student.
        token_ids: tokens whose student logits are returned, such as the task's choices.
        memory: provides the buffer for the logits of a chunk; None allocates one.

    Returns:
        Per-row loss and statistics; memory does not grow with rows x vocab.
    """
    tokens = token_ids if token_ids is not None else torch.empty(len(student), 0, dtype=torch.long)
    return Distilled(*_apply(student, target, unembed, tokens.to(student.device), memory))


def cross_entropy(
    student: Float[Tensor, "rows d"],
    target: Target,
    unembed: Unembedding,
    *,
    memory: Memory | None = None,
) -> Float[Tensor, " rows"]:
    """The loss of `distillation` alone, in nats: fewer passes over the logits."""
    return _apply(student, target, unembed, None, memory)[0]


def _apply(
    student: Tensor,
    target: Target,
    unembed: Unembedding,
    token_ids: Tensor | None,
    memory: Memory | None,
) -> tuple[Tensor, ...]:
    # Autocast would round one side's W^T p, and not the other's.
    with torch.autocast(student.device.type, enabled=False):
        if isinstance(target, HiddenTarget) and is_reducible(unembed):
            # Four products in tiles take less time than three in chunks of whole rows.
            target = reduce_target(target, len(student), unembed)
        buffer = None
        if not isinstance(target, ReducedTarget):
            buffer = chunk_memory(unembed) if memory is None else memory()
        # Upcast before the norm, so that no gradient passes through the head's dtype.
        normed = wide_norm(unembed, student.to(wide(unembed.weight.dtype)))
        found = _ChunkedCrossEntropy.apply(normed, target, unembed, token_ids, buffer)
    return cast(tuple[Tensor, ...], found)


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Forward computes the gradient too, so that no logits are kept or computed twice."""

    @staticmethod
    def forward(
        ctx: Any,
        normed: Tensor,
        target: Target,
        unembed: Unembedding,
        token_ids: Tensor | None,
        memory: Tensor | None,
    ) -> tuple[Tensor, ...]:
        gradient = torch.empty_like(normed) if ctx.needs_input_grad[0] else None
        found: list[list[Tensor]] = []
        step = tile_of(unembed)[0] if memory is None else memory.shape[1]
        for start in range(0, max(len(normed), 1), step):
            rows = slice(start, start + step)
            chunk = _Chunk(
                normed[rows],
                unembed,
                None if token_ids is None else token_ids[rows],
                None if gradient is None else gradient[rows],
            )
            if isinstance(target, ReducedTarget):
                found.append(_against_reduced(chunk, target, rows))
            else:
                assert memory is not None
                spare = memory[:, : len(chunk.normed)]
                found.append(_against_logits(chunk, target, rows, spare))
        loss, *statistics = (torch.cat(parts) for parts in zip(*found, strict=True))
        ctx.save_for_backward(gradient)
        ctx.mark_non_differentiable(*statistics)
        return loss, *statistics

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        (gradient,) = ctx.saved_tensors
        return gradient * upstream[0][:, None], None, None, None, None


@dataclass(frozen=True)
class _Chunk:
    """Rows whose logits exist at once; `gradient` is filled in if it is needed."""

    normed: Tensor
    unembed: Unembedding
    token_ids: Tensor | None
    gradient: Tensor | None


def _against_reduced(chunk: _Chunk, target: ReducedTarget, rows: slice) -> list[Tensor]:
    """Two products with the unembedding: for the student's logits and for the gradient."""
    unembed, normed, mean = chunk.unembed, chunk.normed, target.mean[rows]
    wanted = chunk.gradient is not None
    found = softmax_of(unembed, normed, mean=wanted, token_ids=chunk.token_ids)
    crossed = (normed.double() * mean).sum(-1) + target.offset[rows]
    loss = (found.log_z - unembed.scale * crossed).to(normed.dtype)
    if chunk.gradient is not None and found.mean is not None:
        chunk.gradient.copy_((found.mean - mean) * unembed.scale)
    if found.best is None or found.token_logits is None:
        return [loss]
    agrees = found.best == target.best[rows]
    return [loss, loss - target.entropy[rows], found.best, agrees, found.token_logits]


def _against_logits(
    chunk: _Chunk, target: TargetLogits, rows: slice, memory: Float[Tensor, "3 rows vocab"]
) -> list[Tensor]:
    """Three products with the unembedding: for both sides' logits and for the gradient."""
    unembed = chunk.unembed
    raw, p_target, spare = memory
    anchor = target.write(rows, raw)
    goal = raw if anchor is None else softcapped(unembed, raw, out=spare)
    log_z_target = softmax(goal, out=p_target)
    of_target: list[Tensor] = []
    if chunk.token_ids is not None:
        best = goal.argmax(-1)
        of_target = [best, log_z_target - torch.mul(p_target, goal, out=spare).sum(-1)]
    if anchor is None:
        write_logits(unembed, chunk.normed, raw)
    else:
        # Add the product of the difference to the target's logits: both sides then share the
        # rounding of half precision, which would otherwise hide a small distance between them.
        add_logits(unembed, chunk.normed - anchor, raw)
    logits = softcapped(unembed, raw, out=spare)
    spare = spare if logits is raw else raw
    crossed = torch.mul(p_target, logits, out=spare).sum(-1)
    log_z = softmax(logits, out=spare)
    loss = log_z - crossed
    if chunk.gradient is not None:
        residual = spare.sub_(p_target)
        if unembed.softcap is not None:
            # d(capped)/d(raw), from the capped logits; they are read below, so not in place.
            residual.mul_(1 - (logits / unembed.softcap) ** 2)
        chunk.gradient.copy_(times_weight(residual, unembed) * unembed.scale)
    if chunk.token_ids is None:
        return [loss]
    target_best, entropy = of_target
    best = logits.argmax(-1)
    token_logits = logits.gather(-1, chunk.token_ids)
    return [loss, loss - entropy, best, best == target_best, token_logits]

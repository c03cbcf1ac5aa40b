"""The distillation loss: cross-entropy against a frozen target, chunked, with its own gradient.

The product with the unembedding dominates everything else, and the logits of all rows and layers
must never exist at once. So the loss and its gradient are computed together, chunk by chunk: only
the hidden state needs a gradient, `(p_student - p_target) W`. Knows nothing of layers or training.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from lspade_train.adapters import Unembedding

CHUNK_MB = {"cpu": 24, "cuda": 512}
"""One chunk of fp32 logits: on a CPU it stays in the cache, on a GPU it fills the cores."""

ABSENT = -1.0e4
"""Logit of a token that a top-k target does not hold: its probability is exactly zero."""

TargetLogits = Callable[[slice], Tensor]
"""Rows of the target's logits, (chunk, vocab), made when they are needed."""


@dataclass(frozen=True)
class Distilled:
    """What one pass over the vocabulary gives, per row.

    Attributes:
        loss: cross-entropy against the target, nats; differentiable.
        kl: KL(target || student) in nats: the loss less the target's entropy.
        best: the student's most probable token.
        agrees: whether that is the target's too.
        watched: the student's logits of the watched tokens.
    """

    loss: Float[Tensor, " rows"]
    kl: Float[Tensor, " rows"]
    best: Int[Tensor, " rows"]
    agrees: Bool[Tensor, " rows"]
    watched: Float[Tensor, "rows watched"]


def distillation(
    student: Float[Tensor, "rows d"],
    target: TargetLogits,
    unembed: Unembedding,
    *,
    watch: Int[Tensor, "rows watched"] | None = None,
    chunk: int | None = None,
) -> Distilled:
    """Cross-entropy of the student's distribution against the target's, with its statistics.

    Args:
        student: translated hidden states, before the final norm.
        target: gives the target's logits for a slice of the rows.
        unembed: the frozen norm and head of the student's side.
        watch: tokens whose student logits are returned, such as the task's choices.
        chunk: rows whose logits exist at once; None: `chunk_rows`.

    Returns:
        Per-row loss and statistics; memory does not grow with rows x vocab.
    """
    tokens = watch if watch is not None else torch.empty(len(student), 0, dtype=torch.long)
    return Distilled(*_apply(student, target, unembed, tokens.to(student.device), chunk))


def cross_entropy(
    student: Float[Tensor, "rows d"],
    target: TargetLogits,
    unembed: Unembedding,
    *,
    chunk: int | None = None,
) -> Float[Tensor, " rows"]:
    """The loss of `distillation` alone, in nats: fewer passes over the logits."""
    return _apply(student, target, unembed, None, chunk)[0]


def chunk_rows(unembed: Unembedding) -> int:
    """Rows whose logits exist at once."""
    vocab = unembed.weight.shape[0]
    return max(CHUNK_MB.get(unembed.weight.device.type, 24) * 2**20 // (4 * vocab), 1)


def _apply(
    student: Tensor,
    target: TargetLogits,
    unembed: Unembedding,
    watch: Tensor | None,
    chunk: int | None,
) -> tuple[Tensor, ...]:
    normed = unembed.norm(student).to(unembed.weight.dtype)
    chunk = chunk or chunk_rows(unembed)
    return cast(
        tuple[Tensor, ...], _ChunkedCrossEntropy.apply(normed, target, unembed, watch, chunk)
    )


def hidden_target(hidden: Float[Tensor, "rows d"], unembed: Unembedding) -> TargetLogits:
    """A target in factored form: the hidden state before the final norm."""
    return lambda rows: unembed(hidden[rows].to(unembed.weight.dtype))


def logits_target(logits: Float[Tensor, "rows vocab"]) -> TargetLogits:
    """A target whose logits were stored."""
    return lambda rows: logits[rows]


def topk_target(
    values: Float[Tensor, "rows k"], tokens: Int[Tensor, "rows k"], vocab_size: int
) -> TargetLogits:
    """A target of which the k best logits were stored; it is renormalised over those."""

    def dense(rows: slice) -> Tensor:
        kept = values[rows].float()
        absent = kept.new_full((len(kept), vocab_size), ABSENT)
        return absent.scatter_(-1, tokens[rows].long(), kept)

    return dense


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Forward computes the gradient too, so that no logits are kept or computed twice."""

    @staticmethod
    def forward(
        ctx: Any,
        normed: Tensor,
        target: TargetLogits,
        unembed: Unembedding,
        watch: Tensor | None,
        chunk: int,
    ) -> tuple[Tensor, ...]:
        wide = torch.promote_types(normed.dtype, torch.float32)
        gradient = torch.empty_like(normed) if ctx.needs_input_grad[0] else None
        # Made once: small tensors kept between those of a chunk would break the heap into pieces.
        kinds = [wide] if watch is None else [wide, wide, torch.long, torch.bool]
        out = [normed.new_empty(len(normed), dtype=kind) for kind in kinds]
        if watch is not None:
            out.append(normed.new_empty(watch.shape, dtype=wide))
        for start in range(0, len(normed), chunk):
            part = slice(start, start + chunk)
            into = gradient[part] if gradient is not None else None
            watched = watch[part] if watch is not None else None
            found = _cross(normed[part], target(part), unembed, watched, into)
            for whole, value in zip(out, found, strict=True):
                whole[part] = value
        ctx.save_for_backward(gradient)
        ctx.mark_non_differentiable(*out[1:])
        return tuple(out)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        (gradient,) = ctx.saved_tensors
        return gradient * upstream[0][:, None].to(gradient.dtype), None, None, None, None


def _cross(
    normed: Tensor,
    target: Tensor,
    unembed: Unembedding,
    watch: Tensor | None,
    gradient: Tensor | None,
) -> list[Tensor]:
    """Loss of one chunk, and its statistics where tokens are watched; fills in the gradient.

    Three tensors of logits at most exist at once.
    """
    goal = target.to(torch.promote_types(normed.dtype, torch.float32))
    p_goal, scratch = goal.softmax(-1), torch.empty_like(goal)
    found: list[Tensor] = []
    if watch is not None:
        entropy = _log_z(goal, p_goal) - _dot(p_goal, goal, scratch)
        found = [entropy, goal.argmax(-1)]
    del target, goal
    logits = unembed.finish(unembed.head(normed)).to(p_goal.dtype)
    crossed = _dot(p_goal, logits, scratch)
    p = torch.softmax(logits, -1, out=scratch)
    loss = _log_z(logits, p) - crossed
    if watch is not None:
        entropy, goal_best = found
        best = logits.argmax(-1)
        found = [loss - entropy, best, best == goal_best, logits.gather(-1, watch)]
    if gradient is not None:
        residual = p.sub_(p_goal)
        if unembed.softcap is not None:
            # d(capped)/d(raw), from the capped logits.
            residual.mul_(1 - (logits / unembed.softcap) ** 2)
        torch.mm(residual.to(normed.dtype), unembed.weight, out=gradient).mul_(unembed.scale)
    return [loss, *found]


def _dot(first: Tensor, second: Tensor, scratch: Tensor) -> Tensor:
    """Row-wise inner products."""
    return torch.mul(first, second, out=scratch).sum(-1)


def _log_z(logits: Tensor, p: Tensor) -> Tensor:
    """Log partition of each row, from its likeliest token: that one cannot underflow."""
    return logits.amax(-1) - p.amax(-1).log()

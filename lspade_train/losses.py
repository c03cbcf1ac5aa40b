"""The distillation loss: cross-entropy against a frozen target, chunked, with its own gradient.

The product with the unembedding dominates everything else, and the logits of all rows and layers
must never exist at once. So the loss and its gradient are computed together, chunk by chunk: only
the hidden state needs a gradient, `(p_student - p_target) W`. Knows nothing of layers or training.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from lspade_train.adapters import Unembedding

CHUNK_BYTES = 24 * 1024 * 1024
"""One chunk of logits: large enough to amortise reading W, small enough to stay in cache."""

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
    chunk_bytes: int = CHUNK_BYTES,
) -> Distilled:
    """Cross-entropy of the student's distribution against the target's.

    Args:
        student: translated hidden states, before the final norm.
        target: gives the target's logits for a slice of the rows.
        unembed: the frozen norm and head of the student's side.
        watch: tokens whose student logits are returned, such as the task's choices.
        chunk_bytes: upper bound of one chunk of fp32 logits.

    Returns:
        Per-row loss and statistics; memory does not grow with rows x vocab.
    """
    normed = unembed.norm(student).to(unembed.weight.dtype)
    tokens = watch if watch is not None else torch.empty(len(student), 0, dtype=torch.long)
    rows = max(chunk_bytes // (4 * unembed.weight.shape[0]), 1)
    loss, kl, best, agrees, watched = _ChunkedCrossEntropy.apply(
        normed, target, unembed, tokens.to(student.device), rows
    )
    return Distilled(loss, kl, best, agrees, watched)


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
        watch: Tensor,
        chunk_rows: int,
    ) -> tuple[Tensor, ...]:
        rows = len(normed)
        wide = torch.promote_types(normed.dtype, torch.float32)
        loss = normed.new_empty(rows, dtype=wide)
        kl = torch.empty_like(loss)
        best = torch.empty(rows, dtype=torch.long, device=normed.device)
        agrees = torch.empty(rows, dtype=torch.bool, device=normed.device)
        watched = normed.new_empty(rows, watch.shape[1], dtype=wide)
        wants_gradient = ctx.needs_input_grad[0]
        gradient = torch.empty_like(normed) if wants_gradient else None

        for start in range(0, rows, chunk_rows):
            part = slice(start, start + chunk_rows)
            logits = unembed.finish(unembed.head(normed[part])).to(wide)
            goal = target(part).to(wide)
            watched[part] = logits.gather(-1, watch[part])
            p, log_z, best[part] = _softmax(logits)
            p_goal, goal_z, goal_best = _softmax(goal)
            agrees[part] = best[part] == goal_best
            loss[part] = log_z - _dot(p_goal, logits)
            kl[part] = loss[part] - (goal_z - _dot(p_goal, goal))
            if gradient is not None:
                residual = p.sub_(p_goal)
                if unembed.softcap is not None:
                    # d(capped)/d(raw), from the capped logits.
                    residual.mul_(1 - (logits / unembed.softcap) ** 2)
                gradient[part] = (residual.to(normed.dtype) @ unembed.weight).mul_(unembed.scale)

        ctx.save_for_backward(gradient)
        ctx.mark_non_differentiable(kl, best, agrees, watched)
        return loss, kl, best, agrees, watched

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        (gradient,) = ctx.saved_tensors
        return gradient * upstream[0][:, None].to(gradient.dtype), None, None, None, None


def _softmax(logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Probabilities, log partition and best token of each row, in two passes over the logits."""
    top, best = logits.max(-1)
    p = logits.softmax(-1)
    return p, top - p.gather(-1, best[:, None]).squeeze(-1).log(), best


def _dot(first: Tensor, second: Tensor) -> Tensor:
    """Row-wise inner products, without the tensor of products."""
    return torch.bmm(first[:, None], second[..., None]).flatten()

"""The distillation loss: cross-entropy against a frozen target, chunked, with its own gradient.

The product with the unembedding dominates everything else, and the logits of all rows and layers
must never exist at once. So the loss and its gradient are computed together, chunk by chunk: only
the hidden state needs a gradient, `(p_student - p_target) W`. Knows nothing of layers or training.
"""

from dataclasses import dataclass
from typing import Any, Protocol, cast

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from lspade_train.models import Unembedding

CHUNK_MB = {"cpu": 16, "cuda": 512}
"""One chunk of fp32 logits: on a CPU it stays in the cache, on a GPU it fills the cores."""

ABSENT = -1.0e4
"""Logit of a token that a top-k target does not hold: its probability is exactly zero."""


class TargetLogits(Protocol):
    """The target's logits, made when they are needed."""

    def __call__(self, rows: slice, out: Tensor | None = None) -> Float[Tensor, "chunk vocab"]:
        """Logits of some rows, in the given memory where that serves."""
        ...


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
    memory: Float[Tensor, "3 chunk vocab"] | None = None,
) -> Distilled:
    """Cross-entropy of the student's distribution against the target's, with its statistics.

    Args:
        student: translated hidden states, before the final norm.
        target: gives the target's logits for a slice of the rows.
        unembed: the frozen norm and head of the student's side.
        watch: tokens whose student logits are returned, such as the task's choices.
        memory: what the logits of a chunk are written to, from `chunk_memory`; None: made anew.

    Returns:
        Per-row loss and statistics; memory does not grow with rows x vocab.
    """
    tokens = watch if watch is not None else torch.empty(len(student), 0, dtype=torch.long)
    return Distilled(*_apply(student, target, unembed, tokens.to(student.device), memory))


def cross_entropy(
    student: Float[Tensor, "rows d"],
    target: TargetLogits,
    unembed: Unembedding,
    *,
    memory: Float[Tensor, "3 chunk vocab"] | None = None,
) -> Float[Tensor, " rows"]:
    """The loss of `distillation` alone, in nats: fewer passes over the logits."""
    return _apply(student, target, unembed, None, memory)[0]


def chunk_memory(unembed: Unembedding, rows: int | None = None) -> Float[Tensor, "3 chunk vocab"]:
    """Memory for the logits of one chunk; who keeps it spares the system from mapping it anew.

    Args:
        unembed: the frozen norm and head.
        rows: of a chunk; None: `chunk_rows`.
    """
    weight = unembed.weight
    wide = torch.promote_types(weight.dtype, torch.float32)
    shape = (3, rows or chunk_rows(unembed), weight.shape[0])
    with torch.inference_mode(False):  # a validation may ask first, and training writes to it later
        return torch.empty(shape, dtype=wide, device=weight.device)


def chunk_rows(unembed: Unembedding) -> int:
    """Rows whose logits exist at once."""
    vocab = unembed.weight.shape[0]
    return max(CHUNK_MB.get(unembed.weight.device.type, 16) * 2**20 // (4 * vocab), 1)


def _apply(
    student: Tensor,
    target: TargetLogits,
    unembed: Unembedding,
    watch: Tensor | None,
    memory: Tensor | None,
) -> tuple[Tensor, ...]:
    normed = unembed.norm(student).to(unembed.weight.dtype)
    memory = chunk_memory(unembed) if memory is None else memory
    return cast(
        tuple[Tensor, ...], _ChunkedCrossEntropy.apply(normed, target, unembed, watch, memory)
    )


def hidden_target(hidden: Float[Tensor, "rows d"], unembed: Unembedding) -> TargetLogits:
    """A target in factored form: the hidden state before the final norm."""

    def logits(rows: slice, out: Tensor | None = None) -> Tensor:
        return unembed.into(unembed.norm(hidden[rows].to(unembed.weight.dtype)), out)

    return logits


def logits_target(logits: Float[Tensor, "rows vocab"]) -> TargetLogits:
    """A target whose logits were stored."""

    def stored(rows: slice, out: Tensor | None = None) -> Tensor:  # noqa: ARG001
        return logits[rows]

    return stored


def topk_target(
    values: Float[Tensor, "rows k"], tokens: Int[Tensor, "rows k"], vocab_size: int
) -> TargetLogits:
    """A target of which the k best logits were stored; it is renormalised over those."""

    def dense(rows: slice, out: Tensor | None = None) -> Tensor:
        kept = values[rows].float() if out is None else values[rows].to(out.dtype)
        out = kept.new_empty(len(kept), vocab_size) if out is None else out
        return out.fill_(ABSENT).scatter_(-1, tokens[rows].long(), kept)

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
        memory: Tensor,
    ) -> tuple[Tensor, ...]:
        gradient = torch.empty_like(normed) if ctx.needs_input_grad[0] else None
        chunk = memory.shape[1]
        found: list[list[Tensor]] = []
        for start in range(0, max(len(normed), 1), chunk):
            part = slice(start, start + chunk)
            into = gradient[part] if gradient is not None else None
            watched = watch[part] if watch is not None else None
            held = memory[:, : len(normed[part])]
            found.append(_cross(normed[part], target(part, held[0]), unembed, watched, into, held))
        loss, *statistics = (torch.cat(parts) for parts in zip(*found, strict=True))
        ctx.save_for_backward(gradient)
        ctx.mark_non_differentiable(*statistics)
        return loss, *statistics

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
    memory: Tensor,
) -> list[Tensor]:
    """Loss of one chunk, and its statistics where tokens are watched; fills in the gradient."""
    goal = target.to(memory.dtype)
    p_goal, scratch = torch.softmax(goal, -1, out=memory[1]), memory[2]
    found: list[Tensor] = []
    if watch is not None:
        entropy = _log_z(goal, p_goal) - _dot(p_goal, goal, scratch)
        found = [entropy, goal.argmax(-1)]
    logits = unembed.into(normed, memory[0]).to(memory.dtype)  # the target's are not needed now
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

"""Targets that heads are fitted to: a distribution over the vocabulary per row.

Either the target's logits, computed on demand from what the cache stores, or, if the logits are
linear in the student's state, a target reduced to a few numbers. With p the target's distribution
and z = s (W n + b) the student's logits for its normed state n:

    CE(p, z) = logsumexp(z) - s (n . W^T p + b . p)        dCE/dn = s (W^T softmax(z) - W^T p)

so W^T p (as wide as n) and b . p are all that is needed of p, and the product with W that gives the
target's logits is computed once per row instead of once per step. Soft-capped logits are not
linear. Independent of Lightning, files and heads.
"""

from dataclasses import dataclass, replace
from typing import Protocol

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lspade_train.cache import StateBatch
from lspade_train.models import Unembedding
from lspade_train.training.numerics import (
    chunk_memory,
    softmax,
    times_weight,
    wide,
    wide_norm,
    write_logits,
)
from lspade_train.training.tiles import softmax_of, tile_of

ABSENT = -1.0e4
"""Logit of a token that is not in a top-k target: its probability is exactly zero."""


class TargetLogits(Protocol):
    """A target's logits, computed on demand."""

    def __call__(self, rows: slice) -> Float[Tensor, "chunk vocab"]:
        """Logits of some rows, as the model gives them."""
        ...

    def write(self, rows: slice, out: Float[Tensor, "chunk vocab"]) -> Tensor | None:
        """Write the logits of some rows into `out`.

        Returns:
            The normed states of these logits, in which case `out` is not yet soft-capped; None if
            no state is stored.
        """
        ...


@dataclass(frozen=True)
class HiddenTarget:
    """A target in factored form: the hidden state before the final norm."""

    hidden: Float[Tensor, "rows d"]
    unembed: Unembedding

    def __call__(self, rows: slice) -> Tensor:
        """The model's own logits of those states."""
        return self.unembed(self.hidden[rows].to(self.unembed.weight.dtype))

    def write(self, rows: slice, out: Tensor) -> Tensor:
        """Logits before soft-capping, and the normed states."""
        normed = wide_norm(self.unembed, self.hidden[rows].to(out.dtype))
        write_logits(self.unembed, normed, out)
        return normed


@dataclass(frozen=True)
class StoredLogits:
    """A target whose logits were stored."""

    logits: Float[Tensor, "rows vocab"]

    def __call__(self, rows: slice) -> Tensor:
        """The stored logits."""
        return self.logits[rows]

    def write(self, rows: slice, out: Tensor) -> None:
        """Copy them."""
        out.copy_(self.logits[rows])


@dataclass(frozen=True)
class TopkTarget:
    """A target whose k best logits were stored, renormalised over those."""

    values: Float[Tensor, "rows k"]
    tokens: Int[Tensor, "rows k"]
    vocab_size: int

    def __call__(self, rows: slice) -> Tensor:
        """Logits over the vocabulary, `ABSENT` for tokens that were not stored."""
        kept = self.values[rows].float()
        out = kept.new_empty(len(kept), self.vocab_size)
        self.write(rows, out)
        return out

    def write(self, rows: slice, out: Tensor) -> None:
        """Scatter them over the vocabulary."""
        out.fill_(ABSENT).scatter_(-1, self.tokens[rows].long(), self.values[rows].to(out.dtype))


@dataclass(frozen=True)
class ReducedTarget:
    """A target reduced to what the cross-entropy of linear logits needs.

    Attributes:
        mean: W^T p, the mean of the head's rows.
        offset: b . p, the mean of the head's bias.
        entropy: entropy of p, nats.
        best: the most probable token.
    """

    mean: Float[Tensor, "rows d_head"]
    offset: Float[Tensor, " rows"]
    entropy: Float[Tensor, " rows"]
    best: Int[Tensor, " rows"]


Target = TargetLogits | ReducedTarget


def target_logits(batch: StateBatch, target: str, unembed: Unembedding) -> TargetLogits:
    """The target's logits of rows x layers, flattened row by row, for any kind of stored target.

    Args:
        batch: rows with their targets.
        target: `spade`, or `final` for the model's own answer.
        unembed: the frozen norm and head.
    """
    layers = batch.hidden.shape[1]
    if target == "final":
        final = batch.final[:, None].expand(-1, layers, -1).reshape(-1, batch.final.shape[-1])
        return HiddenTarget(final, unembed)
    if batch.target is not None:
        return HiddenTarget(batch.target.flatten(0, 1), unembed)
    if batch.target_logits is not None:
        return StoredLogits(batch.target_logits.flatten(0, 1))
    assert batch.target_values is not None
    assert batch.target_tokens is not None
    return TopkTarget(
        batch.target_values.flatten(0, 1),
        batch.target_tokens.flatten(0, 1),
        unembed.weight.shape[0],
    )


def target_of(batch: StateBatch, target: str, unembed: Unembedding) -> Target:
    """The target of rows x layers for a training step: reduced if the batch has that."""
    if batch.target_mean is None:
        return target_logits(batch, target, unembed)
    assert batch.target_offset is not None
    assert batch.target_entropy is not None
    assert batch.target_best is not None
    return ReducedTarget(
        batch.target_mean.flatten(0, 1),
        batch.target_offset.flatten(0, 1),
        batch.target_entropy.flatten(0, 1),
        batch.target_best.flatten(0, 1),
    )


# Reducing -----------------------------------------------------------------------------------------


def is_reducible(unembed: Unembedding) -> bool:
    """Whether a reduced target gives loss and gradient as exactly as its logits do.

    False if logits are soft-capped, and in half precision, where W^T softmax(z) and W^T p are
    rounded more coarsely than the difference between the two for a trained head.
    """
    return unembed.softcap is None and unembed.weight.dtype in (torch.float32, torch.float64)


@torch.no_grad()
def reduce_target(
    target: TargetLogits,
    rows: int,
    unembed: Unembedding,
    memory: Float[Tensor, "3 chunk vocab"] | None = None,
) -> ReducedTarget:
    """Two products over the vocabulary per row: the target's logits, and W^T p.

    The logits of hidden targets never exist as a whole.

    Args:
        target: computes the logits of a slice of the rows.
        rows: number of rows.
        unembed: the frozen norm and head; must satisfy `is_reducible`.
        memory: buffer for the logits of a chunk if the target's logits were stored; None allocates
            one.
    """
    parts: list[tuple[Tensor, ...]] = []
    if isinstance(target, HiddenTarget):
        for part in target.hidden.split(tile_of(unembed)[0]):
            parts.append(_reduce_hidden(part.to(wide(unembed.weight.dtype)), unembed))
        return ReducedTarget(*(torch.cat(tensors) for tensors in zip(*parts, strict=True)))
    memory = chunk_memory(unembed) if memory is None else memory
    for first in range(0, max(rows, 1), memory.shape[1]):
        part = slice(first, min(first + memory.shape[1], rows))
        logits, p = memory[0, : part.stop - first], memory[1, : part.stop - first]
        target.write(part, logits)
        log_z = softmax(logits, out=p)
        mean = times_weight(p, unembed).to(p.dtype)
        bias = unembed.bias
        offset = log_z.new_zeros(len(p)) if bias is None else p @ bias.to(p.dtype)
        best = logits.argmax(-1)
        entropy = log_z - logits.mul_(p).sum(-1)
        parts.append((mean, offset, entropy, best))
    return ReducedTarget(*(torch.cat(tensors) for tensors in zip(*parts, strict=True)))


def _reduce_hidden(hidden: Float[Tensor, "rows d"], unembed: Unembedding) -> tuple[Tensor, ...]:
    """The attributes of `ReducedTarget`, in order."""
    normed, none = wide_norm(unembed, hidden), hidden.new_empty(len(hidden), 0, dtype=torch.long)
    found = softmax_of(unembed, normed, token_ids=none)
    assert found.mean is not None
    assert found.best is not None
    expected = unembed.scale * ((normed * found.mean).sum(-1) + found.offset)
    numbers = (found.mean, found.offset, found.log_z - expected)
    return *(number.to(normed.dtype) for number in numbers), found.best


def with_reduced_final(batch: StateBatch, unembed: Unembedding) -> StateBatch:
    """The batch with the model's own answer, reduced once, as the target of every layer."""
    layers = batch.hidden.shape[1]
    found = reduce_target(HiddenTarget(batch.final, unembed), len(batch), unembed)
    return replace(
        batch,
        target_mean=found.mean[:, None].expand(-1, layers, -1),
        target_offset=found.offset[:, None].expand(-1, layers),
        target_entropy=found.entropy[:, None].expand(-1, layers),
        target_best=found.best[:, None].expand(-1, layers),
    )

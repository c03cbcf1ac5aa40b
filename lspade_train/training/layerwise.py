"""Training a few layers at a time, since the heads of different layers share no parameters.

`layer_losses` runs a step on one piece of the layers after another, keeping only the gradients of
each. `LayerGroup` is coarser: heads too large for one device are fitted in groups, each through all
its epochs. Independent of losses and targets.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor

from lspade_train.probes.heads import LSpadeHeads

PieceLoss = Callable[[LSpadeHeads, slice], Float[Tensor, " piece"]]
"""Computes the losses of a slice of the layers, given the heads of those layers."""


@dataclass(frozen=True)
class LayerGroup:
    """One of several groups of consecutive layers.

    Attributes:
        number: index of this group, from 0.
        count: number of groups.
    """

    number: int
    count: int

    def among(self, layers: int) -> slice:
        """Slice of this group in that many layers; group sizes differ by at most one."""
        return slice(layers * self.number // self.count, layers * (self.number + 1) // self.count)

    @property
    def is_last(self) -> bool:
        """Whether this is the last group."""
        return self.number == self.count - 1


ALL_LAYERS = LayerGroup(0, 1)


def layer_losses(
    heads: LSpadeHeads, pieces: Sequence[slice], loss_of: PieceLoss
) -> Float[Tensor, " layers"]:
    """Loss of every layer, differentiable in the heads' parameters.

    Args:
        heads: the heads of all layers.
        pieces: slices of the layers, ascending and without gaps.
        loss_of: computes the losses of one piece.
    """
    return cast(Tensor, _PieceByPiece.apply(heads, pieces, loss_of, *heads.parameters()))


class _PieceByPiece(torch.autograd.Function):
    """Forward computes the gradients too, so that a piece's intermediates are freed with it."""

    @staticmethod
    def forward(
        ctx: Any,
        heads: LSpadeHeads,
        pieces: Sequence[slice],
        loss_of: PieceLoss,
        *parameters: Tensor,
    ) -> Tensor:
        losses: list[Tensor] = []
        gradients: list[Tensor] = []
        for piece in pieces:
            part = heads.part(piece)
            with torch.enable_grad():
                loss = loss_of(part, piece)
                total = loss.sum()
            with torch.autocast(loss.device.type, enabled=False):
                found = torch.autograd.grad(total, tuple(part.parameters()))
            losses.append(loss.detach())
            if len(pieces) == 1:
                gradients = list(found)  # whole already; a copy of 510 MB takes as long as its use
                break
            gradients = gradients or [torch.empty_like(parameter) for parameter in parameters]
            for gradient, value in zip(gradients, found, strict=True):
                gradient[piece] = value
        ctx.gradients = gradients
        return torch.cat(losses)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        # In place, and released here: they become the parameters' own gradients.
        gradients, ctx.gradients = ctx.gradients, []
        for gradient in gradients:
            gradient.mul_(upstream[0].reshape(-1, *[1] * (gradient.dim() - 1)))
        return None, None, None, *gradients

"""Losses of all layers with the memory of a few: one group of layers after another.

The heads of two layers have nothing in common, so that nothing but the gradients of a group's
parameters has to outlive it. Knows nothing of losses or of what is trained towards.
"""

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor

from lspade_train.heads import LSpadeHeads

GroupLoss = Callable[[LSpadeHeads, slice], Float[Tensor, " group"]]
"""Losses of the layers of a slice, from the heads of those layers alone."""


def layer_losses(
    heads: LSpadeHeads, groups: Sequence[slice], loss_of: GroupLoss
) -> Float[Tensor, " layers"]:
    """Loss of every layer, differentiable in the heads' parameters.

    Args:
        heads: the heads of all layers.
        groups: cuts the layers into groups, ascending and without gaps.
        loss_of: computes one group.
    """
    return cast(Tensor, _GroupByGroup.apply(heads, groups, loss_of, *heads.parameters()))


class _GroupByGroup(torch.autograd.Function):
    """Forward computes the gradients too, so that a group's intermediates go with it."""

    @staticmethod
    def forward(
        ctx: Any,
        heads: LSpadeHeads,
        groups: Sequence[slice],
        loss_of: GroupLoss,
        *parameters: Tensor,
    ) -> Tensor:
        losses: list[Tensor] = []
        gradients = [torch.empty_like(parameter) for parameter in parameters]
        for group in groups:
            part = heads.part(group)
            with torch.enable_grad():
                loss = loss_of(part, group)
                total = loss.sum()
            with torch.autocast(loss.device.type, enabled=False):
                found = torch.autograd.grad(total, tuple(part.parameters()))
            for gradient, value in zip(gradients, found, strict=True):
                gradient[group] = value
            losses.append(loss.detach())
        ctx.gradients = gradients
        return torch.cat(losses)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        # In place, and no longer held: they become the parameters' own gradients.
        gradients, ctx.gradients = ctx.gradients, []
        for gradient in gradients:
            gradient.mul_(upstream[0].reshape(-1, *[1] * (gradient.dim() - 1)))
        return None, None, None, *gradients

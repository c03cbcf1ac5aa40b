"""The distillation loss over the choices of each row, without logits over the vocabulary.

Both distributions are restricted to the row's choices and renormalised, so only the logits of those
tokens are needed, in fp32 or better for any dtype of the head. Independent of heads, files and
Lightning.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from lspade_train.cache import StateBatch
from lspade_train.cache.answers import choice_mask
from lspade_train.models import Unembedding
from lspade_train.training.losses import Distilled
from lspade_train.training.numerics import wide, wide_norm


def choice_distillation(
    student: Float[Tensor, "rows layers d"], batch: StateBatch, target: str, unembed: Unembedding
) -> Distilled:
    """Cross-entropy of the student's distribution over each row's choices against the target's.

    Args:
        student: translated hidden states, before the final norm.
        batch: rows with choices, and their targets.
        target: `spade`, or `final` for the model's own answer.
        unembed: the frozen norm and head.

    Returns:
        Per-row loss and statistics of rows x layers, flattened row by row, all over the choices.
        `token_logits` are the choices' logits, padded with -inf for rows with fewer choices.

    Raises:
        UnsupportedModelError: the head is not linear.
    """
    unembed.require_linear()
    choices = _Choices.of(batch)
    logits = choices.logits(student, unembed)
    with torch.no_grad():
        goal = _target_logits(choices, batch, target, unembed).expand_as(logits)
        p = goal.softmax(-1)
        # Zero where there is no choice: zero times minus infinity is NaN.
        entropy = -(p * goal.log_softmax(-1).where(choices.mask, 0.0)).sum(-1)
    loss = -(p * logits.log_softmax(-1).where(choices.mask, 0.0)).sum(-1)
    best = logits.detach().argmax(-1)
    tokens = batch.choice_ids.long().gather(1, best)
    agrees = best == goal.argmax(-1)
    return Distilled(
        loss=loss.flatten(),
        kl=(loss.detach() - entropy).flatten(),
        best=tokens.flatten(),
        agrees=agrees.flatten(),
        token_logits=logits.detach().flatten(0, 1),
    )


@dataclass(frozen=True)
class _Choices:
    """The choices of a batch: the distinct tokens of all rows, and each row's indices into them.

    Attributes:
        tokens: every token that is a choice of some row, each once.
        places: indices of each row's choices in `tokens`.
        mask: False for padding, in rows with fewer choices than others.
    """

    tokens: Int[Tensor, " tokens"]
    places: Int[Tensor, "rows 1 choices"]
    mask: Bool[Tensor, "rows 1 choices"]

    @classmethod
    def of(cls, batch: StateBatch) -> "_Choices":
        tokens, places = batch.choice_ids.long().unique(return_inverse=True)
        return cls(tokens, places[:, None], choice_mask(batch)[:, None])

    def logits(
        self, states: Float[Tensor, "rows layers d"], unembed: Unembedding
    ) -> Float[Tensor, "rows layers choices"]:
        """Logits of each row's choices; differentiable in `states` only."""
        dtype = wide(unembed.weight.dtype)
        # Upcast before the norm, so that no gradient passes through the head's dtype.
        normed = wide_norm(unembed, states.flatten(0, 1).to(dtype))
        # One product for all rows: a task's rows mostly share their choices.
        found = normed @ unembed.weight.detach()[self.tokens].to(dtype).T
        if unembed.bias is not None:
            found = found + unembed.bias.detach()[self.tokens].to(dtype)
        found = unembed.finish(found).unflatten(0, states.shape[:2])
        places = self.places.expand(-1, states.shape[1], -1)
        return found.gather(-1, places).masked_fill(~self.mask, -torch.inf)


def _target_logits(
    choices: _Choices, batch: StateBatch, target: str, unembed: Unembedding
) -> Float[Tensor, "rows layers choices"]:
    """The target's logits of the choices, from the stored target; one layer if `final`."""
    if target == "final":
        return choices.logits(batch.final[:, None], unembed)
    if batch.target is not None:
        return choices.logits(batch.target, unembed)
    # Top-k targets are refused with the recipe: the choices may not be among the best tokens.
    assert batch.target_logits is not None
    ids = batch.choice_ids.long()[:, None].expand(-1, batch.hidden.shape[1], -1)
    found = batch.target_logits.gather(-1, ids).to(wide(unembed.weight.dtype))
    return found.masked_fill(~choices.mask, -torch.inf)

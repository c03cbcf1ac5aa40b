"""The frozen way from a hidden state to logits, and where a model keeps it."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from lspade_train.errors import UnsupportedModelError
from lspade_train.io.storage import tensor_digest
from lspade_train.models.offloading import loaded

if TYPE_CHECKING:
    from transformers import PreTrainedModel

FINAL_NORMS = ("norm", "ln_f", "final_layer_norm", "norm_f", "final_layernorm")
"""Where the families keep the norm after the last block; the load-time check proves the guess."""


@dataclass(frozen=True)
class Unembedding:
    """The frozen way from a hidden state to logits: final norm, head, scaling, soft-capping.

    Attributes:
        norm: final norm, (..., d) -> (..., d_head).
        head: linear map onto the vocabulary.
        scale: factor on the logits.
        softcap: `softcap * tanh(logits / softcap)` where the family caps them.
    """

    norm: Callable[[Tensor], Tensor]
    head: nn.Module
    scale: float = 1.0
    softcap: float | None = None

    @property
    def weight(self) -> Float[Tensor, "vocab d_head"]:
        """The head's matrix."""
        return self.head.weight  # type: ignore[return-value]

    @property
    def bias(self) -> Float[Tensor, " vocab"] | None:
        """The head's bias, where the family has one."""
        return getattr(self.head, "bias", None)

    @property
    def modules(self) -> list[nn.Module]:
        """Norm and head, as far as the norm is a module."""
        return [part for part in (self.norm, self.head) if isinstance(part, nn.Module)]

    @property
    def bytes(self) -> int:
        """Size of its weights."""
        return sum(p.nbytes for part in self.modules for p in part.parameters())

    def __call__(self, hidden: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch vocab"]:
        """Logits of raw block outputs, in the model's dtype; only `hidden` has a graph."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and hidden.requires_grad):
            return self.finish(self.head(self.norm(hidden)))

    def into(
        self, normed: Float[Tensor, "rows d_head"], out: Float[Tensor, "rows vocab"] | None
    ) -> Float[Tensor, "rows vocab"]:
        """Logits behind the norm, written into `out` where it has the head's own kind of number."""
        if out is None or out.dtype != self.weight.dtype or type(self.head) is not nn.Linear:
            return self.finish(self.head(normed))
        torch.mm(normed, self.weight.T, out=out)
        if self.bias is not None:
            out.add_(self.bias)
        if self.scale != 1.0:
            out.mul_(self.scale)
        return out if self.softcap is None else out.div_(self.softcap).tanh_().mul_(self.softcap)

    def tokens(
        self, hidden: Float[Tensor, "rows d"], ids: Int[Tensor, "rows tokens"]
    ) -> Float[Tensor, "rows tokens"]:
        """Logits of a few tokens per row: a d x tokens product instead of d x V."""
        logits = (self.weight[ids] @ self.norm(hidden)[..., None]).squeeze(-1)
        return self.finish(logits if self.bias is None else logits + self.bias[ids])

    def finish(self, logits: Float[Tensor, "*batch vocab"]) -> Float[Tensor, "*batch vocab"]:
        """Scaling and soft-capping of the head's output."""
        if self.scale != 1.0:
            logits = logits * self.scale
        if self.softcap is not None:
            logits = torch.tanh(logits / self.softcap) * self.softcap
        return logits

    @cached_property
    def digest(self) -> str:
        """SHA-256 of everything here: heads trained for one digest are of no use with another."""
        norms = self.norm.parameters() if isinstance(self.norm, nn.Module) else ()
        extras = torch.tensor([self.scale, self.softcap or 0.0], dtype=torch.float64)
        return tensor_digest(self.weight, self.bias, *norms, extras)


def find_unembedding(model: "PreTrainedModel", decoder: nn.Module) -> Unembedding:
    """The final norm, head and scaling of a model.

    Raises:
        UnsupportedModelError: it has no language-model head.
    """
    norm = next(
        (m for m in (getattr(decoder, n, None) for n in FINAL_NORMS) if m is not None), None
    )
    head = model.get_output_embeddings()
    if head is None:
        raise UnsupportedModelError(
            f"{type(model).__name__} has no language-model head; load it with AutoModelForCausalLM."
        )
    stages = [loaded(m) for m in (norm, getattr(decoder, "project_out", None)) if m is not None]
    config = model.config.get_text_config(decoder=True)
    scale = float(getattr(config, "logit_scale", None) or 1.0)
    scale /= float(getattr(config, "logits_scaling", None) or 1.0)
    return Unembedding(
        norm=stages[0] if len(stages) == 1 else nn.Sequential(*stages),
        head=loaded(head),
        scale=scale,
        softcap=getattr(config, "final_logit_softcapping", None),
    )

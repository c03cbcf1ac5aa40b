"""The frozen map from a hidden state to logits, and where a model keeps it."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from lspade_train.errors import UnsupportedModelError
from lspade_train.io.tensors import tensor_digest
from lspade_train.models.offloading import loaded

if TYPE_CHECKING:
    from transformers import PreTrainedModel

FINAL_NORMS = ("norm", "ln_f", "final_layer_norm", "norm_f", "final_layernorm")
"""Names of the norm after the last block in different families; verified by the load-time check."""


@dataclass(frozen=True)
class Unembedding:
    """The frozen map from a hidden state to logits: final norm, head, scaling, soft-capping.

    Attributes:
        norm: final norm, (..., d) -> (..., d_head).
        head: linear map onto the vocabulary.
        scale: factor on the logits.
        softcap: `softcap * tanh(logits / softcap)`, if the family caps them.
        linear: whether the head applies its matrix and bias and nothing else, so that results
            computed from those (a few tokens' logits, the loss and its gradient) are exact.
    """

    norm: Callable[[Tensor], Tensor]
    head: nn.Module
    scale: float = 1.0
    softcap: float | None = None
    linear: bool = True

    @property
    def weight(self) -> Float[Tensor, "vocab d_head"]:
        """The head's matrix."""
        return self.head.weight  # type: ignore[return-value]

    @property
    def bias(self) -> Float[Tensor, " vocab"] | None:
        """The head's bias, if the family has one."""
        return getattr(self.head, "bias", None)

    @property
    def modules(self) -> list[nn.Module]:
        """The head, and the norm if it is a module."""
        return [part for part in (self.norm, self.head) if isinstance(part, nn.Module)]

    @property
    def bytes(self) -> int:
        """Size of its weights."""
        return sum(p.nbytes for part in self.modules for p in part.parameters())

    def __call__(self, hidden: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch vocab"]:
        """Logits of raw block outputs, in the model's dtype; differentiable in `hidden` only."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and hidden.requires_grad):
            return self.finish(self.head(self.norm(hidden)))

    def into(
        self, normed: Float[Tensor, "rows d_head"], out: Float[Tensor, "rows vocab"] | None
    ) -> Float[Tensor, "rows vocab"]:
        """Logits of normed states, written into `out` if it has the head's dtype.

        Raises:
            UnsupportedModelError: the head is not linear, so the loss's gradient would be wrong.
        """
        self.require_linear()
        if out is None or out.dtype != self.weight.dtype:
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
        """Logits of a few tokens per row: a d x tokens product instead of d x V.

        A head that is not linear computes all logits.
        """
        if not self.linear:
            return self(hidden).gather(-1, ids)
        logits = (self.weight[ids] @ self.norm(hidden)[..., None]).squeeze(-1)
        return self.finish(logits if self.bias is None else logits + self.bias[ids])

    def require_linear(self) -> None:
        """Refuse a head whose gradient is not given by its matrix.

        Raises:
            UnsupportedModelError: the head is not linear.
        """
        if not self.linear:
            raise UnsupportedModelError(
                f"The model's head ({type(self.head).__name__}) is more than a product with its "
                "weight: it has hooks or an adapter, or normalises what it is given.\n"
                "Heads are fitted through a plain linear one: merge or remove what was added to it."
            )

    def finish(self, logits: Float[Tensor, "*batch vocab"]) -> Float[Tensor, "*batch vocab"]:
        """Scaling and soft-capping of the head's output."""
        if self.scale != 1.0:
            logits = logits * self.scale
        if self.softcap is not None:
            logits = torch.tanh(logits / self.softcap) * self.softcap
        return logits

    @cached_property
    def digest(self) -> str:
        """SHA-256 of everything here: heads trained for one digest do not work with another."""
        norms = self.norm.parameters() if isinstance(self.norm, nn.Module) else ()
        extras = torch.tensor([self.scale, self.softcap or 0.0], dtype=torch.float64)
        more = () if self.linear else self.head.state_dict().values()
        return tensor_digest(self.weight, self.bias, *norms, extras, *more)


def find_unembedding(model: "PreTrainedModel", decoder: nn.Module) -> Unembedding:
    """The final norm, head and scaling of a model.

    Raises:
        UnsupportedModelError: it has no language-model head, or one without a matrix.
    """
    norm = next(
        (m for m in (getattr(decoder, n, None) for n in FINAL_NORMS) if m is not None), None
    )
    head = model.get_output_embeddings()
    if head is None:
        raise UnsupportedModelError(
            f"{type(model).__name__} has no language-model head; load it with AutoModelForCausalLM."
        )
    head = loaded(head)
    stages = [loaded(m) for m in (norm, getattr(decoder, "project_out", None)) if m is not None]
    weight = getattr(head, "weight", None)
    if not isinstance(weight, Tensor):
        raise UnsupportedModelError(
            f"The head of {type(model).__name__} ({type(head).__name__}) has no weight of its own; "
            "expected a linear layer.\nUnwrap the head first."
        )
    if any(p.device != weight.device for stage in stages for p in stage.parameters()):
        stages.append(_MoveTo(weight.device))
    config = model.config.get_text_config(decoder=True)
    scale = float(getattr(config, "logit_scale", None) or 1.0)
    scale /= float(getattr(config, "logits_scaling", None) or 1.0)
    return Unembedding(
        norm=stages[0] if len(stages) == 1 else nn.Sequential(*stages),
        head=head,
        scale=scale,
        softcap=getattr(config, "final_logit_softcapping", None),
        linear=_is_linear(head, weight),
    )


class _MoveTo(nn.Module):
    """Move states to the head's device, if a `device_map` has put the norm on another one."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.device = device

    def forward(self, states: Tensor) -> Tensor:
        return states.to(self.device)


@torch.no_grad()
def _is_linear(head: nn.Module, weight: Tensor) -> bool:
    """Whether the head computes the product with its weight, with no hook that may change it.

    Tested with small and large states, since a head may normalise or clamp its input.

    Raises:
        UnsupportedModelError: the number of logits is not the number of its weight's rows.
    """
    width = weight.shape[-1]
    wave = torch.arange(4.0 * width, device=weight.device).reshape(2, 2, width).sin()
    dtype = weight.dtype if weight.is_floating_point() else torch.float32
    states = (wave * torch.tensor([1e-3, 1e3], device=weight.device)[:, None, None]).to(dtype)
    try:
        found = head(states)
    except Exception:  # an unusual head may reject plain states; left to the load-time check
        return False
    if found.shape[-1] != weight.shape[0]:
        raise UnsupportedModelError(
            f"The head ({type(head).__name__}) gives {found.shape[-1]} logits, and its weight has "
            f"{weight.shape[0]} rows.\nExpected a linear layer over the vocabulary; leave the head "
            "out of the quantisation."
        )
    if any(vars(head).get(hooks) for hooks in ("_forward_hooks", "_forward_pre_hooks")):
        return False
    expected = nn.functional.linear(states, weight, getattr(head, "bias", None))
    slack = 4 * torch.finfo(dtype).eps
    pairs = zip(found.double().nan_to_num(), expected.double().nan_to_num(), strict=True)
    return all(
        float((one - other).abs().max()) <= slack * float(other.abs().max()) for one, other in pairs
    )

"""The load-time check: every path of an adapter against the model's own forward."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lspade_train.errors import LSpadeError, UnsupportedModelError
from lspade_train.models.identity import quantization

if TYPE_CHECKING:
    from lspade_train.models.adapter import ModelAdapter


@torch.no_grad()
def check_adapter(adapter: "ModelAdapter") -> None:
    """Compare every path with the model's own forward on one short padded probe.

    As many rows as tokens: a plan that takes a token dimension for the batch fails here.

    Raises:
        UnsupportedModelError: a path gives other numbers; says which.
        RecipeError: the blocks cannot be compiled.
    """
    vocabulary = adapter.vocab_size
    ids = torch.tensor([[3, 4, 5, 6], [7, 8, 9, 10], [3, 11, 12, 13], [7, 14, 9, 15]])
    ids = (ids % vocabulary).to(adapter.device)
    mask = torch.ones_like(ids)
    mask[1, 3] = mask[2, 2:] = 0
    try:
        expected = _model_forward(adapter, ids, mask)
        _compare(adapter, ids, mask, expected)
    except LSpadeError:
        raise
    except Exception as cause:
        text = (str(cause).splitlines() or [type(cause).__name__])[0]
        raise _refused(adapter, f"the probe failed with {type(cause).__name__}: {text}") from cause


def _model_forward(adapter: "ModelAdapter", ids: Tensor, mask: Tensor) -> Tensor:
    positions = {"position_ids": (mask.cumsum(-1) - 1).clamp(min=0)}
    extra = positions if adapter.takes_positions else {}
    return adapter.model(input_ids=ids, attention_mask=mask, use_cache=False, **extra).logits


def _compare(adapter: "ModelAdapter", ids: Tensor, mask: Tensor, expected: Tensor) -> None:
    if not torch.isfinite(expected[mask.bool()]).all():
        raise _refused(adapter, "its logits are NaN or Inf")
    slack = _slack(adapter)
    if not _close(expected[0, 0], expected[2, 0], slack):
        raise _refused(adapter, "a later token changes an earlier one: it is not causal")
    plan = adapter.plan(ids, mask)
    hidden = plan.hidden
    for block in range(adapter.num_layers):
        hidden = adapter.run_block(plan, block, hidden)
    real = mask.bool()
    if not _close(adapter.model_unembed(hidden)[real], expected[real], slack):
        raise _refused(adapter, "replaying its blocks does not give its logits")
    if not _close(adapter.unembed(hidden)[real], expected[real], slack):
        raise _refused(adapter, "final norm and head do not give its logits")
    # The two-token prompt [s, a] is its own SPADE from layer 0 on.
    two = adapter.plan(ids[:, :2], mask[:, :2])
    step = adapter.plan_step(ids[:, 0], torch.ones_like(ids[:, 0]))
    both, alone = two.hidden, two.hidden[:, 1:]
    for block in range(adapter.num_layers):
        both = adapter.run_block(two, block, both)
        alone = adapter.run_block(step, block, alone)
    if not _close(adapter.unembed(alone[:, 0]), adapter.unembed(both[:, 1]), slack):
        raise _refused(adapter, "its key-value cache does not continue the start token")


def _slack(adapter: "ModelAdapter") -> float:
    """A few ulps of the dtype; more where quantised products round by what shares their batch."""
    exact = adapter.dtype == torch.float32 and quantization(adapter.model) is None
    return 256 * torch.finfo(torch.float32).eps if exact else 0.05


def _close(got: Tensor, expected: Tensor, slack: float) -> bool:
    """Equal up to rounding: within the widest logit times `slack`."""
    scale = float(expected.float().abs().max()) + 1e-3
    return float((got.float() - expected.float()).abs().max()) <= slack * scale


def _refused(adapter: "ModelAdapter", why: str) -> UnsupportedModelError:
    kind = getattr(adapter.model.config, "model_type", type(adapter.model).__name__)
    return UnsupportedModelError(
        f"{type(adapter.model).__name__} ({kind}) cannot be driven block by block: {why}.\n"
        "Expected a causal decoder-only model; set data.model_id to one."
    )

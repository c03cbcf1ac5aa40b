"""The load-time check: compares every path of an adapter with the model's own forward."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lspade_train.errors import LSpadeError, UnsupportedModelError
from lspade_train.io.storage import first_line
from lspade_train.models.identity import quantization
from lspade_train.models.plan import Plan

if TYPE_CHECKING:
    from lspade_train.models.adapter import ModelAdapter

KEPT = (1, 3)
"""Rows of the probe that are kept from the middle on: of different length and start token, with one
row dropped before and one between them, so that a row in the wrong place is noticed."""


@torch.no_grad()
def check_adapter(adapter: "ModelAdapter") -> None:
    """Compare every path with the model's own forward on one short padded probe.

    It has as many rows as tokens, so a plan that mistakes a token dimension for the batch fails.

    Raises:
        UnsupportedModelError: a path gives different results.
        RecipeError: the blocks cannot be compiled.
    """
    vocabulary = adapter.vocab_size
    ids = torch.tensor([[3, 4, 5, 6], [7, 8, 9, 10], [3, 11, 12, 13], [16, 14, 9, 15]])
    ids = (ids % vocabulary).to(adapter.device)
    mask = torch.ones_like(ids)
    mask[1, 3] = mask[2, 2:] = 0
    try:
        expected = adapter.model_logits(ids, mask)
        _compare(adapter, ids, mask, expected)
    except LSpadeError:
        raise
    except Exception as cause:
        if getattr(adapter.model.config, "return_dict", True) is False:
            raise UnsupportedModelError(
                f"{type(adapter.model).__name__} does not run with config.return_dict=False: "
                "transformers reads the decoder's output by name.\nSet config.return_dict = True."
            ) from cause
        text = first_line(cause)
        raise _refused(adapter, f"the probe failed with {type(cause).__name__}: {text}") from cause


def _compare(adapter: "ModelAdapter", ids: Tensor, mask: Tensor, expected: Tensor) -> None:
    if not torch.isfinite(expected[mask.bool()]).all():
        raise _refused(adapter, "its logits are NaN or Inf")
    slack = _slack(adapter)
    if not _close(expected[0, 0], expected[2, 0], slack):
        raise _refused(adapter, "a later token changes an earlier one: it is not causal")
    plan = adapter.plan(ids, mask)
    hidden, fewer = _run(adapter, plan, plan.hidden)
    real = mask.bool()
    if not _close(adapter.model_unembed(hidden)[real], expected[real], slack):
        raise _refused(adapter, "replaying its blocks does not give its logits")
    if not _close(adapter.unembed(hidden)[real], expected[real], slack):
        raise _refused(adapter, "final norm and head do not give its logits")
    kept = torch.tensor(KEPT, device=mask.device)
    # Compare padding, too: with another row's mask, a row would attend to padding.
    if not _close(fewer, hidden[kept], slack):
        raise _refused(adapter, "the rows that stay change when others are dropped halfway")
    # For the two-token prompt [s, a], SPADE from layer 0 is the model itself.
    two = adapter.plan(ids[:, :2])
    step = adapter.plan_step(ids[:, 0], torch.ones_like(ids[:, 0]))
    both, _ = _run(adapter, two, two.hidden)
    alone, fewer = _run(adapter, step, two.hidden[:, 1:])
    if not _close(adapter.unembed(alone[:, 0]), adapter.unembed(both[:, 1]), slack):
        raise _refused(adapter, "its key-value cache does not continue the start token")
    if not _close(fewer, alone[kept.to(alone.device)], slack):
        raise _refused(adapter, "rows behind a start token change when others are dropped halfway")


@torch.no_grad()
def why_no_prefix(adapter: "ModelAdapter") -> str:
    """Compare rows that continue a shared prefix with the same rows run as a whole.

    Returns:
        What differs; "" if the results are the same.
    """
    ids = torch.tensor([[3, 4, 5, 6, 7], [3, 4, 5, 9, 2], [3, 4, 5, 6, 0], [3, 4, 5, 7, 8]])
    ids = (ids % adapter.vocab_size).to(adapter.device)
    mask = torch.ones_like(ids)
    mask[2, 4] = 0
    plain = adapter.plan(ids, mask)
    whole, _ = _run(adapter, plain, plain.hidden)
    try:
        rest = adapter.plan(ids, mask, shared=3)
        behind, fewer = _run(adapter, rest, rest.hidden)
    except Exception as cause:  # a family's code may raise anything for a cache of several tokens
        return f"its blocks fail after a shared prefix ({type(cause).__name__})"
    real, kept = mask[:, 3:].bool(), torch.tensor(KEPT, device=mask.device)
    slack = _slack(adapter)
    logits, others = adapter.unembed(behind), adapter.unembed(fewer)
    if not _close(logits[real], adapter.unembed(whole[:, 3:])[real], slack):
        return "its key-value cache does not continue one"
    if not _close(others[real[kept]], logits[kept][real[kept]], slack):
        return "the rows that stay change when others are dropped halfway"
    return ""


def _run(adapter: "ModelAdapter", plan: Plan, hidden: Tensor) -> tuple[Tensor, Tensor]:
    """Output of the last block for all rows, and with only `KEPT` from the middle on."""
    middle = adapter.num_layers // 2
    few, fewer = plan, hidden
    for block in range(adapter.num_layers):
        if block == middle:
            kept = torch.tensor(KEPT, device=hidden.device)
            few, fewer = plan.select(kept), hidden[kept]
        if block >= middle:
            fewer = adapter.run_block(few, block, fewer)
        hidden = adapter.run_block(plan, block, hidden)
    return hidden, fewer


def _slack(adapter: "ModelAdapter") -> float:
    """Tolerance for rounding.

    Products with other numbers of rows round differently, and large states that cancel in the last
    blocks amplify that: for a 28-block model up to 4e-5 of the logits in fp32, and 0.06 in bf16. A
    wrong mask, position or start token changes them by 0.2 or more. Rounding of quantised products
    depends on the rest of the batch.
    """
    exact = adapter.dtype == torch.float32 and quantization(adapter.model) is None
    return 1e-3 if exact else 0.1


def _close(got: Tensor, expected: Tensor, slack: float) -> bool:
    """Equal up to rounding, by the relative root mean square error of each row.

    Not by the largest difference, which in half precision depends on the number of threads.
    """
    off = (got.float() - expected.float()).square().mean(-1).sqrt()
    size = expected.float().square().mean(-1).sqrt() + 1e-3
    return bool((off <= slack * size).all())


def _refused(adapter: "ModelAdapter", why: str) -> UnsupportedModelError:
    kind = getattr(adapter.model.config, "model_type", type(adapter.model).__name__)
    return UnsupportedModelError(
        f"{type(adapter.model).__name__} ({kind}) cannot be run block by block: {why}.\n"
        "Expected a causal decoder-only model; set data.model_id to one."
    )

"""Prefixes that a model runs once for all prompts that share them, if that is exact."""

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from transformers import DynamicCache

from lspade_train.models.load_check import why_no_prefix
from lspade_train.models.prefix import Tokens, rotation_limit, shared_prefixes

if TYPE_CHECKING:
    from lspade_train.models.adapter import ModelAdapter

log = logging.getLogger(__name__)


def prefill(adapter: "ModelAdapter", tokens: Sequence[int]) -> DynamicCache:
    """Keys and values of these tokens at every block, run alone from position 0 on."""
    cache = DynamicCache(config=adapter.model.config)
    ids = torch.tensor([[*tokens]], device=adapter.device)
    mask = torch.ones_like(ids)
    plan = adapter.plan_cached(ids, mask, mask.cumsum(-1) - 1, cache)
    hidden = plan.hidden
    for block in range(adapter.num_layers):
        hidden = adapter.run_block(plan, block, hidden)
    return cache


def prefix_refusal(adapter: "ModelAdapter", longest: int) -> str | None:
    """Why prompts of up to `longest` tokens cannot be split at a prefix; None if they can.

    Determined by probing the model at the first call, and cached while the model is unchanged.
    """
    known = adapter.refresh()
    with known.lock:
        if known.prefix is None:
            known.prefix = why_no_prefix(adapter)
            if known.prefix:
                log.info("shared prefixes are disabled: %s", known.prefix)
    limit = rotation_limit(adapter.text_config)
    if not known.prefix and limit is not None and longest > limit:
        return f"its rotary angles change over {limit:,} tokens, and a prompt has {longest:,}"
    return known.prefix or None


def shared_groups(
    adapter: "ModelAdapter", prompts: Sequence[Tokens], own: Sequence[int] | None = None
) -> list[tuple[int, list[int]]]:
    """`shared_prefixes` of these prompts; one group without a prefix if the model cannot share."""
    found = shared_prefixes(prompts, own)
    if _refused(adapter, prompts, found) is not None:
        return [(0, list(range(len(prompts))))]
    return found


def sharing_told(
    adapter: "ModelAdapter", prompts: Sequence[Tokens], own: Sequence[int] | None = None
) -> str:
    """Which part of these prompts is run only once, in words."""
    found = shared_prefixes(prompts, own)
    shared = [(tokens, len(members)) for tokens, members in found if tokens]
    refused = _refused(adapter, prompts, found)
    if not shared or refused is not None:
        return "none" if refused is None else f"none: {refused}"
    tokens, rows = max(shared, key=lambda one: one[0] * one[1])
    more = f", and {len(shared) - 1} more" if len(shared) > 1 else ""
    return f"{tokens} tokens of {rows:,} prompts{more}"


def _refused(
    adapter: "ModelAdapter", prompts: Sequence[Tokens], found: list[tuple[int, list[int]]]
) -> str | None:
    lengths = [len(prompts[i]) for tokens, members in found if tokens for i in members]
    return prefix_refusal(adapter, max(lengths)) if lengths else None

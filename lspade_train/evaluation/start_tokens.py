"""SPADE with its start token moved, replaced or omitted. Independent of heads and files."""

from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lspade_train.cache import StateBatch
from lspade_train.models import ModelAdapter
from lspade_train.probes.spade import collect_states, continue_states, sweep

Start = Literal["original", "compact", "no_start", "other_token", "random_vector"]


def spade_states(
    adapter: ModelAdapter,
    batch: StateBatch,
    layers: tuple[int, ...],
    start: Start,
    *,
    other: int = 0,
    seed: int = 0,
) -> Float[Tensor, "rows layers d"]:
    """SPADE's hidden state before the final norm, from every cached layer, with one change.

    Args:
        adapter: the frozen model.
        batch: cached rows.
        layers: the layers of `batch.hidden`.
        start: `original` keeps the two tokens' position ids, `compact` sets them to 0 and 1,
            `no_start` runs the answer token alone, `other_token` replaces the start token by
            `other`, `random_vector` replaces its state by a random one of the same norm.
        other: token id of the replacement.
        seed: seed of the random directions, one per layer.
    """
    if start == "no_start":
        return _alone(adapter, batch, layers)
    if start == "random_vector":
        return _behind_noise(adapter, batch, layers, seed)
    return continue_states(
        adapter,
        batch.hidden,
        layers,
        torch.full_like(batch.start_id, other) if start == "other_token" else batch.start_id,
        batch.position_id,
        positions="compact" if start == "compact" else "original",
    )


def _alone(
    adapter: ModelAdapter, batch: StateBatch, layers: tuple[int, ...]
) -> Float[Tensor, "rows layers d"]:
    positions = batch.position_id.repeat(len(layers))[:, None]
    ones = torch.ones_like(positions)
    plan = adapter.plan_cached(ones, ones, positions, None)
    return sweep(adapter, plan, batch.hidden[:, :, None], layers)


def _behind_noise(
    adapter: ModelAdapter, batch: StateBatch, layers: tuple[int, ...], seed: int
) -> Float[Tensor, "rows layers d"]:
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(len(layers), adapter.hidden_size, generator=generator)
    noise = noise / noise.norm(dim=-1, keepdim=True)
    lengths = _start_lengths(adapter, batch.start_id, layers)
    start = (lengths[..., None] * noise.to(lengths)).to(batch.hidden)
    positions = batch.position_id.repeat(len(layers))
    positions = torch.stack([torch.zeros_like(positions), positions], dim=1)
    ones = torch.ones_like(positions)
    plan = adapter.plan_cached(ones, ones, positions, None)
    return sweep(adapter, plan, torch.stack([start, batch.hidden], dim=2), layers)


def _start_lengths(
    adapter: ModelAdapter, start_ids: Int[Tensor, " rows"], layers: tuple[int, ...]
) -> Float[Tensor, "rows layers"]:
    """Euclidean norm of each row's own h_s^l."""
    distinct, which = start_ids.unique(return_inverse=True)
    first = torch.zeros_like(distinct)[:, None]
    states = collect_states(adapter, distinct[:, None], None, first, layers)
    return states.hidden[:, 0].float().norm(dim=-1)[which]

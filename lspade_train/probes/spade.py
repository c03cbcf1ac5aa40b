"""SPADE: what the model answers from `[h_s^l, h_a^l]` alone, for all layers in one upward sweep.

Paper v2 calls it SimLens. Independent of heads, tasks and files.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lspade_train.errors import TaskError
from lspade_train.models import ModelAdapter, Plan
from lspade_train.models.plan import token_mask
from lspade_train.recipe import PositionIds, check_layers

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class States:
    """Residual stream of one batch at its answer positions.

    Attributes:
        hidden: h_a^l for each requested layer, (prompts, positions, layers, d).
        final: h_a^L, (prompts, positions, d).
        start_ids: first real token of each prompt, (prompts,).
        position_ids: index of each answer among the prompt's real tokens, (prompts, positions).
    """

    hidden: Float[Tensor, "prompts positions layers d"]
    final: Float[Tensor, "prompts positions d"]
    start_ids: Int[Tensor, " prompts"]
    position_ids: Int[Tensor, "prompts positions"]


@torch.no_grad()
def collect_states(
    adapter: ModelAdapter,
    input_ids: Int[Tensor, "prompts tokens"],
    attention_mask: Int[Tensor, "prompts tokens"] | None,
    positions: Int[Tensor, "prompts positions"],
    layers: Sequence[int],
    *,
    shared: int = 0,
) -> States:
    """Run whole prompts block by block and keep the residual stream at the answer positions.

    Args:
        adapter: the frozen model.
        input_ids: prompts, padded on either side.
        attention_mask: 1 for real tokens; None if nothing is padded.
        positions: columns of `input_ids` to keep.
        layers: layers to keep, 0..L.
        shared: number of leading tokens that are run once for all prompts (see
            `ModelAdapter.plan`); `positions` must come after them.
    """
    mask = token_mask(input_ids, attention_mask)
    plan = adapter.plan(input_ids, mask, shared=shared)
    at_answers = _picks(positions - shared)

    hidden = plan.hidden
    # Each layer is copied to its place at once: stacking them later would copy them once more.
    kept = hidden.new_empty(*positions.shape, len(layers), hidden.shape[-1])
    if 0 in layers:
        kept[:, :, layers.index(0)] = at_answers(hidden)
    for block in range(adapter.num_layers):
        hidden = adapter.run_block(plan, block, hidden)
        if block + 1 in layers:
            kept[:, :, layers.index(block + 1)] = at_answers(hidden)
    final = at_answers(hidden).contiguous()
    first = mask.argmax(-1, keepdim=True)
    return States(
        hidden=kept.to(final.device),
        final=final,
        start_ids=input_ids.gather(1, first).squeeze(1),
        position_ids=(mask.cumsum(-1) - 1).gather(1, positions.to(mask.device)),
    )


def _picks(columns: Int[Tensor, "rows positions"]) -> Callable[[Tensor], Tensor]:
    """Function that picks each row's columns; on a CPU a view, if they are one range for all."""
    if columns.device.type == "cpu":  # on a GPU, looking at them would wait for the blocks before
        first, count = int(columns[0, 0]), columns.shape[1]
        if torch.equal(columns, torch.arange(first, first + count).expand_as(columns)):
            return lambda hidden: hidden[:, first : first + count]
    rows = torch.arange(len(columns), device=columns.device)[:, None]
    return lambda hidden: hidden[rows.to(hidden.device), columns.to(hidden.device)]


@torch.no_grad()
def continue_states(
    adapter: ModelAdapter,
    hidden: Float[Tensor, "rows layers d"],
    layers: Sequence[int],
    start_ids: Int[Tensor, " rows"],
    position_ids: Int[Tensor, " rows"],
    *,
    positions: PositionIds = "original",
) -> Float[Tensor, "rows layers d"]:
    """SPADE's hidden state before the final norm, from every requested layer, in one sweep.

    Going up the blocks once, the rows that start at layer l join the batch before block l+1. The
    start token's keys and values are constants, so a row is a single token: L(L+1)/2 single-token
    block applications per prompt for all layers, and each block's weights are read once.

    Args:
        adapter: the frozen model.
        hidden: h_a^l for each of `layers`.
        layers: ascending, 0..L.
        start_ids: first real token of each row's prompt.
        position_ids: index of the answer among its prompt's real tokens.
        positions: `original` keeps (0, n), `compact` uses (0, 1).

    Source: arXiv:2507.17618, SPADE (v1), SimLens (v2).
    """
    asked = [layer for layer in layers if layer < adapter.num_layers]
    if positions == "compact":
        position_ids = torch.ones_like(position_ids)
    if not asked:
        return hidden.clone()
    plan = adapter.plan_step(start_ids.repeat(len(asked)), position_ids.repeat(len(asked)))
    done = sweep(adapter, plan, hidden[:, : len(asked), None], asked)
    # Layer L has no block above it: there, SPADE is the model itself.
    return torch.cat([done, hidden[:, len(asked) :]], dim=1)


@torch.no_grad()
def sweep(
    adapter: ModelAdapter,
    plan: Plan,
    hidden: Float[Tensor, "rows layers tokens d"],
    layers: Sequence[int],
) -> Float[Tensor, "rows layers d"]:
    """Run short sequences through the blocks, each starting after its own layer.

    Args:
        adapter: the frozen model.
        plan: plan for rows x layers sequences, the rows of the first layer first.
        hidden: the sequences' states after each of `layers`.
        layers: ascending, 0..L-1.

    Returns:
        Raw output of the last block at the last token.
    """
    active, step = hidden.new_empty(0, *hidden.shape[2:]), plan
    for block in range(layers[0], adapter.num_layers):
        if block in layers:
            joining = hidden[:, layers.index(block)].to(active.device)
            active = torch.cat([active, joining])
            step = plan.select(slice(0, len(active)))
        active = adapter.run_block(step, block, active)
    rows, count = hidden.shape[:2]
    return active[:, -1].reshape(count, rows, -1).transpose(0, 1).to(hidden.device)


@torch.no_grad()
def spade_logits(
    model: "PreTrainedModel | ModelAdapter",
    input_ids: Int[Tensor, "rows tokens"],
    attention_mask: Int[Tensor, "rows tokens"] | None = None,
    *,
    layers: Sequence[int] | None = None,
    positions: PositionIds = "original",
) -> Float[Tensor, "rows layers vocab"]:
    """SPADE's logits at the last real token of each prompt.

    Args:
        model: a Hugging Face decoder, or its adapter.
        input_ids: prompts, padded on the right or on the left.
        attention_mask: 1 or True for real tokens; None if nothing is padded.
        layers: layers 0..L to answer from; None means 1..L. Layer L is the model itself.
        positions: `original` keeps the two tokens' position ids (0, n), `compact` uses (0, 1).

    Raises:
        RecipeError: a layer out of range.
        TaskError: a token id outside the vocabulary, or a mask that does not fit the prompts.
        UnsupportedModelError: a model that cannot be run block by block.

    Source: arXiv:2507.17618, SPADE (v1), SimLens (v2).
    """
    adapter = ModelAdapter.of(model)
    wanted = check_layers(
        list(range(1, adapter.num_layers + 1)) if layers is None else layers, adapter.num_layers
    )
    ascending = sorted(set(wanted))
    mask = token_mask(input_ids, attention_mask)
    if not mask.any(dim=-1).all():
        raise TaskError(
            "attention_mask hides every token of a prompt; expected one real token or more in each."
        )
    answers = last_real_token(mask)
    states = collect_states(adapter, input_ids, mask, answers[:, None], ascending)
    final = continue_states(
        adapter,
        states.hidden[:, 0],
        ascending,
        states.start_ids,
        states.position_ids[:, 0],
        positions=positions,
    )
    order = [ascending.index(layer) for layer in wanted]
    return adapter.unembed(final[:, order])


def last_real_token(mask: Int[Tensor, "rows tokens"]) -> Int[Tensor, " rows"]:
    """Column of each row's last real token, for either padding side."""
    columns = torch.arange(mask.shape[1], device=mask.device)
    return (mask * columns).argmax(-1)

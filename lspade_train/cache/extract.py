"""From tokenised prompts to hidden states, and from those to SPADE targets.

These are two steps, since a recipe may need only the first; the second starts from the states that
the first stored. Independent of files: used by the writer, in-memory mode and online mode.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from lspade_train.cache.unfinished import Unfinished
from lspade_train.errors import NumericsError
from lspade_train.models import ModelAdapter, length_batches, shared_groups
from lspade_train.probes.spade import collect_states, continue_states
from lspade_train.recipe import PositionIds, TargetKind
from lspade_train.tasks import Example

Item = TypeVar("Item")

SWEEP_ROWS = 16_384
"""Most single-token rows in the upward sweep at once, which bounds its memory."""


@dataclass(frozen=True)
class Extraction:
    """What to compute for each prompt.

    Attributes:
        layers: layers with a hidden state and a SPADE target, ascending, 0..L-1.
        positions: position ids of SPADE's two tokens.
        targets: how SPADE's answer is stored.
        topk: tokens kept with `targets: topk`.
        max_choices: width of the choice columns.
        groups: names of the subgroups; rows hold an index into them.
        spade: whether SPADE's answers are computed at all.
    """

    layers: tuple[int, ...]
    positions: PositionIds
    targets: TargetKind
    topk: int
    max_choices: int
    groups: tuple[str, ...]
    spade: bool = True


def row_count(examples: Sequence[Example]) -> int:
    """Number of cached rows of these prompts: one per answer position."""
    return sum(len(example.positions) for example in examples)


def beginnings(examples: Sequence[Example]) -> tuple[list[np.ndarray], list[int]]:
    """Token ids of the prompts, and each one's first answer position, where sharing must end."""
    return [e.input_ids for e in examples], [int(min(e.positions)) for e in examples]


def _batches(
    adapter: ModelAdapter, examples: Sequence[Example], tokens_per_batch: int
) -> Iterator[tuple[int, list[int]]]:
    """Per batch: number of leading tokens that its prompts share, and the prompts' indices."""
    for shared, members in shared_groups(adapter, *beginnings(examples)):
        lengths = [len(examples[i].input_ids) for i in members]
        for places in length_batches(lengths, tokens_per_batch, shared=shared):
            yield shared, [members[place] for place in places]


def extract(
    adapter: ModelAdapter,
    examples: Sequence[Example],
    what: Extraction,
    tokens_per_batch: int,
    *,
    to_host: bool = True,
    unfinished: Unfinished | None = None,
) -> dict[str, Tensor]:
    """Hidden states and labels of `examples`, one row per answer position, in their order.

    Leading tokens that the prompts share are run once. The bytes depend on `examples` and
    `tokens_per_batch` only.

    Args:
        adapter: the frozen model.
        examples: tokenised prompts; an empty sequence gives no rows.
        what: the layers.
        tokens_per_batch: padded prompt tokens per forward.
        to_host: copy results to the host's memory; otherwise they stay on the device.
        unfinished: counts the batches, and may already hold the first of them.

    Returns:
        Tensors whose first dimension is the row, by their names in `StateBatch`; no targets.

    Raises:
        NumericsError: a hidden state is NaN or Inf.
    """
    starts = np.cumsum([0] + [len(example.positions) for example in examples])
    unfinished = unfinished or Unfinished()
    out, done = unfinished.tensors, unfinished.steps
    out |= _labels(examples, what)
    if not examples:
        return out | _no_states(adapter, what)

    def batches() -> Iterator[tuple[list[int], Callable[[], dict[str, Tensor]]]]:
        for shared, batch in islice(_batches(adapter, examples, tokens_per_batch), done, None):
            parts = _forward(adapter, [examples[i] for i in batch], what, shared)
            yield batch, _to_host(parts) if to_host else partial(dict, parts)

    with unfinished:
        for batch, arrived in _lagged(batches()):
            parts = arrived()
            _refuse_non_finite_states(parts, examples, batch, what.layers)
            if batch == list(range(len(examples))):  # all of them, in order: nothing to copy
                out |= parts
            else:
                place = torch.cat([torch.arange(starts[i], starts[i + 1]) for i in batch])
                for name, part in parts.items():
                    if name not in out:
                        out[name] = part.new_empty(int(starts[-1]), *part.shape[1:])
                    out[name][place.to(part.device)] = part
            unfinished.step(len(parts["final"]))
    return out


def spade_targets(
    adapter: ModelAdapter,
    states: Mapping[str, Tensor],
    what: Extraction,
    *,
    unfinished: Unfinished | None = None,
) -> dict[str, Tensor]:
    """SPADE's answers to the rows that `extract` returned, in the form that `what.targets` asks.

    They depend on the stored rows only, not on when or in which batches these were computed. Memory
    beyond the result is bounded by `SWEEP_ROWS`.

    Args:
        adapter: the frozen model.
        states: `hidden`, `start_id` and `position_id` of the rows.
        what: layers, position ids and the kind of target.
        unfinished: counts the steps, and may already hold the first of them.

    Returns:
        Tensors by their names in `StateBatch`, on the device of `states["hidden"]`.

    Raises:
        NumericsError: a target is NaN or Inf.
    """
    hidden = states["hidden"]
    step = max(SWEEP_ROWS // len(what.layers), 1)
    unfinished = unfinished or Unfinished()
    out = unfinished.tensors
    with unfinished:
        for first in range(unfinished.steps * step, max(len(hidden), 1), step):
            rows = slice(first, first + step)
            parts = _store_target(adapter, _continued(adapter, states, rows, what), what)
            _refuse_non_finite_targets(parts, first, what.layers)
            for name, part in parts.items():
                if name not in out:
                    out[name] = torch.empty(
                        len(hidden), *part.shape[1:], dtype=part.dtype, device=hidden.device
                    )
                out[name][rows] = part
            unfinished.step(len(hidden[rows]))
    return out


@torch.no_grad()
def _continued(
    adapter: ModelAdapter, states: Mapping[str, Tensor], rows: slice, what: Extraction
) -> Tensor:
    """SPADE's hidden state before the final norm, (rows, layers, d), on the model's device."""
    hidden = states["hidden"][rows].to(adapter.device)
    if not len(hidden):
        return hidden
    ids, at = (states[name][rows].long().to(adapter.device) for name in ("start_id", "position_id"))
    return continue_states(adapter, hidden, what.layers, ids, at, positions=what.positions)


def _no_states(adapter: ModelAdapter, what: Extraction) -> dict[str, Tensor]:
    """Empty states, for a process without rows."""
    final = torch.empty(0, adapter.hidden_size, dtype=adapter.dtype, device=adapter.device)
    ids = torch.empty(0, dtype=torch.int32)
    return {
        "hidden": final[:, None].expand(-1, len(what.layers), -1),
        "final": final,
        "start_id": ids,
        "position_id": ids.clone(),
    }


def _lagged(items: Iterable[Item]) -> Iterator[Item]:
    """Yield each item once the next one is started: the device computes while the host copies."""
    held: list[Item] = []
    for item in items:
        held.append(item)
        if len(held) > 1:
            yield held.pop(0)
    yield from held


def _to_host(parts: dict[str, Tensor]) -> Callable[[], dict[str, Tensor]]:
    """Start copying to the host's memory; the returned function waits for the copies."""
    copies: dict[str, Tensor] = {}
    events: list[Any] = []
    for name, part in parts.items():
        if part.device.type != "cuda":
            copies[name] = part.cpu()
            continue
        # Only copies to pinned memory are asynchronous.
        copies[name] = torch.empty(part.shape, dtype=part.dtype, pin_memory=True)
        copies[name].copy_(part, non_blocking=True)
        events.append(torch.cuda.current_stream(part.device).record_event())

    def arrived() -> dict[str, Tensor]:
        for event in events:
            event.synchronize()
        return copies

    return arrived


def _forward(
    adapter: ModelAdapter, examples: Sequence[Example], what: Extraction, shared: int
) -> dict[str, Tensor]:
    ids, mask, positions, real = _pad(examples, adapter.device)
    states = collect_states(adapter, ids, mask, positions, what.layers, shared=shared)
    hidden, final = states.hidden.flatten(0, 1), states.final.flatten(0, 1)
    if len({len(example.positions) for example in examples}) > 1:
        # Prompts with fewer positions than the widest are padded by repeating one: drop those rows.
        keep = real.to(final.device).flatten()
        hidden, final = hidden[keep], final[keep]
    return {
        "hidden": hidden,
        "final": final,
        "start_id": states.start_ids[:, None].expand_as(real)[real].int(),
        "position_id": states.position_ids[real].int(),
    }


@torch.no_grad()
def _store_target(adapter: ModelAdapter, target: Tensor, what: Extraction) -> dict[str, Tensor]:
    if what.targets == "hidden":
        return {"target": target}
    half = torch.bfloat16 if adapter.dtype == torch.bfloat16 else torch.float16
    logits = adapter.unembed(target)
    if what.targets == "logits":
        return {"target_logits": logits.to(half)}
    values, tokens = logits.topk(min(what.topk, logits.shape[-1]))
    return {"target_values": values.to(half), "target_tokens": tokens.int()}


def _pad(
    examples: Sequence[Example], device: torch.device
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Right-padded ids, mask, positions, and which of the positions are real."""
    width = max(len(example.input_ids) for example in examples)
    count = max(len(example.positions) for example in examples)
    ids = np.zeros((len(examples), width), dtype=np.int64)
    mask = np.zeros_like(ids)
    positions = np.zeros((len(examples), count), dtype=np.int64)
    real = np.zeros((len(examples), count), dtype=bool)
    for row, example in enumerate(examples):
        ids[row, : len(example.input_ids)] = example.input_ids
        mask[row, : len(example.input_ids)] = 1
        positions[row, : len(example.positions)] = example.positions
        real[row, : len(example.positions)] = True
    ids_t, mask_t, positions_t, real_t = map(torch.from_numpy, (ids, mask, positions, real))
    return ids_t.to(device), mask_t.to(device), positions_t.to(device), real_t.to(device)


def _labels(examples: Sequence[Example], what: Extraction) -> dict[str, Tensor]:
    """The columns of a row that do not depend on the model."""
    answers, labelled, choices, counts, groups = [], [], [], [], []
    for example in examples:
        n = len(example.positions)
        known = example.answer_ids is not None
        answers.append(example.answer_ids if known else np.zeros(n, dtype=np.int64))
        labelled.append(np.full(n, known))
        ids = example.choice_ids
        # Padding repeats the first choice, which changes no maximum over the choices.
        padded = [*ids, *[ids[0] if ids else 0] * (what.max_choices - len(ids))]
        choices.append(np.tile(np.array(padded, dtype=np.int64), (n, 1)))
        counts.append(np.full(n, len(ids)))
        groups.append(np.full(n, what.groups.index(example.group)))

    def joined(parts: list[np.ndarray], *shape: int) -> Tensor:
        # Starts with an empty array, since there may be no prompts.
        return torch.from_numpy(np.concatenate([np.zeros((0, *shape), dtype=np.int64), *parts]))

    return {
        "answer_id": joined(answers).int(),
        "labelled": joined(labelled).bool(),
        "choice_ids": joined(choices, what.max_choices).int(),
        "choice_count": joined(counts).int(),
        "group": joined(groups).int(),
    }


def _refuse_non_finite_states(
    parts: dict[str, Tensor],
    examples: Sequence[Example],
    batch: list[int],
    layers: tuple[int, ...],
) -> None:
    prompts = np.repeat(batch, [len(examples[i].positions) for i in batch])
    for name in ("hidden", "final"):
        found = _first_non_finite(parts[name])
        if found is not None:
            row, place = found
            prompt = int(prompts[row])
            where = f" at layer {layers[place]}" if name == "hidden" else ""
            raise _non_finite(
                f"the model's {name}{where}, prompt {prompt} of its shard "
                f"({len(examples[prompt].input_ids)} tokens)"
            )


def _refuse_non_finite_targets(
    parts: dict[str, Tensor], first: int, layers: tuple[int, ...]
) -> None:
    for name, part in parts.items():
        found = _first_non_finite(part) if part.is_floating_point() else None
        if found is not None:
            row, place = found
            raise _non_finite(
                f"SPADE's {name.replace('_', ' ')} at layer {layers[place]}, row {first + row} of "
                "its shard"
            )


def _first_non_finite(value: Tensor) -> tuple[int, int] | None:
    """Row, and index in the second dimension, of the first vector that is not finite."""
    # A minimum or maximum is NaN if any value is: one pass, without temporary tensors.
    if not value.numel() or all(bool(end.isfinite()) for end in value.aminmax()):
        return None
    bad = ~torch.isfinite(value if value.ndim == 3 else value[:, None])
    row, place = bad.any(-1).nonzero()[0].tolist()
    return row, place


def _non_finite(what: str) -> NumericsError:
    return NumericsError(
        f"NaN or Inf in {what}; expected finite numbers. Nothing was written.\n"
        "Half precision may overflow: try --data.dtype bfloat16 or float32."
    )

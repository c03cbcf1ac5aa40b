"""How good every lens is at every layer, from cached states alone: no model forward.

Knows nothing of files or pictures.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lspade_train.adapters import ModelAdapter, Unembedding
from lspade_train.cache import StateBatch, StateDataset
from lspade_train.errors import TaskError
from lspade_train.exits import ExitTable
from lspade_train.heads import LSpadeHeads
from lspade_train.lenses import LayerView, Lens
from lspade_train.metrics import agreement, entropy, kl_divergence
from lspade_train.module import target_logits
from lspade_train.policy import ExitPolicy, signal
from lspade_train.runtime.flops import count_flops, exit_flops

CHUNK_ROWS = 256
FORMAT_VERSION = 1
PER_ROW = ("answer", "agrees_model", "agrees_spade", "kl_to_spade", "kl_to_model", "entropy")


@dataclass(frozen=True)
class Readings:
    """Per-row measurements of every lens at every layer.

    Attributes:
        lenses: names, in the order of the first dimension.
        layers: in the order of the second.
        values: by name of `PER_ROW`, (lenses, layers, rows).
        full_answer: the model's own answer, (rows,).
        full_entropy: its entropy in nats, (rows,).
        answer_id: right token, (rows,).
        labelled: whether there is one, (rows,).
        group: index into `groups`, (rows,).
        groups: names of the subgroups.
    """

    lenses: tuple[str, ...]
    layers: tuple[int, ...]
    values: dict[str, Tensor]
    full_answer: Tensor
    full_entropy: Tensor
    answer_id: Tensor
    labelled: Tensor
    group: Tensor
    groups: tuple[str, ...]

    def correct(self) -> Tensor:
        """Whether each lens is right, (lenses, layers, labelled rows)."""
        return (self.values["answer"] == self.answer_id)[..., self.labelled]

    def full_correct(self) -> Tensor:
        """Whether the model is right, (labelled rows,)."""
        return (self.full_answer == self.answer_id)[self.labelled]


@torch.no_grad()
def read_lenses(
    dataset: StateDataset,
    unembed: Unembedding,
    lenses: Sequence[Lens],
    layers: Sequence[int],
) -> Readings:
    """Measure `lenses` on every cached row.

    Args:
        dataset: cached states of one split.
        unembed: the frozen norm and head.
        lenses: what to compare.
        layers: layers to measure, a subset of the cached ones.

    Raises:
        TaskError: the split is empty.
    """
    if len(dataset) == 0:
        raise TaskError("The split has no rows to evaluate. Choose another with --split.")
    parts = [_read(batch, dataset.layers, unembed, lenses, layers) for batch in _chunks(dataset)]
    values = {name: torch.cat([part[0][name] for part in parts], dim=-1) for name in PER_ROW}
    rows = {name: torch.cat([part[1][name] for part in parts]) for name in parts[0][1]}
    return Readings(
        lenses=tuple(lens.name for lens in lenses),
        layers=tuple(layers),
        values=values,
        groups=dataset.groups,
        **rows,
    )


def summarise(readings: Readings) -> dict[str, Any]:
    """Means over the rows as JSON: per lens and metric one number per layer.

    Accuracy is over the task's choices, or over the vocabulary where it has none; None where no
    row has a label. KL and entropy in nats.
    """
    means = {name: readings.values[name].double().mean(-1) for name in PER_ROW if name != "answer"}
    labelled = int(readings.labelled.sum())
    accuracy = readings.correct().double().mean(-1) if labelled else None
    lenses: dict[str, Any] = {}
    for place, lens in enumerate(readings.lenses):
        lenses[lens] = {name: value[place].tolist() for name, value in means.items()}
        lenses[lens]["accuracy"] = accuracy[place].tolist() if accuracy is not None else None
    return {
        "format_version": FORMAT_VERSION,
        "n": len(readings.full_answer),
        "n_labelled": labelled,
        "layers": list(readings.layers),
        "full_model": {
            "accuracy": float(readings.full_correct().double().mean()) if labelled else None,
            "entropy": float(readings.full_entropy.double().mean()),
        },
        "lenses": lenses,
        "groups": _by_group(readings) if labelled else {},
    }


def _by_group(readings: Readings) -> dict[str, Any]:
    """Accuracy of every lens in every subgroup, such as the number of hops."""
    if readings.groups == ("",):
        return {}
    group = readings.group[readings.labelled]
    correct, full = readings.correct().double(), readings.full_correct().double()
    found: dict[str, Any] = {}
    for index, name in enumerate(readings.groups):
        mine = group == index
        if not mine.any():
            continue
        accuracy = correct[..., mine].mean(-1)
        found[name] = {
            "n": int(mine.sum()),
            "full_model": float(full[mine].mean()),
            **{lens: accuracy[i].tolist() for i, lens in enumerate(readings.lenses)},
        }
    return found


def _chunks(dataset: StateDataset) -> Iterator[StateBatch]:
    for first in range(0, len(dataset), CHUNK_ROWS):
        yield dataset.gather(torch.arange(first, min(first + CHUNK_ROWS, len(dataset))))


def _read(
    batch: StateBatch,
    cached: Sequence[int],
    unembed: Unembedding,
    lenses: Sequence[Lens],
    layers: Sequence[int],
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    batch = batch.to(unembed.weight.device)
    full = unembed(batch.final)
    stored = target_logits(batch, "spade", unembed)
    values: dict[str, list[Tensor]] = {name: [] for name in PER_ROW}
    for lens in lenses:
        for layer in layers:
            place = cached.index(layer)
            rows = slice(place, len(batch) * len(cached), len(cached))
            spade = stored(rows)
            view = LayerView(layer, batch.hidden[:, place], lambda spade=spade: spade)
            logits = lens.logits(view)
            values["answer"].append(pick_answer(logits, batch))
            values["agrees_model"].append(agreement(logits, full))
            values["agrees_spade"].append(agreement(logits, spade))
            values["kl_to_spade"].append(kl_divergence(spade, logits))
            values["kl_to_model"].append(kl_divergence(full, logits))
            values["entropy"].append(entropy(logits))
    shape = (len(lenses), len(layers), len(batch))
    stacked = {name: torch.stack(parts).reshape(shape).cpu() for name, parts in values.items()}
    rows_only = {
        "full_answer": pick_answer(full, batch),
        "full_entropy": entropy(full),
        "answer_id": batch.answer_id.long(),
        "labelled": batch.labelled,
        "group": batch.group,
    }
    return stacked, {name: value.cpu() for name, value in rows_only.items()}


def pick_answer(logits: Tensor, batch: StateBatch) -> Tensor:
    """The best of a row's choices, or of the vocabulary where it has none, (rows,)."""
    best = logits.argmax(-1)
    if batch.choice_ids.shape[1] == 0:
        return best
    choices = batch.choice_ids.long()
    chosen = choices.gather(1, logits.gather(1, choices).argmax(-1, keepdim=True)).squeeze(1)
    return torch.where(batch.choice_count > 0, chosen, best)


@torch.no_grad()
def exit_table(
    dataset: StateDataset,
    adapter: ModelAdapter,
    heads: LSpadeHeads,
    policy: ExitPolicy,
    *,
    rows: int | None = None,
) -> ExitTable:
    """What every cached row would answer, and cost, if it stopped at each check layer.

    Confidence and answer are those of the policy's decoder: what `ExitRuntime` does, from cached
    states.

    Args:
        dataset: cached states of one split.
        adapter: the frozen model.
        heads: bound heads of the check layers.
        policy: check layers, measure, scope and decoder; its threshold is not read.
        rows: leading rows used; None takes all.
    """
    dataset = dataset if rows is None else dataset.first(rows)
    chunks = [batch.to(adapter.device) for batch in _chunks(dataset)]
    parts = [_exits(batch, dataset.layers, adapter.unembed, heads, policy) for batch in chunks]
    confidence, answers, full = (torch.cat(tensors).cpu() for tensors in zip(*parts, strict=True))
    labels = dataset.gather(torch.arange(len(dataset)))
    choices = labels.choice_ids.shape[1] if policy.scope == "choices" else None
    counts = count_flops(adapter, heads)
    tokens, top = labels.position_id + 1, adapter.num_layers
    cost = exit_flops(counts, tokens, [*policy.layers, top], policy, choices=choices)
    free = exit_flops(counts, tokens, policy.layers, policy, choices=choices, checks=())
    options = adapter.vocab_size if choices is None else choices
    certain = (0.0, math.log(options)) if policy.measure == "entropy" else (-1.0, 0.0)
    return ExitTable(
        layers=tuple(policy.layers),
        num_layers=top,
        bounds=certain,
        confidence=confidence.numpy(),
        answers=answers.numpy(),
        full_answer=full.numpy(),
        gold=labels.answer_id.long().numpy() if bool(labels.labelled.all()) else None,
        cost=cost[:, :-1].numpy(),
        full_cost=cost[:, -1].numpy(),
        free_cost=free.numpy(),
        plain_cost=counts.full(tokens).numpy(),
    )


def _exits(
    batch: StateBatch,
    cached: Sequence[int],
    unembed: Unembedding,
    heads: LSpadeHeads,
    policy: ExitPolicy,
) -> tuple[Tensor, Tensor, Tensor]:
    """Signal and answer at each check layer, (rows, checks), and the model's answer."""
    stored = target_logits(batch, "spade", unembed)
    signals: list[Tensor] = []
    answers: list[Tensor] = []
    for layer in policy.layers:
        place = cached.index(layer)
        hidden = batch.hidden[:, place]
        plain = policy.decoder == "logit_lens"
        logits = unembed(hidden) if plain else heads.logits(hidden, layer)
        seen = _choice_logits(logits, batch) if policy.scope == "choices" else logits
        value = signal(seen, policy.measure)
        signals.append(value if policy.measure == "entropy" else -value)
        if policy.decoder == "spade":
            logits = stored(slice(place, len(batch) * len(cached), len(cached)))
        answers.append(pick_answer(logits, batch))
    full = pick_answer(unembed(batch.final), batch)
    return torch.stack(signals, 1), torch.stack(answers, 1), full


def _choice_logits(logits: Tensor, batch: StateBatch) -> Tensor:
    """Logits of each row's choices; the padding of shorter rows is no choice."""
    chosen = logits.gather(1, batch.choice_ids.long())
    padding = torch.arange(chosen.shape[1], device=chosen.device) >= batch.choice_count[:, None]
    return chosen.masked_fill(padding, -torch.inf)

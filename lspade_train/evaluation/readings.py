"""What every lens reads off every cached row at every layer: no model forward.

Knows nothing of means, files or pictures.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lspade_train.cache import StateBatch, StateDataset
from lspade_train.cache.answers import choice_logits, chunks, pick_answer
from lspade_train.errors import TaskError
from lspade_train.models import Unembedding
from lspade_train.probes.lenses import LayerView, Lens
from lspade_train.probes.metrics import agreement, entropy, kl_divergence
from lspade_train.training.targets import target_logits

OF_ANSWER = ("answer", "best", "confidence", "entropy")
PER_LENS = (*OF_ANSWER, "agrees_model", "agrees_spade", "kl_to_spade", "kl_to_model")


@dataclass(frozen=True)
class Readings:
    """Per-row measurements of every lens at every layer.

    Attributes:
        lenses: names, in the order of the first dimension of `values`.
        layers: in the order of the second.
        values: by name of `PER_LENS`, (lenses, layers, rows): `answer` is the best of the row's
            choices (of the vocabulary where it has none), `best` that of the vocabulary,
            `confidence` the answer's probability among the choices, `entropy` and KL in nats.
        full: the model's own, by name of `OF_ANSWER`, (rows,).
        answer_id: right token, (rows,).
        labelled: whether there is one, (rows,).
        group: index into `groups`, (rows,).
        groups: names of the subgroups.
        has_choices: whether rows have choices.
    """

    lenses: tuple[str, ...]
    layers: tuple[int, ...]
    values: dict[str, Tensor]
    full: dict[str, Tensor]
    answer_id: Tensor
    labelled: Tensor
    group: Tensor
    groups: tuple[str, ...]
    has_choices: bool

    def __len__(self) -> int:
        return len(self.answer_id)


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
    values: dict[str, list[Tensor]] = {name: [] for name in PER_LENS}
    rows: dict[str, list[Tensor]] = {}
    for batch in chunks(dataset):
        lens_values, row_values = _read(batch, dataset.layers, unembed, lenses, layers)
        for name in PER_LENS:
            values[name].append(lens_values[name])
        for name, value in row_values.items():
            rows.setdefault(name, []).append(value)
    joined = {name: torch.cat(parts) for name, parts in rows.items()}
    return Readings(
        lenses=tuple(lens.name for lens in lenses),
        layers=tuple(layers),
        values={name: torch.cat(parts, dim=-1) for name, parts in values.items()},
        full={name: joined[f"full_{name}"] for name in OF_ANSWER},
        answer_id=joined["answer_id"],
        labelled=joined["labelled"],
        group=joined["group"],
        groups=dataset.groups,
        has_choices=bool(joined["choice_count"].any()),
    )


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
    values: dict[str, list[Tensor]] = {name: [] for name in PER_LENS}
    for lens in lenses:
        for layer in layers:
            place = cached.index(layer)
            spade = stored(slice(place, len(batch) * len(cached), len(cached)))
            view = LayerView(layer, batch.hidden[:, place], lambda spade=spade: spade)
            logits = lens.logits(view)
            found = _of_answer(logits, batch) | {
                "agrees_model": agreement(logits, full),
                "agrees_spade": agreement(logits, spade),
                "kl_to_spade": kl_divergence(spade, logits),
                "kl_to_model": kl_divergence(full, logits),
            }
            for name, value in found.items():
                values[name].append(value)
    shape = (len(lenses), len(layers), len(batch))
    stacked = {name: torch.stack(parts).reshape(shape).cpu() for name, parts in values.items()}
    rows = {f"full_{name}": value for name, value in _of_answer(full, batch).items()} | {
        "answer_id": batch.answer_id.long(),
        "labelled": batch.labelled,
        "group": batch.group,
        "choice_count": batch.choice_count,
    }
    return stacked, {name: value.cpu() for name, value in rows.items()}


def _of_answer(logits: Tensor, batch: StateBatch) -> dict[str, Tensor]:
    """The answer of each row, the vocabulary's best token, and how sure each is, (rows,)."""
    wide = logits.float()
    confidence = wide.softmax(-1).amax(-1)
    if batch.choice_ids.shape[1]:
        among = choice_logits(wide, batch).softmax(-1).amax(-1)
        confidence = torch.where(batch.choice_count > 0, among, confidence)
    return {
        "answer": pick_answer(logits, batch),
        "best": logits.argmax(-1),
        "confidence": confidence,
        "entropy": entropy(logits),
    }

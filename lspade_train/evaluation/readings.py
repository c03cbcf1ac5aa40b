"""Reads every lens on every cached row at every layer, without a model forward.

Independent of means, files and figures.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lspade_train.cache import StateBatch, StateDataset
from lspade_train.cache.answers import choice_logits, chunks, pick_answer
from lspade_train.errors import TaskError
from lspade_train.io.progress import Progress
from lspade_train.models import Unembedding
from lspade_train.probes.heads import LSpadeHeads
from lspade_train.probes.lenses import LayerView, find_lens
from lspade_train.probes.metrics import Distribution, entropy
from lspade_train.training.targets import target_logits

OF_ANSWER = ("answer", "best", "confidence", "entropy")
CHUNK_LOGITS = 2**23
"""Logits (rows x vocabulary) computed at once: 170 rows for a vocabulary of 49,152."""

PER_LENS = (*OF_ANSWER, "agrees_model", "agrees_spade", "kl_to_spade", "kl_to_model")


@dataclass(frozen=True)
class Readings:
    """Per-row measurements of every lens at every layer.

    Attributes:
        lenses: keys, in the order of the first dimension of `values`.
        layers: layers, in the order of the second dimension.
        values: by the names in `PER_LENS`, (lenses, layers, rows): `answer` is the best of the
            row's choices (of the vocabulary if the row has none), `best` the best of the
            vocabulary, `confidence` the answer's probability among the choices, `entropy` and KL in
            nats. For lenses in `over_choices` the entropy is over the choices, and values that
            compare vocabularies are meaningless.
        full: the same for the full model, by the names in `OF_ANSWER`, (rows,).
        answer_id: correct token, (rows,).
        labelled: whether the row has a label, (rows,).
        group: index into `groups`, (rows,).
        groups: names of the subgroups.
        choice_count: choices of the row, 0 if any token may be the answer, (rows,).
        over_choices: lenses whose heads were fitted over the choices.
    """

    lenses: tuple[str, ...]
    layers: tuple[int, ...]
    values: dict[str, Tensor]
    full: dict[str, Tensor]
    answer_id: Tensor
    labelled: Tensor
    group: Tensor
    groups: tuple[str, ...]
    choice_count: Tensor
    over_choices: tuple[str, ...] = ()

    @property
    def has_choices(self) -> bool:
        """Whether any row has choices."""
        return bool(self.choice_count.any())

    def __len__(self) -> int:
        return len(self.answer_id)


@torch.no_grad()
def read_lenses(
    dataset: StateDataset,
    unembed: Unembedding,
    lenses: Mapping[str, LSpadeHeads | None],
    layers: Sequence[int],
) -> Readings:
    """Measure `lenses` on every cached row.

    SPADE is unembedded once per layer, for any number of lenses. Memory holds the logits of one
    layer for some rows, and values derived from them: about ten times `CHUNK_LOGITS`.

    Args:
        dataset: cached states of one split.
        unembed: the frozen norm and head.
        lenses: keys of the registry, each with the bound heads that the lens uses (None for a lens
            without heads).
        layers: layers to measure, a subset of the cached ones.

    Raises:
        TaskError: the split is empty.
        RecipeError: a lens is not registered.
        ArtifactError: a lens that needs heads has none.
    """
    if len(dataset) == 0:
        raise TaskError("The split has no rows to evaluate. Choose another with --split.")
    values: dict[str, list[Tensor]] = {name: [] for name in PER_LENS}
    rows: dict[str, list[Tensor]] = {}
    with Progress("lenses", len(dataset)) as progress:
        for batch in chunks(dataset, max(CHUNK_LOGITS // len(unembed.weight), 1)):
            lens_values, row_values = _read(batch, dataset.layers, unembed, lenses, layers)
            for name in PER_LENS:
                values[name].append(lens_values[name])
            for name, value in row_values.items():
                rows.setdefault(name, []).append(value)
            progress.advance(len(batch))
    joined = {name: torch.cat(parts) for name, parts in rows.items()}
    return Readings(
        lenses=tuple(lenses),
        layers=tuple(layers),
        values={name: torch.cat(parts, dim=-1) for name, parts in values.items()},
        full={name: joined[f"full_{name}"] for name in OF_ANSWER},
        answer_id=joined["answer_id"],
        labelled=joined["labelled"],
        group=joined["group"],
        groups=dataset.groups,
        choice_count=joined["choice_count"],
        over_choices=tuple(k for k, h in lenses.items() if h is not None and h.scope == "choices"),
    )


def _read(
    batch: StateBatch,
    cached: Sequence[int],
    unembed: Unembedding,
    lenses: Mapping[str, LSpadeHeads | None],
    layers: Sequence[int],
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """One chunk: by name, the lenses' values (lenses, layers, rows) and the rows' own (rows,)."""
    batch = batch.to(unembed.weight.device)
    full = Distribution(unembed(batch.final))
    stored = target_logits(batch, "spade", unembed)
    values: dict[str, list[Tensor]] = {name: [] for name in PER_LENS}
    for layer in layers:
        place = cached.index(layer)
        spade = Distribution(stored(slice(place, len(batch) * len(cached), len(cached))))
        for key, heads in lenses.items():
            hidden = batch.hidden[:, place]
            view = LayerView(layer, hidden, unembed, heads, lambda spade=spade: spade.logits)
            logits = find_lens(key).logits(view)
            read = spade if logits is spade.logits else Distribution(logits)
            found = _of_answer(read, batch) | {
                "agrees_model": read.best == full.best,
                "agrees_spade": read.best == spade.best,
                "kl_to_spade": spade.kl_to(read),
                "kl_to_model": full.kl_to(read),
            }
            if heads is not None and heads.scope == "choices":
                found["entropy"] = entropy(choice_logits(logits, batch))
            for name, value in found.items():
                values[name].append(value)
    shape = (len(layers), len(lenses), len(batch))
    stacked = {
        name: torch.stack(parts).reshape(shape).transpose(0, 1).cpu()
        for name, parts in values.items()
    }
    rows = {f"full_{name}": value for name, value in _of_answer(full, batch).items()} | {
        "answer_id": batch.answer_id.long(),
        "labelled": batch.labelled,
        "group": batch.group,
        "choice_count": batch.choice_count,
    }
    return stacked, {name: value.cpu() for name, value in rows.items()}


def _of_answer(read: Distribution, batch: StateBatch) -> dict[str, Tensor]:
    """Each row's answer, the vocabulary's best token, confidence and entropy, (rows,)."""
    confidence = read.confidence
    if batch.choice_ids.shape[1]:
        among = choice_logits(read.logits, batch).float().softmax(-1).amax(-1)
        confidence = torch.where(batch.choice_count > 0, among, confidence)
    return {
        "answer": pick_answer(read.logits, batch),
        "best": read.best,
        "confidence": confidence,
        "entropy": read.entropy,
    }

"""Reads every lens on every cached row at every layer, without a model forward.

Independent of means, files and figures.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from lspade_train.cache import StateBatch, StateDataset
from lspade_train.cache.answers import choice_logits, choice_mask, chunks, pick_answer
from lspade_train.errors import TaskError
from lspade_train.io.progress import Progress
from lspade_train.models import Unembedding
from lspade_train.probes.heads import LSpadeHeads
from lspade_train.probes.lenses import LayerView, find_lens
from lspade_train.probes.metrics import Distribution
from lspade_train.training.targets import target_logits

OF_ANSWER = ("answer", "best", "confidence", "entropy")
CHUNK_LOGITS, CHUNK_ROWS = 2**23, 128
"""Logits (rows x vocabulary) computed at once: 170 rows for a vocabulary of 49,152. With larger
vocabularies at least so many rows: products of fewer are slower, by a third with 55 rows."""

BLOCK_LOGITS = 2**18
"""Logits measured at once on a CPU, so that all passes over them stay in its caches."""

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
            nats. Lenses in `over_choices` are read over the choices only: their entropy is over
            those, and values that compare vocabularies are meaningless.
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

    SPADE is unembedded once per layer, for any number of lenses; heads that were fitted over the
    choices need no product with the vocabulary. Memory holds the logits of all lenses at one layer
    for `CHUNK_LOGITS` or `CHUNK_ROWS`, and the full model's distribution.

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
        for batch in chunks(dataset, max(CHUNK_LOGITS // len(unembed.weight), CHUNK_ROWS)):
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
        over_choices=tuple(key for key, heads in lenses.items() if _over_choices(heads)),
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
    blocks = _blocks(len(batch), unembed.weight)
    final = unembed(batch.final)
    full = [Distribution(final[rows]) for rows in blocks]
    stored = target_logits(batch, "spade", unembed)
    by_layer: list[dict[str, Tensor]] = []
    for layer in layers:
        place = cached.index(layer)
        spade = stored(slice(place, len(batch) * len(cached), len(cached)))
        hidden = batch.hidden[:, place]
        logits: list[Tensor] = []
        for key, heads in lenses.items():
            view = LayerView(layer, hidden, unembed, heads, lambda spade=spade: spade)
            lens, choices = find_lens(key), batch.choice_ids.long()
            few = _over_choices(heads)
            logits.append(lens.token_logits(view, choices) if few else lens.logits(view))
        parts = [
            _measure([one[rows] for one in logits], lenses, spade[rows], model, batch.rows(rows))
            for rows, model in zip(blocks, full, strict=True)
        ]
        by_layer.append({name: torch.cat([p[name] for p in parts], dim=-1) for name in PER_LENS})
    values = {
        name: torch.stack([found[name] for found in by_layer], dim=1).cpu() for name in PER_LENS
    }
    answers = [
        _of_answer(model, batch.rows(rows)) for rows, model in zip(blocks, full, strict=True)
    ]
    rows = {f"full_{name}": torch.cat([one[name] for one in answers]) for name in OF_ANSWER} | {
        "answer_id": batch.answer_id.long(),
        "labelled": batch.labelled,
        "group": batch.group,
        "choice_count": batch.choice_count,
    }
    return values, {name: value.cpu() for name, value in rows.items()}


def _blocks(rows: int, weight: Tensor) -> list[slice]:
    """Rows whose logits fit in a processor's cache; all of them on a GPU."""
    step = max(BLOCK_LOGITS // len(weight), 1) if weight.device.type == "cpu" else rows
    return [slice(first, min(first + step, rows)) for first in range(0, rows, step)]


def _over_choices(heads: LSpadeHeads | None) -> bool:
    return heads is not None and heads.scope == "choices"


def _measure(
    logits: Sequence[Tensor],
    lenses: Mapping[str, LSpadeHeads | None],
    spade_logits: Tensor,
    full: Distribution,
    batch: StateBatch,
) -> dict[str, Tensor]:
    """Values of some rows at one layer, by name, (lenses, rows)."""
    spade = Distribution(spade_logits)
    found: list[dict[str, Tensor]] = []
    for one, heads in zip(logits, lenses.values(), strict=True):
        if _over_choices(heads):
            found.append(_of_choices(one, batch))
            continue
        read = spade if one.is_set_to(spade.logits) else Distribution(one)
        found.append(
            _of_answer(read, batch)
            | {
                "agrees_model": read.best == full.best,
                "agrees_spade": read.best == spade.best,
                "kl_to_spade": spade.kl_to(read),
                "kl_to_model": full.kl_to(read),
            }
        )
    return {name: torch.stack([one[name] for one in found]) for name in PER_LENS}


def _of_choices(logits: Float[Tensor, "rows choices"], batch: StateBatch) -> dict[str, Tensor]:
    """Values of a lens that was read over the choices, (rows,)."""
    read = Distribution(logits.masked_fill(~choice_mask(batch), -torch.inf))
    answer = batch.choice_ids.long().gather(1, read.best[:, None]).squeeze(1)
    never, unknown = torch.zeros_like(batch.labelled), torch.full_like(read.entropy, torch.nan)
    return {
        "answer": answer,
        "best": answer,
        "confidence": read.confidence,
        "entropy": read.entropy,
        "agrees_model": never,
        "agrees_spade": never,
        "kl_to_spade": unknown,
        "kl_to_model": unknown,
    }


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

"""An exit table from cached states: what `ExitRuntime` would do on each row, without running it.

Knows nothing of how a threshold is chosen, of files or of pictures.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from lspade_train.cache import StateBatch, StateDataset
from lspade_train.cache.answers import choice_logits, chunks, pick_answer
from lspade_train.errors import PolicyError
from lspade_train.models import ModelAdapter, Unembedding
from lspade_train.policies.exit_table import ExitTable
from lspade_train.policies.flops import cost_parts, count_flops
from lspade_train.policies.policy import ExitPolicy
from lspade_train.probes.heads import LSpadeHeads
from lspade_train.probes.measures import find_measure
from lspade_train.training.targets import target_logits


@torch.no_grad()
def exit_table(
    dataset: StateDataset, adapter: ModelAdapter, heads: LSpadeHeads, policy: ExitPolicy
) -> ExitTable:
    """What every cached row would answer, and cost, if it stopped at each of the policy's layers.

    The rows are read a few hundred at a time, and nothing is kept of them but numbers.

    Args:
        dataset: cached states of one split.
        adapter: the frozen model.
        heads: bound heads of the policy's layers.
        policy: layers, measure, scope and decoder; its threshold is not read.

    Raises:
        PolicyError: no rows, no layers, or a scope of choices where a row has none.
        NumericsError: a confidence that is NaN or infinite.
    """
    labels, top = dataset.labels, adapter.num_layers
    among_choices = policy.scope == "choices"
    if among_choices and not has_choices(dataset):
        raise PolicyError(
            "The scope is choices, and some of these rows have none. Set --scope vocabulary."
        )
    if not len(dataset):
        raise PolicyError("There are no rows to calibrate on. Choose a split that has rows.")
    parts = zip(*_read_all(dataset, adapter, heads, policy), strict=True)
    confidence, answers, full = (torch.cat(tensors).numpy() for tensors in parts)
    counts = labels["choice_count"] if among_choices else None
    options = adapter.vocab_size if counts is None else int(counts.max())
    return ExitTable(
        layers=policy.layers,
        num_layers=top,
        bounds=find_measure(policy.measure).ends(options),
        confidence=confidence,
        answers=answers,
        full_answer=full,
        gold=labels["answer_id"].long().numpy() if bool(labels["labelled"].all()) else None,
        costs=cost_parts(
            count_flops(adapter, heads),
            labels["position_id"] + 1,
            policy.layers,
            policy,
            choices=counts,
        ),
    )


def has_choices(dataset: StateDataset) -> bool:
    """Whether every row has choices to answer from."""
    return bool((dataset.labels["choice_count"] > 0).all())


def _read_all(
    dataset: StateDataset, adapter: ModelAdapter, heads: LSpadeHeads, policy: ExitPolicy
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    for batch in chunks(dataset):
        found = _read(batch.to(adapter.device), dataset.layers, adapter.unembed, heads, policy)
        yield tuple(tensor.cpu() for tensor in found)  # type: ignore[misc]


def _read(
    batch: StateBatch,
    cached: Sequence[int],
    unembed: Unembedding,
    heads: LSpadeHeads,
    policy: ExitPolicy,
) -> tuple[Tensor, Tensor, Tensor]:
    """Measure and answer at each check layer, (rows, checks), and the model's answer, (rows,)."""
    measure = find_measure(policy.measure)
    stored = target_logits(batch, "spade", unembed)
    signals: list[Tensor] = []
    answers: list[Tensor] = []
    for layer in policy.layers:
        place = cached.index(layer)
        hidden = batch.hidden[:, place]
        bare = policy.decoder == "logit_lens"
        logits = unembed(hidden) if bare else heads.logits(hidden, layer)
        seen = choice_logits(logits, batch) if policy.scope == "choices" else logits
        signals.append(measure.function(seen))
        if policy.decoder == "spade":
            logits = stored(slice(place, len(batch) * len(cached), len(cached)))
        answers.append(pick_answer(logits, batch))
    full = pick_answer(unembed(batch.final), batch)
    return torch.stack(signals, 1), torch.stack(answers, 1), full

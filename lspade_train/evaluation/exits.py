"""SPADE-EXIT from cached states: what every row would answer and cost, and sweeps of thresholds.

Knows nothing of how a threshold is chosen, of files or of pictures.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lspade_train.cache import StateBatch, StateDataset
from lspade_train.errors import PolicyError
from lspade_train.evaluation.readings import choice_logits, chunks, pick_answer
from lspade_train.evaluation.summary import LEVEL, RESAMPLES, SEED, plain
from lspade_train.models import ModelAdapter, Unembedding
from lspade_train.policies.exit_table import (
    ExitTable,
    Threshold,
    evaluate_policy,
    oracle_saving,
    pick,
)
from lspade_train.policies.flops import count_flops, exit_flops
from lspade_train.policies.policy import ExitPolicy, signal
from lspade_train.probes.heads import LSpadeHeads
from lspade_train.probes.metrics import bootstrap_interval
from lspade_train.training.targets import target_logits

PAPER_THRESHOLDS = (0.5, 1.0, 1.5, 2.0)
"""Nats, over the vocabulary; arXiv:2507.17618."""


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
    batches = [batch.to(adapter.device) for batch in chunks(dataset)]
    parts = [_exits(batch, dataset.layers, adapter.unembed, heads, policy) for batch in batches]
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


def sweep_thresholds(table: ExitTable) -> dict[str, Any]:
    """SPADE-EXIT at the paper's thresholds and over a fine grid, as JSON.

    Args:
        table: entropies over the vocabulary in nats.
    """
    grid = table.grid()
    never, *rows = measure_exits(table, [None, *PAPER_THRESHOLDS, *grid])
    return {
        "layers": list(table.layers),
        "exit_layers": [*table.layers, table.num_layers],
        "never": never,
        "paper": rows[: len(PAPER_THRESHOLDS)],
        "grid": rows[len(PAPER_THRESHOLDS) :],
        "oracle_saving": oracle_saving(table),
    }


def measure_exits(table: ExitTable, thresholds: Sequence[Threshold | None]) -> list[dict[str, Any]]:
    """What each threshold makes of the same rows, with intervals and exit counts, as JSON.

    Args:
        table: confidence, answers and costs.
        thresholds: in the table's measure; None is the plain model, unchecked.
    """
    checks = len(table.layers)
    stops = [
        np.full(len(table), checks) if limit is None else table.exits(limit) for limit in thresholds
    ]
    answers = np.stack([pick(table.answers, table.full_answer, stop) for stop in stops])
    means = {"disagreement": answers != table.full_answer}
    if table.gold is not None:
        right = (answers == table.gold).astype(float)
        means |= {"accuracy": right, "drop": (table.full_answer == table.gold) - right}
    intervals = {name: _intervals(value) for name, value in means.items()}
    rows: list[dict[str, Any]] = []
    for place, (limit, stop) in enumerate(zip(thresholds, stops, strict=True)):
        row = asdict(evaluate_policy(table, limit))
        for unused in ("layers", "p_value", "accepted"):
            del row[unused]
        for name in ("accuracy", "drop", "disagreement"):
            row[f"{name}_interval"] = intervals[name][place] if name in intervals else None
        row["exit_counts"] = np.bincount(stop, minlength=checks + 1).tolist()
        rows.append(plain(row))
    return rows


def measure_policy(
    dataset: StateDataset, adapter: ModelAdapter, heads: LSpadeHeads, policy: ExitPolicy
) -> dict[str, Any]:
    """A saved policy on these rows, under its own measure and scope, as JSON.

    Args:
        dataset: cached states of one split.
        adapter: the frozen model.
        heads: bound heads.
        policy: as `policy.json` has it.

    Returns:
        `row` is None, with a `note`, where these rows cannot show what the policy does.
    """
    found: dict[str, Any] = {
        "layers": list(policy.layers),
        "exit_layers": [*policy.layers, adapter.num_layers],
        "measure": policy.measure,
        "scope": policy.scope,
        "decoder": policy.decoder,
        "threshold": policy.threshold,
    }
    note = _why_not(dataset, heads, policy)
    if note is not None:
        return found | {"oracle_saving": None, "row": None, "note": note}
    table = exit_table(dataset, adapter, heads, policy)
    threshold = policy.threshold
    if threshold is not None and policy.measure != "entropy":
        # The table holds these measures negated, so that lower is more certain.
        several = isinstance(threshold, tuple)
        threshold = tuple(-limit for limit in threshold) if several else -threshold
    (row,) = measure_exits(table, [threshold])
    row["threshold"] = plain(policy.threshold)
    return found | {"oracle_saving": oracle_saving(table), "row": row, "note": None}


def _why_not(dataset: StateDataset, heads: LSpadeHeads, policy: ExitPolicy) -> str | None:
    missing = [x for x in policy.layers if x not in dataset.layers or x not in heads.layers]
    if not policy.layers:
        return "The policy has no check layers: it never exits."
    if missing:
        return f"The policy checks layers {missing}, which have no cached states or no head."
    try:
        policy.check_heads(heads.digest, heads.target)
    except PolicyError as stale:  # heads that were fitted again, say
        return str(stale).replace("\n", " ")
    if policy.scope == "choices" and not dataset.shards[0]["choice_ids"].shape[1]:
        return "The policy looks at the choices, and these rows have none."
    return None


def _intervals(values: Any) -> list[list[float]]:
    """Bounds of the mean of each row of (thresholds, rows)."""
    columns = torch.from_numpy(np.asarray(values, dtype=np.float64)).T
    return bootstrap_interval(columns, level=LEVEL, resamples=RESAMPLES, seed=SEED).tolist()


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
        bare = policy.decoder == "logit_lens"
        logits = unembed(hidden) if bare else heads.logits(hidden, layer)
        seen = choice_logits(logits, batch) if policy.scope == "choices" else logits
        value = signal(seen, policy.measure)
        signals.append(value if policy.measure == "entropy" else -value)
        if policy.decoder == "spade":
            logits = stored(slice(place, len(batch) * len(cached), len(cached)))
        answers.append(pick_answer(logits, batch))
    full = pick_answer(unembed(batch.final), batch)
    return torch.stack(signals, 1), torch.stack(answers, 1), full

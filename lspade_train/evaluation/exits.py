"""SPADE-EXIT on cached rows: threshold sweeps and a saved policy, in the format of `results.json`.

Independent of how a threshold is chosen, of files and of plots.
"""

from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import torch

from lspade_train.cache import StateDataset
from lspade_train.errors import PolicyError
from lspade_train.evaluation.readings import Readings
from lspade_train.evaluation.summary import LEVEL, RESAMPLES, SEED, plain
from lspade_train.models import ModelAdapter
from lspade_train.policies.cached_exits import CachedExits, exit_table, has_choices
from lspade_train.policies.exit_table import (
    ExitTable,
    Threshold,
    evaluate_policy,
    oracle_saving,
    pick,
)
from lspade_train.policies.flops import count_flops
from lspade_train.policies.policy import ExitPolicy
from lspade_train.policies.readers import answer_readers, check_readers
from lspade_train.policies.seconds import Seconds
from lspade_train.policies.sides import Side, chose
from lspade_train.probes.heads import LSpadeHeads
from lspade_train.probes.lenses import SPADE, lens_of_target
from lspade_train.probes.measures import FIXED
from lspade_train.probes.metrics import bootstrap_interval

PAPER_THRESHOLDS = (0.5, 1.0, 1.5, 2.0)
"""Nats, over the vocabulary; arXiv:2507.17618."""


def sweep_thresholds(table: ExitTable) -> dict[str, Any]:
    """SPADE-EXIT at the paper's thresholds and over a fine grid, as JSON.

    Args:
        table: table of entropies in nats; the paper's thresholds assume the vocabulary as scope.
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


def swept_table(
    readings: Readings,
    dataset: StateDataset,
    adapter: ModelAdapter,
    heads: LSpadeHeads,
    policy: ExitPolicy,
) -> ExitTable:
    """`exit_table` of an entropy policy that answers with SPADE, reusing existing readings.

    Args:
        readings: readings of the same rows, by the heads' lens and SPADE at the policy's layers.
        dataset: cached states of one split.
        adapter: the frozen model.
        heads: bound heads of the policy's layers.
        policy: a policy of scope vocabulary; for another scope the rows are read again.

    Raises:
        PolicyError, NumericsError: as for `exit_table`.
    """
    own, labels = lens_of_target(heads.target).key, dataset.labels
    if policy.scope != "vocabulary" or not {own, SPADE.key} <= set(readings.lenses):
        return exit_table(dataset, adapter, heads, policy)
    readers = check_readers(policy, heads)
    (reader,) = readers

    def of(lens: str, name: str) -> torch.Tensor:
        return readings.values[name][readings.lenses.index(lens)].T

    exits = CachedExits(
        layers=readings.layers,
        scope=policy.scope,
        readings={},
        signals={(reader, policy.measure): of(own, "entropy")},
        answers={"spade": of(SPADE.key, "answer")},
        full_answer=readings.full["answer"],
        gold=labels["answer_id"].long() if bool(labels["labelled"].all()) else None,
        tokens=labels["position_id"] + 1,
        choices=None,
        counts=count_flops(adapter, readers),
        dataset=dataset,
    )
    return exits.table(policy, (reader,))


def measure_exits(
    table: ExitTable, thresholds: Sequence[Threshold | None], *, oracle: float | None = None
) -> list[dict[str, Any]]:
    """Results of each threshold on the same rows, with intervals and exit counts, as JSON.

    Args:
        table: confidence, answers and costs of the check layers.
        thresholds: thresholds in the table's measure; None is the plain model, unchecked.
        oracle: as for `evaluate_policy`.
    """
    ideal = oracle_saving(table) if oracle is None else oracle
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
        row = asdict(evaluate_policy(table, limit, oracle=ideal))
        for unused in ("layers", "p_value", "accepted"):
            del row[unused]
        for name in ("accuracy", "drop", "disagreement"):
            row[f"{name}_interval"] = intervals[name][place] if name in intervals else None
        row["exit_counts"] = np.bincount(stop, minlength=checks + 1).tolist()
        rows.append(plain(row))
    return rows


def measure_policy(
    dataset: StateDataset,
    adapter: ModelAdapter,
    heads: LSpadeHeads,
    policy: ExitPolicy,
    side: Side,
) -> tuple[dict[str, Any], ExitTable | None]:
    """Results of a saved policy on these rows, with its own measure and scope, as JSON.

    Args:
        dataset: cached states of one split.
        adapter: the frozen model.
        heads: bound heads.
        policy: the saved policy.
        side: which rows these are.

    Returns:
        The JSON, in which `row` is None, with a `note`, if the policy cannot be measured on these
        rows, and `chosen_on_these_rows` is true if its figures are biased; and the policy's exit
        table, None if there is no `row`.
    """
    flattered = chose(policy, side)
    warning = ", on the selection rows (optimistic)" if flattered else ""
    found: dict[str, Any] = {
        "layers": list(policy.layers),
        "exit_layers": [*policy.layers, adapter.num_layers],
        "measure": policy.measure,
        "scope": policy.scope,
        "decoder": policy.decoder,
        "threshold": policy.threshold,
        "promise": _promised(policy),
        "chosen_on_these_rows": flattered,
        "label": f"policy.json: {policy.measure} over {policy.scope}{warning}",
    }
    note = _why_not(dataset, heads, policy)
    if note is not None:
        return found | {"oracle_saving": None, "row": None, "note": note}, None
    oracle = _oracle(dataset, adapter, heads, policy)
    table = exit_table(dataset, adapter, heads, policy)
    (row,) = measure_exits(table, [policy.threshold], oracle=oracle)
    return found | {
        "oracle_saving": oracle,
        "row": row | _timed(table, policy),
        "note": None,
    }, table


def _timed(table: ExitTable, policy: ExitPolicy) -> dict[str, Any]:
    """The time saved on these rows, predicted as by `calibrate --cost time`; {} without prices."""
    record = policy.calibration.get("seconds")
    if record is None:
        return {}
    seconds = Seconds.from_json(record)
    timed = replace(table, costs=seconds.costs(policy, len(table)), flops=table.costs)
    saved = evaluate_policy(timed, policy.threshold).time_saved
    return {"time_saved": saved, "timed_as": f"{seconds.shape} on {seconds.where}"}


def _promised(policy: ExitPolicy) -> dict[str, Any] | None:
    """Risk, budget and confidence of a policy's calibration; None if it was not calibrated."""
    record = policy.calibration
    if not record.get("confidence"):
        return None
    return {name: record[name] for name in ("risk", "budget", "confidence")}


def _oracle(
    dataset: StateDataset, adapter: ModelAdapter, heads: LSpadeHeads, policy: ExitPolicy
) -> float:
    """Saving of an oracle that may exit at any layer, with the policy's best decoder."""
    known = {layer for layer in dataset.layers if layer in heads.layers} | {*policy.layers}
    unchecked = ExitPolicy(
        layers=tuple(sorted(known)), measure=FIXED, scope=policy.scope, positions=policy.positions
    )
    return max(
        oracle_saving(exit_table(dataset, adapter, heads, replace(unchecked, decoder=word)))
        for word in dict.fromkeys(policy.decoders)
    )


def _why_not(dataset: StateDataset, heads: LSpadeHeads, policy: ExitPolicy) -> str | None:
    missing = [x for x in policy.layers if x not in dataset.layers or x not in heads.layers]
    if not policy.layers:
        return "The policy has no check layers: it never exits."
    if missing:
        return f"The policy checks layers {missing}, which have no cached states or no head."
    try:
        check_readers(policy, heads)
        answer_readers(policy, heads)
        beside = heads.tuned_lens
        policy.check_heads(heads.digest, None if beside is None else beside.digest)
    except PolicyError as stale:  # such as heads that were fitted again
        return str(stale).replace("\n", " ")
    if policy.scope == "choices" and not has_choices(dataset):
        return "The policy needs answer choices, but some rows have none."
    return None


def _intervals(values: Any) -> list[list[float]]:
    """Bounds of the mean of each row of (thresholds, rows)."""
    columns = torch.from_numpy(np.asarray(values, dtype=np.float64)).T
    return bootstrap_interval(columns, level=LEVEL, resamples=RESAMPLES, seed=SEED).tolist()

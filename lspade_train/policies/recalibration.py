"""Chooses a stricter policy, tested on the rows that an audit sampled in use.

The candidates are the audited policy with tightened thresholds, or with only its deepest checks.
They are fixed beforehand, so all audited rows can test them (Learn then Test). Looser policies
cannot be tested: for rows that did not exit, an audit does not learn what they would have answered.
Independent of models and the command line.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any

import numpy as np
import torch

from lspade_train.errors import AuditError
from lspade_train.policies.audited_rows import AuditedRow, AuditedRows
from lspade_train.policies.calibration import (
    Calibration,
    Candidate,
    check_budget,
    run_tests,
)
from lspade_train.policies.conditions import Conditions, without_small
from lspade_train.policies.designs import with_history
from lspade_train.policies.exit_table import ExitRule, ExitTable
from lspade_train.policies.flops import FlopCounts, cost_parts
from lspade_train.policies.policy import NO_GROUP, ExitPolicy
from lspade_train.policies.power import rows_to_prove
from lspade_train.policies.promise import promise
from lspade_train.policies.seconds import Seconds
from lspade_train.policies.shift import exit_profile
from lspade_train.probes.measures import FIXED, find_measure

FACTORS = (0.0, *map(float, np.geomspace(1e-4, 1, 33)))
"""Thresholds to try, as fractions of the way from certain to the policy's, strict to loose."""

COARSE = FACTORS[::4]
"""The same, for adding one layer after another."""

SEQUENCES = 2

KEPT = ("rows", "small_groups", "cost", "seconds")
"""Keys of the calibration record that are kept."""


@dataclass(frozen=True, kw_only=True)
class Recalibration:
    """The result of testing a policy and stricter ones on audited rows.

    Attributes:
        policy: the chosen policy, with its new guarantee.
        calibration: the test.
        rows: number of audited rows it is based on.
        unchanged: whether the audited policy itself was chosen.
    """

    policy: ExitPolicy
    calibration: Calibration
    rows: int
    unchanged: bool


def recalibrate(
    policy: ExitPolicy, audited: AuditedRows, budget: float, confidence: float = 0.95
) -> Recalibration:
    """Choose among the audited policy and stricter ones.

    The guarantee is on the disagreement with the full model, which bounds a drop in accuracy. A
    guarantee within groups is kept: rows of a group with too few audited rows no longer exit, or
    are excluded, as in the policy's calibration. A guarantee by depth is not kept.

    Args:
        policy: the policy that was audited.
        audited: its rows, sampled at random from those that it answered.
        budget: largest disagreement, over 0 and under 1.
        confidence: probability that the guarantee holds.

    Raises:
        AuditError: the policy never exits, or the rows are of another policy or too few.
        PolicyError: budget or confidence out of range.
    """
    check_budget("disagreement", budget, confidence)
    if not policy.check_layers:
        raise AuditError("The policy never exits early, so it cannot be made stricter.")
    needed = rows_to_prove(0, "disagreement", budget, (1 - confidence) / SEQUENCES)
    if len(audited.rows) < needed:
        raise AuditError(
            f"{len(audited.rows):,} audited rows cannot prove a disagreement of at most "
            f"{budget:g}, even without one failure: it takes {needed:,}.\n"
            "Audit more rows, or allow more with --max_disagreement."
        )
    table = _table(policy, audited)
    record = policy.calibration
    groups = _groups(record, audited.rows)
    exit_groups = policy.exit_groups
    if groups and record.get("small_groups") == "never_exit":
        table, large = without_small(table, groups, needed)
        exit_groups = tuple(name for name in large if policy.may_exit(name))
    conditions = Conditions(groups=groups) if groups else None
    sequences = [
        [Candidate("", table, rule, conditions) for rule in rules]
        for rules in (_tightened(policy, table), _added_from_deepest(policy, table))
    ]
    found = run_tests(sequences, [table], "disagreement", budget, confidence)
    chosen = found.chosen
    new = policy.at(chosen.layers, chosen.threshold)
    if chosen.threshold is None:
        new = policy.at(policy.layers, None)
    new = replace(new, exit_groups=exit_groups)
    checked = table.at(chosen.layers) if chosen.threshold is not None else table
    times = sorted(row.time for row in audited.rows)
    kept = found.to_json() | {
        # The rows that chose the audited policy: its figures on these are still biased.
        **{name: record[name] for name in KEPT if name in record},
        "audited": {"first": times[0], "last": times[-1]},
        "profile": exit_profile(checked, chosen.threshold),
    }
    same = _same(policy, new)
    new = replace(new, calibration=kept | {"promise": promise(kept)})
    return Recalibration(policy=new, calibration=found, rows=len(audited.rows), unchanged=same)


def since(audited: AuditedRows, policy: str, time: str | None) -> AuditedRows:
    """The rows of a policy since some time.

    Args:
        audited: all rows.
        policy: `policy_digest` of the policy.
        time: ISO date or time, UTC; None keeps all rows.

    Raises:
        AuditError: rows of another policy, or a time that cannot be read.
    """
    if audited.policy != policy:
        raise AuditError(
            f"The audited rows are of another policy ({audited.policy:.12}...; the state is about "
            f"{policy:.12}...). Move them away to start a new audit."
        )
    if time is None:
        return audited
    try:
        begin = datetime.fromisoformat(time)
    except ValueError as cause:
        raise AuditError(f"--since is {time!r}; expected a date such as 2026-03-01.") from cause
    begin = begin if begin.tzinfo else begin.replace(tzinfo=UTC)
    kept = [row for row in audited.rows if datetime.fromisoformat(row.time) >= begin]
    return replace(audited, rows=kept)


def _table(policy: ExitPolicy, audited: AuditedRows) -> ExitTable:
    """The audited rows: answer 0 is the full model's, 1 another."""
    counts, rows, layers = FlopCounts.from_json(audited.flops), audited.rows, policy.layers
    if any(row.values is not None and len(row.values) != len(layers) for row in rows):
        raise AuditError("The audited rows have other check layers than the policy.")
    widths = None
    if policy.scope == "choices":
        widths = torch.tensor([row.choices or 0 for row in rows])
    bounds = find_measure(policy.measure).ends(
        counts.vocab if widths is None else max(int(widths.max()), 2)
    )
    unknown = (None,) * len(layers)
    # A NaN check stops no row, and the values of rows that never exit are not used.
    values = [
        [bounds[1] if value is None else value for value in row.values or unknown] for row in rows
    ]
    agrees = np.array([row.agrees or [True] * len(layers) for row in rows])
    costs = cost_parts(
        counts,
        [row.tokens for row in rows],
        policy,
        choices=widths,
        shared=torch.tensor([row.shared for row in rows]),
    )
    priced = policy.calibration.get("seconds")  # if the policy was chosen by time
    seconds = Seconds.from_json(priced).costs(policy, len(rows)) if priced else None
    held = np.array([not policy.may_exit(row.group) for row in rows])
    table = ExitTable(
        layers=layers,
        num_layers=len(counts.step),
        bounds=bounds,
        confidence=np.array(values, dtype=np.float32),
        answers=(~agrees).astype(int),
        full_answer=np.zeros(len(rows), dtype=int),
        gold=None,
        costs=seconds or costs,
        flops=None if seconds is None else costs,
        stays=np.array([row.values is None for row in rows]),
    )
    return table.held_back(held)


def _tightened(policy: ExitPolicy, table: ExitTable) -> list[ExitRule]:
    """Rules with all thresholds tightened alike; the last one is the policy itself."""
    if policy.measure == FIXED:
        return [ExitRule(layers=policy.layers, threshold=limits_of(policy))]
    return [
        ExitRule(
            layers=policy.layers, threshold=_scaled(policy, table, [factor] * len(table.layers))
        )
        for factor in FACTORS
    ]


def _added_from_deepest(policy: ExitPolicy, table: ExitTable) -> list[ExitRule]:
    """The deepest check alone, then with the shallower ones added one by one, strict to loose."""
    if policy.measure == FIXED or len(policy.layers) == 1:
        return []
    found: list[ExitRule] = []
    for start in reversed(range(1, len(policy.layers))):
        for factor in COARSE:
            factors = [factor, *[1.0] * (len(policy.layers) - start - 1)]
            limits = _scaled(policy, table, [0.0] * start + factors)[start:]
            rule = ExitRule(layers=policy.layers[start:], threshold=limits)
            # A gate's check uses the one before it.
            found.append(rule if policy.gate is None else with_history(rule, policy.layers))
    return found


def limits_of(policy: ExitPolicy) -> tuple[float, ...]:
    """The threshold of each check layer of a policy that may exit."""
    limits = policy.threshold
    assert limits is not None
    return limits if isinstance(limits, tuple) else (limits,) * len(policy.layers)


def _scaled(policy: ExitPolicy, table: ExitTable, factors: Sequence[float]) -> tuple[float, ...]:
    certain = table.bounds[0]
    pairs = zip(limits_of(policy), factors, strict=True)
    # The policy's own threshold is kept exactly.
    return tuple(x if f == 1 else certain + (x - certain) * f for x, f in pairs)


def _groups(record: Mapping[str, Any], rows: Sequence[AuditedRow]) -> dict[str, Any]:
    """Which rows belong to each group, if the guarantee holds within groups."""
    if not any(one["kind"] == "group" for one in record.get("conditions") or ()):
        return {}
    names = [row.group or NO_GROUP for row in rows]
    return {name: np.array([n == name for n in names]) for name in sorted(set(names))}


def _same(before: ExitPolicy, after: ExitPolicy) -> bool:
    """Whether both policies behave the same."""
    if after.threshold is None or before.exit_groups != after.exit_groups:
        return False
    return before.layers == after.layers and limits_of(before) == limits_of(after)

"""Choose the exit thresholds that save most compute within a risk budget, with a guarantee.

Learn then Test (Angelopoulos et al. 2021, arXiv:2110.01052): candidate policies are tested from
strict to loose, each with a p-value for "its risk is over the budget", until the first one fails.
What passed is within the budget with the wanted confidence, for rows drawn like the tested ones.
Arrays in, numbers out: knows nothing of models, of heads or of files.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import numpy as np
from scipy.optimize import isotonic_regression

from lspade_train.errors import PolicyError, TaskError
from lspade_train.policies.exit_table import (
    ExitTable,
    PolicyRow,
    Threshold,
    evaluate_policy,
    oracle_saving,
    pick,
)
from lspade_train.policies.pvalues import disagreement_p_value, drop_p_value

RiskKind = Literal["accuracy_drop", "disagreement"]
FLAGS = {"accuracy_drop": "--max_accuracy_drop", "disagreement": "--max_disagreement"}
RATES = tuple(float(rate) for rate in np.geomspace(1e-3, 0.5, 56))


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """The chosen policy and the evidence for it.

    Attributes:
        chosen: the policy; threshold None means never exit.
        reason: in words, why it was chosen.
        risk: what the budget is about.
        budget: largest risk allowed, 0..1.
        confidence: probability that the promise holds.
        n: rows tested.
        oracle_saving: of the chosen check layers.
        curve: every policy considered, sequence after sequence, strict to loose.
    """

    chosen: PolicyRow
    reason: str
    risk: RiskKind
    budget: float
    confidence: float
    n: int
    oracle_saving: float
    curve: tuple[PolicyRow, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain numbers, lists and dictionaries."""
        return asdict(self)


def calibrate(
    sequences: Sequence[tuple[ExitTable, Sequence[Threshold]]],
    risk: RiskKind,
    budget: float,
    confidence: float = 0.95,
) -> Calibration:
    """Test each sequence of policies in its order, and take the accepted one that saves most.

    Args:
        sequences: a table and thresholds for it, strict to loose, chosen without the table's rows
            (`ExitTable.grid`, or `propose` on other rows). Several, for instance one per set of
            check layers, share the error probability equally (Bonferroni).
        risk: `accuracy_drop` or `disagreement`, both against the full model.
        budget: largest risk allowed, over 0 and under 1.
        confidence: probability that the chosen policy's true risk is within the budget.

    Raises:
        PolicyError: budget or confidence out of range, or nothing to test.
        TaskError: an accuracy budget for rows without right answers.
    """
    for name, value in ((FLAGS[risk], budget), ("--confidence", confidence)):
        if not 0 < value < 1:
            raise PolicyError(f"{name} {value} is out of range: expected over 0 and under 1.")
    if not sequences:
        raise PolicyError("No policies to test. Give at least one set of check layers.")
    level = (1 - confidence) / len(sequences)
    curve: list[PolicyRow] = []
    for table, thresholds in sequences:
        passed = True
        for threshold in thresholds:
            row = evaluate_policy(table, threshold)
            p_value = _p_value(table, threshold, risk, budget)
            passed = passed and p_value <= level
            curve.append(replace(row, p_value=p_value, accepted=passed))
    first = sequences[0][0]
    never = evaluate_policy(first, None)
    chosen = max((never, *filter(_accepted, curve)), key=lambda row: row.compute_saved)
    saving = next(oracle_saving(t) for t, _ in sequences if t.layers == chosen.layers)
    return Calibration(
        chosen=chosen,
        reason=_reason(chosen, curve, budget, level, len(first)),
        risk=risk,
        budget=budget,
        confidence=confidence,
        n=len(first),
        oracle_saving=saving,
        curve=tuple(curve),
    )


def propose(table: ExitTable, rates: Sequence[float] = RATES) -> list[Threshold]:
    """One threshold per check layer, strict to loose, learnt from rows that are not tested later.

    At rate r every check layer stops the rows, among those that reach it, whose chance to answer
    unlike the full model is at most r, by an isotonic fit over the confidence: all layers then
    pay the same price at the margin, which one threshold for all of them cannot arrange.

    Args:
        table: rows of another split, or one half of the split (`ExitTable.rows`), as in LTT's
            split fixed-sequence testing; the order it proposes is tested on the other rows.
        rates: 0..1, ascending.
    """
    return [_equal_rate(table, rate) for rate in rates]


def most_promising(tables: Sequence[ExitTable], risk: RiskKind, budget: float) -> int:
    """Position of the table whose own proposals save most at half the budget.

    Args:
        tables: the same rows measured in several ways, such as both scopes; not tested later.
        risk: as for `calibrate`.
        budget: as for `calibrate`.
    """

    def saving(table: ExitTable) -> float:
        rows = [evaluate_policy(table, threshold) for threshold in propose(table)]
        fine = (row.compute_saved for row in rows if _risk(row, risk) <= budget / 2)
        return max(fine, default=0.0)

    return max(range(len(tables)), key=lambda place: saving(tables[place]))


def rows_needed(budget: float, confidence: float, sequences: int = 1) -> int:
    """Fewest rows with which a policy that never errs can pass; the accuracy test needs 1% more."""
    return math.ceil(math.log((1 - confidence) / sequences) / math.log1p(-budget))


def _p_value(table: ExitTable, threshold: Threshold, risk: RiskKind, budget: float) -> float:
    answers = pick(table.answers, table.full_answer, table.exits(threshold))
    if risk == "disagreement":
        return disagreement_p_value(int((answers != table.full_answer).sum()), len(table), budget)
    if table.gold is None:
        raise TaskError(
            "--max_accuracy_drop needs right answers, and these rows have none. "
            "Give --max_disagreement instead: it compares with the full model."
        )
    before, after = table.full_answer == table.gold, answers == table.gold
    losses, gains = int((before & ~after).sum()), int((after & ~before).sum())
    return drop_p_value(losses, gains, len(table), budget)


def _risk(row: PolicyRow, risk: RiskKind) -> float:
    """Its risk on the rows it was measured on; disagreement bounds a drop that is not known."""
    if risk == "disagreement" or row.drop is None:
        return row.disagreement
    return row.drop


def _equal_rate(table: ExitTable, rate: float) -> tuple[float, ...]:
    thresholds: list[float] = []
    inside = np.ones(len(table), dtype=bool)
    for check in range(len(table.layers)):
        signal = table.confidence[inside, check]
        wrong = (table.answers[inside, check] != table.full_answer[inside]).astype(float)
        order = np.argsort(signal, kind="stable")
        # One more wrong row, the surest of all: a few lucky rows do not prove a rate of zero.
        chance = np.asarray(isotonic_regression(np.r_[1.0, wrong[order]]).x)[1:]
        sure = signal[order][chance <= rate]
        limit = float(sure[-1]) if len(sure) else table.bounds[0]
        thresholds.append(limit)
        inside &= table.confidence[:, check] > limit
    return tuple(thresholds)


def _accepted(row: PolicyRow) -> bool:
    return row.accepted is True


def _reason(
    chosen: PolicyRow, curve: Sequence[PolicyRow], budget: float, level: float, n: int
) -> str:
    if chosen.threshold is not None:
        return "It saves the most compute of the policies that passed the test."
    if any(map(_accepted, curve)):
        return "Never exit: the policies that passed the test cost more in checks than they save."
    needed = rows_needed(budget, 1 - level)
    if n < needed:
        return (
            f"Never exit: {n} rows cannot prove a risk of {budget:g}, even without one loss. "
            f"Give at least {needed} rows, or a larger budget."
        )
    return "Never exit: even the strictest policy could not be shown to stay within the budget."

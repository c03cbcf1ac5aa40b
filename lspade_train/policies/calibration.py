"""Chooses the exit thresholds that save the most compute within a risk budget, with a guarantee.

Learn then Test (Angelopoulos et al. 2021, arXiv:2110.01052): candidate policies are tested from
strict to loose, each with a p-value for "its risk is over the budget", until the first one fails.
Those that passed are within the budget with the given confidence, for rows from the distribution of
the tested ones. Independent of models, heads and files.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from numpy.typing import NDArray

from lspade_train.errors import PolicyError, TaskError
from lspade_train.policies.conditions import Conditions, Finding, Measured
from lspade_train.policies.exit_table import (
    ExitRule,
    ExitTable,
    PolicyRow,
    evaluate_policy,
    oracle_saving,
    pick,
)
from lspade_train.policies.power import RiskKind, rows_to_prove
from lspade_train.policies.pvalues import disagreement_p_value, drop_p_value

LEAD = 2 / 3
"""Fraction of the error probability for the most promising sequence."""
LEAST_TIME = 0.02
"""Least fraction of time saved for a worthwhile exit: less cannot be measured. Our choice."""
FLAGS = {"accuracy_drop": "--max_accuracy_drop", "disagreement": "--max_disagreement"}


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """The chosen policy and the evidence for it.

    Attributes:
        chosen: the policy; threshold None means never exit.
        reason: why it was chosen, in words.
        risk: the risk that the budget limits.
        budget: largest risk allowed, 0..1.
        confidence: probability that the guarantee holds.
        n: rows tested.
        oracle_saving: saving of the oracle over all layers that could be checked.
        curve: every policy considered, sequence after sequence, strict to loose; with conditions
            its p-value is the largest of all its tests.
        conditions: groups and depths that are covered or excluded.
    """

    chosen: PolicyRow
    reason: str
    risk: RiskKind
    budget: float
    confidence: float
    n: int
    oracle_saving: float
    curve: tuple[PolicyRow, ...]
    conditions: tuple[Finding, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Plain numbers, lists and dictionaries."""
        return asdict(self)


@dataclass(frozen=True)
class Candidate:
    """One policy that may be chosen.

    Attributes:
        name: signal and answer method, in words.
        table: table of the current rows, over all layers that its kind of policy could check.
        rule: which of these layers it checks, and its thresholds.
        conditions: groups and depths within which the budget must hold, too.
        expected: fraction of answers that it is expected to change, from the proposing rows.
    """

    name: str
    table: ExitTable
    rule: ExitRule
    conditions: Conditions | None = None
    expected: float = 0.0


def learn_then_test(
    sequences: Sequence[tuple[ExitTable, Sequence[ExitRule]]],
    risk: RiskKind,
    budget: float,
    confidence: float = 0.95,
    conditions: Conditions | None = None,
) -> Calibration:
    """Test each sequence of policies in order, and choose the accepted policy that saves most.

    Args:
        sequences: a table and rules over its layers, strict to loose, chosen without the table's
            rows (`uniform_rules` of its grid, or `propose` on other rows). Several share the error
            probability equally (Bonferroni); an empty one gets no share.
        risk: `accuracy_drop` or `disagreement`, both against the full model.
        budget: largest risk allowed, over 0 and under 1.
        confidence: probability that the chosen policy's true risk is within the budget.
        conditions: groups and depths within which the budget must hold, too.

    Raises:
        PolicyError: budget or confidence out of range, or nothing to test.
        TaskError: an accuracy budget for rows without labels.
    """
    if not sequences:
        raise PolicyError("No policies to test. Give at least one set of check layers.")
    candidates = [
        [Candidate("", table, rule, conditions) for rule in rules] for table, rules in sequences
    ]
    tables = [table for table, _ in sequences]
    return run_tests(candidates, tables, risk, budget, confidence)


def run_tests(
    sequences: "Sequence[Sequence[Candidate]]",
    tables: Sequence[ExitTable],
    risk: RiskKind,
    budget: float,
    confidence: float = 0.95,
    shares: Sequence[float] | None = None,
) -> Calibration:
    """`learn_then_test` for sequences of arbitrary policies.

    Args:
        sequences: candidates, strict to loose, ordered without the rows of their tables.
        tables: tables of the same rows over all layers that could be checked, for the oracle.
        risk: as for `learn_then_test`.
        budget: as for `learn_then_test`.
        confidence: as for `learn_then_test`.
        shares: fraction of the error probability for each sequence, at most 1 in total
            (`error_shares`); None: equal shares.

    Raises:
        PolicyError: budget or confidence out of range.
        TaskError: an accuracy budget for rows without labels.

    Source: fixed-sequence testing, arXiv:2110.01052; of a Pareto frontier, arXiv:2210.07913.
    """
    check_budget(risk, budget, confidence)
    if shares is None:
        shares = [1 / max(sum(map(bool, sequences)), 1)] * len(sequences)
    levels = [(1 - confidence) * share for share in shares]
    ideal = max(map(oracle_saving, tables))
    curve: list[PolicyRow] = []
    found: list[list[Finding]] = []
    for sequence, level in zip(sequences, levels, strict=True):
        needed = rows_to_prove(0, risk, budget, level) if sequence else 0
        passed = True
        for candidate in sequence:
            checked = candidate.table.at(candidate.rule.layers)
            row = evaluate_policy(checked, candidate.rule.threshold, oracle=ideal)
            value = p_value(checked, candidate.rule, risk, budget)
            held: list[Finding] = []
            if candidate.conditions is not None and passed and value <= level:
                measure = _measure(risk, budget)
                held = candidate.conditions.findings(checked, candidate.rule, measure, needed)
                value = max([value, *(one.p_value for one in held if one.p_value is not None)])
            passed = passed and value <= level
            found.append(held)
            curve.append(replace(row, name=candidate.name, p_value=value, accepted=passed))
    never = evaluate_policy(tables[0], None, oracle=ideal)
    chosen = max((never, *filter(_is_worth_it, curve)), key=lambda row: row.saved)
    place = next((n for n, row in enumerate(curve) if row is chosen), None)
    return Calibration(
        chosen=chosen,
        reason=_reason(chosen, curve, budget, max(levels, default=1 - confidence), len(tables[0])),
        risk=risk,
        budget=budget,
        confidence=confidence,
        n=len(tables[0]),
        oracle_saving=ideal,
        curve=tuple(curve),
        conditions=() if place is None else tuple(found[place]),
    )


def frontier(candidates: "Sequence[Candidate]") -> "list[Candidate]":
    """The Pareto-optimal candidates in expected risk and saving on the proposing rows.

    Args:
        candidates: candidates with tables of rows that are not tested later.

    Returns:
        Candidates, safest first, which is the order to test them in on other rows.

    Source: Pareto Testing, arXiv:2210.07913.
    """
    measured = [(one.expected, saving(one), one) for one in candidates]
    found: list[Candidate] = []
    most = 0.0
    for _, saved, candidate in sorted(measured, key=lambda one: (one[0], -one[1])):
        if saved > most:
            found.append(candidate)
            most = saved
    return found


def saving(candidate: Candidate) -> float:
    """Fraction of the plain model's cost that a candidate saves on its table's rows."""
    checked = candidate.table.at(candidate.rule.layers)
    return evaluate_policy(checked, candidate.rule.threshold, oracle=1.0).saved


def error_shares(sequences: "Sequence[Sequence[Candidate]]", budget: float) -> list[float]:
    """How much of the error probability each sequence gets; an empty one gets none.

    Two thirds go to the one expected to save most within the budget, judged by the proposing rows;
    the others share the rest. Any split that does not use the tested rows is valid.

    Args:
        sequences: candidates with tables of the proposing rows.
        budget: largest fraction of changed answers.
    """
    within = [
        max((saving(one) for one in sequence if one.expected <= budget), default=0.0)
        for sequence in sequences
    ]
    some = [place for place, sequence in enumerate(sequences) if sequence]
    if len(some) <= 1:
        return [float(bool(sequence)) for sequence in sequences]
    lead = max(some, key=lambda place: within[place])
    rest = (1 - LEAD) / (len(some) - 1)
    return [
        LEAD if place == lead else rest if sequence else 0.0
        for place, sequence in enumerate(sequences)
    ]


def check_budget(risk: RiskKind, budget: float, confidence: float) -> None:
    """Refuse a budget or a confidence that is not a probability strictly between 0 and 1.

    Raises:
        PolicyError: out of range.
    """
    for name, value in ((FLAGS[risk], budget), ("--confidence", confidence)):
        if not 0 < value < 1:
            raise PolicyError(f"{name} {value} is out of range: expected over 0 and under 1.")


def rows_needed(budget: float, confidence: float, sequences: int = 1) -> int:
    """Fewest rows on which an error-free policy can pass; the accuracy test needs 1% more."""
    return math.ceil(math.log((1 - confidence) / sequences) / math.log1p(-budget))


def p_value(table: ExitTable, rule: ExitRule, risk: RiskKind, budget: float) -> float:
    """Exact p-value of "this policy's risk is over the budget", from the table's rows.

    Args:
        table: table over the rule's layers.
        rule: thresholds.
        risk: as for `learn_then_test`.
        budget: as for `learn_then_test`.

    Raises:
        TaskError: an accuracy budget for rows without labels.
    """
    answers = pick(table.answers, table.full_answer, table.exits(rule.threshold))
    if risk == "disagreement":
        return disagreement_p_value(int((answers != table.full_answer).sum()), len(table), budget)
    if table.gold is None:
        raise TaskError(
            "--max_accuracy_drop requires labels, but these rows have none. "
            "Give --max_disagreement instead: it compares with the full model."
        )
    return drop_p_value(*_changes(table, answers), len(table), budget)


def _changes(table: ExitTable, answers: NDArray[Any]) -> tuple[int, int]:
    """Number of rows that become wrong, and of rows that become right."""
    before, after = table.full_answer == table.gold, answers == table.gold
    return int((before & ~after).sum()), int((after & ~before).sum())


def _measure(risk: RiskKind, budget: float) -> Measured:
    """A function that gives the risk and p-value of a rule on a table's rows."""

    def measured(table: ExitTable, rule: ExitRule) -> tuple[float, float]:
        row = evaluate_policy(table, rule.threshold, oracle=1.0)
        return _risk(row, risk), p_value(table, rule, risk, budget)

    return measured


def _risk(row: PolicyRow, risk: RiskKind) -> float:
    """Its risk on the rows it was measured on; disagreement bounds an unknown accuracy drop."""
    if risk == "disagreement" or row.drop is None:
        return row.disagreement
    return row.drop


def _accepted(row: PolicyRow) -> bool:
    return row.accepted is True


def _is_worth_it(row: PolicyRow) -> bool:
    return _accepted(row) and (row.time_saved is None or row.time_saved >= LEAST_TIME)


def _reason(
    chosen: PolicyRow, curve: Sequence[PolicyRow], budget: float, level: float, n: int
) -> str:
    time = chosen.time_saved is not None
    if chosen.threshold is not None:
        what = "time" if time else "compute"
        return f"It saves the most {what} of the policies that passed the test."
    if not curve:
        what = "time on this machine" if time else "compute"
        return f"No early exit: no check saves more {what} than it costs on the training rows."
    if any(map(_accepted, curve)):
        if time:
            return (
                f"No early exit: no policy that passed the test saves {LEAST_TIME:.0%} of the time "
                "on this machine."
            )
        return (
            "No early exit: the policies that passed the test cost more in checks than they save."
        )
    needed = rows_needed(budget, 1 - level)
    if n < needed:
        return (
            f"No early exit: {n:,} rows are too few for a budget of {budget:g}: at least "
            f"{needed:,} are needed even if no answer is lost. Add rows or raise the budget."
        )
    return "No early exit: no policy passed the test at this budget."

"""How many rows the tests in `pvalues.py` need, and what a number of rows can prove."""

from collections.abc import Callable
from typing import Literal

from lspade_train.errors import PolicyError
from lspade_train.policies.pvalues import disagreement_p_value, drop_p_value

RiskKind = Literal["accuracy_drop", "disagreement"]
MOST_ROWS = 10**7


def rows_to_prove(losses: int, risk: RiskKind, budget: float, level: float) -> int:
    """Fewest rows on which a policy with that many losses, and no gains, passes its test.

    Args:
        losses: rows where the policy's answer is worse than the full model's.
        risk: as for `learn_then_test`.
        budget: as for `learn_then_test`.
        level: largest p-value that passes.

    Raises:
        PolicyError: more than ten million rows are needed.
    """
    enough = losses + 1
    while _p_value(losses, enough, risk, budget) > level:
        enough *= 2
        if enough > MOST_ROWS:
            raise PolicyError(f"A risk of {budget:g} takes over {MOST_ROWS:,} rows to prove.")
    return _first(lambda rows: _p_value(losses, rows, risk, budget) <= level, enough // 2, enough)


def most_losses(risk: RiskKind, budget: float, rows: int, level: float) -> int | None:
    """Most losses, without gains, with which that many rows prove a budget; None: not even 0."""
    fails = _first(lambda losses: _p_value(losses, rows, risk, budget) > level, -1, rows)
    return fails - 1 if fails else None


def smallest_budget(losses: int, risk: RiskKind, rows: int, level: float) -> float | None:
    """Smallest budget under 1, to 0.0001, that these rows and losses prove; None if none does."""
    if losses > rows:
        return None
    steps = 10_000

    def proves(step: int) -> bool:
        return step >= steps or _p_value(losses, rows, risk, step / steps) <= level

    found = _first(proves, 0, steps)
    return found / steps if found < steps else None


def _first(holds: Callable[[int], bool], low: int, high: int) -> int:
    """Smallest number over `low`, up to `high`, for which a monotone condition holds."""
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if holds(middle) else (middle, high)
    return high


def _p_value(losses: int, rows: int, risk: RiskKind, budget: float) -> float:
    if risk == "disagreement":
        return disagreement_p_value(losses, rows, budget)
    return drop_p_value(losses, 0, rows, budget)

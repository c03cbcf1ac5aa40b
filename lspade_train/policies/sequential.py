"""An anytime-valid test, usable after every row: is a rate still within its budget?

A fixed-sample p-value is invalid if the decision to stop depends on it. An e-process stays valid:
the probability that it ever reaches 1/alpha is at most alpha, as long as every row fails with a
probability within the budget (Ville's inequality). Works on counts only: independent of models,
policies and files.

Source: Waudby-Smith and Ramdas 2024, "Estimating means of bounded random variables by betting";
Podkopaev and Ramdas 2021, arXiv:2110.06177, tracking the risk of a deployed model; Shin, Ramdas
and Rinaldo 2022, arXiv:2203.03532, on evidence that restarts over time.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import brentq
from scipy.special import betaincc, betaln, xlog1py, xlogy

PRIOR = (0.5, 0.5)
"""Beta prior over the rate that the bets are placed on (Jeffreys'); ours, not the papers'."""

BLOCK, GROWTH = 100, 0.05
"""A block is full at 100 rows, or 5% of all rows before it: their number grows like log n."""

Blocks = Sequence[tuple[int, int]]
"""Rows and failures of consecutive blocks of a stream, oldest first."""


def add_to_blocks(blocks: Blocks, n: int, failures: int) -> tuple[tuple[int, int], ...]:
    """Add further rows to the last block, or to a new one if it is full.

    Args:
        blocks: the blocks so far.
        n: number of further rows, 0 or more.
        failures: number of failures among them.
    """
    if not n:
        return tuple(blocks)
    before = sum(rows for rows, _ in blocks[:-1])
    if not blocks or blocks[-1][0] >= max(BLOCK, GROWTH * before):
        return (*blocks, (n, failures))
    rows, failed = blocks[-1]
    return (*blocks[:-1], (rows + n, failed + failures))


def log_evidence(blocks: Blocks, budget: float) -> float:
    """Logarithm of the evidence against "every row fails with probability `budget` or less".

    A new bet begins with every block, so that a change after a long healthy time is found almost as
    soon as one at the beginning (up to a logarithm): a single bet would first have to win back its
    losses. Block k (from 0) is allotted 1 / ((k+1)(k+2)) of the wealth beforehand.

    Args:
        blocks: from `add_to_blocks`. Where they end depends on the number of rows only.
        budget: largest rate allowed, over 0 and under 1.

    Returns:
        Natural logarithm; 0 without rows. Raise an alarm at level alpha at `log(1 / alpha)`.
    """
    if not blocks:
        return 0.0
    n, failures = np.array(blocks, dtype=float)[::-1].cumsum(0)[::-1].T
    share = np.arange(1, len(blocks) + 1)
    grown = _log_e_values(failures, n, budget) - np.log(share * (share + 1))
    kept = -math.log(len(blocks) + 1)  # reserved for future blocks
    return float(np.logaddexp(np.logaddexp.reduce(grown), kept))


def log_e_value(failures: int, n: int, budget: float) -> float:
    """Logarithm of the evidence of one bet that began with the first row.

    The likelihood ratio of a rate q over the budget to the budget itself is a bet whose wealth does
    not grow in expectation under the null hypothesis. The mixture of these bets over q, with a Beta
    prior truncated at the budget, has a closed form and depends on the counts alone.

    Args:
        failures: rows that failed, 0..n.
        n: rows seen.
        budget: largest rate allowed, over 0 and under 1.

    Returns:
        Natural logarithm; 0 at n = 0.
    """
    return float(_log_e_values(failures, n, budget))


def confidence_sequence(failures: int, n: int, alpha: float = 0.05) -> tuple[float, float]:
    """Interval for the rate that is valid at all sample sizes simultaneously, at level 1 - alpha.

    Args:
        failures: rows that failed, 0..n.
        n: independent rows seen, all of the same rate; 0 gives (0, 1).
        alpha: probability that the true rate is ever outside.

    Source: Robbins 1970, the mixture of likelihood ratios, inverted.
    """
    a, b = PRIOR
    mixture = float(betaln(a + failures, b + n - failures) - betaln(a, b))
    rate, limit = failures / n if n else 0.5, math.log(1 / alpha)

    def excess(p: float) -> float:
        return mixture - float(_log_likelihood(failures, n, p)) - limit

    tiny = 1e-12
    low: Any = brentq(excess, tiny, rate) if failures and excess(tiny) > 0 else 0.0
    high: Any = brentq(excess, rate, 1 - tiny) if failures < n and excess(1 - tiny) > 0 else 1.0
    return float(low), float(high)


def rows_until_alarm(
    rate: float, budget: float, alpha: float = 0.05, seen: Blocks = (), most: int = 10**6
) -> int:
    """Further rows until an alarm for a stream that fails exactly at `rate`, or `most`.

    A guide for choosing an audit rate: about half of all random streams raise an alarm earlier.

    Args:
        rate: failure rate from now on.
        budget: as for `log_evidence`.
        alpha: level of the alarm.
        seen: blocks so far.
        most: upper limit of the search.
    """

    def rings(rows: int) -> bool:
        blocks, done = tuple(seen), 0
        while done < rows:
            size = max(BLOCK, int(GROWTH * sum(n for n, _ in blocks)))
            end = min(done + size, rows)
            failures = round(rate * end) - round(rate * done)
            blocks, done = add_to_blocks(blocks, end - done, failures), end
        return log_evidence(blocks, budget) >= math.log(1 / alpha)

    low, high = 1, 1
    while not rings(high):
        if high >= most:
            return most
        low, high = high + 1, min(2 * high, most)
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if rings(middle) else (middle + 1, high)
    return low


def _log_e_values(failures: ArrayLike, n: ArrayLike, budget: float) -> NDArray[Any]:
    a, b = np.add(PRIOR[0], failures), np.subtract(np.add(PRIOR[1], n), failures)
    inside = betaln(a, b) - betaln(*PRIOR)
    with np.errstate(divide="ignore"):  # no rate over the budget remains: evidence 0
        tail = np.log(betaincc(a, b, budget)) - math.log(betaincc(*PRIOR, budget))
    return inside + tail - _log_likelihood(failures, n, budget)


def _log_likelihood(failures: ArrayLike, n: ArrayLike, rate: float) -> NDArray[Any]:
    return xlogy(failures, rate) + xlog1py(np.subtract(n, failures), -rate)

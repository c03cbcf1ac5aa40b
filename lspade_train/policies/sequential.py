"""A test that may be looked at after every row: is a rate still within its budget?

A fixed-sample p-value is void once somebody stops looking because of what it says. An e-process is
not: whenever one looks, the probability that it has ever reached 1/alpha is at most alpha as long
as the rate is within the budget (Ville's inequality). Counts in, numbers out: knows nothing of
models, policies or files.

Source: Waudby-Smith and Ramdas 2024, "Estimating means of bounded random variables by betting";
Podkopaev and Ramdas 2021, arXiv:2110.06177, tracking the risk of a deployed model.
"""

import math

from scipy.optimize import brentq
from scipy.special import betaincc, betaln

PRIOR = (0.5, 0.5)
"""Beta prior over the rate that the bets are placed on (Jeffreys'); ours, not the papers'."""


def log_e_value(failures: int, n: int, budget: float) -> float:
    """Logarithm of the evidence against "the rate of failures is at most `budget`".

    A likelihood ratio between a rate q over the budget and the budget itself is a bet whose wealth
    cannot be expected to grow under the null hypothesis. The mixture of these bets over q, with a
    Beta prior cut off at the budget, has a closed form and depends on the counts alone.

    Args:
        failures: rows that failed, 0..n.
        n: independent rows seen.
        budget: largest rate allowed, over 0 and under 1.

    Returns:
        Natural logarithm; 0 at n = 0. Alarm at level alpha where it reaches `log(1 / alpha)`.
    """
    a, b = PRIOR
    inside = betaln(a + failures, b + n - failures) - betaln(a, b)
    tail = _log(betaincc(a + failures, b + n - failures, budget)) - _log(betaincc(a, b, budget))
    return float(inside + tail) - _log_likelihood(failures, n, budget)


def confidence_sequence(failures: int, n: int, alpha: float = 0.05) -> tuple[float, float]:
    """Interval for the rate that covers it at all sample sizes at once, with 1 - alpha.

    Args:
        failures: rows that failed, 0..n.
        n: independent rows seen; 0 gives (0, 1).
        alpha: probability that the true rate is ever outside.

    Source: Robbins 1970, the mixture of likelihood ratios, inverted.
    """
    a, b = PRIOR
    mixture = float(betaln(a + failures, b + n - failures) - betaln(a, b))
    rate, limit = failures / n if n else 0.5, math.log(1 / alpha)

    def excess(p: float) -> float:
        return mixture - _log_likelihood(failures, n, p) - limit

    tiny = 1e-12
    low = brentq(excess, tiny, rate) if failures and excess(tiny) > 0 else 0.0
    high = brentq(excess, rate, 1 - tiny) if failures < n and excess(1 - tiny) > 0 else 1.0
    return float(low), float(high)


def rows_until_alarm(rate: float, budget: float, alpha: float = 0.05, most: int = 10**6) -> int:
    """Rows after which a stream that fails exactly at `rate` rings; `most` where it does not.

    A guide for choosing an audit rate: half of all random streams ring earlier, roughly.
    """
    low, high = 1, most
    if log_e_value(round(rate * most), most, budget) < math.log(1 / alpha):
        return most
    while low < high:
        middle = (low + high) // 2
        rings = log_e_value(round(rate * middle), middle, budget) >= math.log(1 / alpha)
        low, high = (low, middle) if rings else (middle + 1, high)
    return low


def _log_likelihood(failures: int, n: int, rate: float) -> float:
    misses = n - failures
    hit = failures * math.log(rate) if failures else 0.0
    return hit + (misses * math.log1p(-rate) if misses else 0.0)


def _log(probability: float) -> float:
    return math.log(probability) if probability > 0 else -math.inf

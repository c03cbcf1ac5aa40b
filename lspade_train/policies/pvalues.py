"""Exact p-values of the two risks of an early exit, from counts alone.

Independent of policies, tables and thresholds.
"""

import functools
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import beta, binom

# Error spent on the unknown rate of gains, the mass omitted from sums, and the tolerance of the
# upper bound for the largest probability over that rate.
NUISANCE, TAIL = 1e-5, 1e-9
RELATIVE_GAP, ABSOLUTE_GAP = 1e-2, 1e-6


def disagreement_p_value(failures: int, n: int, budget: float) -> float:
    """Exact binomial p-value of "more than `budget` of the rows disagree"."""
    return float(binom.cdf(failures, n, budget))


@functools.lru_cache(maxsize=65536)
def drop_p_value(losses: int, gains: int, n: int, budget: float) -> float:
    """Exact p-value of "accuracy drops by `budget` or more", from paired answers.

    Each row loses an answer (+1), wins one (-1) or changes nothing (0), so the counts are
    multinomial: the non-inferiority test of paired proportions (Tango 1998), in its unconditional
    exact form (Hsueh, Liu and Chen 2001). The statistic is the score, whose variance is that of
    the rare changes. A policy that loses 0.5% and wins 0.5% passes at 1,000 rows, budget 0.01 and
    95% with probability 0.88; with a betting bound (Waudby-Smith and Ramdas 2020: valid at every
    sample size, dependent on the order of the rows) 0.56; with Hoeffding-Bentkus on losses
    rescaled to 0..1, which sees only the range, never: that needs tens of thousands of rows.

    The rate of gains is unknown under the null hypothesis: the p-value is the largest probability
    over a Clopper-Pearson interval for it, plus that interval's error (Berger and Boos 1994). The
    rejection region is closed under "one loss less" and "one gain more", so a corner of each cell
    of rates bounds the whole cell, and splitting cells gives the exact maximum, unlike a grid.

    Args:
        losses: rows that are right with the full model and wrong with the policy.
        gains: the reverse.
        n: rows.
        budget: drop tested against, over 0 and under 1.
    """
    observed = _score(np.array(losses), np.array(gains), n, budget)
    if observed >= 0:
        return 1.0
    low = float(beta.ppf(NUISANCE / 2, gains, n - gains + 1)) if gains else 0.0
    high = float(beta.isf(NUISANCE / 2, gains + 1, n - gains)) if gains < n else 1.0
    high = min(high, (1 - budget) / 2)
    edges = np.linspace(min(low, high), high, 17)
    most = int(binom.isf(TAIL, n, high))
    seen = np.arange(int(binom.ppf(TAIL, n, edges[0])), most + 1)
    region = _region(float(observed), np.arange(most + 1), n, budget)[seen]

    def reach(loss_rate: NDArray[Any], gain_rate: NDArray[Any]) -> NDArray[Any]:
        """Probability of the region, which is taken to include everything outside `seen`."""
        share = np.minimum(loss_rate / (1 - gain_rate), 1)[:, None]
        inside = binom.cdf(region, n - seen, share) * binom.pmf(seen, n, gain_rate[:, None])
        outside = binom.cdf(seen[0] - 1, n, gain_rate) + binom.sf(most, n, gain_rate)
        return inside.sum(1) + outside

    left, right, largest = edges[:-1], edges[1:], 0.0
    while True:
        middle = (left + right) / 2
        largest = max(largest, float(reach(budget + middle, middle).max()))
        bound = largest * (1 + RELATIVE_GAP) + ABSOLUTE_GAP
        split = reach(budget + left, right) > bound
        if not split.any():
            return min(1.0, bound + NUISANCE)
        left, middle, right = left[split], middle[split], right[split]
        left, right = np.concatenate([left, middle]), np.concatenate([middle, right])


def _score(losses: NDArray[Any], gains: NDArray[Any], n: int, budget: float) -> NDArray[Any]:
    """Tango's statistic: negative if the drop is under the budget."""
    # The gains' most likely rate if the drop were the budget: root of a quadratic.
    slope = (losses + gains) * (1 - budget) - 2 * budget * (n - losses)
    rate = (slope + np.sqrt(slope**2 + 8 * n * gains * budget * (1 - budget))) / (4 * n)
    return (losses - gains - n * budget) / np.sqrt(n * (2 * rate + budget - budget**2))


def _region(observed: float, gains: NDArray[Any], n: int, budget: float) -> NDArray[Any]:
    """For 0, 1, ... gains, the most losses whose score is at most the observed one, or -1."""
    low = np.full(len(gains), -1)
    high = np.minimum(n - gains, np.floor(n * budget + gains).astype(int))
    while (low < high).any():
        middle = (low + high + 1) // 2
        inside = _score(middle, gains, n, budget) <= observed + 1e-9
        low, high = np.where(inside, middle, low), np.where(inside, high, middle - 1)
    # More gains never allow fewer losses, which the bound over cells relies on.
    return np.minimum(np.maximum.accumulate(low), n - gains)

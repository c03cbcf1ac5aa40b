"""Candidate policies from rows that are not tested later: thresholds, and the checks worth making.

Arrays in, rules out: knows nothing of models, of risks' budgets or of files.
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Float
from scipy.optimize import isotonic_regression

from lspade_train.policies.exit_table import ExitRule, ExitTable, Threshold

RATES = tuple(float(rate) for rate in np.geomspace(1e-3, 0.5, 56))


def propose(table: ExitTable, rates: Sequence[float] = RATES) -> list[ExitRule]:
    """One rule per rate, strict to loose, each with only the checks that pay for themselves.

    At rate r every check layer stops the rows, among those that reach it, whose chance to answer
    unlike the full model is at most r, by an isotonic fit over the confidence: all layers then
    pay the same price at the margin, which one threshold for all of them cannot arrange.

    Args:
        table: rows of another split, or one half of the split (`ExitTable.rows`), as in LTT's
            split fixed-sequence testing; the order it proposes is tested on the other rows.
        rates: 0..1, ascending.
    """
    return paying_rules(table, [_equal_rate(table, rate) for rate in rates])


def uniform_rules(table: ExitTable) -> list[ExitRule]:
    """The grid's thresholds, one for all layers, each with only the checks that pay."""
    return paying_rules(table, table.grid())


def paying_rules(table: ExitTable, thresholds: Sequence[Threshold]) -> list[ExitRule]:
    """A rule for each threshold with the checks that pay; none where no check does.

    Args:
        table: rows that say what pays.
        thresholds: for all layers of the table.
    """
    rules = (prune(table, threshold) for threshold in thresholds)
    return [*dict.fromkeys(rule for rule in rules if rule is not None)]


def prune(table: ExitTable, threshold: Threshold) -> ExitRule | None:
    """Drop checks until each that is left saves more than it costs on the table's rows.

    One at a time, always the one whose removal saves most: the rows that it stopped then stop at
    the next layer that is sure of them, and all rows that reached it are spared its cost.

    Args:
        table: rows that say what pays.
        threshold: for all layers of the table.

    Returns:
        None where no check pays.
    """
    costs, never = table.costs, np.ones(len(table), dtype=bool)
    # Stage by stage, so that dropping one is cheap; every row stops at the last one.
    sure = np.vstack([table.sure(threshold).T, never])
    check, ends = costs.check.T.copy(), (costs.reach + costs.answer).T.copy()
    layers, limits = list(table.layers), threshold
    while layers:
        gains = _gains_without(sure, check, ends)
        if gains.max() < 0:
            return ExitRule(layers=tuple(layers), threshold=limits)
        worst = int(gains.argmax())
        sure, check, ends = (np.delete(part, worst, axis=0) for part in (sure, check, ends))
        del layers[worst]
        if isinstance(limits, tuple):
            limits = (*limits[:worst], *limits[worst + 1 :])
    return None


def _gains_without(
    sure: Bool[np.ndarray, "stages rows"],
    check: Float[np.ndarray, "checks rows"],
    ends: Float[np.ndarray, "stages rows"],
) -> Float[np.ndarray, " checks"]:
    """What is saved over all rows by dropping each check, negative where it pays for itself.

    Args:
        sure: which stage would stop which row; the last one, never stopping, all of them.
        check: cost of one check.
        ends: cost of stopping at each stage, the checks on the way apart.
    """
    first = sure.argmax(0)
    stopped = np.flatnonzero(first < len(check))
    at, later = first[stopped], sure[:, stopped]
    later[at, np.arange(len(stopped))] = False
    second = later.argmax(0)
    paid = check.cumsum(0)
    stops = ends + np.vstack([paid, paid[-1:]])
    # A row that stops there runs on to the next layer that is sure of it ...
    dearer = stops[second, stopped] - check[at, stopped] - stops[at, stopped]
    # ... and one that passes is spared the check.
    spared = (check * (first > np.arange(len(check))[:, None])).sum(1)
    return spared - np.bincount(at, weights=dearer, minlength=len(check))


def _equal_rate(table: ExitTable, rate: float) -> tuple[float, ...]:
    sign = 1 if table.lower_is_sure else -1  # so that low is certain
    low, high = sorted(sign * end for end in table.bounds)
    doubt = sign * table.confidence
    thresholds: list[float] = []
    inside = np.ones(len(table), dtype=bool)
    for check in range(len(table.layers)):
        signal = doubt[inside, check]
        wrong = (table.answers[inside, check] != table.full_answer[inside]).astype(float)
        order = np.argsort(signal, kind="stable")
        # One more wrong row, the surest of all: a few lucky rows do not prove a rate of zero.
        chance = np.asarray(isotonic_regression(np.r_[1.0, wrong[order]]).x)[1:]
        sure = signal[order][chance <= rate]
        # Rounding may take a measure past its bounds by a hair, where no policy can have a limit.
        limit = min(max(float(sure[-1]), low), high) if len(sure) else low
        thresholds.append(sign * limit)
        inside &= doubt[:, check] > limit
    return tuple(thresholds)

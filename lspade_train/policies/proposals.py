"""Proposes candidate policies, from rows that are not tested later: check layers and thresholds.

Works on arrays only: independent of models, budgets and files.
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Float, Int

from lspade_train.policies.exit_table import ExitRule, ExitTable, Threshold, pick
from lspade_train.policies.logistic import fit_layer, folds

PRICES = tuple(float(price) for price in np.geomspace(2000, 0.5, 100))
"""Prices of a wrong answer to try, in forwards of the plain model."""
SWEEPS = 4
PENALTIES = (0.1, 3.0)


def propose(
    table: ExitTable,
    chance: Float[np.ndarray, "rows checks"],
    prices: Sequence[float] = PRICES,
) -> list[ExitRule]:
    """The cheapest rule for each price of a wrong answer, strict to loose.

    Args:
        table: rows of a split other than the tested one.
        chance: estimated probability that the answer at each check layer is not the full model's
            (`chance_wrong`, or a gate's own). Smoother than the actual outcomes: the few wrong
            answers in a few thousand rows would leave large steps between the rules.
        prices: prices of a wrong answer, in forwards of the plain model.
    """
    order = _surest_first(table)  # the same for all prices
    rules = (cheapest(table, chance, price, order) for price in prices)
    return [*dict.fromkeys(rule for rule in rules if rule is not None)]


def cheapest(
    table: ExitTable,
    chance: Float[np.ndarray, "rows checks"],
    price: float,
    order: Int[np.ndarray, "rows checks"] | None = None,
) -> ExitRule | None:
    """Thresholds that minimise the cost of the rows and of their wrong answers.

    Coordinate descent, from the last check layer down: with the others fixed, a layer's best
    threshold maximises the cumulative saving over the rows that reach it, sorted by doubt; a layer
    whose maximum does not pay for its checks is dropped.

    Args:
        table: as for `propose`.
        chance: as for `propose`.
        price: price of a wrong answer, in forwards of the plain model.
        order: the rows at each check layer, most certain first, if already known.

    Returns:
        The rule; None if no check pays off.
    """
    costs, count = table.costs, len(table.layers)
    unit = costs.plain.mean()
    ends, check = (costs.reach + costs.answer) / unit, costs.check / unit
    stop = ends[:, :count] + price * chance
    sign, doubt = _doubt(table)
    order = _surest_first(table) if order is None else order
    limits = np.full(count, -np.inf, dtype=doubt.dtype)
    for _ in range(SWEEPS):
        before = limits.copy()
        passed = ~np.logical_or.accumulate(doubt <= limits, axis=1)
        reached = np.column_stack([np.ones(len(table), dtype=bool), passed[:, :-1]])
        onward = ends[:, count]
        for place in reversed(range(count)):
            rows = order[reached[order[:, place], place], place]
            saved = (onward - stop[:, place])[rows]
            limits[place] = _best_limit(doubt[rows, place], saved, check[rows, place].sum())
            if np.isfinite(limits[place]):
                stops = doubt[:, place] <= limits[place]
                onward = np.where(stops, stop[:, place], onward) + check[:, place]
        if (limits == before).all():
            break
    kept = np.flatnonzero(np.isfinite(limits))
    # Rounding may push a measure slightly past its bounds, where thresholds are not allowed.
    low, high = sorted(sign * end for end in table.bounds)
    inside = np.clip(limits[kept], low, high)
    if not len(kept):
        return None
    return ExitRule(
        layers=tuple(table.layers[place] for place in kept),
        threshold=tuple(float(sign * limit) for limit in inside),
    )


def _doubt(table: ExitTable) -> tuple[int, Float[np.ndarray, "rows checks"]]:
    """A sign that makes low values certain, and the measure times that sign."""
    sign = 1 if table.lower_is_sure else -1
    return sign, sign * table.confidence


def _surest_first(table: ExitTable) -> Int[np.ndarray, "rows checks"]:
    return np.argsort(_doubt(table)[1], axis=0, kind="stable")


def chance_wrong(table: ExitTable, seed: int = 0) -> Float[np.ndarray, "rows checks"]:
    """Probability that a row's answer is not the full model's, given its confidence.

    A logistic regression per check layer on the measure, its root and its logarithm, with each
    row's value from a fit to other rows.

    Args:
        table: rows whose full answers are known.
        seed: seed of the folds.
    """
    certain, undecided = table.bounds
    doubt = np.clip((table.confidence.astype(np.float64) - certain) / (undecided - certain), 0, 1)
    wrong = table.answers != table.full_answer[:, None]
    fold = folds(len(table), seed)
    columns = np.stack([doubt, np.sqrt(doubt), np.log(doubt + 1e-4)], axis=-1)
    fits = (
        fit_layer(columns[:, place], wrong[:, place], fold, PENALTIES)
        for place in range(len(table.layers))
    )
    return np.stack([fit.doubt for fit in fits], axis=1)


def expected_risk(
    table: ExitTable, rule: ExitRule, chance: Float[np.ndarray, "rows checks"]
) -> float:
    """Fraction of rows whose answer a rule is expected to change.

    Args:
        table: as for `propose`, over all layers.
        rule: a rule over some of them.
        chance: as for `propose`.
    """
    places = [table.layers.index(layer) for layer in rule.layers]
    stops = table.at(rule.layers).exits(rule.threshold)
    return float(pick(chance[:, places], np.zeros(len(table)), stops).mean())


def uniform_rules(table: ExitTable) -> list[ExitRule]:
    """A rule for each threshold of the grid, with only the checks that pay off."""
    return paying_rules(table, table.grid())


def paying_rules(table: ExitTable, thresholds: Sequence[Threshold]) -> list[ExitRule]:
    """A rule for each threshold, with only the checks that pay off; no rule if none does.

    Args:
        table: rows to decide which checks pay off.
        thresholds: thresholds for all layers of the table.
    """
    rules = (prune(table, threshold) for threshold in thresholds)
    return [*dict.fromkeys(rule for rule in rules if rule is not None)]


def prune(table: ExitTable, threshold: Threshold) -> ExitRule | None:
    """Drop checks until each remaining one saves more than it costs on the table's rows.

    Greedily, the check whose removal saves most is dropped: the rows that exited there then exit at
    the next layer that is confident, and all rows that reached it save its cost.

    Args:
        table: rows to decide which checks pay off.
        threshold: threshold for all layers of the table.

    Returns:
        The rule; None if no check pays off.
    """
    costs, never = table.costs, np.ones(len(table), dtype=bool)
    # Kept per stage, so that dropping one is cheap; all remaining rows stop at the last one.
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
    """Saving over all rows from dropping each check, negative if the check pays off.

    Args:
        sure: which stage would stop which row; the last one (no exit) stops all of them.
        check: cost of one check.
        ends: cost of stopping at each stage, without the checks on the way.
    """
    first = sure.argmax(0)
    stopped = np.flatnonzero(first < len(check))
    at, later = first[stopped], sure[:, stopped]
    later[at, np.arange(len(stopped))] = False
    second = later.argmax(0)
    paid = check.cumsum(0)
    stops = ends + np.vstack([paid, paid[-1:]])
    # A row that stops there continues to the next layer that is confident ...
    dearer = stops[second, stopped] - check[at, stopped] - stops[at, stopped]
    # ... and one that passes is spared the check.
    spared = (check * (first > np.arange(len(check))[:, None])).sum(1)
    return spared - np.bincount(at, weights=dearer, minlength=len(check))


def _best_limit(
    doubt: Float[np.ndarray, " rows"], saved: Float[np.ndarray, " rows"], price: float
) -> float:
    """The doubt up to which to exit, -inf if no saving pays for the checks.

    Args:
        doubt: doubt of each row, ascending.
        saved: saving from stopping each row.
        price: cost of the checks.
    """
    if not len(doubt):
        return -np.inf
    total = saved.cumsum()
    total[:-1][doubt[1:] == doubt[:-1]] = -np.inf  # rows of equal doubt stop together
    best = int(total.argmax())
    return float(doubt[best]) if total[best] > price else -np.inf

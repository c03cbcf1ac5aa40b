"""Candidate policies from rows that are not tested later: thresholds, and the checks worth making.

Arrays in, rules out: knows nothing of models, of risks' budgets or of files.
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Float, Int

from lspade_train.policies.exit_table import ExitRule, ExitTable, Threshold, pick
from lspade_train.policies.logistic import fit_layer, folds

PRICES = tuple(float(price) for price in np.geomspace(2000, 0.5, 100))
"""What one wrong answer may be worth, in forwards of the plain model."""
SWEEPS = 4
PENALTIES = (0.1, 3.0)


def propose(
    table: ExitTable,
    chance: Float[np.ndarray, "rows checks"],
    prices: Sequence[float] = PRICES,
) -> list[ExitRule]:
    """The rule that is cheapest for each price of a wrong answer, strict to loose.

    Args:
        table: rows of another split than the one that is tested.
        chance: probability that the answer at each check layer is not the full model's, as far as
            can be told from what is checked (`chance_wrong`, or a gate's own). Not whether it is:
            among a few thousand rows the few wrong ones leave large steps between the rules.
        prices: of a wrong answer, in forwards of the plain model.
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

    Coordinate descent, from the last check layer down: given the others, the best threshold of
    one layer is where the sum, over the rows that reach it in order of their doubt, of what
    stopping saves is largest; a layer whose largest sum does not pay for its checks has none.

    Args:
        table: as for `propose`.
        chance: as for `propose`.
        price: of a wrong answer, in forwards of the plain model.
        order: the rows of each check layer, the most certain first, where it is known already.

    Returns:
        None where no check pays.
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
    # Rounding may take a measure past its bounds by a hair, where no policy can have a limit.
    low, high = sorted(sign * end for end in table.bounds)
    inside = np.clip(limits[kept], low, high)
    if not len(kept):
        return None
    return ExitRule(
        layers=tuple(table.layers[place] for place in kept),
        threshold=tuple(float(sign * limit) for limit in inside),
    )


def _doubt(table: ExitTable) -> tuple[int, Float[np.ndarray, "rows checks"]]:
    """The measure times a sign with which low is certain."""
    sign = 1 if table.lower_is_sure else -1
    return sign, sign * table.confidence


def _surest_first(table: ExitTable) -> Int[np.ndarray, "rows checks"]:
    return np.argsort(_doubt(table)[1], axis=0, kind="stable")


def chance_wrong(table: ExitTable, seed: int = 0) -> Float[np.ndarray, "rows checks"]:
    """Probability that a row's answer is not the full model's, given its confidence.

    A logistic regression per check layer over the measure, its root and its logarithm, each row's
    value fitted on other rows.

    Args:
        table: rows whose full answers are known.
        seed: of the folds.
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
    """Share of the rows whose answer a rule is expected to change.

    Args:
        table: as for `propose`, over all layers.
        rule: over some of them.
        chance: as for `propose`.
    """
    places = [table.layers.index(layer) for layer in rule.layers]
    stops = table.at(rule.layers).exits(rule.threshold)
    return float(pick(chance[:, places], np.zeros(len(table)), stops).mean())


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


def _best_limit(
    doubt: Float[np.ndarray, " rows"], saved: Float[np.ndarray, " rows"], price: float
) -> float:
    """The doubt up to which to stop, -inf where nothing that is saved pays for the checks.

    Args:
        doubt: ascending.
        saved: by stopping each row.
        price: of the checks.
    """
    if not len(doubt):
        return -np.inf
    total = saved.cumsum()
    total[:-1][doubt[1:] == doubt[:-1]] = -np.inf  # equal doubts stop together
    best = int(total.argmax())
    return float(doubt[best]) if total[best] > price else -np.inf

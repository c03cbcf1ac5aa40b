"""Tests whether rows exit at the same layers as the calibration rows."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from scipy.stats import chi2_contingency

from lspade_train.policies.exit_table import ExitTable, Threshold

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
LEVEL = 0.001
"""Report that exit layers differ for p-values below this."""

LEAST = 5
"""Smallest expected count per cell, for the chi-square approximation."""


def exit_profile(table: ExitTable, threshold: Threshold | None) -> dict[str, Any]:
    """Exit layers of rows, and quantiles of their measures, for `policy.json`.

    Args:
        table: table of the policy's check layers.
        threshold: the policy's threshold.

    Returns:
        `exit_counts`, exit layer -> rows (L: never exited), and `signal_quantiles`, check layer ->
        the measure's values at `quantiles`, over all rows that are checked.
    """
    layers = [*table.layers, table.num_layers]
    never = np.full(len(table), len(table.layers))
    stops = never if threshold is None else table.exits(threshold)
    counts = np.bincount(stops, minlength=len(layers)).tolist()
    checked = table.confidence if table.stays is None else table.confidence[~table.stays]
    values = np.quantile(checked.astype(float), QUANTILES, axis=0).T if len(checked) else []
    return {
        "exit_counts": dict(zip(map(str, layers), counts, strict=True)),
        "quantiles": list(QUANTILES),
        "signal_quantiles": {
            str(layer): row.tolist() for layer, row in zip(table.layers, values, strict=False)
        },
    }


def calibrated_exits(record: Mapping[str, Any]) -> dict[int, int]:
    """Exit layer -> rows at calibration; empty if the policy does not record them."""
    counts = (record.get("profile") or {}).get("exit_counts") or {}
    return {int(layer): int(rows) for layer, rows in counts.items()}


def shift_p_value(before: Mapping[int, int], now: Mapping[int, int]) -> float | None:
    """Chi-square test of "both samples exit alike"; for a single look, not for repeated testing.

    Neighbouring layers are merged until each cell has a few expected rows.

    Args:
        before: exit layer -> rows.
        now: the same for other rows.

    Returns:
        The p-value, or None if there are too few rows.
    """
    layers = sorted({*before, *now})
    pairs = np.array([[before.get(layer, 0), now.get(layer, 0)] for layer in layers], dtype=float)
    if not len(pairs) or not pairs.sum(0).all():
        return None
    # The smaller sample's expected share of a cell must be large enough.
    least = LEAST / (pairs.sum(0).min() / pairs.sum())
    cells: list[Any] = []
    for pair in pairs:
        if cells and cells[-1].sum() < least:
            cells[-1] = cells[-1] + pair
        else:
            cells.append(pair)
    if len(cells) > 1 and cells[-1].sum() < least:
        last = cells.pop()
        cells[-1] = cells[-1] + last
    if len(cells) < 2:
        return 1.0 if pairs.sum(0).min() >= 2 * LEAST and (pairs.sum(1) > 0).sum() < 2 else None
    found: Any = chi2_contingency(np.array(cells), correction=False)
    return float(found.pvalue)

"""How well the exit signal predicts agreement, in bins, in the format of `results.json`.

Independent of models, thresholds and plots.
"""

from typing import Any

import numpy as np

from lspade_train.evaluation.chance import wilson_interval
from lspade_train.policies.exit_table import ExitTable
from lspade_train.probes.measures import GATED, find_measure

BINS, LEAST = 10, 20
"""Number of bins per layer, with equal numbers of rows; and the fewest rows of a bin."""
LAYERS = 4
"""Check layers shown, evenly spaced, with the last."""


def reliability(table: ExitTable, measure: str) -> dict[str, Any]:
    """Fraction of answers that equal the full model's, by the signal at a check.

    Args:
        table: signals and answers at the check layers; all rows count at each of them, even those
            that would have exited before.
        measure: the measure of the signal.

    Returns:
        `measure`, its `unit`, whether it `is_doubt` (the probability that the answer is not the
        full model's), and for each layer in `layers` the bins' mean `signal`, `agreement`,
        its `interval` (Wilson, 95%) and `rows`.
    """
    last = len(table.layers) - 1
    places = dict.fromkeys(round(i) for i in np.linspace(last, 0, min(last + 1, LAYERS)))
    return {
        "measure": measure,
        "is_doubt": measure == GATED,
        "unit": find_measure(measure).unit,
        "layers": [_bins(table, place) for place in sorted(places)],
    }


def _bins(table: ExitTable, place: int) -> dict[str, Any]:
    signal = table.confidence[:, place]
    same = table.answers[:, place] == table.full_answer
    bins = min(BINS, max(len(table) // LEAST, 1))
    parts = np.array_split(signal.argsort(kind="stable"), bins)
    return {
        "layer": table.layers[place],
        "signal": [float(signal[part].mean()) for part in parts],
        "agreement": [float(same[part].mean()) for part in parts],
        "interval": [list(wilson_interval(int(same[part].sum()), len(part))) for part in parts],
        "rows": [len(part) for part in parts],
    }

"""Figures of certainty: whether low entropy goes with a right answer."""

from itertools import pairwise
from typing import Any

from lspade_train.reporting.plots.charts import (
    LENSES,
    MODEL,
    Bars,
    Chart,
    Omitted,
    Series,
    look,
    run_note,
)

LAYER = "layer (block that the answer is read after)"
NO_LABELS = "These rows have no right answers."
ONE_KIND = "Answers are all right, all wrong, or without labels."


def entropy_by_correctness(results: dict[str, Any]) -> Chart | Omitted:
    """Median entropy of right and of wrong answers by layer, with quartiles."""
    title = "Entropy of right and wrong answers by layer"
    if not results["n_labelled"]:
        return Omitted(title, NO_LABELS)
    lens = telling_lens(results)
    histogram, edges = results["lenses"][lens]["entropy_histogram"], results["entropy_edges"]
    series = tuple(
        _quartile_series(label, results["layers"], histogram[key], edges, index)
        for index, (key, label) in enumerate({"correct": "right", "wrong": "wrong"}.items())
    )
    return Chart(
        name="entropy_by_correctness",
        title=title,
        note=run_note(results, labelled=True, interval=False) + ", bands: quartiles",
        caption=f"Median entropy of {LENSES[lens][0]} over the rows that it answers rightly and "
        f"wrongly, read off bins of {edges[1]:.2g} nats.",
        x_label=LAYER,
        y_label="entropy (nats)",
        series=series,
        whole_x=True,
    )


def entropy_histogram(results: dict[str, Any]) -> Bars | Omitted:
    """Entropy of right and wrong answers at the layer where it tells them apart best."""
    title = "Entropy of right and wrong answers"
    place = telling_layer(results)
    if place is None:
        return Omitted(title, ONE_KIND)
    lens = telling_lens(results)
    histogram, edges = results["lenses"][lens]["entropy_histogram"], results["entropy_edges"]
    right, wrong = histogram["correct"][place], histogram["wrong"][place]
    last = max(i for i in range(len(right)) if right[i] or wrong[i]) + 1
    auroc = results["lenses"][lens]["auroc"][place]
    groups = {
        f"right ({sum(right):,})": [count / sum(right) for count in right[:last]],
        f"wrong ({sum(wrong):,})": [count / sum(wrong) for count in wrong[:last]],
    }
    return Bars(
        name="entropy_histogram",
        title=f"{title}: {LENSES[lens][0]}, layer {results['layers'][place]}",
        note=run_note(results, labelled=True, interval=False) + f", AUROC {auroc:.3f}",
        caption="The layer where low entropy predicts a right answer best. Each colour sums to 1.",
        x_label="entropy (nats)",
        y_label="share of the answers of a kind",
        places=[(low + high) / 2 for low, high in pairwise(edges)][:last],
        groups=groups,
        looks=(look(0), look(1)),
        width=edges[1] - edges[0],
    )


def risk_coverage(results: dict[str, Any]) -> Chart | Omitted:
    """Error rate among the most certain rows, at the layer where entropy tells most."""
    place = telling_layer(results)
    if place is None:
        return Omitted("Risk-coverage", ONE_KIND)
    series = [
        Series(LENSES[name][0], results["coverage"], lens["risk"][place], LENSES[name][1])
        for name, lens in results["lenses"].items()
    ]
    full = Series("full model", results["coverage"], results["full_model"]["risk"], MODEL)
    return Chart(
        name="risk_coverage",
        title=f"Risk-coverage at layer {results['layers'][place]}",
        note=run_note(results, labelled=True, interval=False),
        caption="Error rate when only the rows of lowest entropy are answered.",
        x_label="coverage (share of rows answered)",
        y_label="risk (share of wrong answers)",
        series=(*series, full),
        percent_x=True,
    )


def telling_lens(results: dict[str, Any]) -> str:
    """The lens that decides exits: L-SPADE, or the last there is where it was not measured."""
    return "l_spade" if "l_spade" in results["lenses"] else list(results["lenses"])[-1]


def telling_layer(results: dict[str, Any]) -> int | None:
    """Place of the layer where that lens's entropy predicts a right answer best."""
    values = results["lenses"][telling_lens(results)]["auroc"]
    if empty(values):
        return None
    return max(range(len(values)), key=lambda i: -1.0 if values[i] is None else values[i])


def _quartile_series(
    label: str, layers: list[int], counts: list[list[int]], edges: list[float], index: int
) -> Series:
    found = [[_quantile(row, edges, q) for row in counts] for q in (0.25, 0.5, 0.75)]
    return Series(label, layers, found[1], look(index), found[0], found[2])


def _quantile(counts: list[int], edges: list[float], q: float) -> float | None:
    """A quantile of binned values, linear within its bin; None where there are none."""
    wanted, seen = q * sum(counts), 0
    if not sum(counts):
        return None
    for place, count in enumerate(counts):
        if seen + count >= wanted and count:
            return edges[place] + (wanted - seen) / count * (edges[place + 1] - edges[place])
        seen += count
    return edges[-1]


def empty(values: list[float | None] | None) -> bool:
    """Whether a metric has no number at any layer."""
    return values is None or all(value is None for value in values)

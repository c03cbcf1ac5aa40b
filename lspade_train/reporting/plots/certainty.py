"""Figures of confidence: whether low entropy goes with a correct answer."""

from itertools import pairwise
from typing import Any

from lspade_train.probes.lenses import label_of, style_of
from lspade_train.reporting.plots.charts import (
    MODEL,
    Bars,
    Chart,
    Omitted,
    Series,
    cycle_style,
    run_note,
)
from lspade_train.reporting.tables import exit_lens

LAYER = "layer (block that the answer is read after)"
NO_LABELS = "These rows have no labels."
ONE_KIND = "Every answer is correct, every answer is wrong, or the rows have no labels."


def reliability(results: dict[str, Any]) -> Chart | Omitted:
    """How often an exit's answer is the full model's, by the signal that decides the exit."""
    title = "Reliability of the signal"
    found = (results["exits"] or {}).get("reliability")
    if not found:
        return Omitted(title, "No checks were measured.")
    series = [
        Series(
            f"layer {one['layer']}", one["signal"], one["agreement"], cycle_style(index),
            low=[low for low, _ in one["interval"]], high=[high for _, high in one["interval"]],
        )
        for index, one in enumerate(found["layers"])
    ]  # fmt: skip
    if found["is_doubt"]:
        seen = [value for one in found["layers"] for value in one["signal"]]
        ends = [min(seen), max(seen)]
        series.append(Series("as the gate says", ends, [1 - end for end in ends], MODEL))
    whose = "policy.json" if found["of"] == "policy" else "the heads, answered by SPADE"
    unit = "probability that the answer is not the full model's" if found["is_doubt"] else ""
    unit = unit or found["unit"]
    return Chart(
        name="reliability",
        title=title,
        note=run_note(results, labelled=False, interval=False) + ", 95% Wilson intervals",
        caption=f"Checks of {whose}: each point is an equal share of the rows, sorted by the "
        "signal at that layer, including rows that would have exited earlier.",
        x_label=found["measure"] + (f" ({unit})" if unit else ""),
        y_label="agreement (fraction of rows)",
        series=tuple(series),
    )


def entropy_by_correctness(results: dict[str, Any]) -> Chart | Omitted:
    """Median entropy of correct and of wrong answers by layer, with quartiles."""
    title = "Entropy of correct and wrong answers by layer"
    if not results["n_labelled"]:
        return Omitted(title, NO_LABELS)
    lens = exit_lens(results)
    histogram, edges = results["lenses"][lens]["entropy_histogram"], results["entropy_edges"]
    series = tuple(
        _quartile_series(kind, results["layers"], histogram[kind], edges, index)
        for index, kind in enumerate(("correct", "wrong"))
    )
    return Chart(
        name="entropy_by_correctness",
        title=title,
        note=run_note(results, labelled=True, interval=False) + ", bands: quartiles",
        caption=f"Median entropy of {label_of(lens)} over the rows that it answers correctly "
        f"and wrongly, read off bins of {edges[1]:.2g} nats.",
        x_label=LAYER,
        y_label="entropy (nats)",
        series=series,
        whole_x=True,
    )


def entropy_histogram(results: dict[str, Any]) -> Bars | Omitted:
    """Entropy of correct and wrong answers at the most discriminative layer."""
    title = "Entropy of correct and wrong answers"
    place = most_discriminative_layer(results)
    if place is None:
        return Omitted(title, ONE_KIND)
    lens = exit_lens(results)
    histogram, edges = results["lenses"][lens]["entropy_histogram"], results["entropy_edges"]
    correct, wrong = histogram["correct"][place], histogram["wrong"][place]
    last = max(i for i in range(len(correct)) if correct[i] or wrong[i]) + 1
    auroc = results["lenses"][lens]["auroc"][place]
    groups = {
        f"correct ({sum(correct):,})": [count / sum(correct) for count in correct[:last]],
        f"wrong ({sum(wrong):,})": [count / sum(wrong) for count in wrong[:last]],
    }
    return Bars(
        name="entropy_histogram",
        title=f"{title}: {label_of(lens)}, layer {results['layers'][place]}",
        note=run_note(results, labelled=True, interval=False) + f", AUROC {auroc:.3f}",
        caption="Where low entropy best predicts a correct answer. Each colour sums to 1.",
        x_label="entropy (nats)",
        y_label="fraction of the correct (wrong) answers",
        places=[(low + high) / 2 for low, high in pairwise(edges)][:last],
        groups=groups,
        styles=(cycle_style(0), cycle_style(1)),
        width=edges[1] - edges[0],
    )


def risk_coverage(results: dict[str, Any]) -> Chart | Omitted:
    """Error rate among the most certain rows, at the most discriminative layer."""
    place = most_discriminative_layer(results)
    if place is None:
        return Omitted("Risk-coverage", ONE_KIND)
    series = [
        Series(label_of(key), results["coverage"], lens["risk"][place], style_of(key))
        for key, lens in results["lenses"].items()
    ]
    full = Series("full model", results["coverage"], results["full_model"]["risk"], MODEL)
    return Chart(
        name="risk_coverage",
        title=f"Risk-coverage at layer {results['layers'][place]}",
        note=run_note(results, labelled=True, interval=False),
        caption="Error rate when only the rows of lowest entropy are answered.",
        x_label="coverage (fraction of rows answered)",
        y_label="risk (fraction of wrong answers)",
        series=(*series, full),
        percent_x=True,
    )


def most_discriminative_layer(results: dict[str, Any]) -> int | None:
    """Index of the layer where the exit lens's entropy best predicts a correct answer."""
    values = results["lenses"][exit_lens(results)]["auroc"]
    if empty(values):
        return None
    return max(range(len(values)), key=lambda i: -1.0 if values[i] is None else values[i])


def _quartile_series(
    label: str, layers: list[int], counts: list[list[int]], edges: list[float], index: int
) -> Series:
    found = [[_quantile(row, edges, q) for row in counts] for q in (0.25, 0.5, 0.75)]
    return Series(label, layers, found[1], cycle_style(index), found[0], found[2])


def _quantile(counts: list[int], edges: list[float], q: float) -> float | None:
    """A quantile of binned values, linear within a bin; None if there are no values."""
    wanted, seen = q * sum(counts), 0
    if not sum(counts):
        return None
    for place, count in enumerate(counts):
        if seen + count >= wanted and count:
            return edges[place] + (wanted - seen) / count * (edges[place + 1] - edges[place])
        seen += count
    return edges[-1]


def empty(values: list[float | None] | None) -> bool:
    """Whether a metric has no value at any layer."""
    return values is None or all(value is None for value in values)

"""From results to figures: one function each, which says why where there is nothing to show."""

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

from lspade_train.plots import extras, trade_off
from lspade_train.plots.charts import (
    LENSES,
    MODEL,
    Bars,
    Chart,
    Figure,
    Level,
    Omitted,
    Series,
    look,
    run_note,
)

NO_LABELS = "These rows have no right answers."
LAYER = "layer (block that the answer is read after)"


def all_figures(results: dict[str, Any]) -> list[Figure | Omitted]:
    """Every figure in the order of the report; what cannot be drawn says why.

    Args:
        results: as in `results.json`.
    """
    return [build(results) for build in BUILDERS]


def accuracy_by_layer(results: dict[str, Any]) -> Chart:
    """Accuracy of every lens, or the agreement of its answers where there are no labels."""
    labelled = results["n_labelled"] > 0
    metric = "accuracy" if labelled else "answer_agrees_model"
    over = "the task's choices" if results["has_choices"] else "the vocabulary"
    full = results["full_model"]
    level = Level("full model", full["accuracy"], _pair(full["accuracy_interval"]))
    what = "Accuracy" if labelled else "Agreement of the answers with the full model's"
    return _by_layer(
        results,
        metric,
        name="accuracy_by_layer" if labelled else "answer_agreement_by_layer",
        title=f"{what} by layer",
        caption=f"The answer is the best of {over}. The line is the full model.",
        y_label="accuracy (fraction of rows)" if labelled else "agreement (fraction of rows)",
        levels=(level,) if labelled else (),
    )


def agreement_by_layer(results: dict[str, Any]) -> Chart:
    """How often a lens gives the full model's most probable token."""
    return _by_layer(
        results,
        "agrees_model",
        name="agreement_by_layer",
        title="Agreement with the full model by layer",
        caption="Most probable token of the whole vocabulary, the full model's against the lens's.",
        y_label="agreement (fraction of rows)",
    )


def kl_by_layer(results: dict[str, Any]) -> Chart:
    """KL of every lens to the full model."""
    return _by_layer(
        results,
        "kl_to_model",
        name="kl_by_layer",
        title="KL to the full model by layer",
        caption="Mean of KL(full model || lens) over the vocabulary.",
        y_label="KL (nats)",
        log_y=True,
    )


def kl_to_spade_by_layer(results: dict[str, Any]) -> Chart:
    """KL of every other lens to SPADE: what training brings down."""
    return _by_layer(
        results,
        "kl_to_spade",
        name="kl_to_spade_by_layer",
        title="KL to SPADE by layer",
        caption="Mean of KL(SPADE || lens): what training an L-SPADE head brings down.",
        y_label="KL (nats)",
        log_y=True,
        lenses=[lens for lens in results["lenses"] if lens != "spade"],
    )


def auroc_by_layer(results: dict[str, Any]) -> Chart | Omitted:
    """How well low entropy predicts a right answer."""
    title = "Entropy as a predictor of the right answer"
    if all(_empty(lens["auroc"]) for lens in results["lenses"].values()):
        return Omitted(title, "Answers are all right, all wrong, or without labels.")
    return _by_layer(
        results,
        "auroc",
        name="auroc_by_layer",
        title=title,
        caption="Probability that a right answer has less entropy than a wrong one: 0.5 is chance.",
        y_label="AUROC (0.5: chance, 1: perfect)",
        levels=(Level("chance", 0.5),),
    )


def calibration_by_layer(results: dict[str, Any]) -> Chart | Omitted:
    """Expected calibration error of every lens."""
    title = "Calibration error by layer"
    if not results["n_labelled"]:
        return Omitted(title, NO_LABELS)
    return _by_layer(
        results,
        "ece",
        name="calibration_by_layer",
        title=title,
        caption="Mean gap between the answer's probability and its accuracy, over 15 bins.",
        y_label="expected calibration error (fraction)",
        levels=(Level("full model", results["full_model"]["ece"]),),
    )


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
        return Omitted(title, "Answers are all right, all wrong, or without labels.")
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
        return Omitted("Risk-coverage", "Answers are all right, all wrong, or without labels.")
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


def groups_by_layer(results: dict[str, Any]) -> Chart | Omitted:
    """Accuracy of one lens in every subgroup."""
    title = "Accuracy by subgroup"
    if not results["groups"]:
        return Omitted(title, "The rows have no subgroups, or no right answers.")
    lens = telling_lens(results)
    series = tuple(
        Series(f"{name} (n = {group['n']:,})", results["layers"], group["lenses"][lens], look(i))
        for i, (name, group) in enumerate(results["groups"].items())
    )
    return Chart(
        name="accuracy_by_group",
        title=f"{title}: {LENSES[lens][0]}",
        note=run_note(results, labelled=True, interval=False),
        caption="Harder questions need more layers where the lines part.",
        x_label=LAYER,
        y_label="accuracy (fraction of rows)",
        series=series,
        whole_x=True,
    )


def comparison(several: Sequence[dict[str, Any]]) -> Chart:
    """L-SPADE's accuracy by layer of several heads folders; `label` tells them apart.

    Where models differ in depth the layer is given as a fraction of theirs. Without labels in any
    of them the agreement with the full model is compared.
    """
    labelled = all(results["n_labelled"] > 0 for results in several)
    metric = "accuracy" if labelled else "answer_agrees_model"
    same = len({results["num_layers"] for results in several}) == 1
    series: list[Series] = []
    for index, results in enumerate(several):
        lens = results["lenses"][telling_lens(results)]
        low, high = _band(lens, metric)
        depth = 1 if same else results["num_layers"]
        x = [layer / depth for layer in results["layers"]]
        series.append(Series(results["label"], x, lens[metric], look(index), low, high))
    models = {results["model_id"]: results["full_model"]["accuracy"] for results in several}
    levels = [Level(f"full model ({_short(m)})", value) for m, value in models.items()]
    what = "accuracy" if labelled else "agreement with the full model"
    return Chart(
        name="compare_accuracy",
        title=f"L-SPADE's {what} by layer",
        note=", ".join(f"{r['label']}: n = {r['n']:,}, seed {r['seed']}" for r in several),
        caption=f"{several[0]['interval']['level']:.0%} bootstrap intervals.",
        x_label=LAYER if same else "layer (fraction of the model's depth)",
        y_label=f"{what} (fraction of rows)",
        series=tuple(series),
        levels=tuple(levels) if labelled else (),
        whole_x=same,
    )


def telling_lens(results: dict[str, Any]) -> str:
    """The lens that decides exits: L-SPADE, or the last there is where it was not measured."""
    return "l_spade" if "l_spade" in results["lenses"] else list(results["lenses"])[-1]


def telling_layer(results: dict[str, Any]) -> int | None:
    """Place of the layer where that lens's entropy predicts a right answer best."""
    values = results["lenses"][telling_lens(results)]["auroc"]
    if _empty(values):
        return None
    return max(range(len(values)), key=lambda i: -1.0 if values[i] is None else values[i])


def _by_layer(
    results: dict[str, Any],
    metric: str,
    *,
    lenses: Sequence[str] | None = None,
    **described: Any,
) -> Chart:
    series: list[Series] = []
    for name in results["lenses"] if lenses is None else lenses:
        lens = results["lenses"][name]
        if lens[metric] is None:
            continue
        label, style = LENSES[name]
        series.append(Series(label, results["layers"], lens[metric], style, *_band(lens, metric)))
    labelled = metric in {"accuracy", "ece", "auroc"}
    return Chart(
        series=tuple(series),
        note=run_note(results, labelled=labelled, interval=any(one.low for one in series)),
        x_label=LAYER,
        whole_x=True,
        **described,
    )


def _band(lens: dict[str, Any], metric: str) -> tuple[list[float] | None, list[float] | None]:
    intervals = lens.get(f"{metric}_interval")
    if intervals is None:
        return None, None
    return [low for low, _ in intervals], [high for _, high in intervals]


def _pair(interval: list[float] | None) -> tuple[float, float] | None:
    return None if interval is None else (interval[0], interval[1])


def _empty(values: list[float | None] | None) -> bool:
    return values is None or all(value is None for value in values)


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


def _short(model_id: str) -> str:
    return model_id.rstrip("/").rsplit("/", 1)[-1]


BUILDERS: tuple[Callable[[dict[str, Any]], Figure | Omitted], ...] = (
    accuracy_by_layer,
    agreement_by_layer,
    kl_by_layer,
    kl_to_spade_by_layer,
    trade_off.sweep_by_layer,
    trade_off.sweep_by_flops,
    trade_off.exit_histogram,
    trade_off.iso_compute,
    entropy_by_correctness,
    entropy_histogram,
    auroc_by_layer,
    risk_coverage,
    calibration_by_layer,
    groups_by_layer,
    extras.cross_task,
    extras.start_ablation,
    extras.heads_ablation,
    extras.learning_curve,
)

"""From results to figures: one function each, which returns a reason if there is no data."""

from collections.abc import Callable, Sequence
from typing import Any

from lspade_train.probes.lenses import SPADE, label_of, style_of
from lspade_train.reporting.plots import certainty, extras, trade_off
from lspade_train.reporting.plots.certainty import LAYER, NO_LABELS, ONE_KIND, empty
from lspade_train.reporting.plots.charts import (
    Chart,
    Figure,
    Level,
    Omitted,
    Series,
    cycle_style,
    run_note,
)
from lspade_train.reporting.tables import exit_lens


def all_figures(results: dict[str, Any]) -> list[Figure | Omitted]:
    """Every figure, in the order of the report, or the reason why it cannot be drawn.

    Args:
        results: as in `results.json`.
    """
    return [build(results) for build in BUILDERS]


def accuracy_by_layer(results: dict[str, Any]) -> Chart:
    """Accuracy of every lens, or the agreement of its answers if there are no labels."""
    labelled = results["n_labelled"] > 0
    metric = "accuracy" if labelled else "answer_agrees_model"
    over = "the task's choices" if results["has_choices"] else "the vocabulary"
    full = results["full_model"]
    level = Level("full model", full["accuracy"], _pair(full["accuracy_interval"]))
    levels = (level, *trade_off.chance_levels(full)) if labelled else ()
    what = "Accuracy" if labelled else "Agreement of the answers with the full model's"
    return _by_layer(
        results,
        metric,
        name="accuracy_by_layer" if labelled else "answer_agreement_by_layer",
        title=f"{what} by layer",
        caption=f"The answer is the best of {over}. The lines are the full model and "
        "the chance level.",
        y_label="accuracy (fraction of rows)" if labelled else "agreement (fraction of rows)",
        levels=levels,
    )


def agreement_by_layer(results: dict[str, Any]) -> Chart:
    """How often a lens's most probable token is the full model's."""
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
    """KL of every other lens to SPADE: what training reduces."""
    return _by_layer(
        results,
        "kl_to_spade",
        name="kl_to_spade_by_layer",
        title="KL to SPADE by layer",
        caption="Mean of KL(SPADE || lens): what training an L-SPADE head reduces.",
        y_label="KL (nats)",
        log_y=True,
        lenses=[lens for lens in results["lenses"] if lens != SPADE.key],
    )


def auroc_by_layer(results: dict[str, Any]) -> Chart | Omitted:
    """How well low entropy predicts a correct answer."""
    title = "Entropy as a predictor of the correct answer"
    if all(empty(lens["auroc"]) for lens in results["lenses"].values()):
        return Omitted(title, ONE_KIND)
    return _by_layer(
        results,
        "auroc",
        name="auroc_by_layer",
        title=title,
        caption="Probability that a correct answer has lower entropy than a wrong one.",
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


def groups_by_layer(results: dict[str, Any]) -> Chart | Omitted:
    """Accuracy of one lens in every subgroup."""
    title = "Accuracy by subgroup"
    if not results["groups"]:
        return Omitted(title, "The rows have no subgroups, or no labels.")
    lens = exit_lens(results)
    series = tuple(
        Series(
            f"{name} (n = {group['n']:,})", results["layers"], group["lenses"][lens], cycle_style(i)
        )
        for i, (name, group) in enumerate(results["groups"].items())
    )
    return Chart(
        name="accuracy_by_group",
        title=f"{title}: {label_of(lens)}",
        note=run_note(results, labelled=True, interval=False),
        caption="Rows of each subgroup that are answered correctly.",
        x_label=LAYER,
        y_label="accuracy (fraction of rows)",
        series=series,
        whole_x=True,
    )


def comparison(several: Sequence[dict[str, Any]]) -> Chart:
    """Accuracy by layer of the heads of several folders, each with its `label`.

    If the models differ in depth, layers are given as a fraction of it. If any results have no
    labels, agreement with the full model is compared instead.
    """
    labelled = all(results["n_labelled"] > 0 for results in several)
    metric = "accuracy" if labelled else "answer_agrees_model"
    same = len({results["num_layers"] for results in several}) == 1
    series: list[Series] = []
    for index, results in enumerate(several):
        lens = results["lenses"][exit_lens(results)]
        low, high = _band(lens, metric)
        depth = 1 if same else results["num_layers"]
        x = [layer / depth for layer in results["layers"]]
        series.append(Series(results["label"], x, lens[metric], cycle_style(index), low, high))
    models = {results["model_id"]: results["full_model"]["accuracy"] for results in several}
    levels = [Level(f"full model ({_short(m)})", value) for m, value in models.items()]
    what = "accuracy" if labelled else "agreement with the full model"
    kinds = " and ".join(dict.fromkeys(label_of(exit_lens(results)) for results in several))
    return Chart(
        name="compare_accuracy",
        title=f"{kinds}: {what} by layer",
        note=", ".join(f"{r['label']}: n = {r['n']:,}, seed {r['seed']}" for r in several),
        caption=f"{several[0]['interval']['level']:.0%} bootstrap intervals.",
        x_label=LAYER if same else "layer (fraction of the model's depth)",
        y_label=f"{what} (fraction of rows)",
        series=tuple(series),
        levels=tuple(levels) if labelled else (),
        whole_x=same,
    )


def _by_layer(
    results: dict[str, Any],
    metric: str,
    *,
    lenses: Sequence[str] | None = None,
    **described: Any,
) -> Chart:
    series: list[Series] = []
    for key in results["lenses"] if lenses is None else lenses:
        lens = results["lenses"][key]
        if lens[metric] is None:
            continue
        band = _band(lens, metric)
        series.append(Series(label_of(key), results["layers"], lens[metric], style_of(key), *band))
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


def _short(model_id: str) -> str:
    return model_id.rstrip("/").rsplit("/", 1)[-1]


BUILDERS: tuple[Callable[[dict[str, Any]], Figure | Omitted], ...] = (
    accuracy_by_layer,
    agreement_by_layer,
    kl_by_layer,
    kl_to_spade_by_layer,
    extras.training_curve,
    trade_off.sweep_by_layer,
    trade_off.sweep_by_flops,
    trade_off.exit_histogram,
    trade_off.iso_compute_chart,
    certainty.reliability,
    certainty.entropy_by_correctness,
    certainty.entropy_histogram,
    auroc_by_layer,
    certainty.risk_coverage,
    calibration_by_layer,
    groups_by_layer,
    extras.cross_task_heatmap,
    extras.start_ablation,
    extras.heads_ablation,
    extras.learning_curve,
)

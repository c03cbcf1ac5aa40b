"""Figures of the fit, and of the optional parts of `evaluate`: other tasks and ablations."""

from typing import Any

from lspade_train.probes.lenses import label_of
from lspade_train.reporting.plots.certainty import LAYER
from lspade_train.reporting.plots.charts import (
    Chart,
    Heatmap,
    Omitted,
    Series,
    cycle_style,
    run_note,
)
from lspade_train.reporting.tables import exit_lens

NO_ABLATIONS = "Not measured: ask for it with lspade-train evaluate --ablations true."


def training_curve(results: dict[str, Any]) -> Chart | Omitted:
    """Loss of the fit by epoch."""
    title = "Training curve"
    history = results.get("training", {}).get("history") or []
    kinds = {"val/loss/mean": "validation", "train/loss/mean": "training, mean over the epoch"}
    series = tuple(
        Series(
            label,
            [epoch["epoch"] for epoch in history],
            [epoch.get(name) for epoch in history],
            cycle_style(index),
        )
        for index, (name, label) in enumerate(kinds.items())
        if any(epoch.get(name) is not None for epoch in history)
    )
    if not series:
        return Omitted(title, "The heads do not record their fit, or it did not validate.")
    heads = label_of(exit_lens(results))
    return Chart(
        name="training_curve",
        title=f"{title}: {heads}",
        note=f"{results['name']}, mean over the layers, seed {results['seed']}",
        caption=f"Cross-entropy of {heads} with its target's distribution, whose entropy is the "
        "least that it can be.",
        x_label="epoch",
        y_label="loss (nats)",
        series=series,
        whole_x=True,
    )


def cross_task_heatmap(results: dict[str, Any]) -> Heatmap | Omitted:
    """Heads and thresholds of task i, used on task j."""
    title = "Transfer between tasks"
    cross = results["cross_task"]
    if not cross:
        return Omitted(title, "Not measured: ask for it with lspade-train evaluate --cross.")
    cells = [[cell and cell["policy"] for cell in row] for row in cross["cells"]]
    return Heatmap(
        name="cross_task",
        title=title,
        note=f"heads and threshold of one task used on another, seed {results['seed']}",
        caption="Heads and threshold of the row's task (chosen on its own validation split) used "
        "on the column's task without retraining: how often the answer is the full model's, the "
        "accuracy, and the FLOPs saved.",
        x_label="used on",
        y_label="trained and thresholded on",
        rows=[heads["name"] for heads in cross["heads"]],
        columns=[_task(task) for task in cross["tasks"]],
        values=[[cell and 1 - cell["disagreement"] for cell in row] for row in cells],
        texts=[[_text(cell) for cell in row] for row in cells],
        colour_label="answers as the full model (fraction of rows)",
    )


def start_ablation(results: dict[str, Any]) -> Chart | Omitted:
    """SPADE with another start token, without one, and with compact positions."""
    return _variants(
        results,
        "start",
        name="ablation_start",
        title="SPADE with another start",
        caption="SPADE when its start token is another token, a random vector or missing, or when "
        "its two position ids are 0 and 1.",
    )


def heads_ablation(results: dict[str, Any]) -> Chart | Omitted:
    """Heads of other forms and targets."""
    return _variants(
        results,
        "heads",
        name="ablation_heads",
        title="Heads trained with other settings",
        caption="Target: SPADE or the full model. Form: full matrix, low rank, or bias only.",
    )


def learning_curve(results: dict[str, Any]) -> Chart | Omitted:
    """KL to SPADE against the number of training rows, at a low, a middle and a high layer."""
    title = "Learning curve"
    variants = (results["ablations"] or {}).get("rows")
    if not variants:
        return Omitted(title, NO_ABLATIONS)
    if any(variant["kl_to_spade"] is None for variant in variants):
        return Omitted(title, "Heads fitted over the choices have no KL over the vocabulary.")
    layers = results["layers"]
    places = sorted({0, len(layers) // 2, len(layers) - 1})
    rows = [variant["rows"] for variant in variants]
    series = tuple(
        Series(
            f"layer {layers[place]}",
            rows,
            [v["kl_to_spade"][place] for v in variants],
            cycle_style(index),
        )
        for index, place in enumerate(places)
    )
    return Chart(
        name="learning_curve",
        title=title,
        note=run_note(results, labelled=False, interval=False),
        caption="KL(SPADE || heads) on these rows after training on fewer rows.",
        x_label="training rows",
        y_label="KL to SPADE (nats)",
        series=series,
        log_x=True,
        log_y=True,
    )


def _variants(results: dict[str, Any], kind: str, **described: Any) -> Chart | Omitted:
    variants = (results["ablations"] or {}).get(kind)
    if not variants:
        return Omitted(described["title"], NO_ABLATIONS)
    labelled = results["n_labelled"] > 0
    metric = "accuracy" if labelled else "agrees_model"
    variants = [variant for variant in variants if variant[metric] is not None]
    if not variants:
        why = "Heads over the choices cannot be compared without labels."
        return Omitted(described["title"], why)
    series = tuple(
        Series(
            variant["label"],
            results["layers"],
            variant[metric],
            cycle_style(index),
            low=[low for low, _ in variant[f"{metric}_interval"]],
            high=[high for _, high in variant[f"{metric}_interval"]],
        )
        for index, variant in enumerate(variants)
    )
    return Chart(
        note=run_note(results, labelled=labelled),
        x_label=LAYER,
        y_label=f"{'accuracy' if labelled else 'agreement with the full model'} (fraction of rows)",
        series=series,
        whole_x=True,
        **described,
    )


def _task(task: dict[str, Any]) -> str:
    full = task["full_model"]
    accuracy = "" if full is None else f"\nmodel: {full:.3f}"
    return f"{task['name']}\nn = {task['n']:,}{accuracy}"


def _text(row: dict[str, Any] | None) -> str:
    """Text of a cell: agreement, accuracy and FLOPs saved, or that the heads cannot be used."""
    if row is None:
        return "cannot\nbe used"
    accuracy = "" if row["accuracy"] is None else f"\naccuracy {row['accuracy']:.3f}"
    return f"{1 - row['disagreement']:.3f}{accuracy}\nsaves {row['compute_saved']:.0%}"

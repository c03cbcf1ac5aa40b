"""The numbers of `results.json` as tables, for the report and a dashboard, without rounding."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lspade_train.probes.lenses import L_SPADE, label_of, lens_of_target

Value = float | int | str | None

METRICS = {
    "accuracy": "Accuracy",
    "accuracy_vocabulary": "Accuracy over the vocabulary",
    "answer_agrees_model": "Agreement of the answers with the full model's",
    "agrees_model": "Agreement with the full model",
    "agrees_spade": "Agreement with SPADE",
    "kl_to_model": "KL to the full model (nats)",
    "kl_to_spade": "KL to SPADE (nats)",
    "entropy": "Entropy (nats)",
    "ece": "Expected calibration error",
    "auroc": "AUROC of low entropy for a correct answer",
    "auroc_confidence": "AUROC of confidence for a correct answer",
    "aurc": "Area under risk-coverage",
}


@dataclass(frozen=True)
class Table:
    """A table with headings.

    Attributes:
        name: identifies the table in a dashboard.
        title: title of the table.
        columns: headings.
        rows: values as in `results.json`.
    """

    name: str
    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Value, ...], ...]


@dataclass(frozen=True)
class Ranged:
    """A value and the ends of its interval, in one cell."""

    value: Value
    low: Value
    high: Value


def merged(table: Table) -> tuple[list[str], list[list[Value | Ranged]]]:
    """Columns and rows with each interval in the cell of its value."""
    lows = {i for i, name in enumerate(table.columns) if name.endswith("low")}
    kept = [i for i in range(len(table.columns)) if not {i, i - 1} & lows]

    def cell(row: tuple[Value, ...], place: int) -> Value | Ranged:
        return Ranged(*row[place : place + 3]) if place + 1 in lows else row[place]

    rows = [[cell(row, place) for place in kept] for row in table.rows]
    return [table.columns[place] for place in kept], rows


def exit_lens(results: dict[str, Any]) -> str:
    """Key of the lens whose entropy decides exits: the lens of the folder's own heads."""
    key = lens_of_target(results["heads"]["target"]).key
    # Earlier versions recorded every folder's heads as L-SPADE, including tuned lenses.
    return key if key in results["lenses"] else L_SPADE.key


def all_tables(results: dict[str, Any]) -> list[Table]:
    """Every table that the results have data for."""
    found = [layer_table(results, metric) for metric in METRICS]
    extra = [
        full_model_table(results),
        exits_table(results),
        baselines_table(results),
        cross_task_table(results),
    ]
    tables = [*found, *extra, *ablation_tables(results)]
    return [table for table in tables if table.rows]


def layer_table(results: dict[str, Any], metric: str) -> Table:
    """One metric by layer, with its interval if it has one; no rows if it was not measured."""
    lenses = {k: lens for k, lens in results["lenses"].items() if lens[metric] is not None}
    columns, values = ["layer"], [list[Value](results["layers"])]
    for key, lens in lenses.items():
        columns.append(label_of(key))
        values.append(lens[metric])
        intervals: list[list[float]] | None = lens.get(f"{metric}_interval")
        if intervals:
            columns += [f"{label_of(key)} low", f"{label_of(key)} high"]
            values += [[low for low, _ in intervals], [high for _, high in intervals]]
    rows = tuple(zip(*values, strict=True)) if lenses else ()
    return Table(metric, METRICS[metric], tuple(columns), rows)


def full_model_table(results: dict[str, Any]) -> Table:
    """The full model's metrics."""
    found = results["full_model"]
    names = [name for name in METRICS if found.get(name) is not None]
    rows = tuple((METRICS[name], found[name]) for name in names)
    return Table("full_model", "Full model", ("metric", "value"), rows)


def exits_table(results: dict[str, Any]) -> Table:
    """SPADE-EXIT at the paper's thresholds and with the policy."""
    rows: list[tuple[Value, ...]] = []
    if results["exits"]:
        found = results["exits"]
        policy = found["policy"]
        rows.append(("never", *_exit_row(found["never"])))
        rows += [(f"{row['threshold']:g} nats", *_exit_row(row)) for row in found["paper"]]
        if policy and policy["row"]:
            rows.append((policy.get("label", "policy.json"), *_exit_row(policy["row"])))
    columns = ("threshold", "accuracy", "low", "high", "drop", "disagreement",
               "mean exit layer", "FLOPs saved")  # fmt: skip
    return Table("exits", "SPADE-EXIT", columns, tuple(rows))


def baselines_table(results: dict[str, Any]) -> Table:
    """Other early-exit methods on the same rows, followed by the saved policy."""
    found = results.get("baselines")
    columns = ("rule", "source", "setting", "accuracy", "drop", "disagreement", "mean exit layer",
               "FLOPs saved", "of the oracle", "within the budget where it was set")  # fmt: skip
    keys = ("accuracy", "drop", "disagreement", "mean_exit_layer", "compute_saved", "efficiency")
    rows: list[tuple[Value, ...]] = []
    for rule in found["rules"] if found else ():
        within = "yes" if rule["within_budget"] else "no"
        values = [rule["row"][key] for key in keys]
        rows.append((rule["name"], rule["source"], rule["setting"], *values, within))
    policy = (results["exits"] or {}).get("policy")
    if rows and policy and policy["row"]:
        values = [policy["row"].get(key) for key in keys]
        rows.append(("policy.json", "calibrate, with a guarantee", "", *values, "tested"))
    title = "Other early-exit methods on the same rows"
    if found:
        title += (
            f"; tuned on {found['n']:,} rows for a risk of {found['budget']:g}, no statistical "
            "guarantee"
        )
    return Table("baselines", title, columns, tuple(rows))


def cross_task_table(results: dict[str, Any]) -> Table:
    """Heads and threshold of task i on task j, one row per pair."""
    cross = results["cross_task"]
    rows: list[tuple[Value, ...]] = []
    for heads, cells in zip(cross["heads"], cross["cells"], strict=True) if cross else ():
        for task, cell in zip(cross["tasks"], cells, strict=True):
            row = _exit_row(cell["policy"]) if cell else (None,) * 7
            rows.append((heads["name"], task["name"], task["n"], task["full_model"], *row))
    columns = ("heads and threshold of", "used on", "n", "full model's accuracy", "accuracy", "low",
               "high", "drop", "disagreement", "mean exit layer",
               "FLOPs saved")  # fmt: skip
    return Table("cross_task", "Transfer between tasks", columns, tuple(rows))


def ablation_tables(results: dict[str, Any]) -> list[Table]:
    """One table per kind of ablation: a row per variant and layer."""
    titles = {
        "start": "SPADE with another start",
        "heads": "Heads trained with other settings",
        "rows": "Learning curve",
    }
    metrics = ("accuracy", "answer_agrees_model", "agrees_model", "kl_to_model", "kl_to_spade")
    columns = ("variant", "training rows", "parameters", "layer", *(METRICS[m] for m in metrics))
    return [
        Table(f"ablation_{kind}", titles[kind], columns, _variants(results, variants, metrics))
        for kind, variants in (results["ablations"] or {}).items()
    ]


def _variants(
    results: dict[str, Any], variants: Sequence[dict[str, Any]], metrics: Sequence[str]
) -> tuple[tuple[Value, ...], ...]:
    return tuple(
        (
            variant["label"], variant["rows"], variant["parameters"], layer,
            *(None if variant[metric] is None else variant[metric][place] for metric in metrics),
        )
        for variant in variants
        for place, layer in enumerate(results["layers"])
    )  # fmt: skip


def _exit_row(row: dict[str, Any]) -> tuple[Value, ...]:
    low, high = row["accuracy_interval"] or (None, None)
    return (
        row["accuracy"], low, high, row["drop"], row["disagreement"], row["mean_exit_layer"],
        row["compute_saved"],
    )  # fmt: skip

"""The numbers of `results.json` as tables, for the page and for a dashboard. Rounds nothing."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

Value = float | int | str | None

LENSES = {
    "logit_lens": "logit lens",
    "tuned_lens": "tuned lens",
    "l_spade": "L-SPADE",
    "spade": "SPADE",
}
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
    "auroc": "AUROC of low entropy for a right answer",
    "auroc_confidence": "AUROC of confidence for a right answer",
    "aurc": "Area under risk-coverage",
}


@dataclass(frozen=True)
class Table:
    """Rows under headings.

    Attributes:
        name: of the table in a dashboard.
        title: what it shows.
        columns: headings.
        rows: values as in `results.json`.
    """

    name: str
    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Value, ...], ...]


def all_tables(results: dict[str, Any]) -> list[Table]:
    """Every table that the results allow."""
    found = [by_layer(results, metric) for metric in METRICS]
    extra = [full_model(results), exits(results), cross_task(results), *ablations(results)]
    return [table for table in [*found, *extra] if table.rows]


def by_layer(results: dict[str, Any], metric: str) -> Table:
    """One metric by layer, with its interval where it has one; no rows where it has no numbers."""
    lenses = {n: lens for n, lens in results["lenses"].items() if lens[metric] is not None}
    columns, values = ["layer"], [list[Value](results["layers"])]
    for name, lens in lenses.items():
        columns.append(LENSES[name])
        values.append(lens[metric])
        intervals: list[list[float]] | None = lens.get(f"{metric}_interval")
        if intervals:
            columns += [f"{LENSES[name]} low", f"{LENSES[name]} high"]
            values += [[low for low, _ in intervals], [high for _, high in intervals]]
    rows = tuple(zip(*values, strict=True)) if lenses else ()
    return Table(metric, METRICS[metric], tuple(columns), rows)


def full_model(results: dict[str, Any]) -> Table:
    """The full model's own numbers."""
    found = results["full_model"]
    names = [name for name in METRICS if found.get(name) is not None]
    rows = tuple((METRICS[name], found[name]) for name in names)
    return Table("full_model", "Full model", ("metric", "value"), rows)


def exits(results: dict[str, Any]) -> Table:
    """SPADE-EXIT at the paper's thresholds and under the policy."""
    rows: list[tuple[Value, ...]] = []
    if results["exits"]:
        found = results["exits"]
        policy = found["policy"]
        rows.append(("never", *_exit_row(found["never"])))
        rows += [(f"{row['threshold']:g} nats", *_exit_row(row)) for row in found["paper"]]
        if policy and policy["row"]:
            rows.append((policy.get("label", "policy.json"), *_exit_row(policy["row"])))
    columns = ("threshold", "accuracy", "low", "high", "drop", "answers unlike the model's",
               "mean exit layer", "FLOPs saved")  # fmt: skip
    return Table("exits", "SPADE-EXIT", columns, tuple(rows))


def cross_task(results: dict[str, Any]) -> Table:
    """Heads and threshold of task i on task j, one row per pair."""
    cross = results["cross_task"]
    rows: list[tuple[Value, ...]] = []
    for heads, cells in zip(cross["heads"], cross["cells"], strict=True) if cross else ():
        for task, cell in zip(cross["tasks"], cells, strict=True):
            row = _exit_row(cell["policy"]) if cell else (None,) * 7
            rows.append((heads["name"], task["name"], task["n"], task["full_model"], *row))
    columns = ("heads and threshold of", "used on", "n", "full model's accuracy", "accuracy", "low",
               "high", "drop", "answers unlike the model's", "mean exit layer",
               "FLOPs saved")  # fmt: skip
    return Table("cross_task", "Transfer between tasks", columns, tuple(rows))


def ablations(results: dict[str, Any]) -> list[Table]:
    """One table per kind of ablation: a row per variant and layer."""
    titles = {
        "start": "SPADE with another start",
        "heads": "L-SPADE heads trained in other ways",
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

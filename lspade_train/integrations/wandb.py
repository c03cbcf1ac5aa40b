"""Evaluations and audits in Weights & Biases: the numbers, tables and figures of the reports."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lspade_train.io.layout import RESULTS
from lspade_train.io.tracking import start_run, wandb_is_on
from lspade_train.policies.audit import AuditState
from lspade_train.reporting.audit import audit_tables, verdict
from lspade_train.reporting.page import REPORT
from lspade_train.reporting.tables import METRICS, Table, all_tables

PROJECT = "lspade-train"


def log_results(results: dict[str, Any], folder: Path, images: Sequence[Path]) -> None:
    """Log one evaluation as a separate run; does nothing if W&B is disabled.

    History, one step per layer with `eval/layer` as x axis: `eval/METRIC/LENS`. Summary:
    `eval/full_model/METRIC`, `eval/policy/VALUE`. `tables/NAME` and `figures/NAME` are the
    report's tables and figures; `results.json` and `report.html` are an artifact.

    Args:
        results: as in `results.json`.
        folder: the heads folder; the run's files are written to its `wandb/`.
        images: files from `plots.write_figures`; the PNGs are logged.
    """
    if not wandb_is_on():
        return
    import wandb

    about = {name: results[name] for name in ("split", "part", "provenance")}
    config = {**results["recipe"], **about}
    with start_run(
        project=PROJECT, name=results["name"], job_type="evaluate", dir=folder, config=config
    ) as run:
        run.define_metric("eval/layer")
        run.define_metric("eval/*", step_metric="eval/layer")
        for row in layer_rows(results):
            run.log(row)
        run.summary.update(summary(results))
        tables = _logged(all_tables(results))
        drawn = [path for path in images if path.suffix == ".png"]
        run.log(tables | {f"figures/{path.stem}": wandb.Image(str(path)) for path in drawn})
        artifact = wandb.Artifact(f"{results['name']}-evaluation", type="evaluation")
        for name in (RESULTS, REPORT):
            if (folder / name).exists():
                artifact.add_file(str(folder / name))
        run.log_artifact(artifact)


def log_audit(state: AuditState, record: Mapping[str, Any] | None, folder: Path) -> None:
    """Log an audit's state as a separate run.

    One step: `audit/NAME` for each number of `audit_numbers`, and `tables/NAME` for each table that
    the command prints. `audit/verdict` in the summary has its sentences.

    Args:
        state: the audit's state.
        record: `calibration` of its policy; None if not available.
        folder: the run's files are written to its `wandb/`.
    """
    with start_run(
        project=PROJECT, name=f"audit-{folder.name}", job_type="audit", dir=folder,
        config=asdict(state.key),
    ) as run:  # fmt: skip
        run.log(audit_numbers(state) | _logged(audit_tables(state, record)))
        run.summary.update({"audit/verdict": " ".join(verdict(state, record))})


def audit_numbers(state: AuditState) -> dict[str, float]:
    """The numbers of an audit, and `audit/exits/layer_LAYER` for every exit layer seen."""
    seen, (low, high) = state.seen, state.bounds
    model, policy, audit = seen.flops
    found: dict[str, float] = {
        **{f"audit/{name}": getattr(seen, name) for name in ("rows", "exited", "drawn")},
        "audit/failures": seen.failures,
        "audit/disagreement_low": low,
        "audit/disagreement_high": high,
        "audit/budget": state.key.budget,
        "audit/log_evidence": state.log_evidence,
        "audit/alarm": float(state.alarm is not None),
        **{f"audit/exits/layer_{layer:02d}": rows for layer, rows in seen.exits.items()},
    }
    if state.disagreement is not None:
        found["audit/disagreement"] = state.disagreement
    if model:
        found |= {"audit/flops_saved": 1 - policy / model, "audit/flops_of_audit": audit / model}
    return found


def _logged(tables: Sequence[Table]) -> dict[str, Any]:
    """Tables by their names in W&B."""
    import wandb

    return {
        f"tables/{table.name}": wandb.Table(list(table.columns), [list(r) for r in table.rows])
        for table in tables
        if table.rows
    }


def layer_rows(results: dict[str, Any]) -> list[dict[str, float]]:
    """The rows to log, one per layer: `eval/layer` and `eval/METRIC/LENS`."""
    rows: list[dict[str, float]] = [{"eval/layer": layer} for layer in results["layers"]]
    for lens, values in results["lenses"].items():
        for metric in METRICS:
            for row, value in zip(rows, values[metric] or [None] * len(rows), strict=True):
                if value is not None:
                    row[f"eval/{metric}/{lens}"] = value
    return rows


def summary(results: dict[str, Any]) -> dict[str, float]:
    """Summary values of an evaluation: the full model's metrics and the policy's."""
    full = results["full_model"]
    found = {f"eval/full_model/{m}": full[m] for m in METRICS if full.get(m) is not None}
    policy = (results["exits"] or {}).get("policy") or {}
    row = policy.get("row") or {}
    if row:
        found["eval/policy/chosen_on_these_rows"] = policy["chosen_on_these_rows"]
    names = ("accuracy", "drop", "disagreement", "mean_exit_layer", "compute_saved")
    return found | {f"eval/policy/{n}": row[n] for n in names if row.get(n) is not None}

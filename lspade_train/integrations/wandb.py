"""An evaluation in Weights & Biases: the numbers, tables and figures of `results.json`."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lspade_train.io.layout import RESULTS
from lspade_train.reporting.page import REPORT
from lspade_train.reporting.tables import METRICS, all_tables
from lspade_train.training.loggers import start_run, wandb_is_on

PROJECT = "lspade-train"


def log_results(results: dict[str, Any], folder: Path, images: Sequence[Path]) -> None:
    """Log one evaluation as a run of its own; does nothing where W&B is off.

    History, one step per layer with `eval/layer` as x axis: `eval/METRIC/LENS`. Summary:
    `eval/full_model/METRIC`, `eval/policy/VALUE`. `tables/NAME` and `figures/NAME` hold the
    report's tables and figures; `results.json` and `report.html` are an artifact.

    Args:
        results: as in `results.json`.
        folder: the heads folder; the run's files are written to `wandb/` there.
        images: files that `plots.write_figures` wrote; the PNGs are logged.
    """
    if not wandb_is_on():
        return
    import wandb

    about = {name: results[name] for name in ("split", "part", "provenance")}
    config = {**results["recipe"], **about}
    with start_run(
        folder, project=PROJECT, name=results["name"], job_type="evaluate", config=config
    ) as run:
        run.define_metric("eval/layer")
        run.define_metric("eval/*", step_metric="eval/layer")
        for row in layer_rows(results):
            run.log(row)
        run.summary.update(summary(results))
        tables = {
            f"tables/{table.name}": wandb.Table(list(table.columns), [list(r) for r in table.rows])
            for table in all_tables(results)
        }
        drawn = [path for path in images if path.suffix == ".png"]
        run.log(tables | {f"figures/{path.stem}": wandb.Image(str(path)) for path in drawn})
        artifact = wandb.Artifact(f"{results['name']}-evaluation", type="evaluation")
        for name in (RESULTS, REPORT):
            if (folder / name).exists():
                artifact.add_file(str(folder / name))
        run.log_artifact(artifact)


def layer_rows(results: dict[str, Any]) -> list[dict[str, float]]:
    """The rows logged, one per layer: `eval/layer` and `eval/METRIC/LENS`."""
    rows: list[dict[str, float]] = [{"eval/layer": layer} for layer in results["layers"]]
    for lens, values in results["lenses"].items():
        for metric in METRICS:
            for row, value in zip(rows, values[metric] or [None] * len(rows), strict=True):
                if value is not None:
                    row[f"eval/{metric}/{lens}"] = value
    return rows


def summary(results: dict[str, Any]) -> dict[str, float]:
    """One number per evaluation: the full model's metrics and the policy's."""
    full = results["full_model"]
    found = {f"eval/full_model/{m}": full[m] for m in METRICS if full.get(m) is not None}
    policy = (results["exits"] or {}).get("policy") or {}
    row = policy.get("row") or {}
    if row:
        found["eval/policy/chosen_on_these_rows"] = policy["chosen_on_these_rows"]
    names = ("accuracy", "drop", "disagreement", "mean_exit_layer", "compute_saved")
    return found | {f"eval/policy/{n}": row[n] for n in names if row.get(n) is not None}

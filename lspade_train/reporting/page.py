"""`report.html`, from the files of a heads folder."""

import json
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, PackageLoader
from markupsafe import Markup

from lspade_train.errors import ArtifactError
from lspade_train.io.layout import CARD, CONFIG, POLICY, RESULTS, read_results
from lspade_train.io.storage import read_json, write_text
from lspade_train.policies.audit import audit_of
from lspade_train.policies.promise import promise
from lspade_train.reporting.plots import Omitted, all_figures
from lspade_train.reporting.plots.interactive import plotly
from lspade_train.reporting.rows import rows_measured
from lspade_train.reporting.tables import Value, all_tables
from lspade_train.reporting.verdict import blind, verdict

REPORT = "report.html"
FORMAT_VERSION = 2


def write_report(folder: Path) -> Path:
    """Write `report.html` into a heads folder, from the files there.

    Args:
        folder: holds `results.json`; `config.json`, `policy.json`, the model card and `figures/`
            are shown or linked if present.

    Returns:
        The path of the report.

    Raises:
        ArtifactError: no results, results of another format, or the folder cannot be written.
    """
    from plotly.offline import get_plotlyjs

    results = read_results(folder)
    if results.get("format_version") != FORMAT_VERSION:
        raise ArtifactError(
            f"{folder / RESULTS} has format_version {results.get('format_version')!r}; a report "
            f"needs {FORMAT_VERSION}. Run lspade-train evaluate --config RECIPE.yaml again."
        )
    found = all_figures(results)
    figures = [figure for figure in found if not isinstance(figure, Omitted)]
    pages = Environment(loader=PackageLoader("lspade_train.reporting", ""), autoescape=True)
    page = pages.get_template("template.html").render(
        results=results,
        rows=rows_measured(results),
        summary=[*summary(results), *_promise(folder, results)],
        figures=figures,
        omitted=[figure for figure in found if isinstance(figure, Omitted)],
        tables=all_tables(results),
        show=_show,
        files=[name for name in (CARD, RESULTS, CONFIG, POLICY) if (folder / name).exists()],
        recipe=yaml.safe_dump(results["recipe"], sort_keys=False),
        training=_training(folder),
        specs=_script_json({figure.name: plotly(figure) for figure in figures}),
        library=Markup(get_plotlyjs()),
    )
    write_text(folder / REPORT, page, ArtifactError)
    return folder / REPORT


def summary(results: dict[str, Any]) -> list[str]:
    """The verdict, and what it is measured against, as sentences."""
    full = results["full_model"]
    if full["accuracy"] is None:
        against = "These rows have no labels: lenses are compared with the full model."
    else:
        low, high = full["accuracy_interval"]
        chance = blind(full)
        against = f"The full model's accuracy is {full['accuracy']:.1%} [{low:.1%}, {high:.1%}]"
        against += "." if chance is None else f"; blind answers are right in {chance:.1%}."
    return [*verdict(results), against]


def _promise(folder: Path, results: dict[str, Any]) -> list[str]:
    """What policy.json promises, where it is about these heads."""
    if not (folder / POLICY).exists():
        return []
    policy = read_json(folder / POLICY, ArtifactError)
    if policy.get("heads_digest") not in {None, results["heads"].get("weights_sha256")}:
        return []
    return [promise(policy.get("calibration") or {}, audit_of(folder))]


def _training(folder: Path) -> dict[str, Any]:
    """How the heads were trained, from config.json; empty without one."""
    path = folder / CONFIG
    training = read_json(path, ArtifactError).get("training", {}) if path.exists() else {}
    return {
        "optimiser steps": training.get("steps"),
        "trained with": training.get("versions"),
        "trained from source": training.get("source"),
        "caches": training.get("caches"),
    }


def _show(value: Value) -> str:
    """Floats with three decimals; integers and text unchanged."""
    if value is None:
        return "-"
    return f"{value:.3f}" if isinstance(value, float) else str(value)


def _script_json(value: Any) -> Markup:
    """JSON escaped so that no text in it can close the enclosing script element."""
    return Markup(json.dumps(value, allow_nan=False).replace("<", "\\u003c"))

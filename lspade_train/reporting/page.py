"""`report.html`, from the files of a heads folder."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, PackageLoader
from markupsafe import Markup

from lspade_train.errors import ArtifactError
from lspade_train.io.layout import CARD, CONFIG, POLICY, RESULTS, read_results
from lspade_train.io.storage import read_json, write_text
from lspade_train.io.text import duration
from lspade_train.policies.audit import audit_of
from lspade_train.policies.promise import promise
from lspade_train.probes.lenses import label_of
from lspade_train.reporting.plots import Omitted, all_figures
from lspade_train.reporting.plots.interactive import plotly
from lspade_train.reporting.rows import rows_measured, short_model
from lspade_train.reporting.tables import Ranged, Value, all_tables, exit_lens, merged
from lspade_train.reporting.verdict import chance_accuracy, verdict

REPORT = "report.html"
FORMAT_VERSION = 2
EXAMPLE = {
    "end of the prompt": "prompt_end",
    "full model's answer": "full_model",
    "its probability": "confidence",
    "policy's answer": "exit",
    "exit layer": "layer",
    "correct answer": "label",
}
"""Columns of the examples, and their keys in `results.json`."""


def write_report(folder: Path) -> Path:
    """Write `report.html` into a heads folder, from the files there.

    Args:
        folder: folder with `results.json`; `config.json`, `policy.json`, the model card and
            `figures/` are shown or linked if present.

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
        sentences=verdict(results),
        promise=_promise(folder, results),
        against=_against(results),
        facts=facts(results),
        examples=results.get("examples"),
        example_columns=EXAMPLE,
        figures=figures,
        omitted=[figure for figure in found if isinstance(figure, Omitted)],
        tables=[(table, *merged(table)) for table in all_tables(results)],
        show=_show,
        files=[name for name in (CARD, RESULTS, CONFIG, POLICY) if (folder / name).exists()],
        recipe=yaml.safe_dump(results["recipe"], sort_keys=False),
        provenance=[*flat(provenance(folder, results))],
        specs=_script_json({figure.name: plotly(figure) for figure in figures}),
        library=Markup(get_plotlyjs()),
    )
    write_text(folder / REPORT, page, ArtifactError)
    return folder / REPORT


def facts(results: dict[str, Any]) -> dict[str, str]:
    """What was measured and how long it took, by name; omits values that are not recorded."""
    n, labelled, interval = results["n"], results["n_labelled"], results["interval"]
    rows = f"{n:,} ({rows_measured(results)})"
    if labelled != n:
        rows += f", {labelled:,} with a label"
    training, evaluated = results.get("training") or {}, results["provenance"].get("seconds")
    found = {
        "Model": f"{short_model(results)}, {results['num_layers']} blocks",
        "Task": results["task"],
        "Rows": rows,
        "Heads": f"{label_of(exit_lens(results))}, {results['heads']['form']}",
        "Intervals": f"{interval['method']}, {interval['level']:.0%}, {interval['resamples']:,} "
        f"resamples, seed {interval['seed']}",
    }
    if training.get("seconds") is not None:
        found["Fit took"] = f"{duration(training['seconds'])} ({training['steps']:,} steps)"
    if evaluated is not None:
        found["Evaluation took"] = duration(evaluated)
    return found


def provenance(folder: Path, results: dict[str, Any]) -> dict[str, Any]:
    """Provenance of the results and the heads, from results.json and config.json."""
    path = folder / CONFIG
    training = read_json(path, ArtifactError).get("training", {}) if path.exists() else {}
    model = {name: results[name] for name in ("model_id", "revision", "dtype", "vocab_size")}
    fit = {
        name: training.get(name) for name in ("steps", "seconds", "versions", "source", "caches")
    }
    return {
        "model": model,
        "heads": results["heads"],
        "fit": fit,
        "evaluate": results["provenance"],
    }


def flat(value: dict[str, Any], *above: str) -> Iterator[tuple[str, str]]:
    """A nested mapping as rows of a table; omits null and empty values."""
    for name, item in value.items():
        if isinstance(item, dict):
            yield from flat(item, *above, str(name))
        elif item not in (None, []):
            words = ", ".join(map(str, item)) if isinstance(item, list) else str(item)
            yield ": ".join([*above, str(name)]), words


def _against(results: dict[str, Any]) -> str:
    """A sentence on what the lenses are measured against."""
    full = results["full_model"]
    if full["accuracy"] is None:
        return "These rows have no labels: lenses are compared with the full model."
    low, high = full["accuracy_interval"]
    chance = chance_accuracy(full)
    against = f"The full model's accuracy is {full['accuracy']:.1%} [{low:.1%}, {high:.1%}]"
    return against + ("." if chance is None else f"; chance accuracy: {chance:.1%}.")


def _promise(folder: Path, results: dict[str, Any]) -> str | None:
    """The guarantee in policy.json, if it is for these heads."""
    if not (folder / POLICY).exists():
        return None
    policy = read_json(folder / POLICY, ArtifactError)
    if policy.get("heads_digest") not in {None, results["heads"].get("weights_sha256")}:
        return None
    return promise(policy.get("calibration") or {}, audit_of(folder))


def _show(value: Value | Ranged) -> Markup | str:
    """Floats with three decimals, an interval under its value; integers and text unchanged."""
    if isinstance(value, Ranged):
        ends = f"{_show(value.low)}\u2013{_show(value.high)}"
        return Markup('{} <span class="ends">{}</span>').format(_show(value.value), ends)
    if value is None:
        return "-"
    return f"{value:.3f}" if isinstance(value, float) else str(value)


def _script_json(value: Any) -> Markup:
    """JSON escaped so that no text in it can close the enclosing script element."""
    return Markup(json.dumps(value, allow_nan=False).replace("<", "\\u003c"))

"""Figures: they show the results' numbers, work in greyscale, and omit what is missing."""

import copy
import json
import re
import subprocess
import sys
from dataclasses import replace

import pytest
from PIL import Image

from lspade_train.probes.lenses import LENSES, label_of
from lspade_train.reporting.plots import (
    Bars,
    Chart,
    Heatmap,
    Omitted,
    all_figures,
    compare_accuracy,
    comparison,
    write_figures,
)
from lspade_train.reporting.plots.charts import CYCLE
from lspade_train.reporting.plots.interactive import plotly
from lspade_train.reporting.plots.static import draw


@pytest.fixture
def results(evaluated_once):
    return evaluated_once.results


def row(**changes):
    values = {
        "threshold": 0.5, "accuracy": 0.8, "accuracy_interval": [0.7, 0.9], "drop": 0.1,
        "drop_interval": [0.0, 0.2], "disagreement": 0.2, "disagreement_interval": [0.1, 0.3],
        "mean_exit_layer": 2.5, "compute_saved": 0.3, "efficiency": 0.5,
        "exit_counts": [3, 4, 1, 4],
    }  # fmt: skip
    return values | changes


def variant(results, name, rows=None):
    count = len(results["layers"])
    numbers = {m: [0.5] * count for m in ("accuracy", "agrees_model", "answer_agrees_model")}
    intervals = {f"{m}_interval": [[0.4, 0.6]] * count for m in numbers}
    kl = {m: [0.1 * (i + 1) for i in range(count)] for m in ("kl_to_model", "kl_to_spade")}
    sizes = {"rows": rows, "parameters": 10}
    return {"name": name, "label": name, **sizes, **numbers, **intervals, **kl}


def with_extras(results):
    """Add the output of `--cross` and `--ablations`, in the documented structure."""
    task = {"name": "toy", "n": 12, "full_model": 0.9}
    results["cross_task"] = {
        "tasks": [task, {**task, "name": "other", "full_model": None}],
        "heads": [{"name": "toy"}, {"name": "other"}],
        "cells": [
            [{"policy": row()}, {"policy": row(accuracy=None)}],
            [{"policy": row(disagreement=0.4)}, None],
        ],
    }
    results["ablations"] = {
        "start": [variant(results, "original"), variant(results, "no start token")],
        "heads": [variant(results, "spade"), variant(results, "final")],
        "rows": [variant(results, f"{n} rows", n) for n in (12, 24, 48)],
    }
    return results


def by_name(results):
    return {f.name: f for f in all_figures(results) if not isinstance(f, Omitted)}


def test_the_figures_show_the_numbers_of_the_results(results):
    figures = by_name(results)
    for name, metric in {
        "accuracy_by_layer": "accuracy",
        "agreement_by_layer": "agrees_model",
        "kl_by_layer": "kl_to_model",
        "calibration_by_layer": "ece",
    }.items():
        drawn = {series.label: series for series in figures[name].series}
        for lens, values in results["lenses"].items():
            series = drawn[label_of(lens)]
            assert list(series.x) == results["layers"]
            assert list(series.y) == values[metric]
            if f"{metric}_interval" in values:
                pairs = [list(p) for p in zip(series.low, series.high, strict=True)]
                assert pairs == values[f"{metric}_interval"]
    level = figures["accuracy_by_layer"].levels[0]
    assert level.value == results["full_model"]["accuracy"]


def test_the_sweep_shows_the_costs_of_the_results(results):
    grid = by_name(results)["exits_by_flops"].series[0]
    rows = results["exits"]["grid"]
    assert list(grid.x) == [1 - row["compute_saved"] for row in rows]
    assert list(grid.y) == [row["accuracy"] for row in rows]
    paper = by_name(results)["exits_by_layer"].series[1]
    assert paper.texts == ["0.5", "1", "1.5", "2"]
    assert list(paper.x) == [row["mean_exit_layer"] for row in results["exits"]["paper"]]


def test_the_policy_is_marked_and_its_exits_are_shown(results):
    results["exits"]["policy"] = {"exit_layers": results["exits"]["exit_layers"], "row": row()}
    figures = by_name(results)
    marked = {series.label: series for series in figures["exits_by_layer"].series}
    assert (marked["policy.json"].x, marked["policy.json"].y) == ([2.5], [0.8])
    assert figures["exit_histogram"].groups["policy.json"] == [3 / 12, 4 / 12, 1 / 12, 4 / 12]


def test_equal_compute_shows_fixed_layers_the_policy_and_chance(results):
    results["exits"]["policy"] = {"exit_layers": results["exits"]["exit_layers"], "row": row()}
    figure = by_name(results)["iso_compute"]
    drawn = {series.label: series for series in figure.series}
    fixed = results["iso_compute"]["lenses"]["l_spade"]
    assert list(drawn["L-SPADE"].x) == fixed["flops"]
    assert list(drawn["L-SPADE"].y) == fixed["accuracy"]
    star = drawn["policy.json"]
    assert (list(star.x), list(star.y), star.style.marker) == ([0.7], [0.8], "star")
    levels = {level.label: level.value for level in figure.levels}
    assert levels["chance"] == results["full_model"]["chance"]


def test_the_training_curve_matches_the_fit(evaluated_once, results):
    config = json.loads((evaluated_once.folder / "config.json").read_text(encoding="utf-8"))
    history = config["training"]["history"]
    validation, training = by_name(results)["training_curve"].series
    assert list(validation.x) == [1, 2]
    assert list(validation.y) == [epoch["val/loss/mean"] for epoch in history]
    assert validation.y[-1] == config["training"]["metrics"]["val/loss/mean"]
    assert all(value > 0 for value in training.y)


def test_a_gates_predicted_doubt_is_drawn_against_the_observed_errors(results):
    results["exits"]["reliability"] |= {"is_doubt": True, "measure": "gate", "of": "policy"}
    *_, doubts = by_name(results)["reliability"].series
    assert list(doubts.y) == [1 - x for x in doubts.x]
    assert "policy.json" in by_name(results)["reliability"].caption


def test_the_matrix_marks_where_heads_cannot_be_used(results):
    matrix = by_name(with_extras(results))["cross_task"]
    assert isinstance(matrix, Heatmap)
    assert [list(values) for values in matrix.values] == [[0.8, 0.8], [0.6, None]]
    assert matrix.texts[0][0] == "0.800\naccuracy 0.800\nsaves 30%"
    assert matrix.texts[1][1] == "cannot\nbe used"


def test_the_learning_curve_is_plotted_over_training_rows(results):
    curve = by_name(with_extras(results))["learning_curve"]
    assert [list(series.x) for series in curve.series] == [[12, 24, 48]] * 3
    assert [series.label for series in curve.series] == ["layer 1", "layer 2", "layer 3"]


def test_every_figure_has_labelled_axes_n_and_seed(results):
    for figure in by_name(with_extras(results)).values():
        assert figure.x_label
        assert figure.y_label
        assert "seed 0" in figure.note
        sizes = figure.columns if isinstance(figure, Heatmap) else [figure.note]
        assert figure.name == "training_curve" or all("n = 12" in text for text in sizes)
        banded = isinstance(figure, Chart) and any(s.low is not None for s in figure.series)
        assert not banded or re.search("95% (bootstrap|Wilson) intervals|quartiles", figure.note)


def test_no_two_series_differ_by_colour_alone(results):
    for figure in by_name(with_extras(results)).values():
        if isinstance(figure, Chart):
            joined = [(s.style.marker, s.style.dash) for s in figure.series if s.joined]
            assert len(joined) == len(set(joined)), figure.name
    for styles in (CYCLE, [lens.style for lens in LENSES.values()]):
        assert len({(one.marker, one.dash) for one in styles}) == len(styles)


def test_evaluate_writes_each_figure_as_png_and_svg(evaluated_once, results):
    paths = [*(evaluated_once.folder / "figures").iterdir()]
    assert {p.name for p in paths} == {f"{n}.{s}" for n in by_name(results) for s in ("png", "svg")}
    assert_drawn(paths)


def test_figures_of_ablations_and_other_tasks_are_drawn(results, tmp_path):
    usual = set(by_name(results))
    more = [f for name, f in by_name(with_extras(results)).items() if name not in usual]
    assert {"cross_task", "learning_curve"} <= {figure.name for figure in more}
    assert_drawn([path for figure in more for path in draw(figure, tmp_path / figure.name)])


def assert_drawn(paths):
    for path in paths:
        if path.suffix == ".png":
            with Image.open(path) as image:
                assert image.size == (1024, 672)
                assert len(image.convert("L").getcolors(1 << 16)) > 20  # not blank
        else:
            assert path.read_text(encoding="utf-8").startswith("<?xml")


def test_new_figures_replace_earlier_ones(results, tmp_path):
    (tmp_path / "of_an_earlier_run.png").write_bytes(b"old")
    (tmp_path / "kept.txt").write_text("mine")
    paths = write_figures(results, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {p.name for p in paths} | {"kept.txt"}


def test_equal_results_give_identical_files(results, tmp_path):
    figure = by_name(results)["accuracy_by_layer"]
    one, two = draw(figure, tmp_path / "one"), draw(figure, tmp_path / "two")
    assert [path.read_bytes() for path in one] == [path.read_bytes() for path in two]


def test_plotly_validates_every_figure(results):
    graph_objects = pytest.importorskip("plotly.graph_objects")
    results["exits"]["policy"] = {"exit_layers": results["exits"]["exit_layers"], "row": row()}
    for figure in by_name(with_extras(results)).values():
        text = json.dumps(plotly(figure), allow_nan=False).replace('"ink"', '"#000"')
        graph_objects.Figure(json.loads(text))  # raises on an unknown key or a wrong value


def test_an_interactive_band_skips_layers_without_an_interval(results):
    chart = by_name(all_right(results))["entropy_by_correctness"]
    bands = {t["name"]: t for t in plotly(chart)["data"] if t.get("fill") == "toself"}
    assert len(bands["correct"]["x"]) == 2 * len(results["layers"])
    assert bands["wrong"]["x"] == []


# Missing results


def unlabelled(results):
    results["n_labelled"] = 0
    for one in (results["full_model"], *results["lenses"].values()):
        for key in list(one):
            if key.startswith(("accuracy", "ece", "auroc", "risk", "aurc", "entropy_histogram")):
                one[key] = None
    exits = results["exits"]
    for one in (exits["never"], *exits["paper"], *exits["grid"]):
        for key in ("accuracy", "accuracy_interval", "drop", "drop_interval"):
            one[key] = None
    results["groups"] = {}
    results["iso_compute"]["metric"] = "answer_agrees_model"
    return results


def one_layer(results):
    for lens in results["lenses"].values():
        for key, value in lens.items():
            if key == "entropy_histogram" and value:
                lens[key] = {kind: counts[:1] for kind, counts in value.items()}
            elif isinstance(value, list):
                lens[key] = value[:1]
    results["layers"] = results["layers"][:1]
    for group in results["groups"].values():
        group["lenses"] = {lens: values[:1] for lens, values in group["lenses"].items()}
    return results


def all_right(results):
    for lens in results["lenses"].values():
        lens["auroc"] = [None] * len(results["layers"])
        lens["entropy_histogram"]["wrong"] = [[0] * 40 for _ in results["layers"]]
    return results


def no_exits(results):
    return results | {"exits": None, "iso_compute": None}


@pytest.mark.parametrize("reduce", [unlabelled, one_layer, all_right, no_exits])
def test_reduced_results_give_reduced_figures_with_a_reason(results, reduce):
    reduced = reduce(results)
    reasons = [figure.why for figure in all_figures(reduced) if isinstance(figure, Omitted)]
    assert all(reason.endswith(".") for reason in reasons)
    assert ("These rows have no labels." in reasons) == (reduce is unlabelled)
    for figure in by_name(reduced).values():
        json.dumps(plotly(figure), allow_nan=False)


def test_partly_labelled_rows_are_drawn_by_agreement(results):
    exits = results["exits"]
    policy = [exits["policy"]["row"]] if exits["policy"] else []
    for one in (exits["never"], *exits["paper"], *exits["grid"], *policy):
        for key in ("accuracy", "accuracy_interval", "drop", "drop_interval"):
            one[key] = None
    charts = [f for f in by_name(results).values() if "SPADE answers" in getattr(f, "caption", "")]
    assert charts
    assert all(None not in series.y for chart in charts for series in chart.series)


def test_ablations_that_nothing_can_be_compared_by_are_omitted(results):
    reduced = unlabelled(with_extras(results))
    for variants in reduced["ablations"].values():
        for variant in variants:
            variant["agrees_model"] = None
    reasons = [figure.why for figure in all_figures(reduced) if isinstance(figure, Omitted)]
    assert "Heads over the choices cannot be compared without labels." in reasons


def test_a_dollar_sign_is_drawn_as_it_is(results, tmp_path):
    figure = by_name(results)["accuracy_by_layer"]
    assert_drawn(draw(replace(figure, title="$5% to $10%"), tmp_path / "dollars"))


@pytest.mark.parametrize("every", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_one_layer_without_labels_can_still_be_drawn(results, tmp_path, every):
    figures = [*by_name(one_layer(unlabelled(results))).values()]
    assert len(figures) > 4
    one_of_each = {type(figure): figure for figure in figures}.values()
    for figure in figures if every else one_of_each:
        assert_drawn(draw(figure, tmp_path / figure.name))


def test_without_labels_answers_are_compared_with_the_models(results):
    figures = by_name(unlabelled(results))
    assert "accuracy_by_layer" not in figures
    series = figures["answer_agreement_by_layer"].series[0]
    assert list(series.y) == results["lenses"]["logit_lens"]["answer_agrees_model"]


def test_the_histogram_shows_fractions_and_ends_at_the_last_row(results):
    figure = by_name(results)["entropy_histogram"]
    assert isinstance(figure, Bars)
    assert all(sum(shares) == pytest.approx(1.0) for shares in figure.groups.values())


# Several heads folders


def test_folders_are_compared_in_one_figure(results, tmp_path):
    several = [{**results, "label": "toy"}, {**copy.deepcopy(results), "label": "again"}]
    png = compare_accuracy(several, tmp_path / "compare.png")
    assert png.exists()
    assert png.with_suffix(".svg").exists()
    chart = comparison(several)
    assert [series.label for series in chart.series] == ["toy", "again"]
    assert list(chart.series[1].y) == results["lenses"]["l_spade"]["accuracy"]


def test_models_of_different_depth_are_compared_by_relative_depth(results):
    deeper = {**copy.deepcopy(results), "label": "deep", "num_layers": 8, "model_id": "org/deep"}
    chart = comparison([{**results, "label": "toy"}, deeper])
    assert chart.x_label.startswith("layer (fraction")
    assert [max(series.x) for series in chart.series] == [3 / 4, 3 / 8]


def test_figure_contents_are_prepared_without_importing_a_plotting_library():
    code = (
        "import sys, lspade_train.reporting.plots, lspade_train.reporting.plots.interactive\n"
        "print({n.split('.')[0] for n in sys.modules} & {'matplotlib', 'plotly', 'torch'})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"

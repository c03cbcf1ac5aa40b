"""Other exit rules, against loops over rows and scikit-learn."""

from pathlib import Path

import numpy as np
import pytest
import torch
import toy
from sklearn.linear_model import LogisticRegression
from sklearn.svm import LinearSVC
from tiny_models import WIDTH

from lspade_train import LSpadeHeads
from lspade_train.cli import main
from lspade_train.evaluation import baselines
from lspade_train.evaluation.baselines import linear_probe, measure_baselines, support_vectors
from lspade_train.io.layout import read_results
from lspade_train.reporting.tables import baselines_table


def test_a_streak_counts_consecutive_equal_answers_up_to_each_check():
    answers = torch.tensor([[1, 1, 2, 2, 2], [3, 1, 1, 3, 3]])
    expected = [[1, 2, 1, 2, 3], [1, 1, 2, 1, 2]]
    np.testing.assert_array_equal(baselines._streak(answers), expected)


def test_the_support_vector_machine_matches_scikit_learn():
    rng = np.random.default_rng(0)
    inputs = rng.normal(size=(400, 2)) * [3, 0.1] + [1, 5]
    wrong = inputs[:, 0] - 20 * inputs[:, 1] + rng.normal(size=400) > -98
    scaled = (inputs - inputs.mean(0)) / inputs.std(0)
    oracle = LinearSVC(C=1 / (baselines.PENALTY * 400 / 2), intercept_scaling=100, max_iter=10_000)
    expected = oracle.fit(scaled, wrong).predict(scaled)
    found = support_vectors(inputs, wrong)(inputs) > 0
    assert (found == expected).mean() > 0.99
    assert (found == wrong).mean() > 0.8


def test_the_probe_matches_scikit_learns_regression():
    rng = np.random.default_rng(0)
    states = rng.normal(size=(300, 8)).astype(np.float32)
    answers = states[:, :3].argmax(1)
    labels = torch.tensor([7, 11, 30])
    probe = linear_probe(torch.from_numpy(states), labels[answers], labels)
    scaled = (states - states.mean(0)) / states.std(0, ddof=1)
    oracle = LogisticRegression(C=1 / (2 * baselines.PENALTY * 300), max_iter=1000)
    expected = oracle.fit(scaled, answers).predict(scaled)
    agree = probe(torch.from_numpy(states)) == labels[torch.from_numpy(expected)]
    assert agree.float().mean() > 0.99


@pytest.fixture(scope="module")
def found(toy_root, tmp_path_factory):
    data = toy.Project(toy_root, tmp_path_factory.mktemp("baselines")).module(mode="memory")
    heads = LSpadeHeads(data.layers, WIDTH).requires_grad_(False).bind(data.adapter)
    rows = measure_baselines(
        data.stored("train"),
        data.stored("validation"),
        data.stored("test"),
        data.adapter,
        heads,
        layers=data.layers,
        scope="choices",
        budget=0.5,
    )
    return {row["name"]: row for row in rows}, data


def test_every_baseline_is_measured_and_reports_its_setting(found):
    rows, data = found
    assert [*rows] == [
        *("fixed layer", "linear probe", "one entropy threshold", "patience"),
        "SVM over statistics",
    ]
    for row in rows.values():
        assert row["row"]["compute_saved"] <= 1
        assert 1 <= row["row"]["mean_exit_layer"] <= data.adapter.num_layers


def test_the_fixed_layer_is_the_cheapest_within_the_budget(found):
    fixed = found[0]["fixed layer"]
    assert fixed["within_budget"]
    layer = int(fixed["setting"].split(",")[0].removeprefix("layer "))
    assert fixed["row"]["mean_exit_layer"] == layer


@pytest.mark.parametrize("risk", ["accuracy_drop", "disagreement"])
def test_settings_are_chosen_by_the_policys_own_risk(found, risk):
    _, data = found
    heads = LSpadeHeads(data.layers, WIDTH).requires_grad_(False).bind(data.adapter)
    states = data.stored("validation")
    rows = measure_baselines(
        states, states, states, data.adapter, heads,
        layers=data.layers, scope="choices", budget=0.2, risk=risk,
    )  # fmt: skip
    name = {"accuracy_drop": "drop"}.get(risk, risk)
    for row in rows:  # chosen and measured on the same rows
        assert row["within_budget"] == (row["row"][name] <= 0.2 + 1e-9)


def test_a_rule_over_budget_at_every_setting_is_reported_as_such(found):
    _, data = found
    heads = LSpadeHeads(data.layers, WIDTH).requires_grad_(False).bind(data.adapter)
    states = data.stored("validation")
    rows = measure_baselines(
        states, states, states, data.adapter, heads, layers=[1], scope="choices", budget=1e-9
    )
    fixed = rows[0]
    assert fixed["within_budget"] == (fixed["row"]["drop"] <= 1e-9)
    assert any(not row["within_budget"] for row in rows)


def test_evaluate_prints_the_rules_beside_the_policy_and_saves_them(
    toy_root, tmp_path, capsys, monkeypatch
):
    project = toy.Project(toy_root, tmp_path)
    monkeypatch.setattr("lspade_train.reporting.plots.write_figures", lambda *_: [])
    folder = str(tmp_path / "heads")
    with torch.no_grad():
        heads = LSpadeHeads(project.module().layers, WIDTH)
    heads.save_pretrained(folder)
    asked = ["--config", str(project.recipe()), "--heads", folder, "--baselines", "true"]
    assert main(["evaluate", *asked]) == 0
    printed = capsys.readouterr().out
    results = read_results(Path(folder))
    rules = [rule["name"] for rule in results["baselines"]["rules"]]
    assert "patience" in rules
    assert all(rule in printed for rule in rules)
    assert [row[0] for row in baselines_table(results).rows] == rules

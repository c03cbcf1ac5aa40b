"""The rows that a budget requires: against enumeration, against the test, and without a model."""

import pytest
import toy
from scipy.stats import binom

from lspade_train.cli import main
from lspade_train.errors import PolicyError, TaskError
from lspade_train.policies.calibration import rows_needed
from lspade_train.policies.plan import plan
from lspade_train.policies.power import most_losses, rows_to_prove, smallest_budget
from lspade_train.policies.pvalues import drop_p_value
from lspade_train.recipe import TextConfig

LEVEL = 0.025


@pytest.mark.parametrize("losses", [0, 1, 2])
def test_rows_for_a_disagreement_are_the_fewest_that_pass_the_binomial_test(losses):
    first = next(n for n in range(1, 2000) if binom.cdf(losses, n, 0.02) <= LEVEL)
    assert rows_to_prove(losses, "disagreement", 0.02, LEVEL) == first


@pytest.mark.parametrize("losses", [0, 2])
def test_rows_for_an_accuracy_drop_pass_and_one_row_fewer_does_not(losses):
    rows = rows_to_prove(losses, "accuracy_drop", 0.02, LEVEL)
    assert drop_p_value(losses, 0, rows, 0.02) <= LEVEL < drop_p_value(losses, 0, rows - 1, 0.02)


def test_without_losses_the_plan_equals_the_minimum_calibrate_requires():
    assert rows_to_prove(0, "disagreement", 0.01, LEVEL) == rows_needed(0.01, 0.95, sequences=2)


def test_the_smallest_budget_and_the_most_losses_just_pass():
    rows, losses = 400, 3
    budget = smallest_budget(losses, "disagreement", rows, LEVEL)
    assert binom.cdf(losses, rows, budget) <= LEVEL < binom.cdf(losses, rows, budget - 1e-4)
    assert most_losses("disagreement", budget, rows, LEVEL) == losses


def test_too_few_rows_prove_no_budget():
    assert most_losses("disagreement", 0.01, 100, LEVEL) is None
    assert smallest_budget(6, "disagreement", 5, LEVEL) is None


def test_a_plan_counts_the_rows_calibrate_would_test_without_a_model(project):
    found = plan(project.module(model_id="nowhere"), "disagreement", 0.05)
    assert (found.rows, found.side.split, found.side.part) == (20, "validation", "all")
    assert found.losses is None


def test_only_the_selection_half_of_a_shared_validation_split_is_counted(project):
    folder = toy.write_data(project.home / "data", validation=40)
    (folder / "test.jsonl").unlink()
    data = project.module(dataset=str(folder), mode="memory")
    found = plan(data, "disagreement", 0.05)
    assert found.rows == len(found.side.states(data)) < 40


def test_an_impossible_plan_raises_a_clear_error(project):
    text = project.module(task="text", dataset=str(project.texts), text=TextConfig(column="text"))
    with pytest.raises(PolicyError, match="running text"):
        plan(text, "disagreement", 0.05)
    with pytest.raises(PolicyError, match="out of range"):
        plan(project.module(), "disagreement", 1.5)
    with pytest.raises(PolicyError, match="over 10,000,000 rows"):
        plan(project.module(), "disagreement", 1e-8)


def test_a_plan_for_an_accuracy_budget_requires_labels(project):
    folder = toy.write_data(project.home / "data")
    rows = [row | {"answer": None} for row in toy.questions(9)]
    toy.write_jsonl(folder / "validation.jsonl", rows)
    with pytest.raises(TaskError, match="requires labels"):
        plan(project.module(dataset=str(folder)), "accuracy_drop", 0.01)


def test_calibrate_plan_needs_no_model_or_heads_and_writes_nothing(project, capsys, monkeypatch):
    monkeypatch.chdir(project.home)
    recipe = project.recipe(data__model_id="nowhere")
    before = set(project.home.rglob("*"))
    arguments = ["calibrate", f"--config={recipe}", "--plan", "--max_disagreement=0.2"]
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    assert "20 rows" in printed
    assert "passes if at most 0 of its answers differ" in printed
    assert set(project.home.rglob("*")) == before

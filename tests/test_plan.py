"""Rows that a budget takes: against enumeration, against the test itself, and without a model."""

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
def test_rows_for_a_disagreement_are_the_first_at_which_the_binomial_test_passes(losses):
    first = next(n for n in range(1, 2000) if binom.cdf(losses, n, 0.02) <= LEVEL)
    assert rows_to_prove(losses, "disagreement", 0.02, LEVEL) == first


@pytest.mark.parametrize("losses", [0, 2])
def test_rows_for_an_accuracy_drop_pass_and_one_row_less_does_not(losses):
    rows = rows_to_prove(losses, "accuracy_drop", 0.02, LEVEL)
    assert drop_p_value(losses, 0, rows, 0.02) <= LEVEL < drop_p_value(losses, 0, rows - 1, 0.02)


def test_without_a_loss_the_plan_is_what_calibrate_says_when_it_refuses():
    assert rows_to_prove(0, "disagreement", 0.01, LEVEL) == rows_needed(0.01, 0.95, sequences=2)


def test_the_smallest_budget_and_the_most_losses_are_the_last_that_pass():
    rows, losses = 400, 3
    budget = smallest_budget(losses, "disagreement", rows, LEVEL)
    assert binom.cdf(losses, rows, budget) <= LEVEL < binom.cdf(losses, rows, budget - 1e-4)
    assert most_losses("disagreement", budget, rows, LEVEL) == losses


def test_few_rows_prove_nothing():
    assert most_losses("disagreement", 0.01, 100, LEVEL) is None
    assert smallest_budget(6, "disagreement", 5, LEVEL) is None


def test_a_plan_counts_the_rows_that_calibrate_would_test_without_a_model(project):
    found = plan(project.module(model_id="nowhere"), "disagreement", 0.05)
    assert (found.rows, found.side.split, found.side.part) == (20, "validation", "all")
    assert found.losses is None


def test_of_a_shared_validation_split_only_the_half_that_may_choose_is_counted(project):
    folder = toy.write_data(project.home / "data", validation=40)
    (folder / "test.jsonl").unlink()
    data = project.module(dataset=str(folder), mode="memory")
    found = plan(data, "disagreement", 0.05)
    assert found.rows == len(found.side.states(data)) < 40


def test_a_plan_for_what_it_cannot_count_is_a_named_error(project):
    text = project.module(task="text", dataset=str(project.texts), text=TextConfig(column="text"))
    with pytest.raises(PolicyError, match="running text"):
        plan(text, "disagreement", 0.05)
    with pytest.raises(PolicyError, match="out of range"):
        plan(project.module(), "disagreement", 1.5)
    with pytest.raises(PolicyError, match="over 10,000,000 rows"):
        plan(project.module(), "disagreement", 1e-8)


def test_a_plan_about_accuracy_needs_right_answers(project):
    folder = toy.write_data(project.home / "data")
    rows = [row | {"answer": None} for row in toy.questions(9)]
    toy.write_jsonl(folder / "validation.jsonl", rows)
    with pytest.raises(TaskError, match="requires labels"):
        plan(project.module(dataset=str(folder)), "accuracy_drop", 0.01)


def test_calibrate_plan_needs_neither_model_nor_heads_and_writes_nothing(
    project, capsys, monkeypatch
):
    monkeypatch.chdir(project.home)
    recipe = project.recipe(data__model_id="nowhere")
    before = set(project.home.rglob("*"))
    arguments = ["calibrate", f"--config={recipe}", "--plan", "--max_disagreement=0.2"]
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    assert "20 rows" in printed
    assert "passes if at most 0 of its answers differ" in printed
    assert set(project.home.rglob("*")) == before

"""Guarantees within groups and depths: against the marginal test, and against simulation."""

import numpy as np
import pytest
from scipy.stats import binom
from test_calibration import on_every_layer, realistic

from lspade_train.errors import PolicyError
from lspade_train.policies.calibration import learn_then_test
from lspade_train.policies.conditions import Conditions, groups_of, without_small
from lspade_train.policies.exit_table import evaluate_policy, pick
from lspade_train.policies.promise import promise
from lspade_train.policies.pvalues import disagreement_p_value
from lspade_train.policies.shift import exit_profile

BUDGET, ROWS = 0.06, 600
SPLITS = pytest.mark.parametrize("splits", [20, pytest.param(200, marks=pytest.mark.slow)])


@pytest.fixture(scope="module")
def population():
    return realistic(20_000, seed=1, checks=4)


@pytest.fixture(scope="module")
def losses(population):
    """Which rows a rule answers differently from the full model, and where it exits."""

    def of(rule, table=population):
        stops = table.at(rule.layers).exits(rule.threshold)
        answers = pick(table.at(rule.layers).answers, table.full_answer, stops)
        return answers != table.full_answer, stops

    return of


@pytest.fixture(scope="module")
def group(population, losses):
    """Four tenths of the rows, including most of those that a rule within the budget would lose."""
    rules = on_every_layer(population, population.grid(24))
    fine = [rule for rule in rules if losses(rule)[0].mean() < 0.8 * BUDGET]
    draw = np.random.default_rng(0).random(len(population))
    return np.where(losses(fine[-1])[0], draw < 0.9, draw < 0.4)


def chosen_on(population, rows, conditions):
    tested = population.rows(rows)
    rules = on_every_layer(tested, tested.grid(24))
    return learn_then_test([(tested, rules)], "disagreement", BUDGET, conditions=conditions)


def drawn(population, splits):
    rng = np.random.default_rng(2)
    return [rng.integers(0, len(population), ROWS) for _ in range(splits)]


def over_in_group(population, losses, group, splits, *, conditional):
    over = exits = 0
    for rows in drawn(population, splits):
        masks = {"hard": group[rows], "easy": ~group[rows]}
        found = chosen_on(population, rows, Conditions(groups=masks) if conditional else None)
        if found.chosen.threshold is not None:
            exits += 1
            over += losses(found.chosen)[0][group].mean() > BUDGET
    assert exits > splits / 2
    return over


@SPLITS
def test_the_per_group_guarantee_fails_in_at_most_5_percent_of_splits(
    population, losses, group, splits
):
    over = over_in_group(population, losses, group, splits, conditional=True)
    assert over <= binom.ppf(0.99, splits, 0.05)


@SPLITS
def test_without_the_condition_a_group_exceeds_the_budget_in_most_splits(
    population, losses, group, splits
):
    assert over_in_group(population, losses, group, splits, conditional=False) > splits / 2


@SPLITS
def test_the_per_depth_guarantee_fails_in_at_most_5_percent_of_splits(population, losses, splits):
    proposing, over, exits = realistic(2000, seed=5, checks=4), 0, 0
    for rows in drawn(population, splits):
        found = chosen_on(population, rows, Conditions(groups={}, proposing=proposing))
        if found.chosen.threshold is None:
            continue
        exits += 1
        unlike, stops = losses(found.chosen)
        over += any(
            unlike[stops <= place].mean() > BUDGET
            for place, one in enumerate(found.conditions)
            if one.held
        )
    assert exits > splits / 2
    assert over <= binom.ppf(0.99, splits, 0.05)


def test_each_condition_applies_the_same_test_to_its_rows(population, losses, group):
    rows = np.arange(2000)
    found = chosen_on(
        population, rows, Conditions(groups={"hard": group[rows]}, proposing=population)
    )
    unlike, stops = losses(found.chosen, population.rows(rows))
    masks = [group[rows], *(stops <= place for place in range(len(found.chosen.layers)))]
    assert len(found.conditions) == len(masks) > 2
    for one, mask in zip(found.conditions, masks, strict=True):
        expected = disagreement_p_value(int(unlike[mask].sum()), int(mask.sum()), BUDGET)
        assert one.n == mask.sum()
        assert one.risk == (pytest.approx(unlike[mask].mean()) if one.n else None)
        assert one.p_value is None or one.p_value == pytest.approx(expected)
        assert one.p_value is None or one.p_value <= 0.05


def test_a_group_with_too_few_rows_is_left_out_and_the_guarantee_says_so(population):
    few = np.arange(ROWS) < 10
    found = chosen_on(population, np.arange(ROWS), Conditions(groups={"rare": few, "usual": ~few}))
    assert [one.held for one in found.conditions] == [False, True]
    words = promise(found.to_json())
    assert "The same holds within the group usual (590 rows)." in words
    assert "It is NOT guaranteed within the group rare (10 rows): too few rows" in words


def test_rows_of_small_groups_never_exit_and_pay_for_no_check(population):
    tested, few = population.rows(np.arange(ROWS)), np.arange(ROWS) < 10
    table, large = without_small(tested, {"rare": few, "usual": ~few}, needed=60)
    assert large == ("usual",)
    loosest = tested.grid()[-1]
    assert (table.exits(loosest)[:10] == len(table.layers)).all()
    assert (table.exits(loosest)[10:] == tested.exits(loosest)[10:]).all()
    everywhere = evaluate_policy(table.rows(few), loosest)
    assert everywhere.disagreement == 0
    assert everywhere.compute_saved == pytest.approx(0)
    profile = exit_profile(table, loosest)
    assert profile["exit_counts"][str(table.num_layers)] >= 10


def test_the_guarantee_says_that_small_groups_never_exit(population):
    few = np.arange(ROWS) < 10
    found = chosen_on(population, np.arange(ROWS), Conditions(groups={"rare": few, "usual": ~few}))
    words = promise(found.to_json() | {"small_groups": "never_exit"})
    assert "Rows of other groups (rare (10 rows)) never exit: too few rows" in words
    assert "NOT guaranteed" not in words


def test_rows_without_groups_are_rejected(project):
    rows = project.module(mode="memory").states("validation")
    with pytest.raises(PolicyError, match="difficulty"):
        groups_of(rows)

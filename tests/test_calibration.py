"""The exit rule against loops, p-values against enumeration, the guarantee against simulation."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binom, binomtest, multinomial

from lspade_train.errors import NumericsError, PolicyError, TaskError
from lspade_train.policies.calibration import Candidate, error_shares, learn_then_test, rows_needed
from lspade_train.policies.exit_table import (
    ExitCosts,
    ExitRule,
    ExitTable,
    evaluate_policy,
    oracle_saving,
)
from lspade_train.policies.proposals import (
    chance_wrong,
    cheapest,
    expected_risk,
    propose,
    prune,
    uniform_rules,
)
from lspade_train.policies.pvalues import (
    ABSOLUTE_GAP,
    NUISANCE,
    RELATIVE_GAP,
    disagreement_p_value,
    drop_p_value,
)

BUDGETS = {"accuracy_drop": 0.01, "disagreement": 0.02}
CHOICES = 4


ANSWER = 0.01


def table_of(confidence, answers, full_answer, gold, check=0.004, bounds=None) -> ExitTable:
    """A model with cost 1 and K+1 equal blocks, checked after each of the first K."""
    n, checks = confidence.shape
    reach = np.tile(np.arange(1, checks + 2) / (checks + 1), (n, 1))
    reach[:, -1] -= ANSWER
    return ExitTable(
        layers=tuple(range(1, checks + 1)),
        num_layers=checks + 1,
        bounds=bounds or (0.0, math.log(CHOICES)),
        confidence=confidence.astype(np.float32),
        answers=answers,
        full_answer=full_answer,
        gold=gold,
        costs=ExitCosts(
            reach=reach,
            check=np.full((n, checks), check),
            answer=np.full((n, checks + 1), ANSWER),
            unchecked=np.full((n, checks), ANSWER),
            plain=np.ones(n),
        ),
    )


def on_every_layer(table, thresholds=None):
    """Rules that check all of the table's layers, with the grid's or the given thresholds."""
    return [ExitRule(layers=table.layers, threshold=t) for t in thresholds or table.grid()]


def realistic(
    n: int, seed: int, checks: int = 8, skew: float = 0.0, check: float = 0.004
) -> ExitTable:
    """Rows of varying difficulty; deeper and more confident answers agree with the model more.

    `skew` makes some layers' heads overconfident and others underconfident.
    """
    rng = np.random.default_rng(seed)
    depth = np.arange(1, checks + 1) / (checks + 1)
    drift = 0.3 * rng.normal(size=(n, checks)).cumsum(1)
    margin = 8 * (depth - rng.beta(1.2, 1.6, (n, 1))) + drift
    full = rng.integers(0, CHOICES, n)
    other = (full + rng.integers(1, CHOICES, n)) % CHOICES
    agrees = rng.random((n, 1)) < 1 / (1 + np.exp(-2 * margin))
    noise = 0.5 * rng.normal(size=margin.shape)
    confidence = math.log(CHOICES) / (1 + np.exp(2 * (margin + noise) - 1))
    gold = np.select([rng.random(n) < 0.7, rng.random(n) < 0.4], [full, other], (full + 2) % 4)
    confidence = confidence * np.exp(skew * np.resize([-2, -1, 1, -1.5, 0.5, -0.5], checks))
    answers = np.where(agrees, full[:, None], other[:, None])
    return table_of(confidence, answers, full, gold, check)


def proposed(table) -> list[ExitRule]:
    """Per-layer thresholds, from what the confidences say about the error probability."""
    return propose(table, chance_wrong(table))


def propose_limits(table) -> tuple[float, ...]:
    """A per-layer threshold that about a third of the rows meet."""
    return tuple(np.quantile(table.confidence, 0.3, axis=0).tolist())


@pytest.fixture(scope="module")
def population() -> ExitTable:
    return realistic(20_000, seed=1)


@given(n=st.integers(1, 12), seed=st.integers(0, 10_000), place=st.integers(0, 79))
@settings(max_examples=40, deadline=None)
def test_evaluating_a_policy_equals_a_loop_over_prompts(n, seed, place):
    table = realistic(n, seed, checks=3)
    threshold = table.grid()[place]
    exits, costs, right, unlike = [], [], [], []
    for row in range(n):
        answer, cost, layer = table.full_answer[row], 1 + 3 * 0.004, table.num_layers
        for check in reversed(range(3)):
            if table.confidence[row, check] <= np.float32(threshold):
                layer = table.layers[check]
                answer, cost = table.answers[row, check], layer / 4 + 0.004 * layer + ANSWER
        exits.append(layer)
        costs.append(cost)
        right.append(answer == table.gold[row])
        unlike.append(answer != table.full_answer[row])
    found = evaluate_policy(table, threshold)
    assert found.mean_exit_layer == pytest.approx(np.mean(exits))
    assert found.compute_saved == pytest.approx(1 - np.sum(costs) / n)
    assert found.accuracy == pytest.approx(np.mean(right))
    assert found.drop == pytest.approx(np.mean(table.full_answer == table.gold) - np.mean(right))
    assert found.disagreement == pytest.approx(np.mean(unlike))


def test_each_layer_is_checked_against_its_own_threshold():
    table = realistic(200, seed=3, checks=3)
    limits = (0.01, 0.3, 0.1)
    expected = [
        next((k for k in range(3) if row[k] <= np.float32(limits[k])), 3)
        for row in table.confidence
    ]
    np.testing.assert_array_equal(table.exits(limits), expected)


def test_the_oracle_exits_at_the_first_agreeing_layer_and_pays_for_no_check():
    answers = np.array([[1, 0, 0], [1, 1, 1], [0, 1, 0]])
    table = table_of(np.ones((3, 3)), answers, np.zeros(3, int), None)
    paid = (2 / 4 + ANSWER) + 1 + (1 / 4 + ANSWER)
    assert oracle_saving(table) == pytest.approx(1 - paid / 3)


@given(seed=st.integers(0, 10_000), price=st.floats(0.001, 0.2))
@settings(max_examples=25, deadline=None)
def test_dropping_any_check_of_a_pruned_rule_saves_nothing(seed, price):
    table = realistic(80, seed, checks=5, check=price)
    rule = prune(table, propose_limits(table))
    if rule is None:
        return
    saved = evaluate_policy(table.at(rule.layers), rule.threshold).compute_saved
    for left_out in rule.layers:
        kept = [place for place, layer in enumerate(rule.layers) if layer != left_out]
        if kept:
            limits = tuple(rule.threshold[place] for place in kept)
            without = table.at([rule.layers[place] for place in kept])
            assert evaluate_policy(without, limits).compute_saved < saved
        else:
            assert saved > 0


@given(seed=st.integers(0, 10_000))
@settings(max_examples=25, deadline=None)
def test_each_pruning_step_drops_the_check_whose_removal_saves_most(seed):
    table = realistic(60, seed, checks=4, check=0.05)
    limits = dict(zip(table.layers, propose_limits(table), strict=True))

    def saved(layers):
        if not layers:
            return 0.0
        return evaluate_policy(table.at(layers), tuple(map(limits.get, layers))).compute_saved

    kept = table.layers
    while kept:
        without = [tuple(layer for layer in kept if layer != one) for one in kept]
        best = max(without, key=saved)
        if saved(best) < saved(kept) - 1e-12:
            break
        kept = best
    found = prune(table, tuple(limits.values()))
    assert saved(() if found is None else found.layers) == pytest.approx(saved(kept))


def price_of(table, chance, price, limits) -> float:
    """Cost of the rows plus that of their expected errors; a limit of None drops the check."""
    total = 0.0
    for row in range(len(table)):
        paid = 0.0
        for place, limit in enumerate(limits):
            if limit is None:
                continue
            paid += table.costs.check[row, place]
            if table.confidence[row, place] <= limit:
                end = table.costs.reach[row, place] + table.costs.answer[row, place]
                total += paid + end + price * chance[row, place]
                break
        else:
            total += paid + table.costs.reach[row, -1] + table.costs.answer[row, -1]
    return total


@given(seed=st.integers(0, 10_000), price=st.floats(0.5, 20), check=st.sampled_from([0.004, 0.1]))
@settings(max_examples=25, deadline=None)
def test_moving_or_dropping_a_threshold_of_the_cheapest_rule_gains_nothing(seed, price, check):
    table = realistic(20, seed, checks=3, check=check)
    chance = np.random.default_rng(seed).random((20, 3)) * table.confidence / math.log(CHOICES)
    rule = cheapest(table, chance, price)
    found = {} if rule is None else dict(zip(rule.layers, rule.threshold, strict=True))
    limits = [found.get(layer) for layer in table.layers]
    least = price_of(table, chance, price, limits)
    assert least <= price_of(table, chance, price, [None] * 3) + 1e-9
    for place in range(3):
        for other in (None, *table.confidence[:, place].tolist()):
            moved = [*limits[:place], other, *limits[place + 1 :]]
            assert price_of(table, chance, price, moved) >= least - 1e-6


def test_proposed_rules_are_sorted_by_expected_risk(population):
    table = population.rows(np.arange(1000))
    chance = chance_wrong(table)
    risks = [expected_risk(table, rule, chance) for rule in propose(table, chance)]
    assert len(risks) > 20
    assert risks == sorted(risks)


def test_estimated_error_probabilities_match_observed_error_rates(population):
    table = population.rows(np.arange(4000))
    chance = chance_wrong(table)
    wrong = table.answers != table.full_answer[:, None]
    for low, high in [(0.0, 0.05), (0.05, 0.2), (0.2, 0.6)]:
        inside = (chance >= low) & (chance < high)
        assert wrong[inside].mean() == pytest.approx(chance[inside].mean(), abs=0.05)


def test_the_most_promising_sequence_gets_two_thirds_of_the_error_probability(population):
    table = population.rows(np.arange(500))

    def sequence(threshold, expected):
        rule = ExitRule(layers=table.layers, threshold=threshold)
        return [Candidate("", table, rule, expected=expected)]

    safe, good, risky = sequence(0.01, 0.001), sequence(0.2, 0.009), sequence(0.9, 0.2)
    assert error_shares([safe, [], good, risky], 0.01) == pytest.approx([1 / 6, 0, 2 / 3, 1 / 6])
    assert error_shares([[], good], 0.01) == [0, 1]


def test_proposed_rules_contain_no_check_at_which_no_row_exits(population):
    table = population.rows(np.arange(800))
    for rule in [*proposed(table), *uniform_rules(table)]:
        stops = table.at(rule.layers).exits(rule.threshold)
        assert {*range(len(rule.layers))} <= {*stops.tolist()}


def test_no_rule_is_proposed_when_checks_are_too_expensive():
    full = np.zeros(100, int)
    table = table_of(np.ones((100, 3)), np.zeros((100, 3), int), full, full, check=0.9)
    assert proposed(table) == uniform_rules(table) == []


def test_checking_without_ever_exiting_costs_more_than_the_plain_model(population):
    assert (population.costs.stops()[:, -1] > population.costs.plain).all()
    strictest = evaluate_policy(population, 0.0)
    assert strictest.mean_exit_layer == population.num_layers
    assert strictest.compute_saved == pytest.approx(-0.004 * len(population.layers))


def test_costs_restricted_to_some_layers_count_only_those_checks(population):
    some = population.costs.at([1, 4])
    check, reach = 0.004, [2 / 9, 5 / 9, 1 - ANSWER]
    expected = [r + k * check + ANSWER for r, k in zip(reach, (1, 2, 2), strict=True)]
    np.testing.assert_allclose(some.stops()[0], expected)


def as_probability(table) -> ExitTable:
    """The same confidences as a measure that is high when confident."""
    upper = math.log(CHOICES)
    return replace(table, confidence=1 - table.confidence / upper, bounds=(1.0, 0.0))


def test_a_measure_that_is_high_when_confident_chooses_the_same_exits(population):
    proposing, tested = population.rows(np.arange(1500)), population.rows(np.arange(1500, 4000))
    found = {
        name: learn_then_test([(of(tested), proposed(of(proposing)))], "disagreement", 0.05)
        for name, of in {"low": lambda t: t, "high": as_probability}.items()
    }
    low, high = found["low"].chosen, found["high"].chosen
    assert high.compute_saved > 0.1
    assert high.compute_saved == pytest.approx(low.compute_saved, abs=2e-3)
    assert high.layers == low.layers
    assert all(0 <= limit <= 1 for limit in high.threshold)


def test_the_grid_of_a_high_when_confident_measure_runs_from_strict_to_loose(population):
    table = as_probability(population.rows(np.arange(500)))
    assert (table.grid()[0], table.grid()[-1]) == (1.0, 0.0)
    layers = [evaluate_policy(table, threshold).mean_exit_layer for threshold in table.grid()]
    assert layers == sorted(layers, reverse=True)
    assert layers[0] > layers[-1]


def test_looser_thresholds_never_exit_later():
    table = realistic(500, seed=4)
    layers = [evaluate_policy(table, threshold).mean_exit_layer for threshold in table.grid()]
    assert layers == sorted(layers, reverse=True)
    assert layers[0] > 8.9
    assert layers[-1] < 2


def test_the_grid_is_ascending_and_independent_of_the_rows():
    grid = realistic(50, seed=5).grid()
    assert grid == sorted(set(grid)) == realistic(60, seed=6).grid()
    assert (grid[0], grid[-1]) == (0.0, pytest.approx(math.log(CHOICES)))


def test_the_plain_model_saves_and_loses_nothing(population):
    row = evaluate_policy(population, None)
    assert (row.drop, row.disagreement, row.compute_saved) == (0, 0, 0)
    assert row.mean_exit_layer == population.num_layers


@pytest.mark.parametrize(("failures", "n"), [(0, 1), (0, 300), (3, 300), (25, 2000), (300, 300)])
def test_the_disagreement_p_value_is_exactly_binomial(failures, n):
    expected = binomtest(failures, n, 0.02, alternative="less").pvalue
    assert disagreement_p_value(failures, n, 0.02) == pytest.approx(expected)


@pytest.mark.parametrize("budget", [0.05, 0.3])
def test_the_drop_p_value_is_the_maximum_over_the_rate_of_gains(budget):
    n = 9
    points = [(lost, won) for lost in range(n + 1) for won in range(n + 1 - lost)]

    def score(lost, won):
        rates = np.linspace(1e-9, (1 - budget) / 2 - 1e-9, 20_001)
        kept = n - lost - won
        likelihood = lost * np.log(rates + budget) + won * np.log(rates)
        rate = rates[(likelihood + kept * np.log(1 - budget - 2 * rates)).argmax()]
        variance = n * (2 * rate + budget - budget**2)
        return (lost - won - n * budget) / math.sqrt(variance)

    scores = np.array([score(*point) for point in points])
    counts = np.array([(lost, won, n - lost - won) for lost, won in points])
    rates = np.linspace(0, (1 - budget) / 2, 1501)
    chances = np.stack(
        [multinomial.pmf(counts, n, [budget + r, r, 1 - budget - 2 * r]) for r in rates]
    )
    for (lost, won), own in zip(points, scores, strict=True):
        interval = binomtest(won, n).proportion_ci(1 - NUISANCE)
        likely = (rates >= interval.low) & (rates <= interval.high)
        expected = chances[likely][:, scores <= own + 1e-3].sum(1).max() if own < 0 else 1.0
        found = drop_p_value(lost, won, n, budget)
        slack = 0.003 * expected + 1e-5  # tolerance of the oracle's grid
        assert expected - slack <= found
        assert found <= expected * (1 + RELATIVE_GAP) + ABSOLUTE_GAP + NUISANCE + slack


def test_without_gains_the_drop_p_value_is_binomial():
    assert drop_p_value(0, 0, 300, 0.01) == pytest.approx(0.99**300, rel=0.011)


def test_the_drop_p_value_rises_with_losses_and_falls_with_gains():
    table = [[drop_p_value(lost, won, 300, 0.02) for won in range(6)] for lost in range(10)]
    # Equal up to how closely the maximum is bounded.
    assert (np.diff(table, axis=0) >= 0).all()
    assert (np.diff(table, axis=1) <= RELATIVE_GAP).all()


def rejection_rate(n, loss_rate, gain_rate, budget=0.01, level=0.05):
    """Probability that the test passes a policy, summed exactly over all outcomes."""
    gains = np.arange(binom.ppf(1e-7, n, gain_rate), binom.isf(1e-7, n, gain_rate) + 1).astype(int)
    limits, most = [], 0
    for won in gains.tolist():
        while most >= 0 and drop_p_value(most, won, n, budget) > level:
            most -= 1
        while drop_p_value(most + 1, won, n, budget) <= level:
            most += 1
        limits.append(most)
    inside = binom.cdf(limits, n - gains, loss_rate / (1 - gain_rate))
    return float((binom.pmf(gains, n, gain_rate) * inside).sum())


@pytest.mark.parametrize(
    ("n", "gain_rate"),
    [
        (300, 0.0),
        (300, 0.005),
        *(
            pytest.param(n, rate, marks=pytest.mark.slow)
            for n, rate in [(300, 0.001), (300, 0.02), (2000, 0.0), (2000, 0.001), (2000, 0.003)]
        ),
    ],
)
def test_a_drop_equal_to_the_budget_passes_at_most_at_the_nominal_rate(n, gain_rate):
    rate = rejection_rate(n, 0.01 + gain_rate, gain_rate)
    # 0.05 is the nominal level; far below it, power would be wasted.
    assert 0.035 < rate <= 0.05 + 1e-6


@pytest.mark.slow
def test_the_drop_test_has_power_where_hoeffding_bentkus_has_none():
    n, loss_rate, gain_rate, budget = 1000, 0.004, 0.003, 0.01
    rescaled, limit = (1 + loss_rate - gain_rate) / 2, (1 + budget) / 2
    gap = rescaled * math.log(rescaled / limit) + (1 - rescaled) * math.log(
        (1 - rescaled) / (1 - limit)
    )
    bentkus = math.e * binom.cdf(math.ceil(n * rescaled), n, limit)
    assert min(math.exp(-n * gap), bentkus) > 0.9  # at the very mean of the samples
    assert rejection_rate(n, loss_rate, gain_rate) > 0.85


def exceeded(population, risk, sequences_of, splits, n):
    """Splits whose chosen policy's true (population) risk exceeds the budget."""
    over, saved = 0, []
    for seed in range(splits):
        rng = np.random.default_rng(seed)
        split = population.rows(rng.integers(0, len(population), n))
        chosen = learn_then_test(sequences_of(split), risk, BUDGETS[risk]).chosen
        truth = evaluate_policy(population.at(chosen.layers), chosen.threshold)
        value = truth.drop if risk == "accuracy_drop" else truth.disagreement
        over += value > BUDGETS[risk]
        saved.append(truth.compute_saved)
    return over, float(np.mean(saved))


@pytest.mark.parametrize("splits", [20, pytest.param(200, marks=pytest.mark.slow)])
@pytest.mark.parametrize("risk", BUDGETS)
def test_the_guarantee_holds_over_random_splits(population, risk, splits):
    over, saved = exceeded(
        population, risk, lambda split: [(split, on_every_layer(split))], splits, 500
    )
    assert over <= binom.ppf(0.99, splits, 0.05)
    assert saved > 0.15  # a guarantee kept by never exiting would be worthless


@pytest.mark.parametrize("splits", [5, pytest.param(40, marks=pytest.mark.slow)])
def test_the_guarantee_holds_with_several_sequences_proposed_on_one_split(population, splits):
    def sequences_of(split):
        tested = split.rows(np.arange(0, len(split), 2))
        proposing = split.rows(np.arange(1, len(split), 2))
        return [(tested, uniform_rules(proposing)), (tested, proposed(proposing))]

    over, _ = exceeded(population, "disagreement", sequences_of, splits, 800)
    assert over <= binom.ppf(0.99, splits, 0.05)


def test_per_layer_thresholds_save_more_when_the_layers_heads_differ():
    others, all_rows = realistic(6000, seed=7, skew=1.5), realistic(10_000, seed=8, skew=1.5)
    one, each = uniform_rules(others), proposed(others)
    _, saved_one = exceeded(all_rows, "disagreement", lambda s: [(s, one)], 5, 1500)
    _, saved_each = exceeded(all_rows, "disagreement", lambda s: [(s, each)], 5, 1500)
    assert saved_each > saved_one + 0.01


def test_testing_stops_at_the_first_failure(population):
    tested = population.rows(np.arange(2000))
    found = learn_then_test([(tested, on_every_layer(tested))], "disagreement", 0.02)
    accepted = [row.accepted for row in found.curve]
    assert accepted == sorted(accepted, reverse=True)
    assert all(row.p_value <= 0.05 for row in found.curve if row.accepted)
    best = max((row for row in found.curve if row.accepted), key=lambda row: row.compute_saved)
    assert found.chosen == best
    assert 0 < best.efficiency == pytest.approx(best.compute_saved / found.oracle_saving)


def test_several_sequences_share_the_error_probability(population):
    table = population.rows(np.arange(500))
    sequences = [(table, on_every_layer(table, [0.0])), (table, on_every_layer(table))]
    found = learn_then_test(sequences, "accuracy_drop", 0.01)
    assert all(row.p_value <= 0.025 for row in found.curve if row.accepted)
    assert any(0.025 < row.p_value <= 0.05 and not row.accepted for row in found.curve)


def test_the_record_round_trips_through_json(population):
    table = population.rows(np.arange(400))
    record = learn_then_test([(table, proposed(table))], "accuracy_drop", 0.05).to_json()
    assert json.loads(json.dumps(record, allow_nan=False))["n"] == 400


@pytest.mark.parametrize("risk", BUDGETS)
def test_too_few_rows_are_rejected_with_the_number_needed(population, risk):
    one = population.rows(np.array([0]))
    found = learn_then_test([(one, on_every_layer(one, [0.1]))], risk, 0.01)
    assert found.chosen.threshold is None
    assert "1 rows are too few" in found.reason
    assert "at least 299 are needed" in found.reason
    assert rows_needed(0.01, 0.95) == 299


def test_confidently_wrong_answers_lead_to_never_exit():
    table = table_of(np.zeros((1000, 3)), np.ones((1000, 3), int), np.zeros(1000, int), None)
    found = learn_then_test([(table, on_every_layer(table))], "disagreement", 0.02)
    assert (found.chosen.threshold, found.chosen.compute_saved) == (None, 0)
    assert "no policy passed the test" in found.reason
    assert found.oracle_saving == 0
    assert found.chosen.efficiency is None


def test_checks_that_cost_more_than_exits_save_lead_to_never_exit():
    full = np.zeros(1000, int)
    table = table_of(np.ones((1000, 3)), np.zeros((1000, 3), int), full, full, check=0.9)
    found = learn_then_test([(table, on_every_layer(table))], "accuracy_drop", 0.01)
    assert found.chosen.threshold is None
    assert "checks" in found.reason


def test_an_accuracy_budget_without_labels_suggests_the_disagreement_budget():
    table = table_of(np.ones((5, 2)), np.ones((5, 2), int), np.ones(5, int), None)
    with pytest.raises(TaskError, match="--max_disagreement"):
        learn_then_test([(table, on_every_layer(table, [0.1]))], "accuracy_drop", 0.01)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_non_finite_confidence_is_rejected_with_its_row_and_layer(value):
    confidence = np.ones((4, 3))
    confidence[2, 1] = value
    with pytest.raises(NumericsError, match=r"row 2 at layer 2.*lspade-train evaluate"):
        table_of(confidence, np.ones((4, 3), int), np.ones(4, int), None)


def test_a_split_without_rows_is_rejected():
    with pytest.raises(PolicyError, match="0 rows"):
        table_of(np.ones((0, 3)), np.ones((0, 3), int), np.ones(0, int), None)


def test_mismatched_shapes_are_rejected():
    with pytest.raises(PolicyError, match=r"answers has shape \(4, 2\), expected \(4, 3\)"):
        table_of(np.ones((4, 3)), np.ones((4, 2), int), np.ones(4, int), None)


@pytest.mark.parametrize(("budget", "confidence"), [(0.0, 0.95), (1.0, 0.95), (0.01, 1.0)])
def test_budgets_and_confidences_out_of_range_are_rejected(population, budget, confidence):
    with pytest.raises(PolicyError, match=r"--(max_disagreement|confidence) .* out of range"):
        learn_then_test(
            [(population, on_every_layer(population))], "disagreement", budget, confidence
        )


def test_an_empty_list_of_candidates_is_rejected():
    with pytest.raises(PolicyError, match="check layers"):
        learn_then_test([], "disagreement", 0.02)

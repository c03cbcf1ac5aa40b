"""The anytime-valid test: its closed form against integration, its errors against simulation."""

import math

import numpy as np
import pytest
from scipy.integrate import quad
from scipy.stats import beta

from lspade_train.policies.sequential import (
    BLOCK,
    PRIOR,
    add_to_blocks,
    confidence_sequence,
    log_e_value,
    log_evidence,
    rows_until_alarm,
)

ALPHA = 0.05


def first_alarm(stream, budget, seen=()):
    """Number of rows after which the evidence first reaches 1/alpha; None if it never does."""
    blocks = tuple(seen)
    for n, failed in enumerate(stream, 1):
        blocks = add_to_blocks(blocks, 1, int(failed))
        # The evidence only grows at a failure, so it can only reach the bound there.
        if failed and log_evidence(blocks, budget) >= math.log(1 / ALPHA):
            return n
    return None


def healthy(rows, every):
    """Blocks of a stream in which failures occur at regular intervals."""
    blocks = ()
    for _ in range(rows // every):
        blocks = add_to_blocks(blocks, every, 1)
    return blocks


@pytest.mark.parametrize(("failures", "n"), [(0, 1), (1, 1), (3, 40), (0, 200), (30, 60)])
def test_the_closed_form_equals_the_integral_over_all_bets(failures, n):
    budget = 0.05
    prior = beta(*PRIOR)

    def bet(q):
        return prior.pdf(q) * (q / budget) ** failures * ((1 - q) / (1 - budget)) ** (n - failures)

    wealth = quad(bet, budget, 1, points=[0.1, 0.5], limit=500)[0] / prior.sf(budget)
    assert math.exp(log_e_value(failures, n, budget)) == pytest.approx(wealth, rel=1e-5)


@pytest.mark.parametrize("rows", [BLOCK - 50, BLOCK, 5 * BLOCK, 40 * BLOCK])
def test_the_expected_evidence_does_not_grow_at_the_budgeted_rate(rows):
    budget, blocks = 0.1, healthy(rows, every=25)
    now = math.exp(log_evidence(blocks, budget))
    hit = math.exp(log_evidence(add_to_blocks(blocks, 1, 1), budget))
    miss = math.exp(log_evidence(add_to_blocks(blocks, 1, 0), budget))
    assert budget * hit + (1 - budget) * miss == pytest.approx(now)


def test_half_of_the_wealth_starts_in_the_first_block():
    expected = (1 + math.exp(log_e_value(7, 60, 0.05))) / 2
    assert math.exp(log_evidence([(60, 7)], 0.05)) == pytest.approx(expected)


def test_the_number_of_blocks_grows_slowly():
    assert len(healthy(1_000_000, every=100)) < 300


def test_a_shift_after_a_long_healthy_period_is_detected_sooner_than_by_one_bet():
    budget, rows, every, later = 0.02, 10_000, 100, 1000
    found = rows_until_alarm(0.1, budget, ALPHA, healthy(rows, every))
    assert found < 400
    one_bet = log_e_value(rows // every + later // 10, rows + later, budget)
    assert one_bet < math.log(1 / ALPHA)


def test_streams_within_the_budget_raise_an_alarm_with_probability_at_most_alpha():
    rng, budget, streams = np.random.default_rng(0), 0.05, 400
    alarms = sum(first_alarm(rng.random(400) < budget, budget) is not None for _ in range(streams))
    assert alarms / streams <= ALPHA + 3 * math.sqrt(ALPHA * (1 - ALPHA) / streams)


def test_streams_over_the_budget_raise_an_alarm_about_when_predicted():
    rng, budget, rate = np.random.default_rng(1), 0.02, 0.2
    found = [first_alarm(rng.random(600) < rate, budget) for _ in range(200)]
    assert None not in found
    assert np.median(found) == pytest.approx(rows_until_alarm(rate, budget), rel=0.5)


def test_no_alarm_is_predicted_for_a_rate_within_the_budget():
    assert rows_until_alarm(0.01, 0.02, most=10_000) == 10_000


def test_the_confidence_sequence_covers_the_rate_at_all_times_in_most_streams():
    rng, rate, streams, missed = np.random.default_rng(2), 0.1, 120, 0
    for _ in range(streams):
        failures = np.cumsum(rng.random(200) < rate)
        bounds = [confidence_sequence(int(failures[n - 1]), n, ALPHA) for n in range(5, 201, 5)]
        missed += not all(low <= rate <= high for low, high in bounds)
    assert missed / streams <= ALPHA + 3 * math.sqrt(ALPHA * (1 - ALPHA) / streams)


@pytest.mark.parametrize(("failures", "n"), [(0, 0), (0, 50), (50, 50), (7, 50)])
def test_the_confidence_sequence_contains_the_observed_rate(failures, n):
    low, high = confidence_sequence(failures, n)
    assert 0 <= low <= high <= 1
    assert n == 0 or low <= failures / n <= high
    assert (low > 0) == (failures > 0) or failures == 50

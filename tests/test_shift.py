"""Where rows exit now and at calibration: the test's level and power, and what is stored."""

import numpy as np
import pytest
from scipy.stats import chi2
from test_calibration import table_of

from lspade_train.policies.shift import calibrated_exits, exit_profile, shift_p_value

SHARES = np.array([0.5, 0.3, 0.15, 0.05])
LAYERS = (2, 4, 6, 9)


def sample(rng, n, shares=SHARES):
    return dict(zip(LAYERS, rng.multinomial(n, shares).tolist(), strict=True))


def test_without_a_shift_p_values_are_uniform():
    rng = np.random.default_rng(0)
    found = np.array([shift_p_value(sample(rng, 300), sample(rng, 200)) for _ in range(1000)])
    for level in (0.01, 0.1, 0.5):
        assert (found < level).mean() == pytest.approx(level, abs=4 * (level / 1000) ** 0.5)


def test_the_statistic_matches_pearsons():
    before, now = {1: 60, 5: 40}, {1: 30, 5: 70}
    table = np.array([[60, 40], [30, 70]])
    expected = table.sum(1)[:, None] * table.sum(0) / table.sum()
    statistic = ((table - expected) ** 2 / expected).sum()
    assert shift_p_value(before, now) == pytest.approx(chi2.sf(statistic, 1))


def test_a_clear_shift_is_detected():
    rng = np.random.default_rng(1)
    assert shift_p_value(sample(rng, 300), sample(rng, 200, SHARES[::-1])) < 1e-6
    assert shift_p_value({1: 300, 9: 0}, {1: 0, 9: 50}) < 1e-6


@pytest.mark.parametrize(
    ("before", "now"), [({}, {1: 50}), ({1: 50, 2: 50}, {}), ({1: 50, 2: 50}, {1: 2, 2: 1})]
)
def test_too_few_rows_give_no_p_value(before, now):
    assert shift_p_value(before, now) is None


def test_the_profile_records_exit_layers_and_confidences():
    confidence = np.linspace(0, 1, 40).reshape(20, 2)
    zeros = np.zeros(20, dtype=int)
    table = table_of(confidence, np.zeros((20, 2), dtype=int), zeros, zeros)
    found = exit_profile(table, 0.5)
    first = int((confidence[:, 0] <= 0.5).sum())
    assert calibrated_exits({"profile": found}) == {1: first, 2: 0, 3: 20 - first}
    middle = found["quantiles"].index(0.5)
    assert found["signal_quantiles"]["2"][middle] == pytest.approx(np.median(confidence[:, 1]))


def test_a_policy_without_a_profile_has_no_calibration_exits():
    assert calibrated_exits({"n": 3}) == {}

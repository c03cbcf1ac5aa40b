"""Every metric against an independent implementation, on random rows."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy.special import log_softmax, rel_entr, softmax
from scipy.stats import binned_statistic
from scipy.stats import entropy as scipy_entropy
from sklearn.metrics import roc_auc_score

from lspade_train.probes.metrics import (
    Distribution,
    agreement,
    at_coverage,
    auroc,
    bootstrap_interval,
    entropy,
    expected_calibration_error,
    kl_divergence,
    risk_coverage,
)

TOLERANCE = 1e-6
quick = settings(max_examples=60, deadline=None)
logits = hnp.arrays(
    np.float64, hnp.array_shapes(min_dims=2, max_dims=2, max_side=9), elements=st.floats(-40, 40)
)


def rows(size):
    """Scores with many ties, and whether each row is right."""
    score = hnp.arrays(np.float64, size, elements=st.integers(0, 8).map(lambda k: k / 8))
    return st.tuples(score, hnp.arrays(bool, size))


scored = st.integers(1, 40).flatmap(rows)


@quick
@given(logits)
def test_entropy_matches_scipy(values):
    expected = scipy_entropy(softmax(values, -1), axis=-1)
    assert entropy(torch.from_numpy(values)).numpy() == pytest.approx(expected, abs=TOLERANCE)


@quick
@given(logits, st.integers(0, 99))
def test_kl_matches_scipy(target, seed):
    other = np.random.default_rng(seed).normal(size=target.shape) * 10
    expected = rel_entr(softmax(target, -1), softmax(other, -1)).sum(-1)
    found = kl_divergence(torch.from_numpy(target), torch.from_numpy(other))
    assert found.numpy() == pytest.approx(expected, abs=TOLERANCE, rel=TOLERANCE)


def test_a_token_of_zero_probability_adds_nothing_to_entropy_or_kl():
    target = torch.tensor([[1.0, 2.0, -torch.inf]], dtype=torch.float64)
    other = torch.tensor([[0.5, 0.1, 7.0]], dtype=torch.float64)
    p, logq = softmax([1.0, 2.0]), log_softmax([0.5, 0.1, 7.0])[:2]
    assert float(entropy(target)) == pytest.approx(scipy_entropy(p), abs=TOLERANCE)
    expected = float((p * (np.log(p) - logq)).sum())
    assert float(kl_divergence(target, other)) == pytest.approx(expected, abs=TOLERANCE)


@pytest.mark.parametrize("excluded", [-torch.inf, -2000.0])
def test_kl_is_finite_where_both_sides_exclude_a_token(excluded):
    target = torch.tensor([[1.0, 2.0, excluded]], dtype=torch.float64)
    other = torch.tensor([[0.5, 0.1, -torch.inf]], dtype=torch.float64)
    expected = rel_entr(softmax([1.0, 2.0]), softmax([0.5, 0.1])).sum()
    assert float(kl_divergence(target, other)) == pytest.approx(expected, abs=TOLERANCE)


def test_kl_is_infinite_where_only_the_student_excludes_a_token():
    target, other = torch.tensor([[1.0, 2.0]]), torch.tensor([[0.5, -torch.inf]])
    assert float(kl_divergence(target, other)) == torch.inf


@pytest.mark.parametrize("size", [1, 2, 255, 256, 257, 1000])
def test_the_most_probable_token_is_the_first_of_the_largest(size):
    values = torch.randint(0, 9, (50, size)).float()  # many ties
    assert Distribution(values).best.tolist() == np.argmax(values.numpy(), -1).tolist()


def test_a_confident_distribution_has_the_entropy_of_float64():
    values = torch.tensor([[20.0, 0.0, -5.0], [9.0, 1.0, 1.0]], dtype=torch.float64)
    found = Distribution(values.float()).entropy.double()
    assert found.tolist() == pytest.approx(entropy(values).tolist(), abs=3e-7)


def test_agreement_compares_the_top_tokens():
    one, two = torch.tensor([[1.0, 2.0], [3.0, 0.0]]), torch.tensor([[0.0, 9.0], [0.0, 1.0]])
    assert agreement(one, two).tolist() == [True, False]


@quick
@given(scored, st.sampled_from([1, 2, 4, 8, 15]))
def test_calibration_error_matches_a_binned_gap(pair, bins):
    confidence, right = pair
    # Scipy's bins are closed on the left, ours on the right: mirrored, they are the same.
    gap, _, which = binned_statistic(
        1 - confidence, confidence - right, "mean", bins=bins, range=(0, 1)
    )
    size = np.bincount(which - 1, minlength=bins)
    expected = float(np.nansum(np.abs(gap) * size) / len(right))
    found = expected_calibration_error(torch.from_numpy(confidence), torch.from_numpy(right), bins)
    assert found == pytest.approx(expected, abs=TOLERANCE)


@quick
@given(scored)
def test_auroc_matches_scikit_learn_and_is_none_for_one_class(pair):
    score, right = pair
    found = auroc(torch.from_numpy(score), torch.from_numpy(right))
    if right.all() or not right.any():
        assert found is None
    else:
        assert found == pytest.approx(roc_auc_score(right, score), abs=TOLERANCE)


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 6).flatmap(rows))
def test_risk_coverage_averages_over_every_order_of_tied_scores(pair):
    score, right = pair
    curves = [
        np.cumsum(~right[list(order)]) / np.arange(1, len(right) + 1)
        for order in itertools.permutations(range(len(right)))
        if all(score[a] >= score[b] for a, b in itertools.pairwise(order))
    ]
    found = risk_coverage(torch.from_numpy(score), torch.from_numpy(right))
    assert found.numpy() == pytest.approx(np.mean(curves, axis=0), abs=TOLERANCE)


def test_coverage_is_rounded_up_to_whole_rows():
    curve = torch.arange(1.0, 31.0)
    assert at_coverage(curve, [0.01, 0.1, 0.11, 1.0]).tolist() == [1, 3, 4, 30]


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 30), st.integers(1, 3), st.integers(0, 9))
def test_bootstrap_bounds_are_percentiles_of_resampled_means(count, columns, seed):
    values = torch.rand(count, columns, dtype=torch.float64)
    found = bootstrap_interval(values, level=0.9, resamples=37, seed=seed)
    draws = torch.randint(count, (37, count), generator=torch.Generator().manual_seed(seed))
    means = np.stack([values.numpy()[draw].mean(0) for draw in draws.numpy()])
    expected = np.percentile(means, [5, 95], axis=0).T
    assert found.numpy() == pytest.approx(expected, abs=TOLERANCE)


def test_a_bootstrap_interval_has_about_the_normal_width():
    values = (torch.arange(2000) % 4 == 0).double()[:, None]
    low, high = bootstrap_interval(values, resamples=4000)[0].tolist()
    expected = 2 * 1.96 * math.sqrt(0.25 * 0.75 / 2000)
    assert high - low == pytest.approx(expected, rel=0.05)
    assert (high + low) / 2 == pytest.approx(0.25, abs=0.002)


def test_resampling_in_chunks_gives_the_same_bounds(monkeypatch):
    values = torch.rand(50, 2, dtype=torch.float64)
    whole = bootstrap_interval(values, resamples=11)
    monkeypatch.setattr("lspade_train.probes.metrics.BOOTSTRAP_CELLS", 100)
    torch.testing.assert_close(bootstrap_interval(values, resamples=11), whole)


def test_columns_are_resampled_together():
    values = torch.rand(40, 1, dtype=torch.float64)
    both = bootstrap_interval(torch.cat([values, 1 - values], dim=1))
    assert both[0].numpy() == pytest.approx((1 - both[1]).flip(0).numpy(), abs=TOLERANCE)

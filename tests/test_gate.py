"""The learned gate: its regression against scikit-learn, its features against a loop, its file."""

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

from lspade_train.errors import PolicyError
from lspade_train.policies.gate import Gate, GateFitter, Reading, features
from lspade_train.policies.logistic import logistic, principal

LAYERS, READERS = (2, 4), ("l_spade", "tuned_lens")


def task(rows=400, seed=0):
    """Rows whose answers at two layers are mostly wrong where a hidden direction says so."""
    rng = np.random.default_rng(seed)
    inputs = [rng.normal(size=(rows, 6)).astype(np.float32) for _ in LAYERS]
    chance = [1 / (1 + np.exp(-(2 * x[:, 0] - x[:, 3] - 1))) for x in inputs]
    return inputs, np.stack([rng.random(rows) < p for p in chance], axis=1)


def blank(like):
    """Uninformative states."""
    return [np.zeros((len(x), 2), dtype=np.float32) for x in like]


def fit_gate(inputs, wrong, hidden=None):
    return GateFitter(LAYERS, READERS, inputs, hidden or blank(inputs)).fit(wrong)


@pytest.mark.parametrize("penalty", [1.0, 30.0])
def test_the_regression_matches_scikit_learn(penalty):
    (inputs, _), wrong = task()
    oracle = LogisticRegression(C=1 / penalty, tol=1e-10, max_iter=10_000)
    oracle.fit(inputs.astype(float), wrong[:, 0])
    weight, bias = logistic(inputs.astype(float), wrong[:, 0].astype(float), penalty)
    np.testing.assert_allclose(weight, oracle.coef_[0], atol=1e-6)
    assert bias == pytest.approx(oracle.intercept_[0], abs=1e-6)


def test_doubts_about_fitted_rows_are_cross_fitted():
    inputs, wrong = task()
    noise = np.random.default_rng(1).random(wrong.shape) < 0.5
    found = fit_gate(inputs, noise)
    # Coin flips cannot be learned: held-out rows get the base rate, whatever the fitted rows say.
    assert np.abs(found.doubt - noise.mean(0)).mean() < 0.1
    right = fit_gate(inputs, wrong)
    doubtful = right.doubt[:, 0] > np.median(right.doubt[:, 0])
    assert wrong[doubtful, 0].mean() > wrong[~doubtful, 0].mean() + 0.3


def test_the_gate_is_invariant_to_feature_scaling():
    inputs, wrong = task()
    scaled = [x * 7 + 3 for x in inputs]
    gate = fit_gate(inputs, wrong).gate
    other = fit_gate(scaled, wrong).gate
    for layer, plain, moved in zip(LAYERS, inputs, scaled, strict=True):
        expected = gate.doubt(layer, torch.from_numpy(plain), None)
        got = other.doubt(layer, torch.from_numpy(moved), None)
        torch.testing.assert_close(got, expected, atol=1e-3, rtol=0)


def test_layers_that_are_never_or_always_wrong_get_extreme_doubts():
    inputs, wrong = task()
    wrong[:, 0], wrong[:, 1] = False, True
    gate = fit_gate(inputs, wrong).gate
    assert gate.doubt(2, torch.from_numpy(inputs[0]), None).max() < 0.01
    assert gate.doubt(4, torch.from_numpy(inputs[1]), None).min() > 0.99


def test_a_gate_fitted_on_hidden_states_reads_them():
    inputs, wrong = task()
    nothing = blank(inputs)
    gate = fit_gate(nothing, wrong, hidden=inputs).gate
    assert gate.hidden.shape == (2, 6)
    doubt = gate.doubt(2, torch.from_numpy(nothing[0]), torch.from_numpy(inputs[0]))
    assert float(doubt[wrong[:, 0]].mean()) > float(doubt[~wrong[:, 0]].mean()) + 0.2


def test_uninformative_hidden_states_are_left_out():
    inputs, wrong = task(rows=150)
    noise = np.random.default_rng(2).normal(size=(2, 150, 40)).astype(np.float32)
    assert fit_gate(inputs, wrong, hidden=[*noise]).gate.hidden is None


def test_the_directions_are_the_principal_components():
    rng = np.random.default_rng(0)
    states = (rng.normal(size=(300, 20)) * np.geomspace(30, 0.1, 20) + 5).astype(np.float32)
    axes = principal(states, 4)
    seen = (states - states.mean(0)) @ axes
    np.testing.assert_allclose(seen.std(0), 1, rtol=1e-3)
    _, _, turn = np.linalg.svd(states - states.mean(0), full_matrices=False)
    for axis, expected in zip(axes.T / np.linalg.norm(axes, axis=0)[:, None], turn, strict=False):
        assert abs(axis @ expected) == pytest.approx(1, abs=1e-3)


def test_the_features_match_a_loop_over_rows():
    generator = torch.Generator().manual_seed(0)
    now = [torch.randn(5, 4, generator=generator) for _ in READERS]
    before = [torch.randn(5, 4, generator=generator) for _ in READERS]
    for logits in (*now, *before):
        logits[1, 3] = -torch.inf  # a row with three choices
    got = features(Reading.of(now), Reading.of(before))

    def row_statistics(logits):
        real = logits[logits.isfinite()]
        p = real.softmax(0)
        first, second = p.sort(descending=True).values[:2]
        top, next_ = real.sort(descending=True).values[:2]
        return [
            -(p * p.log()).sum(),
            first,
            first - second,
            top - next_,
            (real - real.mean()).square().mean().sqrt(),
        ]

    for row in range(5):
        expected = [value for logits in now for value in row_statistics(logits[row])]
        expected += [float(now[0][row].argmax() == now[1][row].argmax())]
        expected += [value for logits in before for value in row_statistics(logits[row])]
        expected += [
            float(a[row].argmax() == b[row].argmax()) for a, b in zip(now, before, strict=True)
        ]
        torch.testing.assert_close(got[row], torch.tensor([float(x) for x in expected]))


def test_features_of_selected_rows_are_the_selected_features():
    logits = [torch.randn(6, 3) for _ in READERS]
    chosen = torch.tensor([4, 1])
    got = features(Reading.of(logits).rows(chosen), None)
    torch.testing.assert_close(got, features(Reading.of(logits), None)[chosen])


def test_a_gate_round_trips_through_its_file_and_a_damaged_one_is_named_in_the_error(tmp_path):
    inputs, wrong = task()
    gate = fit_gate(inputs, wrong, hidden=inputs).gate
    path = tmp_path / "gate.safetensors"
    digest = gate.save(path)
    back = Gate.load(path)
    assert (back.layers, back.readers) == (gate.layers, gate.readers)
    torch.testing.assert_close(back.hidden, gate.hidden, rtol=0, atol=0)
    assert back.save(tmp_path / "again") == digest
    path.write_bytes(path.read_bytes()[:-3] + b"xyz")
    with pytest.raises(PolicyError, match="lspade-train calibrate"):
        Gate.load(path)
    with pytest.raises(PolicyError, match="does not exist"):
        Gate.load(tmp_path / "none")

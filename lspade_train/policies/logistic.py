"""Logistic regressions whose penalty is chosen by cross-validation.

Newton's method: with some tens of columns a step costs one small product and one small solve.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from numpy.typing import NDArray
from scipy.special import expit

FOLDS = 5
STEPS, HALVINGS, CHORDS = 50, 20, 30
TOLERANCE = 1e-8
"""A fit ends when the largest gradient entry, per row, is below this."""
CERTAIN = 1e-6
"""Estimated probabilities are kept at least this far from 0 and 1."""


@dataclass(frozen=True)
class LayerFit:
    """One regression, and cross-fitted probabilities for its own rows.

    Attributes:
        weight: weights of the raw columns, (columns,).
        bias: bias for the raw columns.
        doubt: each row's probability from a fit to the other folds, (rows,).
        log_loss: log loss of those probabilities, nats per row.
    """

    weight: Float[np.ndarray, " columns"]
    bias: float
    doubt: Float[np.ndarray, " rows"]
    log_loss: float


def folds(rows: int, seed: int) -> Int[np.ndarray, " rows"]:
    """The fold of each row; fold sizes differ by at most one."""
    return np.random.default_rng(seed).permutation(rows) % FOLDS


def fit_layer(
    raw: Float[np.ndarray, "rows columns"],
    wrong: Bool[np.ndarray, " rows"],
    fold: Int[np.ndarray, " rows"],
    penalties: Sequence[float | Float[np.ndarray, " columns"]],
) -> LayerFit:
    """Fit with the penalty that does best in cross-validation.

    Args:
        raw: inputs; every column is scaled to unit variance.
        wrong: the binary target.
        fold: from `folds`.
        penalties: strengths of the L2 penalty, in rows, one for all columns or one per column; a
            penalty of n halves the evidence of n rows, an infinite one excludes a column.
    """
    raw = raw.astype(np.float64)
    mean, scale = raw.mean(0), raw.std(0)
    scale[scale < 1e-9] = np.inf  # a constant column carries no information
    inputs, target = (raw - mean) / scale, wrong.astype(np.float64)
    found: list[LayerFit] = []
    for penalty in penalties:
        strength = np.broadcast_to(np.asarray(penalty, dtype=np.float64), scale.shape)
        used = np.isfinite(strength)
        columns, strength = inputs[:, used], strength[used]
        weight, bias = logistic(columns, target, strength)
        out = _cross_fit(columns, target, strength, fold, np.r_[weight, bias])
        out = out.clip(CERTAIN, 1 - CERTAIN)
        loss = float(-(target * np.log(out) + (1 - target) * np.log1p(-out)).mean())
        whole = np.zeros(len(scale))
        whole[used] = weight
        whole /= scale
        found.append(LayerFit(whole, float(bias - whole @ mean), out, loss))
    return min(found, key=lambda one: one.log_loss)


def _cross_fit(
    inputs: NDArray[np.float64],
    target: NDArray[np.float64],
    penalty: NDArray[np.float64],
    fold: NDArray[np.integer],
    whole: NDArray[np.float64],
) -> NDArray[np.float64]:
    """Each row's probability from a fit to the other folds.

    A fold's fit is close to the fit to all rows: the Hessian there, minus the fold's share, leads
    to it in a few steps without recomputing the Hessian.
    """
    columns, ridge = np.c_[inputs, np.ones(len(inputs))], np.r_[penalty, 0.0]
    chance = expit(columns @ whole)
    spread = (chance * (1 - chance))[:, None] * columns
    shares = [columns[fold == held].T @ spread[fold == held] for held in range(FOLDS)]
    curve = np.sum(shares, axis=0) + np.diag(ridge + 1e-9)
    out = np.empty(len(target))
    for held in range(FOLDS):
        rest = fold != held
        seen, known, weights = columns[rest], target[rest], whole.copy()
        step = np.linalg.inv(curve - shares[held])
        for _ in range(CHORDS):
            slope = seen.T @ (expit(seen @ weights) - known) + ridge * weights
            if np.abs(slope).max() < TOLERANCE * len(known):
                break
            weights -= step @ slope
        else:  # not converged: only one class, or an influential fold
            weights = np.append(*logistic(inputs[rest], known, penalty))
        out[~rest] = expit(columns[~rest] @ weights)
    return out


def logistic(
    inputs: NDArray[np.float64],
    target: NDArray[np.float64],
    penalty: float | NDArray[np.float64],
) -> tuple[NDArray[np.float64], float]:
    """Penalised maximum likelihood; half a pseudo-row of each class keeps the bias finite.

    Args:
        inputs: (rows, columns).
        target: 0 or 1, (rows,).
        penalty: strength of the L2 penalty on the weights, one or one per column.

    Returns:
        Weights (columns,) and bias.
    """
    base = (target.sum() + 0.5) / (len(target) + 1)
    lone = float(np.log(base / (1 - base)))
    if target.min(initial=1) == target.max(initial=0):  # only one class
        return np.zeros(inputs.shape[1]), lone
    columns = np.c_[inputs, np.ones(len(inputs))]
    ridge = np.r_[np.broadcast_to(penalty, inputs.shape[1]), 0.0]
    weights = np.r_[np.zeros(inputs.shape[1]), lone]

    def loss(weights: NDArray[np.float64], score: NDArray[np.float64]) -> float:
        value = np.logaddexp(0, score).sum() - target @ score
        return float(value + ridge @ weights**2 / 2)

    score = columns @ weights
    value = loss(weights, score)
    for _ in range(STEPS):
        chance = expit(score)
        slope = columns.T @ (chance - target) + ridge * weights
        if np.abs(slope).max() < TOLERANCE * len(target):
            break
        spread = (chance * (1 - chance))[:, None]
        curve = columns.T @ (spread * columns) + np.diag(ridge)
        step = np.linalg.solve(curve + 1e-9 * np.eye(len(ridge)), slope)
        # Newton's step overshoots far from the minimum: halve it until the loss decreases.
        for _ in range(HALVINGS):
            moved = weights - step
            score = columns @ moved
            if (lower := loss(moved, score)) <= value:
                weights, value = moved, lower
                break
            step /= 2
        else:
            break  # at the minimum, up to rounding
    return weights[:-1], float(weights[-1])


def principal(
    states: Float[np.ndarray, "rows d"], count: int, seed: int = 0
) -> Float[np.ndarray, "d directions"]:
    """Directions in which states vary most, each scaled to unit variance.

    By subspace iteration (Halko et al., arXiv:0909.4061): a few products of the states with some
    tens of directions, whereas the eigenvectors of a d x d matrix would take seconds per layer.
    """
    centred = torch.from_numpy(np.asarray(states, dtype=np.float32))
    centred = centred - centred.mean(0)
    count = min(count, *centred.shape)
    generator = torch.Generator().manual_seed(seed)
    width = min(count + 8, *centred.shape)
    basis = torch.randn(centred.shape[1], width, generator=generator)
    for _ in range(4):
        basis = torch.linalg.qr(centred.T @ (centred @ basis)).Q
    _, values, turn = torch.linalg.svd(centred @ basis, full_matrices=False)
    scale = values[:count].double().clamp(min=1e-6) / len(centred) ** 0.5
    return ((basis @ turn.T[:, :count]).double() / scale).numpy()

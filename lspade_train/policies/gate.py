"""A learned measure of doubt: the probability that the answer given here is not the full model's.

At every check layer a logistic regression reads what the check has at hand anyway: statistics of
each reader's logits (an L-SPADE head, a tuned lens), whether the readers agree, the same of the
check before and whether the answer has changed since, and the hidden state where that helps. It is
fitted on rows whose full answers are known; no right answers are needed. Knows nothing of models,
of costs or of how a threshold is chosen.

Source: logistic gates over exit statistics as in AdaInfer (arXiv:2403.02181), fitted to agreement
with the full model; features and fitting are ours.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from numpy.typing import NDArray
from scipy.optimize import minimize
from scipy.special import expit
from torch import Tensor

from lspade_train.errors import PolicyError
from lspade_train.io.storage import file_digest, file_tag, read_tensors, write_tensors
from lspade_train.probes.metrics import entropy

FORMAT_VERSION = 1
STATISTICS = ("entropy", "max_prob", "margin", "logit margin", "logit norm")
PENALTIES = (3.0, 30.0, 300.0)
"""Strengths of the L2 penalty to choose from, in rows: a penalty of n halves what n rows say."""
FOLDS = 5
DIRECTIONS = 32
"""Principal directions of the hidden state that a gate reads: few beside the rows at hand."""
LEAST = 1e-6
"""Doubt that always remains, so that a threshold of 0 stops nobody."""
REMEDY = "Fit it again with lspade-train calibrate."


@dataclass(frozen=True)
class Reading:
    """What the readers say at one check layer.

    Attributes:
        statistics: of each reader's logits, in the order of `STATISTICS`, (rows, readers * 5).
        answers: place of each reader's likeliest token, (rows, readers).
    """

    statistics: Float[Tensor, "rows statistics"]
    answers: Int[Tensor, "rows readers"]

    @classmethod
    def of(cls, logits: Sequence[Float[Tensor, "rows tokens"]]) -> Self:
        """From the logits of each reader over the same tokens; -inf leaves a token out."""
        found = [_statistics(one.float()) for one in logits]
        answers = [one.argmax(-1) for one in logits]
        return cls(torch.cat(found, dim=-1), torch.stack(answers, dim=-1))

    @classmethod
    def beside(cls, parts: "Sequence[Reading]") -> "Reading":
        """The readings of several readers of the same rows."""
        return cls(
            torch.cat([part.statistics for part in parts], dim=1),
            torch.cat([part.answers for part in parts], dim=1),
        )

    @classmethod
    def stacked(cls, parts: "Sequence[Reading]") -> "Reading":
        """The readings of several batches by the same readers."""
        return cls(
            torch.cat([part.statistics for part in parts]),
            torch.cat([part.answers for part in parts]),
        )

    def cpu(self) -> "Reading":
        """In the CPU's memory."""
        return Reading(self.statistics.cpu(), self.answers.cpu())

    def rows(self, index: Tensor) -> "Reading":
        """The rows at `index` (positions or a mask)."""
        return Reading(self.statistics[index], self.answers[index])


def features(now: Reading, before: Reading | None) -> Float[Tensor, "rows features"]:
    """What the gate looks at: this check, the one before, and what has changed in between.

    Args:
        now: this check.
        before: the check layer before, for the same rows; None at the first one (zeros).
    """
    readers = now.answers.shape[1]
    pairs = [(i, j) for i in range(readers) for j in range(i + 1, readers)]
    same = [(now.answers[:, i] == now.answers[:, j]).float() for i, j in pairs]
    if before is None:
        past, kept = torch.zeros_like(now.statistics), torch.zeros_like(now.statistics[:, :readers])
    else:
        past, kept = before.statistics, (now.answers == before.answers).float()
    return torch.cat([now.statistics, *(one[:, None] for one in same), past, kept], dim=-1)


@dataclass(frozen=True)
class Gate:
    """One logistic regression per check layer.

    Attributes:
        layers: check layers, ascending.
        readers: lenses whose logits it reads, such as ("l_spade", "tuned_lens").
        weight: of the features, (layers, features); their scales are folded in.
        bias: (layers,).
        hidden: weights of the hidden state, (layers, d); None where it is not read.
    """

    layers: tuple[int, ...]
    readers: tuple[str, ...]
    weight: Float[Tensor, "layers features"]
    bias: Float[Tensor, " layers"]
    hidden: Float[Tensor, "layers d"] | None = None

    def doubt(
        self,
        layer: int,
        features: Float[Tensor, "rows features"],
        hidden: Float[Tensor, "rows d"] | None,
    ) -> Float[Tensor, " rows"]:
        """Probability that the answer given at `layer` is not the full model's.

        Args:
            layer: one of `layers`.
            features: from `features`.
            hidden: h_a at that layer; read only where the gate was fitted with it.
        """
        place, device = self.layers.index(layer), features.device
        # Matrix products, as FLOPs are counted by them.
        score = features @ self.weight[place, :, None].to(device)
        if self.hidden is not None and hidden is not None:
            score = score + (hidden.float() @ self.hidden[place, :, None].to(hidden.device))
        score = score.squeeze(-1) + self.bias[place].to(device)
        return torch.sigmoid(score).clamp(min=LEAST)

    def save(self, path: Path) -> str:
        """Write `gate.safetensors`; equal gates give equal bytes.

        Returns:
            SHA-256 of the file.

        Raises:
            PolicyError: the file cannot be written.
        """
        tensors = {"weight": self.weight, "bias": self.bias}
        tensors |= {} if self.hidden is None else {"hidden": self.hidden}
        about = {
            "format_version": FORMAT_VERSION, "layers": self.layers, "readers": self.readers,
        }  # fmt: skip
        write_tensors(path, tensors, json.dumps(about), PolicyError)
        return file_digest(path, PolicyError)

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read a `gate.safetensors`.

        Raises:
            PolicyError: missing, damaged, or of an unknown format.
        """
        tensors, tag = read_tensors(path, PolicyError, REMEDY), file_tag(path)
        try:
            about = json.loads(tag or "")
            known = about["format_version"] == FORMAT_VERSION
            layers, readers = tuple(about["layers"]), tuple(about["readers"])
            weight, bias = tensors["weight"], tensors["bias"]
            hidden = tensors.get("hidden")
            shapes = {len(layers), *(len(one) for one in (weight, bias, hidden) if one is not None)}
            if not known or len(shapes) != 1 or weight.ndim != 2 or bias.ndim != 1:
                raise ValueError("another format")
        except (ValueError, KeyError, TypeError) as cause:
            raise PolicyError(f"{path} is not a gate that this version reads. {REMEDY}") from cause
        return cls(layers, readers, weight, bias, hidden)


@dataclass(frozen=True)
class FittedGate:
    """A gate, and what it would have said of the very rows it was fitted on without seeing them.

    Attributes:
        gate: fitted on all rows.
        doubt: each row's value by a gate fitted on the other folds, (rows, layers).
        log_loss: of those values, nats per row, summed over the layers.
    """

    gate: Gate
    doubt: Float[np.ndarray, "rows layers"]
    log_loss: float


def fit_gate(
    layers: Sequence[int],
    readers: Sequence[str],
    features: Sequence[Float[np.ndarray, "rows features"]],
    wrong: Bool[np.ndarray, "rows layers"],
    *,
    hidden: Sequence[Float[np.ndarray, "rows d"]] | None = None,
    seed: int = 0,
) -> FittedGate:
    """Fit one logistic regression per check layer, its penalty chosen by cross-fitting.

    Args:
        layers: check layers, ascending.
        readers: lenses that the features were made of.
        features: from `features`, one per layer.
        wrong: whether the answer given at each layer is not the full model's.
        hidden: h_a at each layer, to be read too.
        seed: of the folds.
    """
    rows = len(wrong)
    fold = np.random.default_rng(seed).permutation(rows) % FOLDS
    axes = None if hidden is None else [_principal(one) for one in hidden]
    inputs = [
        one if axes is None or hidden is None else np.c_[one, hidden[k] @ axes[k]]
        for k, one in enumerate(features)
    ]
    found = [_fit_layer(inputs[k], wrong[:, k], fold) for k in range(len(layers))]
    width = features[0].shape[1]
    weights = [weight for weight, _, _, _ in found]
    seen = None if axes is None else [a @ w[width:] for a, w in zip(axes, weights, strict=True)]
    gate = Gate(
        layers=tuple(layers),
        readers=tuple(readers),
        weight=torch.from_numpy(np.stack([weight[:width] for weight in weights])).float(),
        bias=torch.tensor([bias for _, bias, _, _ in found], dtype=torch.float32),
        hidden=None if seen is None else torch.from_numpy(np.stack(seen)).float(),
    )
    doubt = np.stack([out for _, _, out, _ in found], axis=1)
    return FittedGate(gate, doubt, sum(loss for _, _, _, loss in found))


def _principal(hidden: NDArray[np.floating]) -> NDArray[np.float64]:
    """Directions in which the states vary most, each scaled to unit variance, (d, directions)."""
    states = torch.from_numpy(np.asarray(hidden, dtype=np.float64))
    states = states - states.mean(0)
    count = min(DIRECTIONS, *states.shape)
    # Of the covariance: d x d at most, however many rows there are.
    values, vectors = torch.linalg.eigh(states.T @ states / len(states))
    scale = values[-count:].clamp(min=1e-12).sqrt()
    return (vectors[:, -count:] / scale).numpy()


def _fit_layer(
    raw: NDArray[np.floating], wrong: NDArray[np.bool_], fold: NDArray[np.integer]
) -> tuple[NDArray[np.float64], float, NDArray[np.float64], float]:
    """Weights, bias, out-of-fold probabilities and their log loss, for the best penalty."""
    raw = raw.astype(np.float64)
    mean, scale = raw.mean(0), raw.std(0)
    scale[scale < 1e-9] = np.inf  # a constant column says nothing
    inputs, target = (raw - mean) / scale, wrong.astype(np.float64)
    best: tuple[float, float, NDArray[np.float64]] | None = None
    for penalty in PENALTIES:
        out = np.empty(len(target))
        for held in range(FOLDS):
            weight, bias = _logistic(inputs[fold != held], target[fold != held], penalty)
            out[fold == held] = expit(inputs[fold == held] @ weight + bias)
        out = out.clip(1e-6, 1 - 1e-6)
        loss = float(-(target * np.log(out) + (1 - target) * np.log1p(-out)).mean())
        if best is None or loss < best[0]:
            best = loss, penalty, out
    assert best is not None
    loss, penalty, out = best
    weight, bias = _logistic(inputs, target, penalty)
    weight = weight / scale
    return weight, float(bias - weight @ mean), out, loss


def _logistic(
    inputs: NDArray[np.float64], target: NDArray[np.float64], penalty: float
) -> tuple[NDArray[np.float64], float]:
    """Penalised maximum likelihood; half a row of each kind keeps the bias finite."""
    rows = len(target)
    base = (target.sum() + 0.5) / (rows + 1)
    start = np.r_[np.zeros(inputs.shape[1]), np.log(base / (1 - base))]
    if target.min(initial=1) == target.max(initial=0):  # one kind only: nothing to tell apart
        return start[:-1], float(start[-1])

    def loss(weights: NDArray[np.float64]) -> tuple[float, NDArray[np.float64]]:
        score = inputs @ weights[:-1] + weights[-1]
        value = np.logaddexp(0, score).sum() - target @ score
        residual = expit(score) - target
        slope = np.r_[inputs.T @ residual + penalty * weights[:-1], residual.sum()]
        return float(value + penalty / 2 * weights[:-1] @ weights[:-1]), slope

    found = minimize(loss, start, jac=True, method="L-BFGS-B", options={"maxiter": 500})
    return found.x[:-1], float(found.x[-1])


def _statistics(logits: Float[Tensor, "rows tokens"]) -> Float[Tensor, "rows statistics"]:
    real = logits.isfinite()
    probability = logits.softmax(-1).topk(2).values
    best = logits.topk(2).values
    count = real.sum(-1, keepdim=True)
    kept = logits.masked_fill(~real, 0.0)
    centred = (kept - kept.sum(-1, keepdim=True) / count).masked_fill(~real, 0.0)
    return torch.stack(
        [
            entropy(logits),
            probability[:, 0],
            probability[:, 0] - probability[:, 1],
            (best[:, 0] - best[:, 1]).clamp(max=100.0),
            centred.norm(dim=-1) / count.squeeze(-1).sqrt(),
        ],
        dim=-1,
    )

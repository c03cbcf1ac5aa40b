"""A learned measure of doubt: the probability that an exit's answer is not the full model's.

At every check layer a logistic regression uses what the check computes anyway: statistics of each
reader's logits (an L-SPADE head, a tuned lens), whether the readers agree, the same for the
previous check and whether the answer has changed since, and the hidden state if it helps. It is
fitted on rows whose full answers are known; no labels are needed. Independent of models, costs and
how a threshold is chosen.

Source: logistic gates over exit statistics as in AdaInfer (arXiv:2403.02181), fitted to agreement
with the full model; features and fitting are ours.
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from numpy.typing import NDArray
from torch import Tensor

from lspade_train.errors import PolicyError
from lspade_train.io.tensors import file_digest_of, file_tag, read_tensors, write_tensors
from lspade_train.policies.logistic import LayerFit, fit_layer, folds, principal
from lspade_train.probes.metrics import entropy

FORMAT_VERSION = 1
STATISTICS = ("entropy", "max_prob", "margin", "logit margin", "logit norm")
PENALTIES = ((3, np.inf), (30, np.inf), (3, 30), (30, 30), (30, 300))
"""Candidate penalties, in rows, for the features and the hidden state; inf excludes the latter."""
DIRECTIONS = 32
"""Principal directions of the hidden state that a gate reads: few, compared with the rows."""
LEAST = 1e-6
"""Lower bound of the doubt, so that with a threshold of 0 no row exits."""
REMEDY = "Fit it again with lspade-train calibrate."


@dataclass(frozen=True)
class Reading:
    """The readers' outputs at one check layer.

    Attributes:
        statistics: each reader's statistics, in the order of `STATISTICS`, (rows, readers * 5).
        answers: index of each reader's most likely token, (rows, readers).
    """

    statistics: Float[Tensor, "rows statistics"]
    answers: Int[Tensor, "rows readers"]

    @classmethod
    def of(cls, logits: Sequence[Float[Tensor, "rows tokens"]]) -> Self:
        """Compute from the logits of each reader over the same tokens; -inf excludes a token."""
        found = [_statistics(one.float()) for one in logits]
        answers = [one.argmax(-1) for one in logits]
        return cls(torch.cat(found, dim=-1), torch.stack(answers, dim=-1))

    @classmethod
    def beside(cls, parts: "Sequence[Reading]") -> "Reading":
        """Join the readings of several readers of the same rows."""
        return cls(
            torch.cat([part.statistics for part in parts], dim=1),
            torch.cat([part.answers for part in parts], dim=1),
        )

    @classmethod
    def stacked(cls, parts: "Sequence[Reading]") -> "Reading":
        """Join the readings of several batches by the same readers."""
        return cls(
            torch.cat([part.statistics for part in parts]),
            torch.cat([part.answers for part in parts]),
        )

    def cpu(self) -> "Reading":
        """A copy on the CPU."""
        return Reading(self.statistics.cpu(), self.answers.cpu())

    def rows(self, index: Tensor) -> "Reading":
        """The rows at `index` (positions or a mask)."""
        return Reading(self.statistics[index], self.answers[index])


def features(now: Reading, before: Reading | None) -> Float[Tensor, "rows features"]:
    """The gate's inputs: this check, the previous one, and what has changed in between.

    Args:
        now: this check.
        before: the previous check of the same rows; None at the first check layer (zeros).
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
        weight: weights of the unscaled features, (layers, features).
        bias: biases, (layers,).
        hidden: weights of the hidden state, (layers, d); None if it is not read.
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
        """Probability that the answer at `layer` is not the full model's.

        Args:
            layer: one of `layers`.
            features: from `features`.
            hidden: h_a at that layer; used only if the gate was fitted with it.
        """
        place, device = self.layers.index(layer), features.device
        # Matrix products, because those are what FLOP counts include.
        score = features @ self.weight[place, :, None].to(device)
        if self.hidden is not None and hidden is not None:
            more = hidden.float() @ self.hidden[place, :, None].to(hidden.device)
            score = score + more.to(device)
        score = score.squeeze(-1) + self.bias[place].to(device)
        return torch.sigmoid(score).clamp(min=LEAST)

    @property
    def digest(self) -> str:
        """SHA-256 of its file, which need not exist."""
        return file_digest_of(*self._content())

    def save(self, path: Path) -> str:
        """Write `gate.safetensors`; equal gates give identical bytes.

        Returns:
            SHA-256 of the file.

        Raises:
            PolicyError: the file cannot be written.
        """
        return write_tensors(path, *self._content(), PolicyError)

    def _content(self) -> tuple[dict[str, Tensor], str]:
        tensors = {"weight": self.weight, "bias": self.bias}
        tensors |= {} if self.hidden is None else {"hidden": self.hidden}
        about = {
            "format_version": FORMAT_VERSION, "layers": self.layers, "readers": self.readers,
        }  # fmt: skip
        return tensors, json.dumps(about)

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
    """A gate, and cross-fitted outputs for the rows that it was fitted on.

    Attributes:
        gate: the gate, fitted on all rows.
        doubt: each row's output from a gate fitted on the other folds, (rows, layers).
    """

    gate: Gate
    doubt: Float[np.ndarray, "rows layers"]


class GateFitter:
    """Fits gates on the same rows for any answers, each layer's regression once per answer.

    Whether a layer's gate uses the hidden state, and how strongly its weights are penalised, is
    decided by cross-validation.

    Args:
        layers: check layers, ascending.
        readers: lenses that the features were computed from.
        features: from `features`, one per layer.
        hidden: h_a at each layer, (rows, d).
        seed: seed of the folds.
    """

    def __init__(
        self,
        layers: Sequence[int],
        readers: Sequence[str],
        features: Sequence[Float[np.ndarray, "rows features"]],
        hidden: Iterable[Float[np.ndarray, "rows d"]],
        *,
        seed: int = 0,
    ) -> None:
        self.layers, self.readers = tuple(layers), tuple(readers)
        self._fold = folds(len(features[0]), seed)
        self._width = features[0].shape[1]
        self._axes: list[NDArray[np.float64]] = []
        self._inputs: list[NDArray[np.float64]] = []
        for seen, states in zip(features, hidden, strict=True):
            axes = principal(states, DIRECTIONS, seed)
            self._axes.append(axes)
            self._inputs.append(np.c_[seen, states.astype(np.float64) @ axes])
        self._fits: dict[tuple[int, bytes], LayerFit] = {}

    def fit(self, wrong: Bool[np.ndarray, "rows layers"]) -> FittedGate:
        """Fit the gate.

        Args:
            wrong: whether the answer at each layer differs from the full model's.
        """
        found = [self._layer(place, wrong[:, place]) for place in range(len(self.layers))]
        weight = np.stack([one.weight[: self._width] for one in found])
        pairs = zip(self._axes, found, strict=True)
        hidden = np.stack([axes @ one.weight[self._width :] for axes, one in pairs])
        gate = Gate(
            layers=self.layers,
            readers=self.readers,
            weight=torch.from_numpy(weight).float(),
            bias=torch.tensor([one.bias for one in found], dtype=torch.float32),
            hidden=torch.from_numpy(hidden).float() if hidden.any() else None,
        )
        return FittedGate(gate, np.stack([one.doubt for one in found], axis=1))

    def _layer(self, place: int, wrong: NDArray[np.bool_]) -> LayerFit:
        key = place, np.packbits(wrong).tobytes()
        if key not in self._fits:
            inputs = self._inputs[place]
            hidden = inputs.shape[1] - self._width
            penalties = [np.repeat(both, (self._width, hidden)) for both in PENALTIES]
            self._fits[key] = fit_layer(inputs, wrong, self._fold, penalties)
        return self._fits[key]


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

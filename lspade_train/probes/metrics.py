"""Entropy, KL, agreement, calibration, AUROC, risk-coverage, bootstrap: functions of tensors.

Independent of models and files.
"""

from collections.abc import Sequence
from functools import cached_property

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

BOOTSTRAP_CELLS = 2**23
"""Resamples x rows held in memory at once."""


class Distribution:
    """softmax(logits) in fp32 or better; quantities that several metrics need are computed once.

    Args:
        logits: unnormalised scores, promoted to fp32 (bf16 loses small entropies).
    """

    def __init__(self, logits: Float[Tensor, "*batch vocab"]) -> None:
        self.logits = logits

    @cached_property
    def shifted(self) -> Float[Tensor, "*batch vocab"]:
        """The logits minus their maximum."""
        wide = self.logits if self.logits.dtype == torch.float64 else self.logits.float()
        return wide - wide.amax(-1, keepdim=True)

    @cached_property
    def probability(self) -> Float[Tensor, "*batch vocab"]:
        """The probabilities."""
        return self.shifted.softmax(-1)

    @cached_property
    def best(self) -> Int[Tensor, "*batch"]:
        """The most probable token; the first of several."""
        return _argmax(self.shifted)  # several times slower in half precision

    @cached_property
    def confidence(self) -> Float[Tensor, "*batch"]:
        """The probability of the most probable token."""
        return self.probability.amax(-1)

    @cached_property
    def log_total(self) -> Float[Tensor, "*batch"]:
        """Logarithm of the sum of `exp(shifted)`, whose largest term is 1."""
        return -self.confidence.log()

    @cached_property
    def entropy(self) -> Float[Tensor, "*batch"]:
        """Shannon entropy in nats; a token of zero probability adds nothing."""
        return self.log_total - self._mean_shifted(self)

    def kl_to(self, other: "Distribution") -> Float[Tensor, "*batch"]:
        """KL(self || other) in nats; see `kl_divergence`."""
        if other is self:
            return torch.zeros_like(self.entropy)
        return other.log_total - self._mean_shifted(other) - self.entropy

    def _mean_shifted(self, other: "Distribution") -> Float[Tensor, "*batch"]:
        """Mean of the other's shifted logits under this distribution."""
        found = torch.linalg.vecdot(self.probability, other.shifted)
        if not found.isnan().any():
            return found
        # Zero times -inf, for a token that both exclude.
        return torch.where(self.probability == 0, 0.0, self.probability * other.shifted).sum(-1)


def entropy(logits: Float[Tensor, "*batch vocab"]) -> Float[Tensor, "*batch"]:
    """Shannon entropy of `softmax(logits)`: the signal that decides an exit.

    Args:
        logits: unnormalised scores, promoted to fp32 (bf16 loses small entropies).

    Returns:
        Nats, from 0 (certain) to ln(vocab) (uniform).

    Source: arXiv:2507.17618, entropy-based early exit.
    """
    return Distribution(logits).entropy


def kl_divergence(
    target: Float[Tensor, "*batch vocab"], logits: Float[Tensor, "*batch vocab"]
) -> Float[Tensor, "*batch"]:
    """KL(softmax(target) || softmax(logits)) in nats, in fp32 or better.

    A token that the target excludes (a logit of -inf) contributes nothing; one that only `logits`
    excludes makes the divergence infinite.
    """
    return Distribution(target).kl_to(Distribution(logits))


def agreement(
    first: Float[Tensor, "*batch vocab"], second: Float[Tensor, "*batch vocab"]
) -> Bool[Tensor, "*batch"]:
    """Whether the two most probable tokens are the same."""
    return first.argmax(-1) == second.argmax(-1)


def expected_calibration_error(
    confidence: Float[Tensor, " rows"], correct: Bool[Tensor, " rows"], bins: int = 15
) -> float:
    """Mean gap between confidence and accuracy over equal-width bins, weighted by their rows.

    Args:
        confidence: probability of the given answer, 0..1.
        correct: whether that answer was right.
        bins: number of bins (a, b]; the first one takes 0 as well.

    Returns:
        0 (calibrated) to 1.

    Source: Guo et al. 2017, arXiv:1706.04599.
    """
    confidence, right = confidence.double(), correct.double()
    which = (confidence * bins).ceil().long().clamp(1, bins) - 1
    gap = torch.zeros(bins, dtype=torch.float64, device=confidence.device)
    gap.scatter_add_(0, which, confidence - right)
    return float(gap.abs().sum() / max(len(confidence), 1))


def auroc(score: Float[Tensor, " rows"], positive: Bool[Tensor, " rows"]) -> float | None:
    """Probability that a positive row scores above a negative one; ties count half.

    Returns:
        0..1, or None if one of the two classes is empty.
    """
    positives = int(positive.sum())
    negatives = len(positive) - positives
    if not positives or not negatives:
        return None
    _, inverse, counts = score.double().unique(return_inverse=True, return_counts=True)
    last = counts.cumsum(0).double()
    mean_rank = last - (counts.double() - 1) / 2
    ranks = mean_rank[inverse]
    above = float(ranks[positive].sum()) - positives * (positives + 1) / 2
    return above / (positives * negatives)


def risk_coverage(
    score: Float[Tensor, " rows"], correct: Bool[Tensor, " rows"]
) -> Float[Tensor, " rows"]:
    """Error rate among the k rows of highest score, for k = 1..n.

    Ties are averaged over: rows of equal score share their errors equally. The mean over k is the
    area under the curve, AURC.

    Args:
        score: confidence of each row; only its order matters.
        correct: whether the row's answer was right.

    Returns:
        0..1, float64.

    Source: Geifman and El-Yaniv 2017, arXiv:1705.08500.
    """
    _, tie, counts = (-score.double()).unique(return_inverse=True, return_counts=True)
    wrong = torch.zeros(len(counts), dtype=torch.float64, device=score.device)
    wrong.scatter_add_(0, tie, (~correct).double())
    errors = (wrong / counts).repeat_interleave(counts).cumsum(0)
    return errors / torch.arange(1, len(score) + 1, device=score.device)


def at_coverage(
    curve: Float[Tensor, " rows"], coverage: Sequence[float]
) -> Float[Tensor, " points"]:
    """Values of a `risk_coverage` curve where the given fractions of the rows are answered.

    Args:
        curve: one value per number of rows, 1..n.
        coverage: fractions, over 0 up to 1; rounded up to whole rows.
    """
    wanted = torch.tensor(coverage, dtype=torch.float64) * len(curve)
    # The subtraction keeps products like 0.1 * 30, slightly above 3, from being rounded up to 4.
    return curve[(wanted - 1e-9).ceil().long().clamp(1, len(curve)) - 1]


def bootstrap_interval(
    values: Float[Tensor, "rows columns"],
    *,
    level: float = 0.95,
    resamples: int = 1000,
    seed: int = 0,
) -> Float[Tensor, "columns 2"]:
    """Percentile bootstrap intervals of the columns' means.

    All columns are resampled together, so the interval of a difference comes from a column of
    differences. Rows are assumed independent.

    Args:
        values: one row per measured row, at least one.
        level: probability inside the interval.
        resamples: number of draws of n rows with replacement.
        seed: seed of those draws.

    Returns:
        Lower and upper bound of each column's mean, float64.

    Source: Efron 1979, "Bootstrap methods: another look at the jackknife".
    """
    rows = len(values)
    values = values.double().cpu()
    generator = torch.Generator().manual_seed(seed)
    step = max(BOOTSTRAP_CELLS // rows, 1)
    means: list[Tensor] = []
    for first in range(0, resamples, step):
        draws = torch.randint(rows, (min(step, resamples - first), rows), generator=generator)
        # How often each row was drawn: a mean over a resample is then a matrix product.
        times = torch.zeros(draws.shape, dtype=torch.float64)
        times.scatter_add_(1, draws, torch.ones_like(times))
        means.append(times @ values / rows)
    tail = (1 - level) / 2
    bounds = torch.tensor([tail, 1 - tail], dtype=torch.float64)
    return torch.cat(means).quantile(bounds, dim=0).T


def _argmax(values: Float[Tensor, "*batch vocab"]) -> Int[Tensor, "*batch"]:
    """`values.argmax(-1)` in two steps: torch finds maxima on a CPU ten times faster than places.

    Finds the first of the blocks with the largest maximum, then the place within that block.
    """
    width, size = 256, values.shape[-1]
    blocks, rest = divmod(size, width)
    maxima = values[..., : blocks * width].unflatten(-1, (blocks, width)).amax(-1)
    if rest:
        maxima = torch.cat([maxima, values[..., -rest:].amax(-1, keepdim=True)], dim=-1)
    block = maxima.argmax(-1, keepdim=True)
    inside = block * width + torch.arange(width, device=values.device)
    chosen = values.gather(-1, inside.clamp_(max=size - 1))
    return inside.gather(-1, chosen.argmax(-1, keepdim=True)).squeeze(-1)

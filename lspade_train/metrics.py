"""Entropy, KL, agreement, calibration error, AUROC: pure functions of tensors.

Knows nothing of models or files.
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor


def entropy(logits: Float[Tensor, "*batch vocab"]) -> Float[Tensor, "*batch"]:
    """Shannon entropy of `softmax(logits)`: the signal that decides an exit.

    Args:
        logits: unnormalised scores, promoted to fp32 (bf16 loses small entropies).

    Returns:
        Nats, from 0 (certain) to ln(vocab) (uniform).

    Source: arXiv:2507.17618, entropy-based early exit.
    """
    logp = _log_softmax(logits)
    # xlogy-style: a probability of zero contributes nothing, even where its logarithm is -inf.
    return -(logp.exp() * logp.nan_to_num(neginf=0.0)).sum(-1)


def kl_divergence(
    target: Float[Tensor, "*batch vocab"], logits: Float[Tensor, "*batch vocab"]
) -> Float[Tensor, "*batch"]:
    """KL(softmax(target) || softmax(logits)) in nats, in fp32 or better."""
    logt, logp = _log_softmax(target), _log_softmax(logits)
    finite = logt.nan_to_num(neginf=0.0)
    return (logt.exp() * (finite - logp)).sum(-1)


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
        0..1, or None where one of the two classes is empty.
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


def _log_softmax(logits: Tensor) -> Tensor:
    wide = logits if logits.dtype == torch.float64 else logits.float()
    return wide.log_softmax(-1)

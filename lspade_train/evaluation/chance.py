"""The frozen model's own accuracy, against baselines without a model: chance and majority answer.

Early exits of a model that only guesses save much but are meaningless. Independent of heads.
"""

import math
from dataclasses import dataclass
from statistics import NormalDist

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from lspade_train.cache import StateBatch, StateDataset
from lspade_train.cache.answers import choice_mask, chunks, pick_answer
from lspade_train.models import Unembedding

LEVEL = 0.95


@dataclass(frozen=True)
class AgainstChance:
    """The frozen model's accuracy, compared with baselines that need no model.

    Attributes:
        n: rows with a label.
        accuracy: fraction that the model answers correctly.
        interval: 95% interval of the accuracy.
        chance: accuracy of guessing, the mean of 1 / choices; None if a row has no choices.
        majority: accuracy of always giving the most frequent correct answer.
        majority_id: token of that answer.
    """

    n: int
    accuracy: float
    interval: tuple[float, float]
    chance: float | None
    majority: float
    majority_id: int

    @property
    def floor(self) -> float:
        """Accuracy of the better of guessing and the most frequent answer."""
        return max(self.chance or 0.0, self.majority)

    @property
    def at_chance(self) -> bool:
        """Whether the interval's lower end is at or below `floor`."""
        return self.interval[0] <= self.floor

    @property
    def verdict(self) -> str:
        """The comparison in words."""
        low, high = self.interval
        baseline = "always giving the most frequent answer"
        if self.chance is not None and self.chance >= self.majority:
            baseline = "guessing among the choices"
        what = "not above chance" if self.at_chance else "above chance"
        return (
            f"the frozen model is {what}: accuracy {self.accuracy:.1%} [{low:.1%}, {high:.1%}] on "
            f"{self.n:,} rows, against {self.floor:.1%} for {baseline}"
        )


def wilson_interval(right: int, n: int, level: float = LEVEL) -> tuple[float, float]:
    """Interval for a proportion; unlike a bootstrap interval, not degenerate at 0 or n.

    Args:
        right: number of successes.
        n: number of rows, 1 or more.
        level: probability inside the interval.

    Source: Wilson 1927, "Probable inference, the law of succession, and statistical inference".
    """
    z = NormalDist().inv_cdf((1 + level) / 2)
    share, shrink = right / n, 1 + z * z / n
    middle = share + z * z / (2 * n)
    half = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return max((middle - half) / shrink, 0.0), min((middle + half) / shrink, 1.0)


def baseline_accuracies(
    answer_id: Int[Tensor, " rows"], choice_count: Int[Tensor, " rows"]
) -> tuple[float | None, float, int]:
    """Accuracy of guessing, accuracy of the most frequent answer, and that answer's token.

    Args:
        answer_id: correct tokens, of one row or more.
        choice_count: choices of each row; 0 if any token may be the answer.
    """
    chance = float((1 / choice_count.double()).mean()) if bool((choice_count > 0).all()) else None
    tokens, counts = answer_id.unique(return_counts=True)
    place = int(counts.argmax())
    return chance, int(counts[place]) / len(answer_id), int(tokens[place])


def compare(
    right: Bool[Tensor, " rows"], answer_id: Int[Tensor, " rows"], count: Int[Tensor, " rows"]
) -> AgainstChance:
    """The comparison for labelled rows, one or more.

    Args:
        right: whether the model's answer is correct.
        answer_id: correct tokens.
        count: choices of each row; 0 if any token may be the answer.
    """
    hits, n = int(right.sum()), len(right)
    return AgainstChance(
        n, hits / n, wilson_interval(hits, n), *baseline_accuracies(answer_id, count)
    )


def cached_accuracy(dataset: StateDataset, unembed: Unembedding) -> AgainstChance | None:
    """The comparison for cached rows, from the states in the cache: no model forward.

    Returns:
        The comparison; None if no row has a label.
    """
    labels = dataset.labels
    known = labels["labelled"]
    if not known.any():
        return None
    device = unembed.weight.device
    with torch.no_grad():
        answers = [_answers(rows.to(device), unembed).cpu() for rows in chunks(dataset)]
    right = (torch.cat(answers) == labels["answer_id"])[known]
    return compare(right, labels["answer_id"][known].long(), labels["choice_count"][known])


def _answers(batch: StateBatch, unembed: Unembedding) -> Int[Tensor, " rows"]:
    """The full model's answers, without logits over the vocabulary if all rows have choices."""
    if not bool((batch.choice_count > 0).all()):
        return pick_answer(unembed(batch.final), batch)
    ids = batch.choice_ids.long()
    scores = unembed.tokens(batch.final, ids).masked_fill(~choice_mask(batch), -torch.inf)
    return ids.gather(1, scores.argmax(-1, keepdim=True)).squeeze(1)

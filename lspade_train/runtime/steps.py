"""Joins the decisions of an answer: a label of several tokens is decided step by step.

Independent of models and batches.
"""

from collections.abc import Sequence
from dataclasses import replace

from lspade_train.runtime.batching import Query
from lspade_train.runtime.decide import Decision

Step = tuple[Query, Decision]
"""The query and the decision of a step."""


def join(steps: Sequence[Step]) -> Decision:
    """Join the steps of a prompt's answer, in order, into one decision."""
    last = steps[-1][1]
    scores = last.scores
    if any(query.fork is not None and query.fork.walked for query, _ in steps):
        scores = _shares(steps)
    if len(steps) == 1:
        return replace(last, scores=scores)
    layers = tuple(decision.layer for _, decision in steps)
    return replace(
        last,
        layer=max(layers),
        entropy=max(decision.entropy for _, decision in steps),
        exited=all(decision.exited for _, decision in steps),
        scores=scores,
        steps=layers,
    )


def _shares(steps: Sequence[Step]) -> dict[str, float]:
    """Probability of every label: the product over its steps, up to the last one taken."""
    shares: dict[str, float] = {}
    reached = 1.0
    for query, decision in steps:
        assert query.fork is not None and decision.scores is not None  # noqa: PT018
        for labels, p in zip(query.fork.options.values(), decision.scores.values(), strict=True):
            shares |= dict.fromkeys(labels, reached * p / len(labels))
        reached *= decision.scores[decision.text or ""]
    return shares

"""From readings to JSON: means with intervals, calibration, selective prediction.

Independent of models, caches and files.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lspade_train.evaluation.chance import baseline_accuracies
from lspade_train.evaluation.readings import Readings
from lspade_train.probes.metrics import (
    at_coverage,
    auroc,
    bootstrap_interval,
    expected_calibration_error,
    risk_coverage,
)

FORMAT_VERSION = 2
LEVEL, RESAMPLES, SEED = 0.95, 1000, 0
INTERVAL = {
    "method": "percentile bootstrap over rows, paired",
    "level": LEVEL,
    "resamples": RESAMPLES,
    "seed": SEED,
}
COVERAGE = tuple(round(0.05 * step, 2) for step in range(1, 21))
ENTROPY_BINS = 40
NEEDS_LABELS = (
    *("accuracy", "accuracy_interval", "accuracy_vocabulary", "accuracy_vocabulary_interval"),
    *("ece", "auroc", "auroc_confidence", "risk", "aurc", "entropy_histogram"),
)

OF_VOCABULARY = (
    *("agrees_model", "agrees_model_interval", "agrees_spade", "kl_to_spade", "kl_to_model"),
    *("accuracy_vocabulary", "accuracy_vocabulary_interval"),
)
"""Metrics that are undefined for heads that were fitted over the choices."""


def summarise(readings: Readings, vocab_size: int) -> dict[str, Any]:
    """Every lens at every layer, and the model itself, as JSON.

    Accuracy is over the task's choices (over the vocabulary if it has none) and over the
    vocabulary; null if no row has a label. Metrics that compare vocabularies are null for heads
    that were fitted over the choices. docs/results.md documents every key.

    Args:
        readings: per-row measurements.
        vocab_size: V; ln V bounds the entropy histograms.
    """
    edges = torch.linspace(0, math.log(vocab_size), ENTROPY_BINS + 1, dtype=torch.float64)
    lenses = {
        name: _lens({key: value[place] for key, value in readings.values.items()}, readings, edges)
        for place, name in enumerate(readings.lenses)
    }
    for name in readings.over_choices:
        lenses[name] |= dict.fromkeys(OF_VOCABULARY)
    full = _lens({name: value[None] for name, value in readings.full.items()}, readings, edges)
    return plain(
        {
            "n": len(readings),
            "n_labelled": int(readings.labelled.sum()),
            "has_choices": readings.has_choices,
            "layers": list(readings.layers),
            "interval": INTERVAL,
            "coverage": COVERAGE,
            "entropy_edges": edges.tolist(),
            "full_model": {name: _only(value) for name, value in full.items()}
            | _baselines(readings),
            "lenses": lenses,
            "groups": _groups(readings),
        }
    )


def means_with_intervals(values: dict[str, Tensor]) -> dict[str, Any]:
    """Mean over the rows of each of `values`, (layers, rows), with `NAME_interval` beside it."""
    columns = torch.cat([value.double() for value in values.values()]).T
    bounds = bootstrap_interval(columns, level=LEVEL, resamples=RESAMPLES, seed=SEED)
    found: dict[str, Any] = {}
    parts = bounds.split([len(value) for value in values.values()])
    for (name, value), interval in zip(values.items(), parts, strict=True):
        found[name] = value.double().mean(-1).tolist()
        found[f"{name}_interval"] = interval.tolist()
    return found


def plain(value: Any) -> Any:
    """A nested value that JSON can represent: numbers that are not finite become null."""
    if isinstance(value, dict):
        return {name: plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _lens(values: dict[str, Tensor], readings: Readings, edges: Tensor) -> dict[str, Any]:
    """One lens from its `values`, (layers, rows); missing comparisons are skipped."""
    compared = {
        name: value for name, value in values.items() if name.startswith(("agrees", "kl_to"))
    }
    found: dict[str, Any] = {name: mean(value) for name, value in compared.items()}
    found["entropy"] = mean(values["entropy"])
    if "agrees_model" in compared:
        same_answer = values["answer"] == readings.full["answer"]
        found |= means_with_intervals(
            {"agrees_model": values["agrees_model"], "answer_agrees_model": same_answer}
        )
    if not readings.labelled.any():
        return found | dict.fromkeys(NEEDS_LABELS)
    gold = readings.answer_id
    known = {name: value[:, readings.labelled] for name, value in values.items()}
    right = (values["answer"] == gold)[:, readings.labelled]
    best_right = (values["best"] == gold)[:, readings.labelled]
    found |= means_with_intervals({"accuracy": right, "accuracy_vocabulary": best_right})
    return found | _confidence(known["entropy"], known["confidence"], right, edges)


def mean(value: Tensor) -> list[float]:
    """Mean over the rows, (layers, rows) -> one number per layer."""
    return value.double().mean(-1).tolist()


def _confidence(
    entropies: Tensor, confidence: Tensor, right: Tensor, edges: Tensor
) -> dict[str, Any]:
    """How well a lens's confidence predicts correctness, from (layers, labelled rows)."""

    def per_layer(metric: Callable[[Tensor, Tensor], Any], score: Tensor) -> list[Any]:
        pairs = zip(score, right, strict=True)
        return [metric(s, r) if s.isfinite().all() else None for s, r in pairs]

    curves: list[Tensor | None] = per_layer(risk_coverage, -entropies)
    return {
        "ece": per_layer(expected_calibration_error, confidence),
        "auroc": per_layer(auroc, -entropies),
        "auroc_confidence": per_layer(auroc, confidence),
        "risk": [c if c is None else at_coverage(c, COVERAGE).tolist() for c in curves],
        "aurc": [c if c is None else float(c.mean()) for c in curves],
        "entropy_histogram": {
            "correct": [_histogram(e[r], edges) for e, r in zip(entropies, right, strict=True)],
            "wrong": [_histogram(e[~r], edges) for e, r in zip(entropies, right, strict=True)],
        },
    }


def _histogram(values: Tensor, edges: Tensor) -> list[int]:
    """Rows per bin; entropies past an end due to rounding are clamped, NaN is not counted."""
    inside = values[values.isfinite()].double().clamp(edges[0], edges[-1])
    return torch.histogram(inside, edges).hist.long().tolist()


def _baselines(readings: Readings) -> dict[str, Any]:
    """Accuracy of guessing among the choices, and of the most frequent answer."""
    known = readings.labelled
    if not known.any():
        return {"chance": None, "majority": None}
    answer_id, count = readings.answer_id[known], readings.choice_count[known]
    chance, majority, _ = baseline_accuracies(answer_id, count)
    return {"chance": chance, "majority": majority}


def _only(value: Any) -> Any:
    """The single layer of the full model."""
    if isinstance(value, dict):
        return {name: _only(item) for name, item in value.items()}
    return None if value is None else value[0]


def _groups(readings: Readings) -> dict[str, Any]:
    """Accuracy of every lens in every subgroup, such as the number of hops."""
    if readings.groups == ("",) or not readings.labelled.any():
        return {}
    right = readings.values["answer"] == readings.answer_id
    full = readings.full["answer"] == readings.answer_id
    found: dict[str, Any] = {}
    for index, name in enumerate(readings.groups):
        mine = (readings.group == index) & readings.labelled
        if mine.any():
            accuracies = (mean(right[place][:, mine]) for place in range(len(readings.lenses)))
            found[name] = {
                "n": int(mine.sum()),
                "full_model": float(full[mine].double().mean()),
                "lenses": dict(zip(readings.lenses, accuracies, strict=True)),
            }
    return found

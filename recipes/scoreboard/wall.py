"""Wall time of a pair's policy relative to the original model, on its test prompts."""

import statistics
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from lspade_train import tasks
from lspade_train.evaluation.run import FittedRecipe
from lspade_train.policies.policy import ExitPolicy
from lspade_train.profiling import untouched
from lspade_train.profiling.clock import hardware, seconds_of
from lspade_train.profiling.shapes import forward_of
from lspade_train.runtime import ExitRuntime
from lspade_train.runtime.batching import Query, collate
from lspade_train.runtime.decide import decide_batch

PROMPTS, ROUNDS = 32, 3
BATCH_SIZES = (1, 8)


def wall(fitted: FittedRecipe) -> dict[str, Any]:
    """Time both alternately on the first prompts, shortest first: medians and ranges of rounds.

    Args:
        fitted: a pair with the policy beside its heads.
    """
    data = fitted.data
    rows = tasks.load_rows(data.config, "test")
    found = tasks.encode(data.config, rows, data.tokenizer, 2**31).examples[:PROMPTS]
    examples = sorted(found, key=lambda one: len(one.input_ids))
    runtime = ExitRuntime(data.adapter, fitted.heads, policy=ExitPolicy.load(fitted.folder))
    plain = untouched(data.config)
    ratios: dict[str, Any] = {}
    for size in BATCH_SIZES:
        cases: list[tuple[Callable[[], object], Callable[[], object]]] = []
        for first in range(0, len(examples), size):
            part = examples[first : first + size]
            queries = [
                Query(i, tuple(map(int, e.input_ids)), {str(t): int(t) for t in e.choice_ids})
                for i, e in enumerate(part)
            ]
            batch = collate(queries, data.adapter.device)
            cases.append((partial(decide_batch, runtime.probe, batch), forward_of(plain, batch)))
        ratios[str(size)] = _ratio(cases, data.adapter.device)
    dtype = str(data.adapter.dtype).removeprefix("torch.")
    return {
        "over_plain": ratios,
        "prompts": len(examples),
        "median_tokens": statistics.median(len(e.input_ids) for e in examples),
        "rounds": ROUNDS,
        "on": f"{hardware(data.adapter.device)}, {torch.get_num_threads()} threads, {dtype}",
    }


def _ratio(
    cases: list[tuple[Callable[[], object], Callable[[], object]]], device: torch.device
) -> dict[str, float]:
    """Ratio of seconds to the original model's, over all batches, timed alternately."""
    rounds: list[float] = []
    for _ in range(ROUNDS + 1):  # the first is a warm-up
        spent = [[seconds_of(run, device) for run in pair] for pair in cases]
        rounds.append(sum(own for own, _ in spent) / sum(plain for _, plain in spent))
    kept = [round(ratio, 4) for ratio in rounds[1:]]
    return {"median": statistics.median(kept), "low": min(kept), "high": max(kept)}

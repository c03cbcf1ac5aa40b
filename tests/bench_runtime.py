"""Wall time of forced exits and of checks, as ratios to an untouched model's forward."""

from collections.abc import Callable
from functools import partial

import torch
from bench_shape import (
    DEVICE,
    LAYERS,
    QUICK,
    ROUNDS,
    VOCAB,
    WIDTH,
    llama,
    shape,
    untouched_llama,
)
from bench_timing import Part, Row, interleaved, seconds, versus

from lspade_train.policies.policy import ExitPolicy
from lspade_train.probes.heads import LSpadeHeads
from lspade_train.runtime import ExitRuntime
from lspade_train.runtime.batching import Query, collate
from lspade_train.runtime.decide import decide_batch

TOKENS, ROWS = (128, 4) if QUICK else (256, 8)


def runtime(rounds: int = ROUNDS) -> list[Row]:
    """Exits at a quarter, half and three quarters of the blocks; checks at which no row exits."""
    adapter, plain = llama(), untouched_llama()
    ids = torch.randint(3, VOCAB, (ROWS, TOKENS))
    with torch.device(DEVICE):
        heads = LSpadeHeads(range(1, LAYERS), WIDTH)
    choices = {label: 100 + i for i, label in enumerate("ABCD")}
    queries = [Query(i, tuple(row), choices) for i, row in enumerate(ids.tolist())]
    batch = collate(queries, adapter.device)
    quarter = LAYERS // 4
    watched = {"layers": tuple(range(quarter, LAYERS, quarter)), "threshold": 0.0}
    policies = {f"exit at {n * quarter}": ExitPolicy.always(n * quarter) for n in (1, 2, 3)}
    policies |= {f"checks, {s}": ExitPolicy(scope=s, **watched) for s in ("choices", "vocabulary")}
    limits = [0.33, 0.58, 0.83, 1.05, 1.12]

    @torch.no_grad()
    def forward() -> None:
        # The strictest baseline: it unembeds the answer position only. Not the adapter's own model,
        # which may be slower because of its hooks.
        plain(batch.ids, attention_mask=batch.mask, use_cache=False, logits_to_keep=1)

    cases: dict[str, Callable[[], object]] = {"forward": forward}
    for name, policy in policies.items():
        probe = ExitRuntime(adapter, heads, policy=policy).probe
        cases[name] = partial(decide_batch, probe, batch)
    taken = interleaved(cases, rounds)
    where = f"{ROWS} x {TOKENS} tokens, {shape()}"
    times = {name: f"{seconds(taken, name):.2f} s" for name in cases}
    return [
        (
            f"runtime: {name} / forward",
            versus(taken, name, "forward"),
            f"at most {most:.2f}; {times[name]} / {times['forward']}, {where}",
        )
        for name, most in zip(policies, limits, strict=True)
    ]


PARTS = {"runtime": Part(runtime, 60, quick=10)}

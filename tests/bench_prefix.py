"""Prompts with a shared prefix: the prefix run once, against the same prompts run in full.

Savings from exits are quoted against a plain model that also shares the prefix, as servers with a
prefix cache do.
"""

import copy
import tempfile
from functools import partial
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch
from bench_cache import build
from bench_shape import QUICK, ROUNDS, TOKENS_PER_BATCH
from bench_subject import Subject, random_subject
from bench_timing import Part, Row, interleaved, seconds, versus
from torch import Tensor
from transformers import DynamicCache

from lspade_train.models import sharing
from lspade_train.policies.policy import ExitPolicy
from lspade_train.tasks import Example

PROMPTS, TOKENS, SHARED = (12, 200, 170) if QUICK else (64, 400, 340)
"""About as in five-shot ARC-Challenge, of which 85% is shared."""


def whole(prompts, own=None):
    """Stands in for `shared_prefixes`: no prompt shares a prefix."""
    return [(0, list(range(len(prompts))))]


@torch.no_grad()
def shared_forward(subject: Subject, ids: Tensor, rows: int) -> None:
    """The untouched model continuing from keys and values it computed once, as `generate` does."""
    start = DynamicCache(config=subject.plain.config)
    subject.plain(ids[:1, :SHARED], past_key_values=start, use_cache=True, logits_to_keep=1)
    for part in ids.split(rows):
        cache = copy.deepcopy(start)
        cache.batch_repeat_interleave(len(part))
        subject.plain(
            part[:, SHARED:], attention_mask=torch.ones_like(part), past_key_values=cache,
            use_cache=True, logits_to_keep=1,
        )  # fmt: skip


def rows_of(subject: Subject, rounds: int) -> list[Row]:
    """Extraction, answers without an exit and answers from halfway up."""
    ids = subject.tokens(PROMPTS, TOKENS)
    ids[:, :SHARED] = ids[0, :SHARED]
    examples = [
        Example(np.array(row, dtype=np.int32), np.array([TOKENS - 1]), np.array([4]), (4, 5), i)
        for i, row in enumerate(ids.tolist())
    ]
    prompts, there = ids.tolist(), ids.to(subject.adapter.device)
    never = subject.runtime(ExitPolicy.never())
    half = subject.runtime(ExitPolicy.always(subject.adapter.num_layers // 2))

    def fresh() -> None:
        subject.adapter.refresh()._prefixes.clear()  # cached prefixes would cost nothing

    def extraction() -> None:
        fresh()
        with tempfile.TemporaryDirectory() as name:
            build(Path(name), subject.adapter, examples, 1000, TOKENS_PER_BATCH, spade=False)

    def decide(runtime=never) -> None:
        fresh()
        runtime.decide(prompts)

    def forward() -> None:
        for part in there.split(TOKENS_PER_BATCH // TOKENS):
            subject.forward(part)

    def run_whole(work) -> None:
        with patch.object(sharing, "shared_prefixes", whole):
            work()

    behind = partial(shared_forward, subject, there, TOKENS_PER_BATCH // (TOKENS - SHARED))
    cases = {
        "extraction": extraction, "extraction, whole": partial(run_whole, extraction),
        "decide": decide, "decide, whole": partial(run_whole, decide),
        "exit half-way": partial(decide, half), "forward": forward, "shared forward": behind,
    }  # fmt: skip
    taken = interleaved(cases, rounds)
    where = f"{PROMPTS} x {TOKENS} tokens, {SHARED} of them shared, {subject.name}"

    def row(case: str, base: str, goal: str) -> Row:
        times = f"{seconds(taken, case):.2f} s / {seconds(taken, base):.2f} s"
        return f"{case} / {base}", versus(taken, case, base), f"{goal}{times}, {where}"

    return [
        row("extraction", "extraction, whole", "at most 0.25; "),
        row("decide", "decide, whole", "at most 0.25; "),
        row("decide", "forward", "no row exits; "),
        row("decide", "shared forward", "no row exits, both share; "),
        row("exit half-way", "shared forward", "both share; "),
        row("exit half-way", "forward", ""),
    ]


def prefix(rounds: int = ROUNDS) -> list[Row]:
    """The benchmark on the random model."""
    return rows_of(random_subject(), rounds)


PARTS = {"prefix": Part(prefix, 120, quick=15)}

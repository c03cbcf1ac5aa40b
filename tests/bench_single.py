"""Single and short prompts: where an exit pays off, and how close the runtime is to its bound.

For a head's answer the lower bound is the fraction of blocks that run. SPADE's answer adds one read
of the upper blocks' weights for a single token: their products with one vector.
"""

from functools import partial

import torch
from bench_shape import QUICK, ROUNDS
from bench_subject import Subject, random_subject
from bench_timing import Part, Row, interleaved, seconds, versus
from torch import nn

from lspade_train.policies.policy import ExitPolicy
from lspade_train.runtime.batching import Query, collate
from lspade_train.runtime.decide import decide_batch

SHAPES = ((1, 32), (1, 64), (1, 256), (8, 64))


def rows_of(subject: Subject, rounds: int, shapes=SHAPES) -> list[Row]:
    """No exit, and a halfway exit answered by a head or by SPADE, for each batch shape."""
    half = subject.adapter.num_layers // 2
    policies = {
        "no exit": ExitPolicy.never(),
        "a head's answer": ExitPolicy.always(half, decoder="l-spade"),
        "SPADE's answer": ExitPolicy.always(half),
    }
    upper = [
        module.weight
        for block in subject.adapter.blocks[half:]
        for module in block.modules()
        if isinstance(module, nn.Linear)
    ]
    vectors = {w.shape[1]: w.new_ones(1, w.shape[1]) for w in upper}

    @torch.no_grad()
    def reading() -> None:
        for weight in upper:
            nn.functional.linear(vectors[weight.shape[1]], weight)

    rows: list[Row] = []
    for count, tokens in shapes:
        ids = subject.tokens(count, tokens).to(subject.adapter.device)
        batch = collate([Query(i, tuple(r), None) for i, r in enumerate(ids.tolist())], ids.device)
        cases = {"forward": partial(subject.forward, ids), "reading": reading}
        for name, policy in policies.items():
            cases[name] = partial(decide_batch, subject.runtime(policy).probe, batch)
        taken = interleaved(cases, rounds)
        share = half / subject.adapter.num_layers
        read = seconds(taken, "reading") / seconds(taken, "forward")
        floors = dict(zip(policies, (1.0, share, share + read), strict=True))
        for name, floor in floors.items():
            times = (
                f"{seconds(taken, name) * 1e3:.1f} ms / {seconds(taken, 'forward') * 1e3:.1f} ms"
            )
            rows.append(
                (
                    f"{count} x {tokens} tokens, {name} / forward",
                    versus(taken, name, "forward"),
                    f"floor {floor:.2f}; {times}, exit at {half} of {subject.adapter.num_layers}, "
                    f"{subject.name}",
                )
            )
    return rows


def single(rounds: int = 5 * ROUNDS) -> list[Row]:
    """The benchmark on the random model."""
    return rows_of(random_subject(), rounds, SHAPES[1::2] if QUICK else SHAPES)


PARTS = {"single": Part(single, 40, quick=10)}

"""Wall time of forced exits and of monitoring, as ratios to the model's own forward."""

import statistics
import time
from collections.abc import Callable

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from lspade_train.heads import LSpadeHeads
from lspade_train.policy import ExitPolicy
from lspade_train.runtime import ExitRuntime
from lspade_train.runtime.decide import decide_batch
from lspade_train.runtime.prompts import Query, collate

LAYERS, WIDTH, VOCAB, TOKENS, ROWS = 16, 512, 32_000, 256, 8


def bench_rows(rounds: int = 5) -> list[dict[str, float | str]]:
    """One row per case: median over interleaved rounds, and the most that is allowed."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=WIDTH, num_hidden_layers=LAYERS, intermediate_size=1376,
        num_attention_heads=8, max_position_embeddings=TOKENS,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    heads = LSpadeHeads(range(1, LAYERS), WIDTH)
    ids = torch.randint(3, VOCAB, (ROWS, TOKENS))
    choices = {label: 100 + i for i, label in enumerate("ABCD")}
    batch = collate(
        [Query(i, tuple(row), choices) for i, row in enumerate(ids.tolist())], ids.device
    )
    watched = {"layers": tuple(range(4, LAYERS, 4)), "threshold": 0.0}
    policies = {f"forced exit at {layer}": ExitPolicy.always(layer) for layer in (4, 8, 12)}
    policies |= {
        f"monitoring, {s}": ExitPolicy(scope=s, **watched) for s in ("choices", "vocabulary")
    }
    limits = [layer / LAYERS + 0.08 for layer in (4, 8, 12)] + [1.05, 1.12]
    probes = {name: ExitRuntime(model, heads, policy=p).probe for name, p in policies.items()}

    @torch.no_grad()
    def forward() -> None:
        # The strictest baseline: unembeds the answer position only.
        model(ids, attention_mask=batch.mask, use_cache=False, logits_to_keep=1)

    cases: dict[str, Callable[[], object]] = {"forward": forward}
    cases |= {name: lambda p=probe: decide_batch(p, batch) for name, probe in probes.items()}
    times = _interleaved(cases, rounds)
    return [
        {"case": name, "ratio": times[name] / times["forward"], "limit": limit}
        for name, limit in zip(policies, limits, strict=True)
    ]


def run(rounds: int = 5) -> list[tuple[str, str, str]]:
    """Rows of (figure, ratio, detail) for the table of `make bench`."""
    where = f"{ROWS} x {TOKENS} tokens, d={WIDTH}, L={LAYERS}, V={VOCAB:,}"
    return [
        (
            f"runtime: {row['case']} / forward",
            f"{row['ratio']:.3f}",
            f"at most {row['limit']:.3f}, {where}",
        )
        for row in bench_rows(rounds)
    ]


def _interleaved(cases: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Median seconds of each case, taken in turn so that a busy machine slows all alike."""
    taken: dict[str, list[float]] = {name: [] for name in cases}
    for _ in range(rounds + 1):
        for name, run in cases.items():
            start = time.perf_counter()
            run()
            taken[name].append(time.perf_counter() - start)
    return {name: statistics.median(seconds[1:]) for name, seconds in taken.items()}


if __name__ == "__main__":
    for line in run():
        print("  ".join(line))  # noqa: T201

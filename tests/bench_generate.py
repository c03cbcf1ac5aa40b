"""Lossless drafting on a real model: acceptance by layer, ceilings, and time in turn with generate.

`python tests/bench_generate.py FOLDER` takes a transformers folder; `--heads` adds fitted heads to
the logit lens, `--text` the file that prompts are cut from (default: this project's README).

A verification of k drafts costs (k + 1) l + k u + (L - l) + u blocks, where u is the unembedding's
cost in blocks (both in weights read), and a plain token L + u; it gives the accepted drafts and one
token more. The ceiling of a layer is the cost per token of plain decoding over that of drafting,
along the model's own texts, with the best of some settings. It takes a verification of k + 1 tokens
to cost as much as one token; on a CPU, or with many rows, it costs more.
"""

import argparse
import os
from pathlib import Path

import torch
from rich.console import Console
from transformers import AutoTokenizer

from lspade_train import LSpadeHeads
from lspade_train.profiling.drafting import DraftingChoice, choose_drafting
from lspade_train.runtime.lossless import draft_costs

tell = Console(highlight=False, soft_wrap=True, markup=False).print
README = Path(__file__).parents[1] / "README.md"


def main() -> None:
    """Measure one model and print it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path, metavar="FOLDER")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--heads", type=Path, help="heads folder")
    parser.add_argument("--text", type=Path, default=README, help="what prompts are cut from")
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--length", type=int, default=64, help="tokens of each prompt")
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    asked = parser.parse_args()
    os.environ["BENCH_MODEL_DTYPE"] = asked.dtype
    from bench_subject import real_subject  # reads it

    subject = real_subject(asked.model)
    ids = AutoTokenizer.from_pretrained(asked.model)(asked.text.read_text("utf-8")).input_ids
    step = max((len(ids) - asked.length) // asked.prompts, 1)
    prompts = [ids[at * step : at * step + asked.length] for at in range(asked.prompts)]
    heads = None if asked.heads is None else LSpadeHeads.from_pretrained(asked.heads)
    tell(f"{subject.name}, {torch.get_num_threads()} threads, {subject.adapter.device}")
    found = choose_drafting(
        subject.adapter, subject.plain, heads, prompts,
        new_tokens=asked.new_tokens, batch_size=asked.batch_size, rounds=asked.rounds,
    )  # fmt: skip
    report(found, draft_costs(subject.adapter, 0).of(0))


def report(found: DraftingChoice, plain: float) -> None:
    """Acceptance and ceiling of each layer, then what was timed."""
    tell(f"plain token: {plain:.1f} blocks; generate: {found.tokens_per_second:.1f} tokens/s")
    tell("layer  head        acceptance  drafts  confidence  ceiling")
    for row in sorted(found.rows, key=lambda row: row.drafting.layer):
        one = row.drafting
        tell(
            f"{one.layer:5}  {one.reader:10}  {row.acceptance:10.2f}  {one.tokens:6}  "
            f"{one.confidence:10.1f}  {row.ceiling:6.2f}x"
        )
    for row in found.timed:
        tell(
            f"layer {row.drafting.layer}: {row.speedup * found.tokens_per_second:.1f} tokens/s, "
            f"{row.speedup:.2f}x (slowest round {row.slowest:.2f}x, ceiling {row.ceiling:.2f}x), "
            f"{row.tokens_per_verification:.2f} tokens/verification, same text {row.equal:.0%}"
        )
    if not found.timed:
        tell("no ceiling is over 1: nothing to time")


if __name__ == "__main__":
    main()

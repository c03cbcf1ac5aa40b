"""Lossless drafting on a real model: acceptance by layer, ceilings, and time in turn with generate.

`python tests/bench_generate.py FOLDER` takes a transformers folder; `--heads` adds fitted heads to
the logit lens, `--text` the file that prompts are cut from (default: this project's README).

A verification of k drafts costs (k + 1) l + k u + (L - l) + u blocks, where u is the unembedding's
cost in blocks (both in weights read), and a plain token L + u; it gives the accepted drafts and one
token more. The ceiling of a layer is the cost per token of plain decoding over that of drafting,
along the model's own texts, with the best of some settings. It takes a verification of k + 1 tokens
to cost as much as one token; on a CPU, or with many rows, it costs more.

`--equal 1000 --layer 26` compares instead: the greedy texts of so many prompts of random tokens,
with four drafts at the layer before every verification, against the model's own. Where two part, it
prints how close the two tokens' logits are.
"""

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING
from unittest.mock import patch

import torch
from rich.console import Console
from rich.progress import track
from transformers import AutoTokenizer

from lspade_train import Drafting, ExitPolicy, ExitRuntime, LSpadeHeads
from lspade_train.policies.drafting import DraftLength
from lspade_train.profiling.drafting import DraftingChoice, choose_drafting, plain_texts
from lspade_train.runtime.lossless import draft_costs

if TYPE_CHECKING:
    from bench_subject import Subject

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
    parser.add_argument("--equal", type=int, metavar="N", help="compare the texts of N prompts")
    parser.add_argument("--layer", type=int, help="where --equal drafts")
    asked = parser.parse_args()
    os.environ["BENCH_MODEL_DTYPE"] = asked.dtype
    from bench_subject import real_subject  # reads it

    subject = real_subject(asked.model)
    heads = None if asked.heads is None else LSpadeHeads.from_pretrained(asked.heads)
    if asked.equal:
        compare(subject, heads, asked.layer, asked.equal, asked.new_tokens, asked.batch_size)
        return
    ids = AutoTokenizer.from_pretrained(asked.model)(asked.text.read_text("utf-8")).input_ids
    step = max((len(ids) - asked.length) // asked.prompts, 1)
    prompts = [ids[at * step : at * step + asked.length] for at in range(asked.prompts)]
    tell(f"{subject.name}, {torch.get_num_threads()} threads, {subject.adapter.device}")
    found = choose_drafting(
        subject.adapter, subject.plain, heads, prompts,
        new_tokens=asked.new_tokens, batch_size=asked.batch_size, rounds=asked.rounds,
    )  # fmt: skip
    report(found, draft_costs(subject.adapter, 0).of(0))


def compare(
    subject: "Subject", heads: LSpadeHeads | None, layer: int, count: int, new_tokens: int,
    batch_size: int,
) -> None:  # fmt: skip
    """How many greedy texts after prompts of 4 to 32 random tokens equal the model's own."""
    runtime = ExitRuntime(subject.adapter, heads, policy=ExitPolicy.never())
    random = torch.Generator().manual_seed(0)
    lengths = torch.randint(4, 33, (count,), generator=random).tolist()
    vocab = subject.adapter.vocab_size
    prompts = [torch.randint(vocab, (n,), generator=random).tolist() for n in lengths]
    drafting = Drafting(layer=layer, confidence=0.0)
    equal = drafted = accepted = 0
    # Four drafts whatever they cost: left to itself, it drafts only where that pays.
    with patch.object(DraftLength, "next", property(lambda length: min(4, length.most))):
        for at in track(range(0, count, batch_size), "comparing", transient=True):
            group = prompts[at : at + batch_size]
            own = plain_texts(subject.plain, group, new_tokens)
            found = runtime.generate(group, new_tokens, drafting=drafting)
            for number, (one, text) in enumerate(zip(found, own, strict=True), at):
                equal += one.token_ids == text
                if one.token_ids != text:
                    tell(difference(subject, number, prompts[number], one.token_ids, text))
            drafted += sum(one.drafts.drafted for one in found if one.drafts)
            accepted += sum(one.drafts.accepted for one in found if one.drafts)
    tell(
        f"{subject.name}: {equal:,} of {count:,} texts equal, {new_tokens} tokens each; "
        f"{drafted:,} tokens drafted at layer {layer}, {accepted:,} accepted"
    )


@torch.no_grad()
def difference(
    subject: "Subject", number: int, prompt: list[int], found: list[int], own: list[int]
) -> str:
    """Where two texts part, and how much the model prefers one token to the other there."""
    place = next(i for i, (a, b) in enumerate(zip(found, own, strict=False)) if a != b)
    text = torch.tensor([[*prompt, *own[:place]]], device=subject.adapter.device)
    logits = subject.plain(text, logits_to_keep=1).logits[0, -1].double()
    gap = float(logits[own[place]] - logits[found[place]])
    return (
        f"prompt {number} parts at token {place}: the two tokens' logits are {gap:.1e} apart, "
        f"the largest is {float(logits.abs().max()):.1f}"
    )


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

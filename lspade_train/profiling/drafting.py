"""Which layer should draft, and whether that is faster here: `calibrate --for generate`.

Counts how often each layer's heads predict the model's next token, on the model's own greedy texts;
then times the most promising layers end to end, in turn with the untouched model's `generate`.
Knows nothing of where the prompts come from.
"""

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from transformers import GenerationConfig

from lspade_train.errors import RecipeError
from lspade_train.models import ModelAdapter
from lspade_train.policies.drafting import Drafting
from lspade_train.policies.policy import ExitPolicy, Reader
from lspade_train.policies.readers import available
from lspade_train.probes.heads import LSpadeHeads
from lspade_train.profiling.clock import hardware
from lspade_train.profiling.rounds import Work, time_rounds
from lspade_train.profiling.shapes import check_baseline
from lspade_train.runtime import ExitRuntime, Generation
from lspade_train.runtime.lossless import draft_costs

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Text = tuple[int, ...]

TIMED = 4
"""Layers that are timed: those with the highest ceilings."""
MOST = 8
"""Drafts per verification that are tried."""


@dataclass(frozen=True)
class DraftingRow:
    """One setting, counted and timed.

    Attributes:
        drafting: the setting.
        acceptance: fraction of the model's tokens that its head predicts at that layer.
        ceiling: speed-up if every draft is accepted with that probability and a verification reads
            the weights once.
        tokens_per_verification: as it ran.
        speedup: the untouched model's seconds over its own, median over the rounds.
        slowest: the smallest of these ratios.
        equal: fraction of the texts that are the untouched model's, token for token.
    """

    drafting: Drafting
    acceptance: float
    ceiling: float
    tokens_per_verification: float
    speedup: float
    slowest: float
    equal: float


@dataclass(frozen=True)
class DraftingChoice:
    """What was measured, and what is faster than plain decoding, if anything.

    Attributes:
        chosen: the fastest setting of those that were faster in every round; None: plain decoding.
        rows: the settings that were timed, fastest first.
        acceptance: of every layer, by its best head.
        tokens_per_second: of the untouched model.
    """

    chosen: Drafting | None
    rows: tuple[DraftingRow, ...]
    acceptance: dict[int, float]
    tokens_per_second: float


@torch.no_grad()
def choose_drafting(
    adapter: ModelAdapter,
    plain: "PreTrainedModel",
    heads: LSpadeHeads | None,
    prompts: Sequence[Sequence[int]],
    *,
    new_tokens: int = 32,
    batch_size: int = 1,
    rounds: int = 3,
) -> DraftingChoice:
    """Measure on these prompts which layer should draft, and how many tokens at most.

    Args:
        adapter: the runtime's model.
        plain: the same weights loaded a second time, and nothing done to them.
        heads: its heads; None: the logit lens alone.
        prompts: token ids.
        new_tokens: greedy tokens of each.
        batch_size: prompts that are decoded together.
        rounds: timed rounds.

    Raises:
        RecipeError: a number under 1, or no prompt.
        UnsupportedModelError: `plain` is the runtime's own model, or another one.
    """
    for name, value in (
        ("--new_tokens", new_tokens), ("--batch_size", batch_size), ("prompts", len(prompts)),
    ):  # fmt: skip
        if value < 1:
            raise RecipeError(f"{name} is {value}; expected 1 or more.")
    check_baseline(plain, adapter)
    groups = [prompts[at : at + batch_size] for at in range(0, len(prompts), batch_size)]
    runtime = ExitRuntime(
        adapter, heads, policy=ExitPolicy.never(),
        tokens_per_batch=batch_size * (max(map(len, prompts)) + new_tokens),
    )  # fmt: skip
    own = [text for group in groups for text in plain_texts(plain, group, new_tokens)]
    predicted = accepted_by_layer(adapter, heads, prompts, own)
    tried = {
        f"{drafting.layer}": (drafting, top) for drafting, top in _promising(adapter, predicted)
    }
    texts: dict[str, list[Generation]] = {}

    def run(name: str) -> None:
        drafting, _ = tried[name]
        runs = (runtime.generate(group, new_tokens, drafting=drafting) for group in groups)
        texts[name] = [one for found in runs for one in found]

    work = {"plain": Work(lambda: [plain_texts(plain, group, new_tokens) for group in groups])}
    timed = time_rounds(
        work | {name: Work(partial(run, name)) for name in tried}, adapter.device, rounds
    )
    rows = [
        _row(
            drafting,
            predicted[drafting.layer][1],
            ceiling,
            texts[name],
            own,
            timed["plain"],
            timed[name],
        )
        for name, (drafting, ceiling) in tried.items()
    ]
    rows.sort(key=lambda row: -row.speedup)
    best = next((row for row in rows if row.slowest > 1), None)
    acceptance = {layer: share for layer, (_, share) in predicted.items()}
    rate = sum(map(len, own)) / statistics.median(timed["plain"])
    choice = DraftingChoice(None, tuple(rows), acceptance, rate)
    if best is None:
        return choice
    record: dict[str, Any] = {
        "hardware": hardware(adapter.device), "threads": torch.get_num_threads(),
        "dtype": str(adapter.dtype).removeprefix("torch."), "prompts": len(prompts),
        "new_tokens": new_tokens, "batch_size": batch_size, "rounds": rounds,
        "tokens_per_second": rate,
        "acceptance_by_layer": {str(layer): share for layer, share in acceptance.items()},
        **{name: value for name, value in asdict(best).items() if name != "drafting"},
    }  # fmt: skip
    return replace(choice, chosen=replace(best.drafting, calibration=record))


def _row(
    drafting: Drafting,
    acceptance: float,
    ceiling: float,
    found: Sequence[Generation],
    own: Sequence[Text],
    plain: Sequence[float],
    seconds: Sequence[float],
) -> DraftingRow:
    """A setting's texts and seconds against the untouched model's, round by round."""
    ratios = [base / mine for base, mine in zip(plain, seconds, strict=True)]
    drafts = [one.drafts for one in found if one.drafts is not None]
    rounds = sum(one.verifications for one in drafts)
    return DraftingRow(
        drafting,
        acceptance=acceptance,
        ceiling=ceiling,
        tokens_per_verification=(sum(one.accepted for one in drafts) + rounds) / max(rounds, 1),
        speedup=statistics.median(ratios),
        slowest=min(ratios),
        equal=statistics.mean(a.token_ids == b for a, b in zip(found, own, strict=True)),
    )


def plain_texts(
    plain: "PreTrainedModel", prompts: Sequence[Sequence[int]], new_tokens: int
) -> list[Text]:
    """The untouched model's own greedy texts, ended as it ends them.

    Without what else its generation_config asks for, such as a repetition penalty.
    """
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(p)) + [*p] for p in prompts], device=plain.device)
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
    model: Any = plain
    configured = model.generation_config
    model.generation_config = GenerationConfig(eos_token_id=configured.eos_token_id)
    found = model.generate(
        input_ids=ids, attention_mask=mask.to(ids.device), max_new_tokens=new_tokens,
        do_sample=False, num_beams=1, pad_token_id=0,
    )  # fmt: skip
    model.generation_config = configured
    given = configured.eos_token_id
    ends = given if isinstance(given, list) else [given]
    texts = found[:, width:].tolist()
    return [
        tuple(t[: next((i for i, token in enumerate(t, 1) if token in ends), len(t))])
        for t in texts
    ]


@torch.no_grad()
def accepted_by_layer(
    adapter: ModelAdapter,
    heads: LSpadeHeads | None,
    prompts: Sequence[Sequence[int]],
    texts: Sequence[Text],
) -> dict[int, tuple[Reader, float]]:
    """Each layer's best head, and the fraction of the texts' tokens that it predicts.

    Args:
        adapter: the model.
        heads: its heads, with the tuned lens beside them; None: the logit lens alone.
        prompts: token ids.
        texts: the model's own continuation of each.
    """
    readers = available(None if heads is None else heads.bind(adapter))
    hits: dict[tuple[int, Reader], int] = {}
    for prompt, text in zip(prompts, texts, strict=True):
        plan = adapter.plan(torch.tensor([[*prompt, *text[:-1]]], device=adapter.device))
        hidden, behind = plan.hidden, len(prompt) - 1
        for layer in range(adapter.num_layers):
            states = hidden[0, behind:]
            for name, reader in readers.items():
                if reader is None:
                    read = states
                elif layer in reader.layers and reader.scope != "choices":
                    read = reader.translate(states, layer).to(states.dtype)
                else:
                    continue
                guesses = adapter.unembed(read).argmax(-1).tolist()
                at: Any = (layer, name)
                hits[at] = hits.get(at, 0) + sum(a == b for a, b in zip(guesses, text, strict=True))
            hidden = adapter.run_block(plan, layer, hidden)
    total = sum(map(len, texts))
    best: dict[int, tuple[Reader, float]] = {}
    for (layer, name), count in hits.items():
        if layer not in best or count / total > best[layer][1]:
            best[layer] = name, count / total
    return best


def _promising(
    adapter: ModelAdapter, predicted: dict[int, tuple[Reader, float]]
) -> Iterator[tuple[Drafting, float]]:
    """The layers to time, with their ceilings."""
    ceilings: dict[int, tuple[float, int]] = {}
    for layer, (_, share) in predicted.items():
        costs = draft_costs(adapter, layer)
        drafts = max(costs.best(share, MOST), 1)
        ceilings[layer] = costs.speedup(share, drafts), drafts
    for layer in sorted(predicted, key=lambda layer: -ceilings[layer][0])[:TIMED]:
        ceiling, drafts = ceilings[layer]
        yield Drafting(layer=layer, tokens=drafts, reader=predicted[layer][0]), ceiling

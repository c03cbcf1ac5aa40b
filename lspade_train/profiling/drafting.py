"""Which layer should draft, and whether that is faster here: `calibrate --for generate`.

Reads along the model's own greedy texts what each layer's heads predict and how sure they are; from
that, the cost of drafting there with any setting; then times the most promising layers end to end,
in turn with the original model's `generate`.
Knows nothing of where the prompts come from.
"""

import logging
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import accumulate
from operator import mul
from typing import TYPE_CHECKING, Any

import torch
from transformers import GenerationConfig

from lspade_train.errors import RecipeError
from lspade_train.models import ModelAdapter
from lspade_train.policies.drafting import DraftCosts, Drafting
from lspade_train.policies.policy import ExitPolicy, Reader
from lspade_train.policies.readers import available
from lspade_train.probes.heads import LSpadeHeads
from lspade_train.profiling.clock import hardware
from lspade_train.profiling.rounds import Work, time_rounds
from lspade_train.profiling.shapes import check_baseline
from lspade_train.runtime import ExitRuntime, Generation
from lspade_train.runtime.lossless import draft_costs, why_plain

if TYPE_CHECKING:
    from transformers import PreTrainedModel

log = logging.getLogger(__name__)

Text = tuple[int, ...]

TIMED = 4
"""Most layers that are timed: those with the highest ceilings."""
LENGTHS, CONFIDENCES = (1, 2, 4, 8), (0.0, 0.2, 0.4, 0.6, 0.8)
"""Settings that are tried at each layer."""


@dataclass(frozen=True)
class Guesses:
    """What a head at a layer predicts along the model's own texts, token by token.

    Attributes:
        reader: which head.
        right: whether its most probable token is the text's.
        sure: the probability it gives that token.
    """

    reader: Reader
    right: list[list[bool]]
    sure: list[list[float]]

    @property
    def acceptance(self) -> float:
        """Fraction of the tokens that it predicts."""
        return statistics.mean(hit for text in self.right for hit in text)

    def speedup(self, costs: DraftCosts, tokens: int, confidence: float) -> float:
        """Plain decoding's cost over that of drafting along these texts with fixed settings."""
        spent, written = 0.0, 0
        for right, sure in zip(self.right, self.sure, strict=True):
            at = 1  # the first token comes from the prompt's run
            while at < len(right):
                most = min(tokens, len(right) - at - 1)
                products = list(accumulate(sure[at : at + most], mul))
                drafts = next((i for i, c in enumerate(products) if c < confidence), most)
                hits = right[at : at + drafts]
                accepted = hits.index(False) if False in hits else drafts
                # The head is read once more where it then stops drafting.
                spent += costs.of(drafts) + costs.readout * (drafts < most)
                written += accepted + 1
                at += accepted + 1
        return written * costs.of(0) / spent if spent else 0.0


@dataclass(frozen=True)
class DraftingRow:
    """The best setting of a layer, by what its head predicts, and as it ran if it was timed.

    Attributes:
        drafting: the setting.
        acceptance: fraction of the model's tokens that its head predicts at that layer.
        ceiling: speed-up in weights read, along the model's own texts, if a verification of
            several tokens costs as much as one token.
        tokens_per_verification: as it ran; None where it was not timed, like all below.
        speedup: the original model's seconds over its own, median over the rounds.
        slowest: the smallest of these ratios.
        equal: fraction of the texts that are the original model's, token for token.
    """

    drafting: Drafting
    acceptance: float
    ceiling: float
    tokens_per_verification: float | None = None
    speedup: float | None = None
    slowest: float | None = None
    equal: float | None = None


@dataclass(frozen=True)
class DraftingChoice:
    """What was measured, and what is faster than plain decoding, if anything.

    Attributes:
        chosen: the fastest setting of those that were faster in every round; None: plain decoding.
        rows: every layer, those that were timed first, fastest first, then by their ceilings.
        tokens_per_second: of the original model.
    """

    chosen: Drafting | None
    rows: tuple[DraftingRow, ...]
    tokens_per_second: float

    @property
    def timed(self) -> tuple[DraftingRow, ...]:
        """The rows that were timed: none where no ceiling is over 1."""
        return tuple(row for row in self.rows if row.speedup is not None)


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
    rows = _by_ceiling(adapter, guesses_by_layer(adapter, heads, prompts, own))
    refused = why_plain(adapter, max(map(len, prompts)) + new_tokens)
    if refused is not None:
        log.warning("this model never drafts: %s", refused)
    promising = [row for row in rows[:TIMED] if row.ceiling > 1 and refused is None]
    tried = {f"{row.drafting.layer}": row for row in promising}
    texts: dict[str, list[Generation]] = {}

    def run(name: str) -> None:
        drafting = tried[name].drafting
        runs = (runtime.generate(group, new_tokens, drafting=drafting) for group in groups)
        texts[name] = [one for found in runs for one in found]

    work = {"plain": Work(lambda: [plain_texts(plain, group, new_tokens) for group in groups])}
    timed = time_rounds(
        work | {name: Work(partial(run, name)) for name in tried}, adapter.device, rounds
    )
    ran = [_timed(row, texts[n], own, timed["plain"], timed[n]) for n, row in tried.items()]
    ran.sort(key=lambda row: -(row.speedup or 0))
    best = next((row for row in ran if row.slowest is not None and row.slowest > 1), None)
    rate = sum(map(len, own)) / statistics.median(timed["plain"])
    choice = DraftingChoice(None, (*ran, *rows[len(ran) :]), rate)
    if best is None:
        return choice
    record: dict[str, Any] = {
        "hardware": hardware(adapter.device), "threads": torch.get_num_threads(),
        "dtype": str(adapter.dtype).removeprefix("torch."), "prompts": len(prompts),
        "new_tokens": new_tokens, "batch_size": batch_size, "rounds": rounds,
        "tokens_per_second": rate,
        "acceptance_by_layer": {f"{row.drafting.layer}": row.acceptance for row in choice.rows},
        **{name: value for name, value in asdict(best).items() if name != "drafting"},
    }  # fmt: skip
    return replace(choice, chosen=replace(best.drafting, calibration=record))


def plain_texts(
    plain: "PreTrainedModel", prompts: Sequence[Sequence[int]], new_tokens: int
) -> list[Text]:
    """The original model's own greedy texts, ended as it ends them.

    Without what else its generation_config asks for, such as a repetition penalty.
    """
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(p)) + [*p] for p in prompts], device=plain.device)
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
    model: Any = plain
    configured = model.generation_config
    model.generation_config = GenerationConfig(eos_token_id=configured.eos_token_id)
    try:
        found = model.generate(
            input_ids=ids, attention_mask=mask.to(ids.device), max_new_tokens=new_tokens,
            do_sample=False, num_beams=1, pad_token_id=0,
        )  # fmt: skip
    finally:
        model.generation_config = configured
    given = configured.eos_token_id
    ends = given if isinstance(given, list) else [given]
    texts = found[:, width:].tolist()
    return [
        tuple(t[: next((i for i, token in enumerate(t, 1) if token in ends), len(t))])
        for t in texts
    ]


@torch.no_grad()
def guesses_by_layer(
    adapter: ModelAdapter,
    heads: LSpadeHeads | None,
    prompts: Sequence[Sequence[int]],
    texts: Sequence[Text],
) -> dict[int, Guesses]:
    """What each layer's best head predicts along the texts.

    Args:
        adapter: the model.
        heads: its heads, with the tuned lens beside them; None: the logit lens alone.
        prompts: token ids.
        texts: the model's own continuation of each.
    """
    readers = available(None if heads is None else heads.bind(adapter))
    found: dict[tuple[int, str], Guesses] = {}
    for prompt, text in zip(prompts, texts, strict=True):
        plan = adapter.plan(torch.tensor([[*prompt, *text[:-1]]], device=adapter.device))
        hidden, start = plan.hidden, len(prompt) - 1
        for layer in range(adapter.num_layers):
            states = hidden[0, start:]
            for name, reader in readers.items():
                if reader is None:
                    read = states
                elif layer in reader.layers and reader.scope != "choices":
                    read = reader.translate(states, layer).to(states.dtype)
                else:
                    continue
                top = adapter.unembed(read).float().softmax(-1).max(-1)
                named: Any = name
                guesses = found.setdefault((layer, name), Guesses(named, [], []))
                guesses.sure.append(top.values.tolist())
                guesses.right.append(
                    [a == b for a, b in zip(top.indices.tolist(), text, strict=True)]
                )
            hidden = adapter.run_block(plan, layer, hidden)
    best: dict[int, Guesses] = {}
    for (layer, _), guesses in found.items():
        if layer not in best or guesses.acceptance > best[layer].acceptance:
            best[layer] = guesses
    return best


def _by_ceiling(adapter: ModelAdapter, guesses: dict[int, Guesses]) -> list[DraftingRow]:
    """Each layer's best setting, the most promising layer first."""
    rows: list[DraftingRow] = []
    for layer, one in guesses.items():
        costs = draft_costs(adapter, layer)
        ceiling, tokens, confidence = max(
            (one.speedup(costs, tokens, confidence), tokens, confidence)
            for tokens in LENGTHS
            for confidence in CONFIDENCES
        )
        drafting = Drafting(layer=layer, tokens=tokens, confidence=confidence, reader=one.reader)
        rows.append(DraftingRow(drafting, one.acceptance, ceiling))
    return sorted(rows, key=lambda row: -row.ceiling)


def _timed(
    row: DraftingRow,
    found: Sequence[Generation],
    own: Sequence[Text],
    plain: Sequence[float],
    seconds: Sequence[float],
) -> DraftingRow:
    """A row with its texts and seconds against the original model's, round by round."""
    ratios = [base / mine for base, mine in zip(plain, seconds, strict=True)]
    drafts = [one.drafts for one in found if one.drafts is not None]
    rounds = sum(one.verifications for one in drafts)
    return replace(
        row,
        tokens_per_verification=(sum(one.accepted for one in drafts) + rounds) / max(rounds, 1),
        speedup=statistics.median(ratios),
        slowest=min(ratios),
        equal=statistics.mean(a.token_ids == b for a, b in zip(found, own, strict=True)),
    )

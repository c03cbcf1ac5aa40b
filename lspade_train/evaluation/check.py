"""A cheap preview of a recipe: prompt, accuracy of the base model, labels, disk space and time.

Only runs the frozen model on a sample of training rows. Writes nothing.
"""

import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lspade_train import cache, tasks
from lspade_train.cache import StateBatch, StateDataset
from lspade_train.cache.answers import choice_logits, pick_answer
from lspade_train.cache.extract import extract, row_count, spade_targets
from lspade_train.errors import RecipeError
from lspade_train.evaluation.chance import AgainstChance, compare
from lspade_train.evaluation.refit import fit_heads
from lspade_train.probes.heads import LSpadeHeads
from lspade_train.recipe import Recipe
from lspade_train.tasks import Example, Split
from lspade_train.training.datamodule import HiddenStateDataModule

TOKENISED = 5_000
"""Most rows of a split to tokenise; larger splits are sampled."""

FIRST_CHUNK, SHORT_CHUNK = 8, 1.0
"""Prompts in the first forward, and the seconds up to which this number is doubled."""

STEPS, SHORT_STEP, PART_ROWS = 3, 5.0, 16
"""Training steps to time; the seconds above which one is enough; and their rows if the loss is over
the vocabulary, where time is proportional to rows."""

FIT_SPLITS: tuple[Split, ...] = ("train", "validation")


@dataclass(frozen=True)
class SplitSize:
    """The size of a split.

    Attributes:
        rows: rows of data.
        over_context: fraction of rows whose prompts are longer than the model's context (or, for
            running text, too short for a position).
        positions: rows that a cache would have, one per answer position.
        tokens: total number of prompt tokens.
        longest: tokens of the longest prompt in the sample.
    """

    rows: int
    over_context: float
    positions: int
    tokens: int
    longest: int


@dataclass(frozen=True)
class Shown:
    """One prompt in the form that the model reads.

    Attributes:
        row: index of its row, from 0.
        prompt: the tokens as text.
        answers: text of each choice's token, or of the correct token if there are no choices.
        right: index of the correct answer in `answers`; None without a label.
        given: text of the model's answer token.
    """

    row: int
    prompt: str
    answers: tuple[str, ...]
    right: int | None
    given: str


@dataclass(frozen=True, kw_only=True)
class Check:
    """A preview of what a recipe will do.

    Attributes:
        shown: the first sampled prompt.
        sampled: number of rows that the model was run on.
        baseline: its accuracy on them; None without labels.
        on_choices: mean total probability of the row's choices; None without choices.
        balance: correct answer -> fraction of the labelled training rows, most frequent first.
        splits: size of each split.
        cache_bytes: size of the caches of train and validation, which `fit` stores.
        test_bytes: size of the cache of test, which `evaluate` adds.
        heads_bytes: size of the exported heads.
        prompt_seconds: seconds per prompt, for states and SPADE's targets.
        cache_seconds: seconds for train and validation.
        fit_seconds: seconds for all training steps.
        steps: number of training steps.
        device: device that it was timed on.
    """

    shown: Shown
    sampled: int
    baseline: AgainstChance | None
    on_choices: float | None
    balance: dict[str, float]
    splits: dict[Split, SplitSize]
    cache_bytes: int
    test_bytes: int
    heads_bytes: int
    prompt_seconds: float
    cache_seconds: float
    fit_seconds: float
    steps: int
    device: str


def check_recipe(recipe: Recipe, *, rows: int = 200, seconds: float = 30.0) -> Check:
    """Preview a recipe on a seeded sample of its training rows.

    Args:
        recipe: the recipe; its caches are neither read nor written.
        rows: most prompts to run the model on.
        seconds: time limit for running prompts.

    Raises:
        RecipeError: `rows` or `seconds` is not positive.
        LSpadeError: the model or the data cannot be used.
    """
    if rows < 1 or seconds <= 0:
        raise RecipeError(
            f"--rows is {rows} and --seconds is {seconds:g}; expected 1 or more, and more than 0."
        )
    tasks.require_splits(recipe.data, ("train",))
    data = _module(recipe)
    draw = np.random.default_rng(recipe.seed_everything)
    prompts: dict[Split, _Prompts] = {
        split: _tokenised(data, split, draw) for split in tasks.splits(recipe.data)
    }
    examples = prompts["train"].examples
    chosen = [examples[i] for i in draw.permutation(len(examples))[:rows]]
    what = data.extraction(examples)
    ran = _run(data, chosen, seconds)
    batch, logits = ran.batch(), data.adapter.unembed(ran.states["final"])
    splits: dict[Split, SplitSize] = {split: found.size for split, found in prompts.items()}
    sizes: dict[Split, int] = {s: _cache_bytes(data, found) for s, found in prompts.items()}
    fit_rows = [splits[split] for split in FIT_SPLITS if split in splits]
    steps = _steps(recipe, splits["train"].positions)
    step_seconds, heads = _time_fit(recipe, data, ran.states, what.groups)
    return Check(
        shown=_shown(data, chosen[0], logits[0]),
        sampled=len(batch),
        baseline=_baseline(batch, logits),
        on_choices=_choice_mass(batch, logits),
        balance=_balance(data, examples),
        splits=splits,
        cache_bytes=sum(sizes[split] for split in FIT_SPLITS if split in sizes),
        test_bytes=sizes.get("test", 0),
        heads_bytes=len(recipe.model.targets) * sum(p.nbytes for p in heads.parameters()),
        prompt_seconds=ran.seconds / ran.prompts,
        cache_seconds=ran.seconds / ran.tokens * sum(size.tokens for size in fit_rows),
        fit_seconds=steps * step_seconds,
        steps=steps,
        device=str(data.adapter.device),
    )


def _module(recipe: Recipe) -> HiddenStateDataModule:
    return HiddenStateDataModule(
        recipe.data,
        recipe.model.layers,
        seed=recipe.seed_everything,
        name=recipe.name,
        spade=recipe.model.target != "final",
    )


@dataclass(frozen=True)
class _Prompts:
    examples: list[Example]
    size: SplitSize


def _tokenised(data: HiddenStateDataModule, split: Split, draw: np.random.Generator) -> _Prompts:
    """The prompts of a split, or of a sample of its rows, and the estimated size of the split."""
    rows = tasks.load_rows(data.config, split)
    count = len(rows.records)
    places = sorted(draw.permutation(count)[:TOKENISED].tolist())
    sample = replace(rows, records=[rows.records[i] for i in places])
    config = replace(data.config, overlong="skip")
    limit = data.frozen.facts.max_length or 2**31
    encoded = tasks.encode(config, sample, data.tokenizer, limit)
    examples = [replace(example, row=places[example.row]) for example in encoded.examples]
    lengths = [len(example.input_ids) for example in examples]
    scale = count / len(places)
    size = SplitSize(
        rows=count,
        over_context=encoded.skipped / len(places),
        positions=round(row_count(examples) * scale),
        tokens=round(sum(lengths) * scale),
        longest=max(lengths),
    )
    return _Prompts(examples, size)


@dataclass(frozen=True)
class _Ran:
    """States of a sample, and the time for computing them."""

    states: dict[str, Tensor]
    seconds: float
    prompts: int
    tokens: int

    def batch(self) -> StateBatch:
        return StateBatch(**self.states)


def _run(data: HiddenStateDataModule, examples: Sequence[Example], seconds: float) -> _Ran:
    """Run the model on prompts, in order, until the prompts or the time run out."""
    what, tokens = data.extraction(examples), data.config.tokens_per_batch

    def states(chunk: Sequence[Example]) -> dict[str, Tensor]:
        found = extract(data.adapter, chunk, what, tokens, to_host=False)
        return found | (spade_targets(data.adapter, found, what) if what.spade else {})

    states(examples[:1])  # warm up
    parts: list[dict[str, Tensor]] = []
    spent, used, first, size = 0.0, 0, 0, FIRST_CHUNK
    while first < len(examples) and spent < seconds:
        chunk = examples[first : first + size]
        found, took = _timed(lambda chunk=chunk: states(chunk))
        parts.append(found)
        spent, first = spent + took, first + len(chunk)
        used += sum(len(example.input_ids) for example in chunk)
        size *= 2 if took < SHORT_CHUNK else 1
    joined = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    device = joined["final"].device
    return _Ran({name: value.to(device) for name, value in joined.items()}, spent, first, used)


def _timed(work: Callable[[], Any]) -> tuple[Any, float]:
    started = time.perf_counter()
    found = work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return found, time.perf_counter() - started


def _baseline(batch: StateBatch, logits: Tensor) -> AgainstChance | None:
    known = batch.labelled
    if not known.any():
        return None
    right = pick_answer(logits, batch) == batch.answer_id
    return compare(right[known], batch.answer_id[known].long(), batch.choice_count[known])


def _choice_mass(batch: StateBatch, logits: Tensor) -> float | None:
    """Total probability of the choices, which is low if the prompt does not lead to them."""
    if not batch.choice_ids.shape[1] or not (batch.choice_count > 0).all():
        return None
    among = choice_logits(logits.float(), batch).logsumexp(-1)
    return float((among - logits.float().logsumexp(-1)).exp().mean())


def _shown(data: HiddenStateDataModule, example: Example, logits: Tensor) -> Shown:
    def text(token: int) -> str:
        return str(data.tokenizer.decode([token]))

    right = None if example.answer_ids is None else int(example.answer_ids[0])
    choices = example.choice_ids or (() if right is None else (right,))
    last = int(example.positions[0]) + 1
    given = logits[list(choices)].argmax() if example.choice_ids else logits.argmax()
    return Shown(
        row=example.row,
        prompt=str(data.tokenizer.decode(example.input_ids[:last].tolist())),
        answers=tuple(map(text, choices)),
        right=None if right is None else choices.index(right),
        given=text(choices[int(given)] if example.choice_ids else int(given)),
    )


def _balance(data: HiddenStateDataModule, examples: Sequence[Example]) -> dict[str, float]:
    counts = Counter(_right_answers(examples))
    return {
        str(data.tokenizer.decode([token])): count / counts.total()
        for token, count in counts.most_common()
    }


def _right_answers(examples: Sequence[Example]) -> Iterator[int]:
    for example in examples:
        if example.answer_ids is not None:
            yield from example.answer_ids.tolist()


def _cache_bytes(data: HiddenStateDataModule, prompts: _Prompts) -> int:
    what = data.extraction(prompts.examples)
    size = cache.estimate(data.adapter, prompts.examples, what, data.config.shard_mb)
    return size.row_bytes * prompts.size.positions


def _steps(recipe: Recipe, rows: int) -> int:
    """Training steps of a fit on one device."""
    epochs, steps = recipe.trainer.get("max_epochs"), recipe.trainer.get("max_steps", -1)
    if epochs is None:
        epochs = -1 if steps != -1 else 1000  # Lightning's own default
    limits = [steps] if steps != -1 else []
    if epochs != -1:
        limits.append(epochs * -(-rows // recipe.data.batch_size))
    return min(limits)


def _time_fit(
    recipe: Recipe, data: HiddenStateDataModule, states: dict[str, Tensor], groups: tuple[str, ...]
) -> tuple[float, LSpadeHeads]:
    """Seconds of a training step, and heads with the recipe's settings."""
    whole = size = recipe.data.batch_size
    if recipe.model.scope == "vocabulary":
        size = min(whole, PART_ROWS)
    rows = torch.arange(size) % len(states["final"])  # repeats the available rows
    batch = {name: value.cpu()[rows] for name, value in states.items()}
    dataset = StateDataset([batch], groups, data.layers)

    def fit(steps: int) -> LSpadeHeads:
        return fit_heads(recipe, recipe.model, dataset, data.adapter, steps)

    heads, once = _timed(lambda: fit(1))
    if once > SHORT_STEP:
        return once * whole / size, heads
    _, more = _timed(lambda: fit(1 + STEPS))
    return max(more - once, 0.0) / STEPS * whole / size, heads

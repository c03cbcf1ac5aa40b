"""Times the pieces of an exit on this machine, by which `calibrate --cost time` prices policies.

The runtime itself is run alternately with the original model: without exits, with all rows exiting
at the embeddings, and with SPADE from there. The blocks' seconds are differences of these, so that
the pieces add up to the run without exits. Checks are timed separately. Independent of how policies
are chosen.
"""

import logging
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lspade_train.errors import RecipeError
from lspade_train.models import ModelAdapter
from lspade_train.policies.cached_exits import has_choices
from lspade_train.policies.flops import count_flops
from lspade_train.policies.gate import Gate, Reading, features
from lspade_train.policies.policy import Decoder, ExitPolicy, Scope
from lspade_train.policies.readers import available
from lspade_train.policies.seconds import Piece, Seconds, place
from lspade_train.policies.sides import calibration_side
from lspade_train.probes.heads import LSpadeHeads
from lspade_train.probes.measures import FIXED, GATED, MEASURES, find_measure, signal
from lspade_train.probes.metrics import entropy
from lspade_train.profiling.clock import hardware
from lspade_train.profiling.rounds import Work, spread_of, time_rounds
from lspade_train.profiling.shapes import (
    batch_of,
    check_baseline,
    forward_of,
    prompts_of,
    untouched,
)
from lspade_train.runtime.batching import Batch
from lspade_train.runtime.decide import Probe, decide_batch

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from lspade_train.training.datamodule import HiddenStateDataModule

BATCH_SIZE = 8
"""Default number of prompts in a batch; `data.batch_size` is for training steps."""

HEADS = 8
"""Most layers whose heads are timed: each has its own weights to read."""
UNSTEADY = 0.1
"""Warn the user if the spread of the rounds is larger."""
SMALL = 10
"""Consecutive runs of work that takes less than a millisecond."""

log = logging.getLogger(__name__)


def measure_seconds(
    data: "HiddenStateDataModule",
    heads: LSpadeHeads,
    *,
    batch_size: int | None = None,
    prompt_length: int | None = None,
    scope: Scope | None = None,
    rounds: int | None = None,
) -> Seconds:
    """Time the parts of a recipe's model here, on validation prompts, for `calibrate(cost=...)`.

    The model is loaded a second time, as the unmodified baseline, so there must be memory for two.

    Args:
        data: the frozen model's states on the task.
        heads: its heads.
        batch_size: prompts in a batch; None: 8.
        prompt_length: tokens of each; None: the median of the rows that `calibrate` tests.
        scope: tokens that checks compute logits for; None: as in `calibrate`.
        rounds: timed rounds; None: as many as fit into some seconds, at least 5.

    Raises:
        RecipeError: a batch size or prompt length out of range.
        PolicyError: the heads were not fitted for the scope.
    """
    tested = calibration_side(data).states(data)
    chosen: Scope = scope or ("choices" if has_choices(tested) else "vocabulary")
    if prompt_length is None:
        prompt_length = max(int(tested.labels["position_id"].median()) + 1, 2)
    widest = int(tested.labels["choice_count"].max()) if chosen == "choices" else 0
    # Like the runtime, without `torch.compile`.
    adapter = ModelAdapter(data.adapter.model)
    # From every group, since the groups that may exit are not chosen yet.
    prompts, _ = prompts_of(data.config, data.tokenizer, adapter.max_length, lambda _: True)
    return time_pieces(
        adapter,
        untouched(data.config),
        heads,
        prompts=prompts,
        batch_size=BATCH_SIZE if batch_size is None else batch_size,
        prompt_length=prompt_length,
        scope=chosen,
        choices=range(widest),
        rounds=rounds,
    )


@torch.no_grad()
def time_pieces(
    adapter: ModelAdapter,
    plain: "PreTrainedModel",
    heads: LSpadeHeads | None,
    *,
    batch_size: int,
    prompt_length: int,
    scope: Scope,
    choices: Sequence[int] = (),
    prompts: Sequence[Sequence[int]] = (),
    rounds: int | None = None,
) -> Seconds:
    """Time the parts of a model on one shape of batch, and on a single prompt of that length.

    Args:
        adapter: the runtime's model.
        plain: the same weights loaded a second time, unmodified.
        heads: heads for the checks; None: the logit lens only.
        batch_size: prompts in a batch.
        prompt_length: tokens of each.
        scope: tokens that checks compute logits for.
        choices: tokens to choose from, if the scope is choices; any will do.
        prompts: as for `profile`.
        rounds: timed rounds; None: as many as fit into some seconds, at least 5.

    Raises:
        RecipeError: a batch size or prompt length out of range.
        PolicyError: the heads were not fitted for the scope.
        UnsupportedModelError: `plain` is the runtime's own model, or a different one.
    """
    _check_shape(adapter, batch_size, prompt_length)
    check_baseline(plain, adapter)
    heads = None if heads is None else heads.bind(adapter)
    where, threads = hardware(adapter.device), torch.get_num_threads()
    dtype = str(adapter.dtype).removeprefix("torch.")
    log.info(
        "measuring seconds per block on this machine: %d x %d tokens on %s",
        *(batch_size, prompt_length, place(where, threads, dtype)),
    )
    full = batch_of(adapter, prompts, prompt_length, batch_size, choices)
    work = {"plain": Work(forward_of(plain, full))}
    for rows in {1, batch_size}:
        batch = batch_of(adapter, prompts, prompt_length, rows, choices)
        bench = _Bench(adapter, heads, scope, batch)
        work |= {f"{name} {rows}": one for name, one in bench.work()}
    timed = time_rounds(work, adapter.device, rounds)
    found = _Found({name: statistics.median(one) for name, one in timed.items()}, batch_size)
    ratios = [a / b for a, b in zip(timed[f"never {batch_size}"], timed["plain"], strict=True)]
    spread = spread_of(ratios)
    if spread > UNSTEADY:
        log.warning(
            "the rounds differ by %.0f%%: other work seems to run here, and the seconds are not to "
            "be relied on. Run it again on an idle machine.",
            100 * spread,
        )
    counts = count_flops(adapter)
    per_block = counts.reach(torch.tensor([prompt_length]))[0].diff()
    return Seconds(
        hardware=where,
        threads=threads,
        dtype=dtype,
        batch_size=batch_size,
        prompt_length=prompt_length,
        scope=scope,
        choices=len(choices) if scope == "choices" else None,
        rounds=len(ratios),
        spread=spread,
        plain=found.medians["plain"],
        start=max(found.less(batch_size, "leave", "answer"), 0.0),
        prompt=_split(found.piece("never", "leave"), per_block),
        step=_split(found.piece("spade", "leave", "enter"), counts.step),
        enter=found.piece("enter"),
        answer=found.piece("answer"),
        readers={name: found.piece(f"read {name}") for name in available(heads)},
        measures={name: found.piece(f"measure {name}") for name in MEASURES if name != FIXED},
    )


def _check_shape(adapter: ModelAdapter, rows: int, tokens: int) -> None:
    limit = adapter.max_length
    if rows < 1:
        raise RecipeError(f"--batch_size is {rows}; expected 1 or more prompts.")
    if tokens < 2 or (limit is not None and tokens > limit):
        raise RecipeError(
            f"--prompt_length is {tokens}; this model takes 2 to {limit or 'any number of'} tokens."
        )


class _Bench:
    """Everything that is timed on one batch."""

    def __init__(
        self, adapter: ModelAdapter, heads: LSpadeHeads | None, scope: Scope, batch: Batch
    ) -> None:
        self.adapter, self.heads, self.batch = adapter, heads, batch
        self.scope: Scope = scope
        self.rows = torch.arange(len(batch.queries))
        self.full = Probe(adapter, None, ExitPolicy(layers=(), scope=scope))
        self.hidden = adapter.plan(batch.ids, batch.mask).hidden[:, -1]
        self.logits = self.full.answer(self.hidden, batch, self.rows)

    def work(self) -> "Iterator[tuple[str, Work]]":
        """The work to time, by name."""
        yield "never", Work(lambda: decide_batch(self.full, self.batch))
        yield "leave", self._left_at_once("logit_lens")
        yield "spade", self._left_at_once("spade")
        starts, positions = self.batch.starts, self.batch.positions
        # As in the middle of a run, where the model's changes have been checked already.
        enter = partial(self.adapter.plan_step, starts, positions)
        yield "enter", Work(enter, SMALL, self.adapter.steady)
        yield "answer", Work(self._answer, SMALL)
        for name in available(self.heads):
            yield f"read {name}", self._read(name)
        for name in MEASURES:
            if name not in (FIXED, GATED):
                yield f"measure {name}", Work(self._decision(name), SMALL)
        yield f"measure {GATED}", Work(self._gate(), SMALL)

    def _left_at_once(self, decoder: Decoder) -> Work:
        policy = ExitPolicy.always(0, scope=self.scope, decoder=decoder)
        probe = Probe(self.adapter, None, policy)
        return Work(lambda: decide_batch(probe, self.batch))

    def _answer(self) -> Tensor:
        logits = self.full.answer(self.hidden, self.batch, self.rows)
        entropy(logits).float().cpu()
        return logits.amax(-1).cpu()

    def _read(self, name: str) -> Work:
        heads = available(self.heads)[name]
        layers = (0,) if heads is None else heads.layers[:: -(-len(heads.layers) // HEADS)]
        policy = ExitPolicy(
            layers=layers,
            measure=FIXED,
            threshold=0.0,
            scope=self.scope,
            decoder=name,  # pyright: ignore[reportArgumentType]
        )
        probe, turn = Probe(self.adapter, self.heads, policy), [0]

        def read() -> None:
            turn[0] += 1
            layer = layers[turn[0] % len(layers)]
            probe.exit_logits(None, self.hidden, layer, self.batch, self.rows)

        return Work(read, HEADS)

    def _decision(self, measure: str) -> Callable[[], object]:
        known = find_measure(measure)
        return lambda: known.is_sure(signal(self.logits, measure), 0.0).cpu().any()

    def _gate(self) -> Callable[[], object]:
        """The most expensive kind of gate, which uses all heads and the hidden state."""
        names = tuple(name for name in available(self.heads) if name != "logit_lens")
        logits = [self.logits] * max(len(names), 1)
        width = features(Reading.of(logits), None).shape[1]
        gate = Gate(
            layers=(0,),
            readers=names,
            weight=torch.zeros(1, width),
            bias=torch.zeros(1),
            hidden=torch.zeros(1, self.hidden.shape[1]),
        )
        before = Reading.of(logits)

        def decide() -> object:
            seen = features(Reading.of(logits), before)
            return (gate.doubt(0, seen, self.hidden) <= 0).cpu().any()

        return decide


@dataclass(frozen=True)
class _Found:
    """Median seconds by name and rows."""

    medians: Mapping[str, float]
    batch_size: int

    def piece(self, name: str, *without: str) -> Piece:
        """A run's seconds, minus those of other runs that are part of it."""
        single, batch = (self.less(rows, name, *without) for rows in (1, self.batch_size))
        return Piece.through(max(single, 0.0), max(batch, 0.0), self.batch_size)

    def less(self, rows: int, name: str, *others: str) -> float:
        """A run's seconds for that many rows, minus those of others."""
        return self.medians[f"{name} {rows}"] - sum(self.medians[f"{x} {rows}"] for x in others)


def _split(whole: Piece, weights: Tensor) -> tuple[Piece, ...]:
    """Divide all blocks' seconds among them, in proportion to their FLOPs."""
    shares = (weights / weights.sum()).tolist()
    return tuple(Piece(whole.once * share, whole.each * share) for share in shares)

"""SPADE-EXIT on one batch: block by block, confident rows exit and continue as a single token.

Paper v2 calls it SimExit. Every block runs at most twice per batch: once on the remaining prompts,
once on all rows that have exited, a single token each. Independent of text and files.
"""

from dataclasses import dataclass, replace
from functools import cached_property

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from lspade_train.errors import NumericsError
from lspade_train.models import ModelAdapter, Plan
from lspade_train.policies.gate import Reading, features
from lspade_train.policies.policy import ExitPolicy
from lspade_train.policies.readers import Readers, answer_readers, check_readers
from lspade_train.probes.heads import LSpadeHeads
from lspade_train.probes.measures import FIXED, signal
from lspade_train.probes.metrics import entropy
from lspade_train.runtime.batching import Batch, Query


@dataclass(frozen=True)
class Decision:
    """The answer to one prompt.

    Attributes:
        token_id: the answer, the most probable choice or token; for a label of several tokens, the
            one that decided it.
        text: its label, or its text; None without a tokenizer.
        layer: exit layer; L is the full model. With several steps, the highest.
        entropy: nats over the policy's scope: the check's entropy at an exit, the model's own
            otherwise. With several steps, the largest.
        exited: whether it, or every step of it, exited below L.
        scores: label -> probability among the choices; None without choices. Labels that were not
            followed to the step that separates them share their common probability evenly.
        steps: exit layer of each step, if there were several.
    """

    token_id: int
    text: str | None
    layer: int
    entropy: float
    exited: bool
    scores: dict[str, float] | None
    steps: tuple[int, ...] = ()


@dataclass(frozen=True)
class Check:
    """The result of one check.

    Attributes:
        value: the measure that the policy compares with its threshold, (rows,).
        logits: each reader's logits over the policy's scope, by its name.
        reading: reading for the gate's next check; None without a gate.
    """

    value: Float[Tensor, " rows"]
    logits: dict[str, Float[Tensor, "rows tokens"]]
    reading: Reading | None


@dataclass(frozen=True)
class Probe:
    """Reads hidden states: a head's map, then logits over the policy's scope."""

    adapter: ModelAdapter
    heads: LSpadeHeads | None
    policy: ExitPolicy

    @cached_property
    def readers(self) -> Readers:
        """The heads that every check uses; empty if nothing is checked."""
        checks = self.policy.check_layers and self.policy.measure != FIXED
        return check_readers(self.policy, self.heads) if checks else {}

    @cached_property
    def answer_heads(self) -> Readers:
        """The heads that answer at an exit."""
        return answer_readers(self.policy, self.heads) if self.policy.check_layers else {}

    def check(
        self,
        hidden: Float[Tensor, "rows d"],
        layer: int,
        batch: Batch,
        rows: Int[Tensor, " rows"],
        before: Reading | None = None,
    ) -> Check:
        """The exit signal at `layer`.

        Args:
            hidden: h_a of the rows.
            layer: a check layer.
            batch: the whole batch.
            rows: indices of the rows in it.
            before: reading of the previous check, for the same rows.
        """
        policy = self.policy
        logits = {
            name: self.read(_translated(hidden, heads, layer), batch, rows)
            for name, heads in self.readers.items()
        }
        if policy.measure == FIXED:
            return Check(torch.zeros(len(hidden), device=hidden.device), logits, None)
        if policy.gate is None:
            (only,) = logits.values()
            return Check(signal(only, policy.measure), logits, None)
        reading = Reading.of([*logits.values()])
        value = policy.gate.doubt(layer, features(reading, before), hidden)
        return Check(value, logits, reading)

    def exit_logits(
        self,
        check: Check | None,
        hidden: Float[Tensor, "rows d"],
        layer: int,
        batch: Batch,
        rows: Int[Tensor, " rows"],
    ) -> Float[Tensor, "rows tokens"]:
        """Logits of the head that answers at `layer`, reused from the check if possible."""
        name = self.policy.decoder_at(layer)
        if check is not None and name in check.logits:
            return check.logits[name]
        return self.read(self.exit_state(hidden, layer), batch, rows)

    def exit_state(self, hidden: Float[Tensor, "rows d"], layer: int) -> Float[Tensor, "rows d"]:
        """The input of the final norm and LM head if a head answers at `layer`."""
        return _translated(hidden, self.answer_heads[self.policy.decoder_at(layer)], layer)

    def read(
        self, state: Float[Tensor, "rows d"], batch: Batch, rows: Int[Tensor, " rows"]
    ) -> Float[Tensor, "rows tokens"]:
        """Logits over the vocabulary, or over each row's choices, padded with -inf."""
        unembed = self.adapter.unembed
        if self.policy.scope == "vocabulary":
            # One token per row, the same shape as the model's own product with logits_to_keep=1.
            return unembed(state[:, None])[:, 0]
        assert batch.choice_ids is not None and batch.choice_mask is not None  # noqa: PT018
        where = unembed.weight.device
        ids, real = batch.choice_ids.to(where)[rows], batch.choice_mask.to(where)[rows]
        return unembed.tokens(state.to(where), ids).masked_fill(~real, -torch.inf)

    def answer(
        self, state: Float[Tensor, "rows d"], batch: Batch, rows: Int[Tensor, " rows"]
    ) -> Float[Tensor, "rows tokens"]:
        """The logits of the answer, for rows that have passed the last block."""
        return self.read(state, batch, rows)


@dataclass(frozen=True)
class Outcome:
    """Where each row of a batch exited, and its logits.

    Attributes:
        logits: logits over the policy's scope, (rows, tokens).
        layers: exit layer, L for none, (rows,).
        entropy: nats, as in `Decision`, (rows,).
    """

    logits: Float[Tensor, "rows tokens"]
    layers: Int[Tensor, " rows"]
    entropy: Float[Tensor, " rows"]


class BatchRun:
    """One batch on its way through the blocks: the remaining prompts, and the rows that exited."""

    def __init__(self, probe: Probe, batch: Batch) -> None:
        self.probe, self.batch = probe, batch
        self.adapter, self.policy = probe.adapter, probe.policy
        rows = len(batch.queries)
        self.inside = torch.arange(rows)
        self.outside = torch.arange(0)
        # `plan.hidden` is always the current state, so dropping rows drops everything at once.
        self.plan: Plan = self.adapter.plan(batch.ids, batch.mask, shared=batch.shared)
        self.ends = batch.ends  # columns of the answers of the rows inside
        self.step: Plan | None = None  # single-token rows of `outside`
        self.every_step: Plan | None = None  # for the whole batch, planned at the first exit
        self.layers = torch.full((rows,), self.adapter.num_layers)
        self.entropy = torch.full((rows,), torch.nan)
        self.before: Reading | None = None  # of the rows inside, if a gate compares checks
        self.answers: list[tuple[Tensor, Tensor]] = []  # rows, logits

    def run(self) -> Outcome:
        """Run every block that a row still needs."""
        for block in range(self.adapter.num_layers):
            if len(self.inside) and block in self.policy.check_layers:
                self._check(block)
            if len(self.inside):
                self.plan = self._apply(self.plan, block)
            if self.step is not None:
                self.step = self._apply(self.step, block)
        self._finish()
        order = torch.cat([rows for rows, _ in self.answers]).argsort()
        logits = torch.cat([logits for _, logits in self.answers])[order]
        return Outcome(logits, self.layers, self.entropy)

    @property
    def _hidden(self) -> Float[Tensor, "rows d"]:
        """State of each row inside at its answer."""
        hidden = self.plan.hidden
        if not self.batch.shared:
            return hidden[:, -1]
        ends = self.ends.to(hidden.device)
        return hidden[torch.arange(len(ends), device=hidden.device), ends]

    def _apply(self, plan: Plan, block: int) -> Plan:
        return replace(plan, hidden=self.adapter.run_block(plan, block, plan.hidden))

    def _check(self, layer: int) -> None:
        hidden = self._hidden
        found = self.probe.check(hidden, layer, self.batch, self.inside, self.before)
        self.before = found.reading
        leaving = self.policy.exits(found.value, layer).cpu()
        if not leaving.any():
            return
        rows = self.inside[leaving]
        self.layers[rows] = layer
        if found.logits:
            seen = next(iter(found.logits.values()))
            self.entropy[rows] = entropy(seen[leaving]).float().cpu()
        if self.policy.decoder_at(layer) == "spade":
            self._continue(hidden[leaving], rows)
        else:
            logits = self.probe.exit_logits(found, hidden, layer, self.batch, self.inside)
            self._answer(rows, logits[leaving])
        self._keep(~leaving)

    def _answer(self, rows: Int[Tensor, " rows"], logits: Float[Tensor, "rows tokens"]) -> None:
        """Store the rows' answer logits, and their entropy if no check has computed it."""
        unread = self.entropy[rows].isnan()
        if unread.any():
            self.entropy[rows[unread]] = entropy(logits[unread.to(logits.device)]).float().cpu()
        self.answers.append((rows, logits))

    def _continue(self, hidden: Float[Tensor, "rows d"], rows: Int[Tensor, " rows"]) -> None:
        """From here on, these rows are a single token each, after their start token."""
        if self.every_step is None:
            where = self.batch.positions
            where = torch.ones_like(where) if self.policy.positions == "compact" else where
            self.every_step = self.adapter.plan_step(self.batch.starts, where)
        self.outside = torch.cat([self.outside, rows])
        states = hidden[:, None]
        if self.step is not None:
            states = torch.cat([self.step.hidden, states.to(self.step.hidden.device)])
        self.step = replace(self.every_step.select(self.outside), hidden=states)

    def _keep(self, staying: Bool[Tensor, " rows"]) -> None:
        self.inside = self.inside[staying]
        if len(self.inside):
            places = staying.nonzero()[:, 0]
            self.plan = self.plan.select(places)
            self.ends = self.ends[places.to(self.ends.device)]
            self.before = None if self.before is None else self.before.rows(places)

    def _finish(self) -> None:
        """Unembed the prompts that never exited and the rows that did, in one product."""
        ends = [self._hidden] if len(self.inside) else []
        ends += [] if self.step is None else [self.step.hidden[:, 0]]
        if not ends:
            return
        rows = torch.cat([self.inside, self.outside])
        self._answer(rows, self.probe.answer(torch.cat(ends), self.batch, rows))


@torch.no_grad()
def decide_batch(probe: Probe, batch: Batch) -> Outcome:
    """Run one batch as far as each row needs.

    Raises:
        NumericsError: a row's logits are NaN or Inf.
    """
    with probe.adapter.steady():
        outcome = BatchRun(probe, batch).run()
    top = outcome.logits.amax(-1)  # NaN if any of them is
    broken = top.isnan() | (top == torch.inf)
    if broken.any():
        prompt = batch.queries[int(broken.nonzero()[0, 0])].index
        raise NumericsError(
            f"The model's logits are NaN or Inf for prompt {prompt + 1}. "
            "Load the model in a wider dtype (bfloat16 or float32)."
        )
    return outcome


def answers(outcome: Outcome, batch: Batch, policy: ExitPolicy, top: int) -> list[Decision]:
    """The decisions of one batch, in the batch's order; `text` only if there are choices.

    Args:
        outcome: the batch's outcome.
        batch: its rows.
        policy: the policy, whose scope the logits are over.
        top: L.
    """
    logits = answer_logits(outcome.logits, batch, policy)
    best = logits.argmax(-1).tolist()
    scores = logits.softmax(-1).tolist() if batch.choice_ids is not None else [None] * len(best)
    layers, entropies = outcome.layers.tolist(), outcome.entropy.tolist()
    rows = zip(batch.queries, best, scores, layers, entropies, strict=True)
    return [_decision(*row, top=top) for row in rows]


def answer_logits(
    logits: Float[Tensor, "rows tokens"], batch: Batch, policy: ExitPolicy
) -> Float[Tensor, "rows answers"]:
    """Logits of possible answers: each row's choices if it has any, else the vocabulary; fp32.

    Args:
        logits: logits over the policy's scope.
        batch: the rows.
        policy: the policy.
    """
    logits = logits.float()
    if batch.choice_ids is None or policy.scope == "choices":
        return logits
    ids = batch.choice_ids.to(logits.device)
    real = batch.choice_mask.to(logits.device)  # type: ignore[union-attr]
    return logits.gather(1, ids).masked_fill(~real, -torch.inf)


def answered(query: Query, place: int) -> int:
    """The token at an index of the possible answers."""
    return place if query.choices is None else [*query.choices.values()][place]


def _decision(
    query: Query, best: int, scores: list[float] | None, layer: int, nats: float, *, top: int
) -> Decision:
    exited = layer < top
    if query.choices is None or scores is None:
        return Decision(best, None, layer, nats, exited, None)
    label = list(query.choices)[best]
    named = dict(zip(query.choices, scores, strict=False))  # padding follows the choices
    return Decision(answered(query, best), label, layer, nats, exited, named)


def _translated(
    hidden: Float[Tensor, "rows d"], heads: LSpadeHeads | None, layer: int
) -> Float[Tensor, "rows d"]:
    return hidden if heads is None else heads.translate(hidden, layer).to(hidden.dtype)

"""`Audit`: is the disagreement of a policy in use within its budget? Some rows are answered twice.

A coin with a fixed probability is flipped for every row. A row that was drawn and had exited is
answered by the full model, too; one that was drawn and had not exited is the full model's answer
already and costs nothing. So the drawn rows are independent draws of the policy's disagreement,
and the test of `policies/sequential.py` may be looked at after each of them.
"""

import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor

from lspade_train.errors import AuditError
from lspade_train.models import ModelAdapter
from lspade_train.policies.audit import (
    AuditFile,
    AuditKey,
    AuditState,
    Seen,
    default_budget,
    policy_digest,
)
from lspade_train.policies.exit_table import take
from lspade_train.policies.flops import FlopCounts, cost_parts, count_flops
from lspade_train.policies.policy import ExitPolicy
from lspade_train.probes.heads import LSpadeHeads
from lspade_train.runtime.batching import Query, shared_batches
from lspade_train.runtime.decide import BatchRun, Decision, Probe, answers

OnAlarm = Literal["warn", "never_exit"]

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Audit:
    """How a policy is audited while it is used. Every default is ours.

    Attributes:
        state: JSON file of what has been seen; processes may share it, a restart resumes it.
        rate: share of rows that is drawn, over 0 and up to 1.
        budget: largest disagreement with the full model that is no reason for an alarm. None: the
            policy's promised disagreement; for a promise about accuracy, the upper 95% bound of
            the disagreement measured at calibration.
        alpha: probability of a false alarm, however long the policy is used.
        on_alarm: `warn`, or `never_exit`: from then on the full model answers every row.
        callback: called with the state, once in each process, when the alarm is known there.
        seed: of the coin, together with the rows seen before; None draws one.
        seconds_between_writes: most time that counts of undrawn rows stay in memory; drawn rows
            are written at once.
    """

    state: str | Path
    rate: float = 0.02
    budget: float | None = None
    alpha: float = 0.05
    on_alarm: OnAlarm = "warn"
    callback: Callable[[AuditState], object] | None = None
    seed: int | None = None
    seconds_between_writes: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.rate <= 1:
            raise AuditError(f"The audit's rate is {self.rate}; expected over 0, at most 1.")
        if self.on_alarm not in get_args(OnAlarm):
            raise AuditError(
                f"on_alarm is {self.on_alarm!r}; expected {', '.join(get_args(OnAlarm))}."
            )


class Auditor:
    """An audit at work in one runtime; safe to use from several threads.

    Args:
        audit: its settings.
        adapter: the model.
        heads: the policy's heads.
        policy: audited.
        tokens_per_batch: padded tokens per batch of the full model.

    Raises:
        AuditError: no budget, or a state that is damaged or of another audit.
    """

    def __init__(
        self,
        audit: Audit,
        adapter: ModelAdapter,
        heads: LSpadeHeads | None,
        policy: ExitPolicy,
        tokens_per_batch: int,
    ) -> None:
        self.audit, self.adapter, self.policy = audit, adapter, policy
        self.tokens = tokens_per_batch
        self.full = Probe(adapter, None, ExitPolicy(layers=(), scope=policy.scope))
        key = AuditKey(
            policy=policy_digest(policy),
            heads=heads.digest if heads is not None else None,
            budget=default_budget(policy) if audit.budget is None else audit.budget,
            alpha=audit.alpha,
        )
        self.file = AuditFile(audit.state, key)
        self._heads = heads
        self._counts: FlopCounts | None = None
        entropy = None if audit.seed is None else [audit.seed, self.file.state.seen.rows]
        self._coin = np.random.default_rng(entropy)
        self._guard = threading.RLock()  # the callback may ask for the state
        self._waiting = Seen()
        self._written = time.monotonic()
        self._told = self._failing = False
        self._tell(self.file.state)

    @property
    def state(self) -> AuditState:
        """What all processes had seen at this one's last update."""
        return self.file.state

    @property
    def stopped(self) -> bool:
        """Whether the full model answers every row since an alarm."""
        return self.audit.on_alarm == "never_exit" and self.state.alarm is not None

    def observe(
        self,
        queries: Sequence[Query],
        decisions: Mapping[int, Decision],
        *,
        full: bool = False,
        shared: Mapping[int, int] | None = None,
    ) -> None:
        """Count answered rows, and audit those that the coin draws.

        A state that cannot be written costs no answer: it is logged once, and the counts wait.

        Args:
            queries: the rows.
            decisions: by the queries' index.
            full: whether the full model gave them, after an alarm.
            shared: leading tokens of each row that were run once for several, by index; none:
                whole prompts. The full model is charged as if it shared them, too.
        """
        if not queries:
            return
        seen = (
            Seen(unaudited=len(queries))
            if full
            else self._audited(queries, decisions, shared or {})
        )
        with self._guard:
            self._waiting += seen
            due = time.monotonic() - self._written >= self.audit.seconds_between_writes
            if not seen.drawn and not due:
                return
            try:
                self._flush()
            except AuditError as error:
                if not self._failing:
                    log.error("The audit's counts wait in memory: %s", error)
                self._failing = True

    def flush(self) -> AuditState:
        """Write what waits, and say what all processes have seen.

        Raises:
            AuditError: the state is damaged, of another audit, or cannot be written.
        """
        with self._guard:
            return self._flush()

    def _flush(self) -> AuditState:
        if self._waiting != Seen():
            state = self.file.add(self._waiting)
            self._waiting, self._failing = Seen(), False
            self._tell(state)
        self._written = time.monotonic()
        return self.file.state

    def _tell(self, state: AuditState) -> None:
        if state.alarm is None or self._told:
            return
        self._told = True
        then = (
            "Every row is answered by the full model now."
            if self.audit.on_alarm == "never_exit"
            else "Answers still exit early."
        )
        log.warning(
            "AUDIT ALARM: %s of %s drawn rows disagree with the full model, budget %.4g. %s\n"
            "Calibrate again on prompts like today's; see lspade-train audit %s.",
            f"{state.seen.failures:,}", f"{state.seen.drawn:,}", state.key.budget, then,
            self.file.path,
        )  # fmt: skip
        if self.audit.callback is not None:
            self.audit.callback(state)

    def _audited(
        self,
        queries: Sequence[Query],
        decisions: Mapping[int, Decision],
        shared: Mapping[int, int],
    ) -> Seen:
        with self._guard:
            heads_up = self._coin.random(len(queries)) < self.audit.rate
        drawn = [query for query, coin in zip(queries, heads_up, strict=True) if coin]
        exited = [query for query in drawn if decisions[query.index].exited]
        layers = [decisions[query.index].layer for query in queries]
        plain, spent = self._flops(queries, layers, [shared.get(q.index, 0) for q in queries])
        again = {query.index for query in exited}
        audit = sum(p for q, p in zip(queries, plain, strict=True) if q.index in again)
        return Seen(
            rows=len(queries),
            exited=sum(decision.exited for decision in decisions.values()),
            exits={layer: layers.count(layer) for layer in sorted(set(layers))},
            drawn=len(drawn),
            audited=len(exited),
            failures=self._failures(exited, decisions),
            flops=(sum(plain), sum(spent), audit),
        )

    @torch.no_grad()
    def _failures(self, queries: Sequence[Query], decisions: Mapping[int, Decision]) -> int:
        """How many the full model answers otherwise, or cannot answer (NaN)."""
        failures = 0
        for batch in shared_batches(queries, self.tokens, self.adapter):
            outcome = BatchRun(self.full, batch).run()
            broken = (outcome.logits.isnan() | (outcome.logits == torch.inf)).any(-1).tolist()
            found = answers(outcome, batch, self.full.policy, self.adapter.num_layers)
            for query, bad, one in zip(batch.queries, broken, found, strict=True):
                failures += bad or one.token_id != decisions[query.index].token_id
        return failures

    def _flops(
        self, queries: Sequence[Query], layers: Sequence[int], shared: Sequence[int]
    ) -> tuple[list[float], list[float]]:
        """Each row's operations with the full model, and with the policy, without padding."""
        if self._counts is None:
            self._counts = count_flops(self.adapter, self._heads)
        lengths, before = torch.tensor([len(q.ids) for q in queries]), torch.tensor(shared)
        checks = self.policy.check_layers
        if not checks:
            plain = self._counts.full(lengths, before).tolist()
            return plain, plain
        width: Tensor | None = None
        if self.policy.scope == "choices":
            width = torch.tensor([len(query.choices or ()) for query in queries])
        costs = cost_parts(self._counts, lengths, self.policy, choices=width, shared=before)
        stages = [*checks, self.adapter.num_layers]
        places = np.array([stages.index(layer) for layer in layers])
        return costs.plain.tolist(), take(costs.stops(), places).tolist()

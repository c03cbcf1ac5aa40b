"""`Audit`: tests whether the disagreement of a policy in use is within its budget.

Every row is sampled with a fixed probability. A sampled row that exited is also answered by the
full model; one that did not exit already has the full model's answer, at no cost. So the sampled
rows are independent draws of the policy's disagreement, and the test of `policies/sequential.py`
can be evaluated after each of them.
"""

import logging
import math
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
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
from lspade_train.policies.audited_rows import AuditedRow, utc_now
from lspade_train.policies.exit_table import take
from lspade_train.policies.flops import FlopCounts, cost_parts, count_flops
from lspade_train.policies.policy import ExitPolicy
from lspade_train.probes.heads import LSpadeHeads
from lspade_train.runtime.batching import Query, batches
from lspade_train.runtime.decide import Decision, Probe, answered
from lspade_train.runtime.trace import trace, trace_flops

OnAlarm = Literal["warn", "never_exit"]

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Audit:
    """Settings of the audit of a policy in use. Every default is ours.

    Attributes:
        state: JSON file with the counts; processes may share it, and a restart resumes it.
        rate: fraction of rows to sample, over 0 and up to 1.
        budget: largest disagreement with the full model that does not call for an alarm. None: the
            policy's guaranteed disagreement; for a guarantee on accuracy, the upper 95% bound of
            the disagreement measured at calibration.
        alpha: probability of ever raising a false alarm, over any period of use.
        on_alarm: `warn`, or `never_exit`: from then on the full model answers every row.
        callback: called with the state, once in each process, when it learns of the alarm.
        seed: seed of the sampling, together with the number of rows seen before; None: random.
        seconds_between_writes: longest time that counts of rows that were not sampled stay in
            memory; sampled rows are written at once.
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


def _reader_of(heads: LSpadeHeads | None, adapter: ModelAdapter) -> str:
    """What an audit's heads are: their digest, or the model's weights where there is none."""
    digest = None if heads is None else heads.digest
    return digest or f"model {adapter.identity['model_weights']}"


class Auditor:
    """Runs the audit in one runtime; thread-safe.

    Args:
        audit: settings.
        adapter: the model.
        heads: the policy's heads.
        policy: the policy to audit.
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
        self.probe = Probe(adapter, heads, policy)
        key = AuditKey(
            policy=policy_digest(policy),
            heads=_reader_of(heads, adapter),
            budget=default_budget(policy) if audit.budget is None else audit.budget,
            alpha=audit.alpha,
        )
        self.file = AuditFile(audit.state, key)
        self._heads = heads
        self._counts: FlopCounts | None = None
        entropy = None if audit.seed is None else [audit.seed, self.file.state.seen.rows]
        self._coin = np.random.default_rng(entropy)
        self._guard = threading.RLock()  # reentrant: the callback may read the state
        self._waiting = Seen()
        self._rows: list[AuditedRow] = []
        self._written = time.monotonic()
        self._told = self._failing = False
        self._tell(self.file.state)

    @property
    def state(self) -> AuditState:
        """The state of all processes at this one's last update."""
        return self.file.state

    @property
    def stopped(self) -> bool:
        """Whether the full model answers every row, because of an alarm."""
        return self.audit.on_alarm == "never_exit" and self.state.alarm is not None

    def observe(
        self,
        queries: Sequence[Query],
        decisions: Mapping[int, Decision],
        *,
        full: bool = False,
        shared: Mapping[int, int] | None = None,
    ) -> None:
        """Count answered rows, and audit a sample of them.

        A state that cannot be written does not affect answers: the counts are kept in memory.

        Args:
            queries: the rows.
            decisions: decisions by the queries' index.
            full: whether they are the full model's answers, after an alarm.
            shared: number of leading tokens of each row that were run once for several, by index;
                empty: whole prompts. The full model's cost assumes that it shares them, too.
        """
        if not queries:
            return
        seen, rows = Seen(unaudited=len(queries)), []
        if not full:
            seen, rows = self._audited(queries, decisions, shared or {})
        with self._guard:
            self._waiting += seen
            self._rows += rows
            due = time.monotonic() - self._written >= self.audit.seconds_between_writes
            if not seen.drawn and not due:
                return
            try:
                self._flush()
            except AuditError as error:
                if not self._failing:
                    log.error("The audit's counts are kept in memory: %s", error)
                self._failing = True
        self._tell(self.file.state)

    def flush(self) -> AuditState:
        """Write pending counts, and return the state of all processes.

        Raises:
            AuditError: the state is damaged, of another audit, or cannot be written.
        """
        with self._guard:
            state = self._flush()
        self._tell(state)
        return state

    def _flush(self) -> AuditState:
        """Write pending counts; the caller holds the guard, and tells of an alarm after it."""
        if self._waiting != Seen():
            flops = self._counts.to_json() if self._counts else None
            self.file.add(self._waiting, self._rows, flops)
            self._waiting, self._rows, self._failing = Seen(), [], False
        self._written = time.monotonic()
        return self.file.state

    def _tell(self, state: AuditState) -> None:
        """Log an alarm and call the callback, once; without the guard, which other threads need."""
        with self._guard:
            if state.alarm is None or self._told:
                return
            self._told = True
        then = (
            "Every row is answered by the full model now."
            if self.audit.on_alarm == "never_exit"
            else "Answers still exit early."
        )
        log.warning(
            "AUDIT ALARM: %s of %s sampled rows disagree with the full model, budget %.4g. %s\n"
            "Calibrate again on current prompts; see lspade-train audit %s.",
            f"{state.seen.failures:,}", f"{state.seen.drawn:,}", state.key.budget, then,
            self.file.path,
        )  # fmt: skip
        if self.audit.callback is None:
            return
        try:
            self.audit.callback(state)
        except Exception:  # the answers are not lost with it
            log.exception("The audit's callback failed.")

    def _audited(
        self,
        queries: Sequence[Query],
        decisions: Mapping[int, Decision],
        shared: Mapping[int, int],
    ) -> tuple[Seen, list[AuditedRow]]:
        """The rows' counts, and the results for the sampled ones."""
        with self._guard:
            heads_up = self._coin.random(len(queries)) < self.audit.rate
        drawn = [query for query, coin in zip(queries, heads_up, strict=True) if coin]
        exited = [query for query in drawn if decisions[query.index].exited]
        layers = [decisions[query.index].layer for query in queries]
        plain, spent, again = self._flops(
            queries, layers, [shared.get(query.index, 0) for query in queries]
        )
        traced = {query.index for query in exited}
        places = [place for place, query in enumerate(queries) if query.index in traced]
        found, failures = self._traced(exited, decisions)
        now = utc_now()
        rows = [
            AuditedRow(
                tokens=len(query.ids),
                choices=None if query.choices is None else len(query.choices),
                shared=shared.get(query.index, 0),
                group=query.group,
                time=now,
                **found.get(query.index, {}),
            )
            for query in drawn
        ]
        seen = Seen(
            rows=len(queries),
            exited=sum(decision.exited for decision in decisions.values()),
            exits={layer: layers.count(layer) for layer in sorted(set(layers))},
            drawn=len(drawn),
            audited=len(exited),
            failures=failures,
            flops=(float(plain.sum()), float(spent.sum()), float(again[places].sum())),
        )
        return seen, rows

    def _traced(
        self, queries: Sequence[Query], decisions: Mapping[int, Decision]
    ) -> tuple[dict[int, dict[str, Any]], int]:
        """Each row's measures and whether its answers agree, by index; and the failures.

        A failure is a row that the full model answers differently, or cannot answer (NaN). In the
        latter case all of the row's answers count as disagreeing.
        """
        found: dict[int, dict[str, Any]] = {}
        failures = 0
        # Every check layer's answer may add one more row for each prompt.
        tokens = max(1, self.tokens // (1 + len(self.policy.check_layers)))
        for batch in batches(queries, tokens, self.adapter.device):
            seen = trace(self.probe, batch)
            same = (seen.answers[:, :-1] == seen.answers[:, -1:]) & ~seen.broken[:, None]
            values = [[v if math.isfinite(v) else None for v in r] for r in seen.values.tolist()]
            for place, query in enumerate(batch.queries):
                agrees = tuple(map(bool, same[place].tolist()))
                found[query.index] = {"values": tuple(values[place]), "agrees": agrees}
                full = answered(query, int(seen.answers[place, -1]))
                broken = bool(seen.broken[place])
                failures += broken or full != decisions[query.index].token_id
        return found, failures

    def _flops(
        self, queries: Sequence[Query], layers: Sequence[int], shared: Sequence[int]
    ) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
        """Each row's operations with the full model, with the policy, and in the audit's trace.

        Padding is not counted. The trace runs whole prompts.
        """
        if self._counts is None:
            self._counts = count_flops(self.adapter, self._heads)
        lengths, before = torch.tensor([len(q.ids) for q in queries]), torch.tensor(shared)
        checks = self.policy.check_layers
        if not checks:
            plain = self._counts.full(lengths, before).numpy()
            return plain, plain, self._counts.full(lengths).numpy()
        width: Tensor | None = None
        if self.policy.scope == "choices":
            width = torch.tensor([len(query.choices or ()) for query in queries])
        costs = cost_parts(self._counts, lengths, self.policy, choices=width, shared=before)
        stages = [*checks, self.adapter.num_layers]
        places = np.array([stages.index(layer) for layer in layers])
        held = np.array([not self.policy.may_exit(query.group) for query in queries])
        spent = np.where(held, costs.plain, take(costs.stops(), places))
        whole = cost_parts(self._counts, lengths, self.policy, choices=width)
        return costs.plain, spent, trace_flops(whole)

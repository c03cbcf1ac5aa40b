"""Runs one batch through all blocks, with a check and an answer at every check layer.

This tells an audit where else a row could have exited, and what it would have answered.
"""

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from lspade_train.policies.exit_table import ExitCosts
from lspade_train.runtime.batching import Batch
from lspade_train.runtime.decide import BatchRun, Probe, answer_logits


@dataclass(frozen=True)
class Trace:
    """Measures and answers of a batch's rows at every check layer.

    Attributes:
        values: the measure at each check layer, (rows, K).
        answers: index of the answer among a row's choices, or its token, at each check layer and
            from the full model, (rows, K+1).
        broken: whether the full model's logits are NaN or Inf, (rows,).
    """

    values: Float[Tensor, "rows checks"]
    answers: Int[Tensor, "rows stages"]
    broken: Bool[Tensor, " rows"]


def trace(probe: Probe, batch: Batch) -> Trace:
    """Run a batch through all blocks, and answer it at every check layer of the probe's policy."""
    return _TraceRun(probe, batch).trace()


def trace_flops(costs: ExitCosts) -> Float[np.ndarray, " rows"]:
    """Operations of each row's trace: the full model, plus every check and answer on the way."""
    return costs.reach[:, -1] + costs.check.sum(1) + costs.answer.sum(1)


class _TraceRun(BatchRun):
    """A batch in which no row exits; the single-token rows of SPADE's answers run beside it."""

    def __init__(self, probe: Probe, batch: Batch) -> None:
        super().__init__(probe, batch)
        self.values: list[Tensor] = []
        self.best: dict[int, Tensor] = {}
        self.going: list[int] = []  # check layers whose SPADE answers are in progress, in order

    @torch.no_grad()
    def trace(self) -> Trace:
        """Run every block on every row."""
        for block in range(self.adapter.num_layers):
            if block in self.policy.check_layers:
                self._look(block)
            self.plan = self._apply(self.plan, block)
            if self.step is not None:
                self.step = self._apply(self.step, block)
        full = self.probe.answer(self._hidden, self.batch, self.inside)
        broken = (full.isnan() | (full == torch.inf)).any(-1).cpu()
        rows = len(self.inside)
        for place, layer in enumerate(self.going):
            assert self.step is not None  # a SPADE answer is in progress
            states = self.step.hidden[place * rows : (place + 1) * rows, 0]
            self.best[layer] = self._best(self.probe.answer(states, self.batch, self.inside))
        stages = [self.best[layer] for layer in self.policy.check_layers]
        return Trace(
            values=torch.stack(self.values, dim=1),
            answers=torch.stack([*stages, self._best(full)], dim=1),
            broken=broken,
        )

    def _look(self, layer: int) -> None:
        hidden = self._hidden
        found = self.probe.check(hidden, layer, self.batch, self.inside, self.before)
        self.before = found.reading
        self.values.append(found.value.float().cpu())
        if self.policy.decoder_at(layer) == "spade":
            self._continue(hidden, self.inside)
            self.going.append(layer)
        else:
            logits = self.probe.exit_logits(found, hidden, layer, self.batch, self.inside)
            self.best[layer] = self._best(logits)

    def _best(self, logits: Float[Tensor, "rows tokens"]) -> Int[Tensor, " rows"]:
        return answer_logits(logits, self.batch, self.policy).argmax(-1).cpu()

"""Kinds of policies, and the candidates of each kind that are proposed from some rows.

Independent of models, files and how candidates are tested.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Self

import torch

from lspade_train.policies.cached_exits import CachedExits
from lspade_train.policies.calibration import Candidate, RiskKind, frontier
from lspade_train.policies.exit_table import (
    ExitRule,
    ExitTable,
    PolicyRow,
    evaluate_policy,
    oracle_saving,
)
from lspade_train.policies.gate import FittedGate
from lspade_train.policies.policy import ExitPolicy
from lspade_train.policies.proposals import chance_wrong, expected_risk, propose, uniform_rules
from lspade_train.probes.measures import FIXED


@dataclass(frozen=True)
class Design:
    """One kind of policy: everything but which layers it checks and its thresholds.

    Attributes:
        name: description in words.
        policy: the policy over all candidate layers.
        readers: readers that its checks use.
        fitted: its gate, with cross-fitted outputs for the rows that it was fitted on.
    """

    name: str
    policy: ExitPolicy
    readers: tuple[str, ...]
    fitted: FittedGate | None = None

    def table(self, rows: CachedExits) -> ExitTable:
        """The table of these rows, which the gate was not fitted on."""
        return rows.table(self.policy, self.readers)

    def candidates(self, rows: CachedExits, *, uniform: bool = False) -> list[Candidate]:
        """Policies of this kind that are proposed from some rows.

        Args:
            rows: rows that the gate was fitted on.
            uniform: use one threshold for all check layers.
        """
        if self.fitted is not None:
            chance = self.fitted.doubt
            table = rows.table(self.policy, self.readers, torch.from_numpy(chance).float())
            rules = [with_history(rule, table.layers) for rule in propose(table, chance)]
        else:
            table = rows.table(self.policy, self.readers)
            if self.policy.measure == FIXED:
                chance = (table.answers != table.full_answer[:, None]).astype(float)
                rules = [ExitRule(layers=(layer,), threshold=0.0) for layer in table.layers]
            else:
                chance = chance_wrong(table)
                rules = uniform_rules(table) if uniform else propose(table, chance)
        return [
            Candidate(self.name, table, rule, expected=expected_risk(table, rule, chance))
            for rule in rules
        ]


def with_history(rule: ExitRule, layers: Sequence[int]) -> ExitRule:
    """Add the check before each check of a gate, which uses its values, with a threshold of 0.

    Args:
        rule: thresholds per layer, of the checks that pay off.
        layers: all layers that the gate was fitted for.
    """
    assert isinstance(rule.threshold, tuple)
    limits = dict(zip(rule.layers, rule.threshold, strict=True))
    for layer in rule.layers:
        place = layers.index(layer)
        if place:
            limits.setdefault(layers[place - 1], 0.0)
    kept = sorted(limits)
    return ExitRule(layers=tuple(kept), threshold=tuple(limits[layer] for layer in kept))


@dataclass(frozen=True)
class Proposals:
    """Candidate policies that are proposed from some rows.

    Attributes:
        designs: every kind of policy.
        candidates: candidates of each kind.
        sequences: the Pareto-optimal candidates, safest first, with the index of their design; one
            sequence per signal. Heads overfit their training rows, and a signal that suffers from
            it can come first on a joint frontier; with separate sequences it spoils only its own.
    """

    designs: Sequence[Design]
    candidates: Sequence[Sequence[Candidate]]
    sequences: Sequence[Sequence[tuple[int, Candidate]]]

    @classmethod
    def of(cls, designs: Sequence[Design], candidates: Sequence[Sequence[Candidate]]) -> Self:
        """Group candidates by signal, and keep each group's frontier."""
        signals: dict[tuple[str, tuple[str, ...]], list[int]] = {}
        for place, design in enumerate(designs):
            signals.setdefault((design.policy.measure, design.readers), []).append(place)
        sequences: list[list[tuple[int, Candidate]]] = []
        for places in signals.values():
            origin = {id(one): place for place in places for one in candidates[place]}
            front = frontier([one for place in places for one in candidates[place]])
            sequences.append([(origin[id(one)], one) for one in front])
        return cls(designs, candidates, sequences)

    def widest(self) -> list[Design]:
        """One design per set of decoders, for the oracles that answer with them."""
        return [*{design.policy.decoders: design for design in self.designs}.values()]

    def best_of_kinds(
        self, rows: CachedExits, risk: RiskKind, budget: float
    ) -> Iterator[PolicyRow]:
        """For each kind, the policy that saves most within half the budget on the proposing rows.

        Args:
            rows: rows to measure it on.
            risk: the risk that the budget limits.
            budget: largest risk.
        """
        for design, candidates in zip(self.designs, self.candidates, strict=True):
            rule = _best(candidates, risk, budget / 2)
            if rule is not None:
                table = design.table(rows)
                row = evaluate_policy(
                    table.at(rule.layers), rule.threshold, oracle=oracle_saving(table)
                )
                yield replace(row, name=design.name)


def _best(candidates: Sequence[Candidate], risk: RiskKind, budget: float) -> ExitRule | None:
    """What saves most within a budget on the candidates' own rows; None if nothing saves."""
    found: tuple[float, ExitRule | None] = (0.0, None)
    for one in candidates:
        seen = evaluate_policy(one.table.at(one.rule.layers), one.rule.threshold, oracle=1.0)
        cost = seen.drop if risk == "accuracy_drop" and seen.drop is not None else None
        if (seen.disagreement if cost is None else cost) <= budget:
            found = max(found, (seen.saved, one.rule), key=lambda pair: pair[0])
    return found[1]

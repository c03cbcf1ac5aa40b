"""Groups and depths within which a policy's risk must be within the budget, too.

A policy passes if all of its tests pass. A policy that exceeds its budget anywhere passes that test
with at most the error probability, so no correction for the number of tests is needed
(intersection-union test, Berger 1982).

Source: arXiv:2402.00857 (control of the risk given the halting time).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
from jaxtyping import Bool

from lspade_train.errors import PolicyError
from lspade_train.policies.exit_table import ExitRule, ExitTable
from lspade_train.policies.policy import NO_GROUP, ExitPolicy

if TYPE_CHECKING:
    from lspade_train.cache import StateDataset

MARGIN = 1.5
"""A depth is tested if its expected rows are this many times the fewest that could pass."""

SmallGroups = Literal["never_exit", "exclude"]
"""How to treat a group with too few rows to prove anything."""

Measured = Callable[[ExitTable, ExitRule], tuple[float, float]]
"""Gives the risk and p-value of a rule on a table of its check layers."""


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One condition of one policy on the tested rows.

    Attributes:
        kind: `group`, or `depth`: the rows that exit at or before a layer.
        name: name of the group, or the layer.
        n: number of rows.
        held: whether it was tested; if not, there is no guarantee.
        risk: risk on these rows; None without rows.
        p_value: of "the risk there is over the budget"; None if it was not tested.
    """

    kind: Literal["group", "depth"]
    name: str
    n: int
    held: bool
    risk: float | None
    p_value: float | None


@dataclass(frozen=True, kw_only=True)
class Conditions:
    """What a policy must satisfy besides its budget over all rows.

    Attributes:
        groups: name -> which of the tested rows belong to it, (n,).
        proposing: other rows, in a table of at least the rules' layers, to estimate at which depths
            enough of the tested rows will exit. The tested rows cannot be used, as their exits are
            not independent of their answers. None: no condition on depths.
    """

    groups: Mapping[str, Bool[np.ndarray, " rows"]]
    proposing: ExitTable | None = None

    def findings(
        self, table: ExitTable, rule: ExitRule, measured: Measured, needed: int
    ) -> list[Finding]:
        """Results for every condition of a rule.

        Args:
            table: table of the tested rows, over the rule's layers.
            rule: the rule.
            measured: gives risk and p-value on some rows.
            needed: fewest rows that can prove the budget if none is lost.
        """
        found = [
            _finding("group", name, mask, int(mask.sum()) >= needed, table, rule, measured)
            for name, mask in self.groups.items()
        ]
        if self.proposing is None:
            return found
        stops = table.exits(rule.threshold)
        foreseen = self.proposing.at(rule.layers).exits(rule.threshold)
        for place, layer in enumerate(rule.layers):
            expected = (foreseen <= place).mean() * len(table)
            held = bool(expected >= MARGIN * needed)
            found.append(_finding("depth", str(layer), stops <= place, held, table, rule, measured))
        return found


def groups_of(rows: "StateDataset") -> dict[str, Bool[np.ndarray, " rows"]]:
    """Which rows belong to each group.

    Raises:
        PolicyError: the rows have no groups.
    """
    index = rows.labels["group"].numpy()
    if len(rows.groups) < 2:
        raise PolicyError(
            "--per_group needs rows of several groups, and these have none: give each a "
            "'group' or 'difficulty'."
        )
    return {name or NO_GROUP: index == place for place, name in enumerate(rows.groups)}


def may_not_exit(rows: "StateDataset", policy: ExitPolicy) -> Bool[np.ndarray, " rows"]:
    """Which rows belong to groups that the policy leaves to the full model."""
    held = np.array([not policy.may_exit(name) for name in rows.groups], dtype=bool)
    return held[rows.labels["group"].numpy()]


def without_small(
    table: ExitTable, groups: Mapping[str, Bool[np.ndarray, " rows"]], needed: int
) -> tuple[ExitTable, tuple[str, ...]]:
    """The table without exits for the rows of small groups, and the names of the other groups.

    Args:
        table: the tested rows.
        groups: as in `Conditions`.
        needed: fewest rows that can prove the budget if none is lost.
    """
    small = np.zeros(len(table), dtype=bool)
    for mask in groups.values():
        small |= mask if mask.sum() < needed else False
    return table.held_back(small), tuple(n for n, mask in groups.items() if mask.sum() >= needed)


def _finding(
    kind: Literal["group", "depth"],
    name: str,
    mask: Bool[np.ndarray, " rows"],
    held: bool,
    table: ExitTable,
    rule: ExitRule,
    measured: Measured,
) -> Finding:
    n = int(mask.sum())
    # Without rows there is no evidence for the guarantee: a p-value of 1.
    risk, p_value = measured(table.rows(mask), rule) if n else (None, 1.0)
    return Finding(
        kind=kind, name=name, n=n, held=held, risk=risk, p_value=p_value if held else None
    )

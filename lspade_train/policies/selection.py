"""From a recipe's data and heads to an exit policy with its promise: what `calibrate` does.

Training rows propose policies, for each scope that the task allows, and say which checks pay for
themselves; validation rows test the proposals. Knows nothing of the command line.
"""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from lspade_train.cache import StateDataset
from lspade_train.errors import PolicyError
from lspade_train.policies.cached_exits import exit_table, has_choices
from lspade_train.policies.calibration import (
    Calibration,
    RiskKind,
    check_budget,
    learn_then_test,
    most_promising,
)
from lspade_train.policies.conditions import Conditions, groups_of
from lspade_train.policies.exit_table import ExitRule, ExitTable, PolicyRow, evaluate_policy
from lspade_train.policies.policy import Decoder, ExitPolicy, Scope
from lspade_train.policies.promise import promise
from lspade_train.policies.proposals import propose, uniform_rules
from lspade_train.policies.shift import exit_profile
from lspade_train.policies.sides import Side, calibration_side
from lspade_train.probes.heads import LSpadeHeads

if TYPE_CHECKING:
    from lspade_train.training.datamodule import HiddenStateDataModule

DESIGN_ROWS = 4_000
"""Training rows that propose policies: more would change them little."""

DROP = 0.01
"""Accuracy that may be lost where no budget is given. Ours."""


@dataclass(frozen=True, kw_only=True)
class Selection:
    """A chosen policy and what speaks for it.

    Attributes:
        policy: ready for `ExitRuntime` and `save`; its threshold is None where nothing qualified.
        calibration: the test: every candidate, and the promise.
        never: the full model on the tested rows.
        side: the rows that were tested.
    """

    policy: ExitPolicy
    calibration: Calibration
    never: PolicyRow
    side: Side


def calibrate(
    data: "HiddenStateDataModule",
    heads: LSpadeHeads,
    *,
    max_accuracy_drop: float | None = None,
    max_disagreement: float | None = None,
    confidence: float = 0.95,
    measure: str = "entropy",
    scope: Scope | None = None,
    decoder: Decoder | None = None,
    interval: int = 1,
    per_group: bool = False,
    per_depth: bool = False,
) -> Selection:
    """Choose the exit policy that saves the most compute within a risk budget, with a guarantee.

    Args:
        data: the frozen model's states on the task; missing caches are built.
        heads: its heads.
        max_accuracy_drop: budget against the full model's accuracy; 0.01 where neither is given.
        max_disagreement: budget for answers unlike the full model's; needs no labels.
        confidence: probability that the promise holds, over 0 and under 1.
        measure: of a check: entropy, margin, max_prob or another registered one.
        scope: what a check looks at; None: what saves more on the training rows.
        decoder: who answers at an exit; None: `spade`, or `tuned_lens` for heads of that kind.
        interval: candidate check layers are every n-th layer that has a head.
        per_group: promise the same within every group of the task that has rows enough.
        per_depth: promise the same for the rows that exit at or before each layer, where the
            training rows let expect enough of them.

    Raises:
        PolicyError: an option out of range, or one that these heads or rows cannot serve.
        TaskError: an accuracy budget for rows without right answers, or a missing split.
        ArtifactError: heads of another model.

    Source: Learn then Test, arXiv:2110.01052.
    """
    risk, budget = risk_budget(max_accuracy_drop, max_disagreement)
    check_budget(risk, budget, confidence)
    heads = heads.bind(data.adapter)
    layers = _candidates(data, heads, interval)
    base = ExitPolicy(
        layers=layers,
        measure=measure,
        scope=scope or "vocabulary",
        decoder=decoder or ("tuned_lens" if heads.target == "final" else "spade"),
        positions=data.config.positions,
        heads_digest=heads.digest,
    )
    base.check_heads(heads.digest, heads.target)
    side = calibration_side(data)
    rows = side.states(data)
    scopes = _scopes(rows) if scope is None else [scope]
    policies = [replace(base, scope=one) for one in scopes]
    proposing = data.stored("train", DESIGN_ROWS)
    designs = [_design(proposing, data, heads, policy) for policy in policies]
    best = most_promising([(t, [*g, *p]) for t, g, p in designs], risk, budget)
    policy, (_, *sequences) = policies[best], designs[best]
    table = exit_table(rows, data.adapter, heads, policy)
    conditions = None
    if per_group or per_depth:
        conditions = Conditions(
            groups=groups_of(rows) if per_group else {},
            proposing=designs[best][0] if per_depth else None,
        )
    found = learn_then_test(
        [(table, rules) for rules in sequences], risk, budget, confidence, conditions
    )
    chosen = found.chosen
    record = found.to_json() | {"rows": side.to_json(), "proposed_by": len(proposing)}
    record |= {"profile": exit_profile(table.at(chosen.layers), chosen.threshold)}
    record |= {"promise": promise(record)}
    policy = replace(policy, layers=chosen.layers, threshold=chosen.threshold, calibration=record)
    return Selection(
        policy=policy, calibration=found, never=evaluate_policy(table, None), side=side
    )


def risk_budget(drop: float | None, disagreement: float | None) -> tuple[RiskKind, float]:
    """The one budget that is given, by what it is about; an accuracy drop of 0.01 for none.

    Raises:
        PolicyError: both are given.
    """
    if drop is not None and disagreement is not None:
        raise PolicyError("Give one budget: --max_accuracy_drop or --max_disagreement, not both.")
    if disagreement is not None:
        return "disagreement", disagreement
    return "accuracy_drop", DROP if drop is None else drop


def _candidates(
    data: "HiddenStateDataModule", heads: LSpadeHeads, interval: int
) -> tuple[int, ...]:
    """Every n-th layer with a head and cached states."""
    layers = [layer for layer in data.layers if layer in heads.layers]
    if not layers:
        raise PolicyError(
            f"The heads have layers {list(heads.layers)}, the recipe asks for {list(data.layers)}: "
            "none in common. Set --model.layers to those of the heads."
        )
    if not 1 <= interval <= len(layers):
        raise PolicyError(
            f"--interval {interval} is out of range: expected 1 to {len(layers)}, a check at every "
            f"n-th of the {len(layers)} layers that have a head."
        )
    return tuple(layers[interval - 1 :: interval])


def _scopes(rows: StateDataset) -> list[Scope]:
    """The scopes that the rows allow."""
    return ["choices", "vocabulary"] if has_choices(rows) else ["vocabulary"]


def _design(
    rows: StateDataset, data: "HiddenStateDataModule", heads: LSpadeHeads, policy: ExitPolicy
) -> tuple[ExitTable, list[ExitRule], list[ExitRule]]:
    """The proposing rows' table, and two sequences of rules: one threshold for all, one each."""
    table = exit_table(rows, data.adapter, heads, policy)
    return table, uniform_rules(table), propose(table)

"""From a recipe's data and heads to an exit policy with its guarantee: what `calibrate` does.

Candidate policies (signal, scope, decoder, thresholds, check layers) are generated on training
rows; the Pareto-optimal ones are tested on validation rows. Independent of the command line.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, get_args

import numpy as np
from jaxtyping import Bool
from numpy.typing import NDArray

from lspade_train.errors import PolicyError
from lspade_train.policies.cached_exits import CachedExits, has_choices
from lspade_train.policies.calibration import (
    Calibration,
    Candidate,
    RiskKind,
    check_budget,
    error_shares,
    run_tests,
)
from lspade_train.policies.conditions import (
    Conditions,
    SmallGroups,
    groups_of,
    without_small,
)
from lspade_train.policies.designs import Proposals
from lspade_train.policies.exit_table import ExitTable, PolicyRow, evaluate_policy
from lspade_train.policies.policy import Decoder, ExitPolicy, Reader, Scope
from lspade_train.policies.power import rows_to_prove
from lspade_train.policies.promise import promise
from lspade_train.policies.search import Options, Search
from lspade_train.policies.seconds import Seconds
from lspade_train.policies.shift import exit_profile
from lspade_train.policies.sides import Side, calibration_side
from lspade_train.probes.heads import LSpadeHeads
from lspade_train.probes.measures import find_measure

if TYPE_CHECKING:
    from lspade_train.training.datamodule import HiddenStateDataModule

DESIGN_ROWS = 4_000
"""Training rows used to propose policies; more would make little difference."""

DROP = 0.01
"""Default budget for the accuracy drop. Our choice."""

PAPER = Options(measure="entropy", reader="l-spade", decoder="spade", uniform=True)
"""The paper's rule: one entropy threshold for the L-SPADE heads; SPADE answers."""


@dataclass(frozen=True, kw_only=True)
class Selection:
    """A chosen policy and the evidence for it.

    Attributes:
        policy: ready for `ExitRuntime` and `save`; its threshold is None if nothing qualified.
        calibration: the test, with every candidate and the guarantee.
        never: the full model on the tested rows.
        kinds: the best candidate of each kind by the training rows, measured on the tested rows;
            for comparison, without a guarantee.
        side: the rows that were tested.
    """

    policy: ExitPolicy
    calibration: Calibration
    never: PolicyRow
    kinds: tuple[PolicyRow, ...]
    side: Side


def calibrate(
    data: "HiddenStateDataModule",
    heads: LSpadeHeads,
    *,
    max_accuracy_drop: float | None = None,
    max_disagreement: float | None = None,
    confidence: float = 0.95,
    measure: str | None = None,
    scope: Scope | None = None,
    reader: Reader | None = None,
    decoder: Decoder | None = None,
    paper: bool = False,
    interval: int = 1,
    seed: int = 0,
    per_group: bool = False,
    per_depth: bool = False,
    small_groups: SmallGroups | None = None,
    cost: Seconds | None = None,
) -> Selection:
    """Choose the exit policy that saves the most within a risk budget, with a guarantee.

    Args:
        data: the frozen model's states on the task; missing caches are built.
        heads: its heads; a tuned lens beside them is used, too.
        max_accuracy_drop: budget for the drop from the full model's accuracy; default 0.01.
        max_disagreement: budget for answers that differ from the full model's; needs no labels.
        confidence: probability that the guarantee holds, over 0 and under 1.
        measure: exit criterion: entropy, margin, max_prob or another registered one, `gate`, or
            `fixed` (always exit at one layer); None searches entropy, gate and fixed exits.
        scope: tokens over which the measure is computed; None: the choices if every row has some.
        reader: heads whose logits the measure uses: l-spade or tuned_lens; None searches both.
        decoder: how the answer is computed at an exit; None searches spade and the heads, also
            layer by layer.
        paper: use the paper's rule: one entropy threshold for the L-SPADE heads at all check
            layers; SPADE answers. Replaces `measure`, `reader` and `decoder`.
        interval: use every n-th layer that has a head as a candidate check layer.
        seed: seed of the gate's folds.
        per_group: the guarantee also holds within every group of the task with enough rows.
        per_depth: the guarantee also holds for the rows that exit at or before each layer, if the
            training rows suggest that there are enough of them.
        small_groups: with `per_group`, how to treat groups that are too small to test or missing:
            `never_exit`, the full model answers their rows, or `exclude`, their rows exit but are
            not covered by the guarantee. None: never_exit.
        cost: cost to reduce: the seconds that `measure_seconds` found on this machine, or None for
            FLOPs. The guarantee is the same.

    Raises:
        PolicyError: an option out of range, or not possible with these heads or rows.
        TaskError: an accuracy budget for rows without labels, or a missing split.
        ArtifactError: heads of another model.

    Source: Learn then Test, arXiv:2110.01052; Pareto Testing, arXiv:2210.07913.
    """
    risk, budget = risk_budget(max_accuracy_drop, max_disagreement)
    check_budget(risk, budget, confidence)
    if measure is not None:
        find_measure(measure)
    _check_small_groups(small_groups, per_group=per_group)
    # Raises for unknown values.
    ExitPolicy(layers=(), scope=scope or "choices", reader=reader, decoder=decoder or "spade")
    asked = Options(measure=measure, reader=reader, decoder=decoder, seed=seed, seconds=cost)
    if paper:
        if (measure, reader, decoder) != (None, None, None):
            raise PolicyError(
                "--paper sets the measure, the reader and the decoder itself: give it alone, or "
                "leave it out."
            )
        asked = replace(PAPER, seed=seed, seconds=cost)
    heads = heads.bind(data.adapter)
    layers = _candidate_layers(data, heads, interval)
    side = calibration_side(data)
    tested = side.independent(data)
    template = ExitPolicy(
        layers=layers,
        scope=scope or ("choices" if has_choices(tested) else "vocabulary"),
        positions=data.config.positions,
        heads_digest=heads.digest,
        tuned_lens_digest=heads.tuned_lens.digest if heads.tuned_lens is not None else None,
    )
    search = Search(data.adapter, heads, template, asked)
    if cost is not None:
        cost.require(template.scope, search.heads_by_name, asked.measures)
    search.check_scope()
    proposing = search.read(data.stored("train", DESIGN_ROWS))
    rows = search.read(tested)
    groups = groups_of(tested) if per_group else {}
    chosen = choose(
        search.propose(proposing), rows, risk, budget, confidence,
        groups=groups, by_depth=per_depth, hold_back=small_groups != "exclude",
    )  # fmt: skip
    record = chosen.calibration.to_json()
    record |= {"rows": side.to_json(), "proposed_by": len(proposing)}
    record |= {"cost": "flops"} if cost is None else {"cost": "time", "seconds": cost.to_json()}
    if per_group:
        record |= {"small_groups": small_groups or "never_exit"}
    policy = chosen.policy or replace(template, threshold=None)
    record |= {"profile": exit_profile(chosen.table, policy.threshold)}
    policy = replace(policy, calibration=record | {"promise": promise(record)})
    return Selection(
        policy=policy,
        calibration=chosen.calibration,
        never=evaluate_policy(chosen.widest[0], None),
        kinds=tuple(chosen.proposals.best_of_kinds(rows, risk, budget)),
        side=side,
    )


@dataclass(frozen=True)
class Choice:
    """The result of testing proposals.

    Attributes:
        policy: the chosen policy; None to always use the full model.
        calibration: the test.
        table: table of the tested rows, over the chosen policy's check layers.
        widest: tables of the tested rows over all layers, one per set of decoders.
        proposals: the proposals.
    """

    policy: ExitPolicy | None
    calibration: Calibration
    table: ExitTable
    widest: Sequence[ExitTable]
    proposals: Proposals


def choose(
    proposals: Proposals,
    rows: CachedExits,
    risk: RiskKind,
    budget: float,
    confidence: float,
    *,
    groups: Mapping[str, NDArray[np.bool_]] | None = None,
    by_depth: bool = False,
    hold_back: bool = False,
) -> Choice:
    """Test proposals on rows that they were not made from.

    Args:
        proposals: from `Search.propose`.
        rows: other rows, from the distribution that the guarantee covers.
        risk: the risk that the budget limits.
        budget: largest risk.
        confidence: probability that the guarantee holds.
        groups: rows of each group within which the budget must hold, too.
        by_depth: the budget must also hold for the rows that exit at or before each layer.
        hold_back: never exit with rows of groups that are too small to prove anything.
    """
    tables: dict[int, ExitTable] = {}
    sequences: list[list[Candidate]] = []
    for sequence in proposals.sequences:
        tested: list[Candidate] = []
        for place, one in sequence:
            if place not in tables:
                tables[place] = proposals.designs[place].table(rows)
            conditions = None
            if groups or by_depth:
                depths = one.table if by_depth else None
                conditions = Conditions(groups=groups or {}, proposing=depths)
            tested.append(replace(one, table=tables[place], conditions=conditions))
        sequences.append(tested)
    widest = [design.table(rows) for design in proposals.widest()]
    shares = error_shares([[one for _, one in each] for each in proposals.sequences], budget)
    may_exit: list[tuple[str, ...] | None] = [None for each in sequences for _ in each]
    if groups and hold_back:
        levels = [(1 - confidence) * share for share in shares]
        sequences, may_exit = _hold_back(sequences, levels, groups, risk, budget)
    found = run_tests(sequences, widest, risk, budget, confidence, shares)
    places = [place for sequence in proposals.sequences for place, _ in sequence]
    every = [one for sequence in sequences for one in sequence]
    for place, one, names, row in zip(places, every, may_exit, found.curve, strict=True):
        if row is found.chosen:
            policy = proposals.designs[place].policy.at(one.rule.layers, one.rule.threshold)
            policy = replace(policy, exit_groups=names)
            return Choice(policy, found, one.table.at(one.rule.layers), widest, proposals)
    return Choice(None, found, widest[0], widest, proposals)


def _hold_back(
    sequences: Sequence[Sequence[Candidate]],
    levels: Sequence[float],
    groups: Mapping[str, Bool[np.ndarray, " rows"]],
    risk: RiskKind,
    budget: float,
) -> tuple[list[list[Candidate]], list[tuple[str, ...] | None]]:
    """The candidates without exits for small groups, and the groups that may exit in each.

    This depends on a group's size, never on its answers, so the tests stay valid.
    """
    held: list[list[Candidate]] = []
    names: list[tuple[str, ...] | None] = []
    for sequence, level in zip(sequences, levels, strict=True):
        needed = rows_to_prove(0, risk, budget, level) if sequence else 0
        found = [without_small(one.table, groups, needed) for one in sequence]
        held.append([replace(one, table=f[0]) for one, f in zip(sequence, found, strict=True)])
        names += [large for _, large in found]
    return held, names


def risk_budget(drop: float | None, disagreement: float | None) -> tuple[RiskKind, float]:
    """The risk and the budget; by default an accuracy drop of 0.01.

    Raises:
        PolicyError: both are given.
    """
    if drop is not None and disagreement is not None:
        raise PolicyError("Give one budget: --max_accuracy_drop or --max_disagreement, not both.")
    if disagreement is not None:
        return "disagreement", disagreement
    return "accuracy_drop", DROP if drop is None else drop


def _check_small_groups(asked: str | None, *, per_group: bool) -> None:
    if asked is not None and (asked not in get_args(SmallGroups) or not per_group):
        raise PolicyError(
            f"--small_groups is {asked!r}; expected {' or '.join(get_args(SmallGroups))}, together "
            "with --per_group."
        )


def _candidate_layers(
    data: "HiddenStateDataModule", heads: LSpadeHeads, interval: int
) -> tuple[int, ...]:
    """Every n-th layer with a head and cached states."""
    kinds = [heads, *([] if heads.tuned_lens is None else [heads.tuned_lens])]
    layers = [layer for layer in data.layers if all(layer in kind.layers for kind in kinds)]
    if not layers:
        raise PolicyError(
            f"The heads have layers {list(heads.layers)}, the recipe asks for {list(data.layers)}: "
            "none in common. Set --model.layers to those of the heads."
        )
    if not 1 <= interval <= len(layers):
        raise PolicyError(
            f"--interval must be between 1 and {len(layers)} (got {interval}): a check at every "
            f"n-th of the {len(layers)} layers that have a head."
        )
    return tuple(layers[interval - 1 :: interval])

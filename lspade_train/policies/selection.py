"""From a recipe's data and heads to an exit policy with its promise: what `calibrate` does.

Training rows propose policies: what decides (a measure of a reader's logits, a learned gate, a
fixed layer), over what (choices or vocabulary), who answers, and which checks pay for themselves.
The proposals that no other beats are tested on validation rows. Knows nothing of the command line.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, cast

import numpy as np
import torch

from lspade_train.cache import StateDataset
from lspade_train.errors import PolicyError
from lspade_train.policies.cached_exits import CachedExits, has_choices, read_exits
from lspade_train.policies.calibration import (
    Calibration,
    Candidate,
    RiskKind,
    check_budget,
    frontier,
    run_tests,
)
from lspade_train.policies.conditions import Conditions, groups_of
from lspade_train.policies.exit_table import (
    ExitRule,
    ExitTable,
    PolicyRow,
    evaluate_policy,
    oracle_saving,
)
from lspade_train.policies.gate import FittedGate, GateFitter
from lspade_train.policies.policy import Decoder, ExitPolicy, Reader, Scope
from lspade_train.policies.promise import promise
from lspade_train.policies.proposals import propose, uniform_rules
from lspade_train.policies.readers import Readers, available, check_readers, own_name
from lspade_train.policies.shift import exit_profile
from lspade_train.policies.sides import Side, calibration_side
from lspade_train.probes.heads import LSpadeHeads
from lspade_train.probes.measures import FIXED, GATED, find_measure

if TYPE_CHECKING:
    from lspade_train.training.datamodule import HiddenStateDataModule

DESIGN_ROWS = 4_000
"""Training rows that propose policies: more would change them little."""

DROP = 0.01
"""Accuracy that may be lost where no budget is given. Ours."""

SEARCHED = ("entropy", GATED, FIXED)
"""Measures that are tried where none is asked for."""


@dataclass(frozen=True, kw_only=True)
class Selection:
    """A chosen policy and what speaks for it.

    Attributes:
        policy: ready for `ExitRuntime` and `save`; its threshold is None where nothing qualified.
        calibration: the test: every candidate, and the promise.
        never: the full model on the tested rows.
        kinds: of each kind of policy the one that the training rows would choose, measured on the
            tested rows; for comparison, without a promise.
        side: the rows that were tested.
    """

    policy: ExitPolicy
    calibration: Calibration
    never: PolicyRow
    kinds: tuple[PolicyRow, ...]
    side: Side


@dataclass(frozen=True, kw_only=True)
class Options:
    """What `calibrate` may search, as it was asked for; None searches all there is."""

    measure: str | None
    scope: Scope | None
    reader: Reader | None
    decoder: Decoder | None
    seed: int


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
    interval: int = 1,
    seed: int = 0,
    per_group: bool = False,
    per_depth: bool = False,
) -> Selection:
    """Choose the exit policy that saves the most compute within a risk budget, with a guarantee.

    Args:
        data: the frozen model's states on the task; missing caches are built.
        heads: its heads; a tuned lens beside them is read too.
        max_accuracy_drop: budget against the full model's accuracy; 0.01 where neither is given.
        max_disagreement: budget for answers unlike the full model's; needs no labels.
        confidence: probability that the promise holds, over 0 and under 1.
        measure: what decides: entropy, margin, max_prob or another registered one, `gate`, or
            `fixed` (always leave at one layer); None searches entropy, gate and fixed exits.
        scope: what a check looks at; None: the choices where every row has some.
        reader: whose logits a measure is of: l-spade or tuned_lens; None searches what is there.
        decoder: who answers at an exit; None searches spade and the heads, also layer by layer.
        interval: candidate check layers are every n-th layer that has a head.
        seed: of the gate's folds.
        per_group: promise the same within every group of the task that has rows enough.
        per_depth: promise the same for the rows that exit at or before each layer, where the
            training rows let expect enough of them.

    Raises:
        PolicyError: an option out of range, or one that these heads or rows cannot serve.
        TaskError: an accuracy budget for rows without right answers, or a missing split.
        ArtifactError: heads of another model.

    Source: Learn then Test, arXiv:2110.01052; Pareto Testing, arXiv:2210.07913.
    """
    risk, budget = risk_budget(max_accuracy_drop, max_disagreement)
    check_budget(risk, budget, confidence)
    if measure is not None:
        find_measure(measure)
    # Refuses words that no policy knows.
    ExitPolicy(layers=(), scope=scope or "choices", reader=reader, decoder=decoder or "spade")
    heads = heads.bind(data.adapter)
    layers = _candidate_layers(data, heads, interval)
    side = calibration_side(data)
    tested = side.states(data)
    asked = Options(measure=measure, scope=scope, reader=reader, decoder=decoder, seed=seed)
    template = ExitPolicy(
        layers=layers,
        scope=scope or ("choices" if has_choices(tested) else "vocabulary"),
        positions=data.config.positions,
        heads_digest=heads.digest,
        tuned_lens_digest=heads.tuned_lens.digest if heads.tuned_lens is not None else None,
    )
    search = _Search(data, heads, template, asked)
    search.check_scope()
    proposing = search.read(data.stored("train", DESIGN_ROWS))
    designs = [*search.designs(proposing)]
    proposed = [design.candidates(proposing) for design in designs]
    rows = search.read(tested)
    groups = groups_of(tested) if per_group else {}
    sequences: list[list[Candidate]] = []
    chosen_from: list[_Design] = []
    for members in _by_signal(designs):
        kept = {id(one): place for place in members for one in proposed[place]}
        front = frontier([one for place in members for one in proposed[place]], risk, budget)
        origins = [designs[kept[id(one)]] for one in front]
        chosen_from += origins
        sequences.append(
            [
                Candidate(
                    one.name,
                    design.table(rows),
                    one.rule,
                    Conditions(groups=groups, proposing=one.table if per_depth else None)
                    if per_group or per_depth
                    else None,
                )
                for design, one in zip(origins, front, strict=True)
            ]
        )
    tables = [design.table(rows) for design in _widest(designs)]
    found = run_tests(sequences, tables, risk, budget, confidence)
    record = found.to_json() | {"rows": side.to_json(), "proposed_by": len(proposing)}
    place = next((n for n, row in enumerate(found.curve) if row is found.chosen), None)
    policy, checked = replace(template, threshold=None), tables[0]
    if place is not None:
        chosen = [one for sequence in sequences for one in sequence][place]
        checked = chosen.table.at(chosen.rule.layers)
        policy = chosen_from[place].policy.at(chosen.rule.layers, chosen.rule.threshold)
    record |= {"profile": exit_profile(checked, policy.threshold)}
    policy = replace(policy, calibration=record | {"promise": promise(record)})
    never = evaluate_policy(tables[0], None)
    kinds = tuple(_best_of_kinds(designs, proposed, rows, risk, budget))
    return Selection(policy=policy, calibration=found, never=never, kinds=kinds, side=side)


@dataclass(frozen=True)
class _Design:
    """One kind of policy: everything but which layers it checks and its thresholds.

    Attributes:
        name: in words.
        policy: over all candidate layers.
        readers: what its checks read.
        fitted: its gate, with what it says of the rows that it was fitted on.
    """

    name: str
    policy: ExitPolicy
    readers: tuple[str, ...]
    fitted: FittedGate | None = None

    def table(self, rows: CachedExits) -> ExitTable:
        """What these rows, which the gate has not seen, would answer and cost."""
        return rows.table(self.policy, self.readers)

    def candidates(self, rows: CachedExits) -> list[Candidate]:
        """Policies of this kind that the proposing rows speak for."""
        seen = None if self.fitted is None else torch.from_numpy(self.fitted.doubt).float()
        table = rows.table(self.policy, self.readers, seen)
        if self.policy.measure == FIXED:
            rules = [ExitRule(layers=(layer,), threshold=0.0) for layer in table.layers]
        elif self.fitted is not None:
            rules = [with_history(rule, table.layers) for rule in propose(table)]
        else:
            rules = [*uniform_rules(table), *propose(table)]
        return [Candidate(self.name, table, rule) for rule in rules]


class _Search:
    """The kinds of policies that a task's rows and heads allow."""

    def __init__(
        self,
        data: "HiddenStateDataModule",
        heads: LSpadeHeads,
        template: ExitPolicy,
        asked: Options,
    ) -> None:
        self.data, self.heads, self.template, self.asked = data, heads, template, asked
        every = available(heads)
        del every["logit_lens"]
        if "logit_lens" in (asked.reader, asked.decoder):
            every["logit_lens"] = None
        self.heads_by_name: Readers = every
        self._gates: GateFitter | None = None
        for word in (asked.reader, asked.decoder):
            if word not in (None, "spade", *every):
                raise PolicyError(
                    f"{word} heads are not here; the given ones are {own_name(heads)}.\n"
                    "Fit both kinds: lspade-train fit --model.target both."
                )

    def check_scope(self) -> None:
        """Refuse heads that were fitted over the choices where the vocabulary is looked at."""
        for word in self.heads_by_name:
            reader = replace(self.template, reader=cast(Reader, word), decoder=cast(Decoder, word))
            check_readers(reader, self.heads)

    def read(self, rows: StateDataset) -> CachedExits:
        """Everything that the search looks at, of some rows."""
        measures = [self.asked.measure] if self.asked.measure else [*SEARCHED]
        return read_exits(
            rows,
            self.data.adapter,
            self.heads_by_name,
            ("spade", *cast(list[Decoder], [*self.heads_by_name])),
            layers=self.template.layers,
            scope=self.template.scope,
            measures=measures,
        )

    def designs(self, rows: CachedExits) -> Iterator[_Design]:
        """Every kind of policy to be proposed."""
        measures = [self.asked.measure] if self.asked.measure else SEARCHED
        for measure in measures:
            for decoders in self._decoders(rows):
                if measure == FIXED:
                    yield self._design(measure, decoders, ())
                elif measure == GATED:
                    yield self._gated(rows, decoders)
                else:
                    for reader in [self.asked.reader] if self.asked.reader else self.heads_by_name:
                        yield self._design(measure, decoders, (reader,))

    def _decoders(self, rows: CachedExits) -> list[tuple[Decoder, ...]]:
        """Who may answer: one for all layers, or at each layer whoever agrees most."""
        count = len(self.template.layers)
        if self.asked.decoder is not None:
            return [_repeated(self.asked.decoder, count)]
        words: list[Decoder] = ["spade", *cast(list[Decoder], [*self.heads_by_name])]
        right = np.stack(
            [(rows.answers[word] == rows.full_answer[:, None]).double().mean(0) for word in words]
        )
        # Of equals the cheapest: an answer from a head runs no block above the exit.
        best: tuple[Decoder, ...] = tuple(
            words[len(words) - 1 - int(place)] for place in right[::-1].argmax(0)
        )
        every: list[tuple[Decoder, ...]] = [_repeated(word, count) for word in words]
        return [*every, *([] if best in every else [best])]

    def _gated(self, rows: CachedExits, decoders: tuple[Decoder, ...]) -> _Design:
        layers, readers = self.template.layers, tuple(self.heads_by_name)
        if self._gates is None:
            features = [one.numpy() for one in rows.features(layers, readers)]
            hidden = (rows.hidden(layer).numpy() for layer in layers)
            self._gates = GateFitter(layers, readers, features, hidden, seed=self.asked.seed)
        fitted = self._gates.fit(rows.wrong(layers, decoders).numpy())
        return self._design(GATED, decoders, readers, fitted)

    def _design(
        self,
        measure: str,
        decoders: tuple[Decoder, ...],
        readers: tuple[str, ...],
        fitted: FittedGate | None = None,
    ) -> _Design:
        who = decoders[0] if len(set(decoders)) == 1 else "best by layer"
        what = measure
        if fitted is not None:
            what = "gate"
        elif readers and len(self.heads_by_name) > 1:
            what = f"{readers[0]} {measure}"
        policy = replace(
            self.template,
            measure=measure,
            reader=readers[0] if len(readers) == 1 and fitted is None else None,  # pyright: ignore[reportArgumentType]
            decoder=decoders[0] if len(set(decoders)) == 1 else decoders,
            gate=None if fitted is None else fitted.gate,
        )
        return _Design(f"{what} -> {who}", policy, readers, fitted)


def _repeated(word: Decoder, count: int) -> tuple[Decoder, ...]:
    return tuple(word for _ in range(count))


def with_history(rule: ExitRule, layers: Sequence[int]) -> ExitRule:
    """Keep the check before each one of a gate, whose values it reads, with a threshold of 0.

    Args:
        rule: thresholds per layer, of the checks that pay for themselves.
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


def _by_signal(designs: "Sequence[_Design]") -> list[list[int]]:
    """Places of the designs that decide by the same signal, each group to be tested for itself.

    Heads know the rows they were trained on too well, and a signal that suffers from it can head
    the frontier of all: in a sequence of its own it spoils only that.
    """
    groups: dict[tuple[str, tuple[str, ...]], list[int]] = {}
    for place, design in enumerate(designs):
        groups.setdefault((design.policy.measure, design.readers), []).append(place)
    return [*groups.values()]


def _best_of_kinds(
    designs: "Sequence[_Design]",
    proposed: Sequence[Sequence[Candidate]],
    rows: CachedExits,
    risk: RiskKind,
    budget: float,
) -> Iterator[PolicyRow]:
    """Of every kind, what saves most within half the budget on the proposing rows."""
    for design, candidates in zip(designs, proposed, strict=True):
        fine: list[tuple[float, ExitRule]] = []
        for one in candidates:
            seen = evaluate_policy(one.table.at(one.rule.layers), one.rule.threshold, oracle=1.0)
            cost = seen.drop if risk == "accuracy_drop" and seen.drop is not None else None
            if (seen.disagreement if cost is None else cost) <= budget / 2:
                fine.append((seen.compute_saved, one.rule))
        saved, rule = max(fine, key=lambda one: one[0], default=(0.0, None))
        if rule is not None and saved > 0:
            table = design.table(rows)
            row = evaluate_policy(
                table.at(rule.layers), rule.threshold, oracle=oracle_saving(table)
            )
            yield replace(row, name=design.name)


def _widest(designs: Sequence[_Design]) -> list[_Design]:
    """One design per set of decoders: whose oracle may answer by them."""
    return [*{design.policy.decoders: design for design in designs}.values()]


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
            f"--interval {interval} is out of range: expected 1 to {len(layers)}, a check at every "
            f"n-th of the {len(layers)} layers that have a head."
        )
    return tuple(layers[interval - 1 :: interval])

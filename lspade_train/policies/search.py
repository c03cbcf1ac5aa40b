"""The kinds of policies that a task's rows and heads allow, and the candidates of each kind.

Knows nothing of files, of the command line or of how candidates are tested.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, cast

import numpy as np
import torch

from lspade_train.cache import StateDataset
from lspade_train.errors import PolicyError
from lspade_train.policies.cached_exits import CachedExits, read_exits
from lspade_train.policies.calibration import Candidate, RiskKind
from lspade_train.policies.exit_table import (
    ExitRule,
    ExitTable,
    PolicyRow,
    evaluate_policy,
    oracle_saving,
)
from lspade_train.policies.gate import FittedGate, GateFitter
from lspade_train.policies.policy import Decoder, ExitPolicy, Reader
from lspade_train.policies.proposals import chance_wrong, expected_risk, propose, uniform_rules
from lspade_train.policies.readers import Readers, available, check_readers, own_name
from lspade_train.probes.heads import LSpadeHeads
from lspade_train.probes.measures import FIXED, GATED

if TYPE_CHECKING:
    from lspade_train.training.datamodule import HiddenStateDataModule

SEARCHED = ("entropy", GATED, FIXED)
"""Measures that are tried where none is asked for."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """What `calibrate` may search, as it was asked for; None searches all there is.

    Attributes:
        measure: what decides.
        reader: whose logits a measure is of.
        decoder: who answers at an exit.
        uniform: one threshold for all check layers.
        seed: of the folds.
    """

    measure: str | None = None
    reader: Reader | None = None
    decoder: Decoder | None = None
    uniform: bool = False
    seed: int = 0

    @property
    def measures(self) -> tuple[str, ...]:
        """What may decide."""
        return (self.measure,) if self.measure else SEARCHED


@dataclass(frozen=True)
class Design:
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

    def candidates(self, rows: CachedExits, *, uniform: bool = False) -> list[Candidate]:
        """Policies of this kind that the proposing rows speak for.

        Args:
            rows: which the gate was fitted on.
            uniform: one threshold for all check layers.
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


class Search:
    """The kinds of policies that a task's rows and heads allow.

    Args:
        data: of the recipe.
        heads: bound; a tuned lens beside them is searched too.
        template: what all policies share.
        asked: what to search.
    """

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
        return read_exits(
            rows,
            self.data.adapter,
            self.heads_by_name,
            ("spade", *cast(list[Decoder], [*self.heads_by_name])),
            layers=self.template.layers,
            scope=self.template.scope,
            measures=self.asked.measures,
        )

    def designs(self, rows: CachedExits) -> Iterator[Design]:
        """Every kind of policy to be proposed."""
        for measure in self.asked.measures:
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

    def _gated(self, rows: CachedExits, decoders: tuple[Decoder, ...]) -> Design:
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
    ) -> Design:
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
        return Design(f"{what} -> {who}", policy, readers, fitted)


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


def by_signal(designs: Sequence[Design]) -> list[list[int]]:
    """Places of the designs that decide by the same signal, each group to be tested for itself.

    Heads know the rows they were trained on too well, and a signal that suffers from it can head
    the frontier of all: in a sequence of its own it spoils only that.
    """
    groups: dict[tuple[str, tuple[str, ...]], list[int]] = {}
    for place, design in enumerate(designs):
        groups.setdefault((design.policy.measure, design.readers), []).append(place)
    return [*groups.values()]


def best_of_kinds(
    designs: Sequence[Design],
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


def widest(designs: Sequence[Design]) -> list[Design]:
    """One design per set of decoders: whose oracle may answer by them."""
    return [*{design.policy.decoders: design for design in designs}.values()]

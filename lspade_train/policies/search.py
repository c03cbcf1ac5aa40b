"""The search space of a calibration: the kinds of policies that a task's rows and heads allow.

Independent of files, the command line and how candidates are tested.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import cast

import numpy as np

from lspade_train.cache import StateDataset
from lspade_train.errors import PolicyError
from lspade_train.io.progress import Progress
from lspade_train.models import ModelAdapter
from lspade_train.policies.cached_exits import CachedExits, read_exits
from lspade_train.policies.calibration import Candidate
from lspade_train.policies.designs import Design, Proposals
from lspade_train.policies.gate import FittedGate, GateFitter
from lspade_train.policies.policy import Decoder, ExitPolicy, Reader
from lspade_train.policies.readers import Readers, available, check_readers, own_name
from lspade_train.policies.seconds import Seconds
from lspade_train.probes.heads import LSpadeHeads
from lspade_train.probes.measures import FIXED, GATED

SEARCHED = ("entropy", GATED, FIXED)
"""Measures to try by default."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """Restrictions of the search by `calibrate`'s options; None searches all values.

    Attributes:
        measure: exit criterion.
        reader: heads whose logits a measure uses.
        decoder: how the answer is computed at an exit.
        uniform: use one threshold for all check layers.
        seed: seed of the folds.
        seconds: price savings in seconds; None: in FLOPs.
    """

    measure: str | None = None
    reader: Reader | None = None
    decoder: Decoder | None = None
    uniform: bool = False
    seed: int = 0
    seconds: Seconds | None = None

    @property
    def measures(self) -> tuple[str, ...]:
        """The exit criteria to search."""
        return (self.measure,) if self.measure else SEARCHED


class Search:
    """The kinds of policies that a task's rows and heads allow.

    Args:
        adapter: the frozen model.
        heads: bound heads; a tuned lens beside them is searched, too.
        template: settings that all policies share.
        asked: what to search.
    """

    def __init__(
        self,
        adapter: ModelAdapter,
        heads: LSpadeHeads,
        template: ExitPolicy,
        asked: Options,
    ) -> None:
        self.adapter, self.heads, self.template, self.asked = adapter, heads, template, asked
        every = available(heads)
        del every["logit_lens"]
        if "logit_lens" in (asked.reader, asked.decoder):
            every["logit_lens"] = None
        self.heads_by_name: Readers = every
        for word in (asked.reader, asked.decoder):
            if word not in (None, "spade", *every):
                raise PolicyError(
                    f"{word} heads are missing; the loaded ones are {own_name(heads)}.\n"
                    "Fit both kinds: lspade-train fit --model.target both."
                )

    def check_scope(self) -> None:
        """Refuse heads that were fitted over the choices if the scope is the vocabulary."""
        for word in self.heads_by_name:
            reader = replace(self.template, reader=cast(Reader, word), decoder=cast(Decoder, word))
            check_readers(reader, self.heads)

    def read(self, rows: StateDataset) -> CachedExits:
        """Read everything that the search needs from some rows."""
        return read_exits(
            rows,
            self.adapter,
            self.heads_by_name,
            ("spade", *cast(list[Decoder], [*self.heads_by_name])),
            layers=self.template.layers,
            scope=self.template.scope,
            measures=self.asked.measures,
            seconds=self.asked.seconds,
        )

    def propose(self, rows: CachedExits) -> Proposals:
        """Every kind of policy, and the candidates proposed from these rows.

        Args:
            rows: rows that are not tested.
        """
        designs: list[Design] = []
        candidates: list[list[Candidate]] = []
        with Progress("proposing", None, "kinds of policies") as progress:
            for one in progress.counted(self._designs(rows)):
                designs.append(one)
                candidates.append(one.candidates(rows, uniform=self.asked.uniform))
        return Proposals.of(designs, candidates)

    def _designs(self, rows: CachedExits) -> Iterator[Design]:
        gates = self._gates(rows) if GATED in self.asked.measures else None
        layers = self.template.layers
        for measure in self.asked.measures:
            for decoders in self._decoders(rows):
                if measure == FIXED:
                    yield self._design(measure, decoders, ())
                elif measure == GATED:
                    assert gates is not None
                    fitted = gates.fit(rows.wrong(layers, decoders).numpy())
                    yield self._design(measure, decoders, gates.readers, fitted)
                else:
                    for reader in [self.asked.reader] if self.asked.reader else self.heads_by_name:
                        yield self._design(measure, decoders, (reader,))

    def _gates(self, rows: CachedExits) -> GateFitter:
        layers, readers = self.template.layers, tuple(self.heads_by_name)
        features = [one.numpy() for one in rows.features(layers, readers)]
        hidden = (rows.hidden(layer).numpy() for layer in layers)
        return GateFitter(layers, readers, features, hidden, seed=self.asked.seed)

    def _decoders(self, rows: CachedExits) -> list[tuple[Decoder, ...]]:
        """Decoders to try: one for all layers, or at each layer the one that agrees most."""
        count = len(self.template.layers)
        if self.asked.decoder is not None:
            return [_repeated(self.asked.decoder, count)]
        words: list[Decoder] = ["spade", *cast(list[Decoder], [*self.heads_by_name])]
        right = np.stack(
            [(rows.answers[word] == rows.full_answer[:, None]).double().mean(0) for word in words]
        )
        # Ties go to the cheapest: an answer from a head runs no block above the exit.
        best: tuple[Decoder, ...] = tuple(
            words[len(words) - 1 - int(place)] for place in right[::-1].argmax(0)
        )
        every: list[tuple[Decoder, ...]] = [_repeated(word, count) for word in words]
        return [*every, *([] if best in every else [best])]

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

"""The cost of exits in seconds: pieces timed on one machine, added up for any policy.

For one batch size and one prompt length. Independent of how the pieces were timed (see
`profiling.pieces`) and of how policies are chosen.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from lspade_train.errors import PolicyError
from lspade_train.policies.exit_table import ExitCosts
from lspade_train.policies.policy import REMEDY, ExitPolicy
from lspade_train.policies.readers import answer_head, read_by_checks
from lspade_train.policies.together import Together
from lspade_train.probes.measures import FIXED


@dataclass(frozen=True)
class Piece:
    """Seconds of one piece of work on some rows of a batch.

    Attributes:
        once: fixed cost if there is any row.
        each: additional cost per row.
    """

    once: float
    each: float

    @classmethod
    def through(cls, single: float, batch: float, rows: int) -> Self:
        """Fit to the seconds of one row and of a full batch; the latter are kept exactly."""
        if rows == 1:
            return cls(batch, 0.0)
        each = min(max((batch - single) / (rows - 1), 0.0), batch / rows)
        return cls(batch - rows * each, each)

    def of(self, rows: int) -> float:
        """Seconds for that many rows."""
        return self.once + self.each * rows if rows else 0.0

    def share(self, rows: int) -> float:
        """One row's share of the seconds of a full batch."""
        return self.of(rows) / rows


NOTHING = Piece(0.0, 0.0)


@dataclass(frozen=True, kw_only=True)
class Seconds:
    """Seconds that the parts of one model take, on one machine and for one batch shape.

    Attributes:
        hardware: the processor's name.
        threads: CPU threads.
        dtype: the model's precision.
        batch_size: prompts in a batch.
        prompt_length: tokens of each prompt.
        scope: the tokens whose logits are computed.
        choices: number of choices of each prompt, if the scope is choices.
        rounds: timed rounds, whose medians these are.
        spread: interquartile range, over the rounds, of the run's time relative to the original
            model's, as a fraction of the median.
        plain: a batch through the original model, which unembeds the answers only.
        start: a batch through the embeddings, planned block by block.
        prompt: whole prompts through each block, L pieces.
        step: single-token rows through each block, L pieces.
        enter: the first exit of a batch that continues as a single token.
        answer: final norm and logits over the scope, after the last block.
        readers: map, norm and logits of each reader, by its name, the heads' own first.
        measures: a check's decision from logits, by the measure's name.
    """

    hardware: str
    threads: int
    dtype: str
    batch_size: int
    prompt_length: int
    scope: str
    choices: int | None
    rounds: int
    spread: float
    plain: float
    start: float
    prompt: tuple[Piece, ...]
    step: tuple[Piece, ...]
    enter: Piece
    answer: Piece
    readers: Mapping[str, Piece]
    measures: Mapping[str, Piece]

    @property
    def shape(self) -> str:
        """The batch shape in words, such as `8 x 64 tokens`."""
        return f"{self.batch_size} x {self.prompt_length} tokens"

    @property
    def where(self) -> str:
        """The machine in words, such as `EPYC 7B13, 2 threads, float32`."""
        return place(self.hardware, self.threads, self.dtype)

    def to_json(self) -> dict[str, Any]:
        """Plain numbers, lists and dictionaries; a piece is [once, each]."""
        kept = asdict(self)
        for name in ("prompt", "step"):
            kept[name] = [_pair(piece) for piece in getattr(self, name)]
        for name in ("enter", "answer"):
            kept[name] = _pair(getattr(self, name))
        for name in ("readers", "measures"):
            kept[name] = {word: _pair(piece) for word, piece in getattr(self, name).items()}
        return kept

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Self:
        """The inverse of `to_json`.

        Raises:
            PolicyError: `value` is not what `to_json` returns.
        """
        kept: dict[str, Any] = dict(value)
        try:
            for name in ("prompt", "step"):
                kept[name] = tuple(Piece(*pair) for pair in kept[name])
            for name in ("enter", "answer"):
                kept[name] = Piece(*kept[name])
            for name in ("readers", "measures"):
                kept[name] = {word: Piece(*pair) for word, pair in kept[name].items()}
            return cls(**kept)
        except (KeyError, TypeError, AttributeError) as cause:
            raise PolicyError(
                f"calibration.seconds is not what calibrate --cost time writes. {REMEDY}"
            ) from cause

    def require(self, scope: str, readers: Iterable[str], measures: Iterable[str]) -> None:
        """Raise if something that the policy needs was not timed.

        Raises:
            PolicyError: another scope, or a reader or measure that is not among the timed ones.
        """
        if scope != self.scope:
            raise PolicyError(
                f"The seconds are of checks over the {self.scope}, the policy's scope is {scope}.\n"
                "Measure them again with that scope (measure_seconds)."
            )
        known = {*self.readers, *self.measures, FIXED}
        missing = [name for name in (*readers, *measures) if name not in known]
        if missing:
            raise PolicyError(
                f"The seconds have no check by {missing[0]}. Measure them again with these heads "
                "and measures (measure_seconds)."
            )

    def check(self, policy: ExitPolicy) -> Piece:
        """One check: each reader's logits, and the decision."""
        if policy.measure == FIXED:
            return NOTHING
        parts = [self.readers[name] for name in read_by_checks(policy, self.readers)]
        parts.append(self.measures[policy.measure])
        return Piece(sum(part.once for part in parts), sum(part.each for part in parts))

    def costs(self, policy: ExitPolicy, rows: int) -> ExitCosts:
        """Seconds of each row by parts, the counterpart of `flops.cost_parts`.

        They are a row's share of a full batch, with `together` for batches that rows have left.
        All rows cost the same, since their prompts are priced at one length.

        Args:
            policy: determines layers, readers and decoders; its threshold is ignored.
            rows: number of rows.
        """
        size, layers = self.batch_size, policy.layers
        stages, check = (*layers, len(self.prompt)), self.check(policy)
        who = [answer_head(policy, layer, self.readers) for layer in layers]
        read = read_by_checks(policy, self.readers)
        heads = [self.readers.get(name, NOTHING) for name in who]
        asked = [NOTHING if name in read else head for name, head in zip(who, heads, strict=True)]
        continues = np.array([name == "spade" for name in who], dtype=bool)
        up = np.array([self._up(layer) for layer in layers]) * continues

        def tiled(values: Sequence[float] | NDArray[np.float64]) -> NDArray[np.float64]:
            return np.tile(np.asarray(values, dtype=float), (rows, 1))

        def shares(pieces: Sequence[Piece]) -> NDArray[np.float64]:
            return np.array([piece.share(size) for piece in pieces], dtype=float)

        start = self.start / size
        return ExitCosts(
            reach=tiled([start + shares(self.prompt[:layer]).sum() for layer in stages]),
            check=tiled([check.share(size)] * len(layers)),
            answer=tiled(np.append(up + shares(asked), self.answer.share(size))),
            unchecked=tiled(up + shares(heads)),
            plain=np.full(rows, self.plain / size),
            together=Together(
                rows=size,
                reach=np.array([_once(self.prompt[:layer]) for layer in stages]),
                check=np.full(len(layers), check.once),
                above=np.array([_once(self.step[layer:]) for layer in layers]),
                unread=np.array([piece.once for piece in asked]),
                continues=continues,
                last=self.answer.once,
                first=self.enter.once,
            ),
        )

    def batch(self, policy: ExitPolicy, stops: Sequence[int]) -> float:
        """Seconds of one batch whose rows exit at these layers, L for a row that never exits.

        Args:
            policy: determines checks and decoders.
            stops: exit layer of each row.
        """
        top, known = len(self.prompt), self.readers
        away = [x for x in stops if x < top and answer_head(policy, x, known) == "spade"]
        total = self.start + self.enter.of(len(away))
        for block, (prompt, step) in enumerate(zip(self.prompt, self.step, strict=True)):
            total += prompt.of(sum(layer > block for layer in stops))
            total += step.of(sum(layer <= block for layer in away))
        check, read = self.check(policy), read_by_checks(policy, known)
        for layer in policy.check_layers:
            who = answer_head(policy, layer, known)
            total += check.of(sum(stop >= layer for stop in stops))
            if who != "spade" and who not in read:
                total += known[who].of(stops.count(layer))
        return total + self.answer.of(len(away) + stops.count(top))

    def _up(self, layer: int) -> float:
        """A row's share of a full batch, from an exit, as a single token, to the answer."""
        pieces = (self.enter, *self.step[layer:], self.answer)
        return sum(piece.share(self.batch_size) for piece in pieces)


def place(hardware: str, threads: int, dtype: str) -> str:
    """The machine that something was timed on, in words."""
    return f"{hardware}, {threads} thread{'s' if threads != 1 else ''}, {dtype}"


def _once(pieces: Sequence[Piece]) -> float:
    return sum(piece.once for piece in pieces)


def _pair(piece: Piece) -> list[float]:
    return [piece.once, piece.each]

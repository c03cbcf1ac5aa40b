"""Signals and answers of candidate policies on cached rows, read once, and tables made from them.

A table describes what `ExitRuntime` would do on each row, without running it. Independent of how a
threshold is chosen, of files and of plots.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from lspade_train.cache import StateBatch, StateDataset
from lspade_train.cache.answers import choice_mask, chunks, pick_answer
from lspade_train.errors import PolicyError
from lspade_train.io.progress import Progress
from lspade_train.models import ModelAdapter, Unembedding
from lspade_train.policies.conditions import may_not_exit
from lspade_train.policies.exit_table import ExitTable
from lspade_train.policies.flops import FlopCounts, cost_parts, count_flops
from lspade_train.policies.gate import Gate, Reading, features
from lspade_train.policies.policy import Decoder, ExitPolicy, Scope
from lspade_train.policies.readers import Readers, answer_readers, check_readers
from lspade_train.policies.seconds import Seconds
from lspade_train.probes.heads import LSpadeHeads
from lspade_train.probes.measures import FIXED, GATED, find_measure
from lspade_train.training.targets import target_logits


@dataclass(frozen=True, kw_only=True)
class CachedExits:
    """Signals, answers and costs of exits at some layers, row by row.

    Attributes:
        layers: K layers, ascending.
        scope: the tokens that logits were computed for: the vocabulary or the choices.
        readings: statistics of each reader's logits, by its name, one `Reading` per layer.
        signals: measures by (reader, measure), (n, K).
        answers: token answered at each layer, by decoder, (n, K).
        full_answer: the full model's answer, (n,).
        gold: the correct answer, (n,); None if some row has none.
        tokens: length of each prompt, (n,).
        choices: number of choices, (n,); None for the vocabulary.
        counts: FLOPs of the model's parts.
        seconds: their time on this machine, if policies are priced by time.
        dataset: the rows, for gates that read hidden states.
    """

    layers: tuple[int, ...]
    scope: Scope
    readings: Mapping[str, Sequence[Reading]]
    signals: Mapping[tuple[str, str], Float[Tensor, "rows layers"]]
    answers: Mapping[Decoder, Int[Tensor, "rows layers"]]
    full_answer: Int[Tensor, " rows"]
    gold: Int[Tensor, " rows"] | None
    tokens: Int[Tensor, " rows"]
    choices: Int[Tensor, " rows"] | None
    counts: FlopCounts
    dataset: StateDataset
    seconds: Seconds | None = None

    def __len__(self) -> int:
        return len(self.full_answer)

    def rows(self, index: Int[Tensor, " kept"]) -> "CachedExits":
        """The rows at `index`."""
        return replace(
            self,
            readings={
                name: [one.rows(index) for one in several]
                for name, several in self.readings.items()
            },
            signals={key: values[index] for key, values in self.signals.items()},
            answers={word: values[index] for word, values in self.answers.items()},
            full_answer=self.full_answer[index],
            gold=None if self.gold is None else self.gold[index],
            tokens=self.tokens[index],
            choices=None if self.choices is None else self.choices[index],
            dataset=self.dataset.select(index),
        )

    def features(self, layers: Sequence[int], readers: Sequence[str]) -> list[Tensor]:
        """Input features of a gate that checks `layers`, (n, features) per layer."""
        found: list[Tensor] = []
        before: Reading | None = None
        for layer in layers:
            place = self.layers.index(layer)
            now = Reading.beside([self.readings[reader][place] for reader in readers])
            found.append(features(now, before))
            before = now
        return found

    def hidden(self, layer: int) -> Float[Tensor, "rows d"]:
        """h_a at one layer, fp32."""
        place = self.dataset.layers.index(layer)
        return torch.cat([batch.hidden[:, place].float() for batch in chunks(self.dataset)])

    def wrong(self, layers: Sequence[int], decoders: Sequence[Decoder]) -> Bool[Tensor, "rows k"]:
        """Whether the answer at each of `layers` differs from the full model's."""
        return self._answers(layers, decoders) != self.full_answer[:, None]

    def doubt(self, gate: Gate, layers: Sequence[int]) -> Float[Tensor, "rows layers"]:
        """A gate's output at each of `layers`."""
        hidden = (None if gate.hidden is None else self.hidden(layer) for layer in layers)
        seen = zip(layers, self.features(layers, gate.readers), hidden, strict=True)
        return torch.stack([gate.doubt(*one) for one in seen], dim=1)

    def table(
        self, policy: ExitPolicy, readers: Sequence[str], confidence: Tensor | None = None
    ) -> ExitTable:
        """Every row's answer and cost for an exit at each of the policy's layers.

        Args:
            policy: layers, measure and decoders; its threshold is ignored.
            readers: readers that its checks use; empty for exits without a check.
            confidence: signal at each of its layers; None computes it.
        """
        if confidence is None:
            confidence = self._confidence(policy, readers)
        flops = cost_parts(self.counts, self.tokens, policy, choices=self.choices)
        seconds = None if self.seconds is None else self.seconds.costs(policy, len(self))
        options = self.counts.vocab if self.choices is None else int(self.choices.max())
        return ExitTable(
            layers=policy.layers,
            num_layers=len(self.counts.step),
            bounds=find_measure(policy.measure).ends(options),
            confidence=confidence.numpy(),
            answers=self._answers(policy.layers, policy.decoders).numpy(),
            full_answer=self.full_answer.numpy(),
            gold=None if self.gold is None else self.gold.numpy(),
            costs=seconds or flops,
            flops=None if seconds is None else flops,
        )

    def _confidence(self, policy: ExitPolicy, readers: Sequence[str]) -> Tensor:
        if policy.measure == FIXED:
            return torch.zeros(len(self), len(policy.layers))
        if policy.measure == GATED:
            assert policy.gate is not None
            return self.doubt(policy.gate, policy.layers)
        (reader,) = readers
        places = [self.layers.index(layer) for layer in policy.layers]
        return self.signals[reader, policy.measure][:, places]

    def _answers(self, layers: Sequence[int], decoders: Sequence[Decoder]) -> Tensor:
        places = [self.layers.index(layer) for layer in layers]
        columns = zip(places, decoders, strict=True)
        return torch.stack([self.answers[word][:, place] for place, word in columns], dim=1)


@torch.no_grad()
def read_exits(
    dataset: StateDataset,
    adapter: ModelAdapter,
    readers: Readers,
    decoders: Sequence[Decoder],
    *,
    layers: Sequence[int],
    scope: Scope,
    measures: Sequence[str] = ("entropy",),
    seconds: Seconds | None = None,
) -> CachedExits:
    """Read cached rows for policies of one scope, a few hundred at a time.

    Args:
        dataset: cached states of one split.
        adapter: the frozen model.
        readers: bound heads that checks or answers may use.
        decoders: decoders that may answer: readers, or `spade`.
        layers: layers to read, ascending.
        scope: tokens to compute logits for: the whole vocabulary, or each row's choices.
        measures: measures of the readers' logits.
        seconds: prices exits by time; None: by FLOPs.

    Raises:
        PolicyError: no rows, or the scope is choices and a row has none.
    """
    if not len(dataset):
        raise PolicyError("There are no rows to calibrate on. Choose a split that has rows.")
    if scope == "choices" and not has_choices(dataset):
        raise PolicyError(
            "The scope is choices, and some of these rows have none. Set --scope vocabulary."
        )
    named = [name for name in measures if find_measure(name).function is not None]
    source = _Source(adapter.unembed, readers, tuple(decoders), tuple(layers), scope, named)
    parts: list[_Part] = []
    with Progress("exits", len(dataset)) as progress:
        for batch in chunks(dataset):
            parts.append(source.read(batch.to(adapter.unembed.weight.device), dataset.layers))
            progress.advance(len(batch))
    labels = dataset.labels
    return CachedExits(
        layers=tuple(layers),
        scope=scope,
        readings={
            reader: [
                Reading.stacked([part.readings[reader][place] for part in parts])
                for place in range(len(layers))
            ]
            for reader in readers
        },
        signals={key: torch.cat([part.signals[key] for part in parts]) for key in parts[0].signals},
        answers={word: torch.cat([part.answers[word] for part in parts]) for word in decoders},
        full_answer=torch.cat([part.full for part in parts]),
        gold=labels["answer_id"].long() if bool(labels["labelled"].all()) else None,
        tokens=labels["position_id"] + 1,
        choices=labels["choice_count"] if scope == "choices" else None,
        counts=count_flops(adapter, readers),
        dataset=dataset,
        seconds=seconds,
    )


def exit_table(
    dataset: StateDataset, adapter: ModelAdapter, heads: LSpadeHeads, policy: ExitPolicy
) -> ExitTable:
    """Every cached row's answer and cost for an exit at each of the policy's layers.

    Args:
        dataset: cached states of one split.
        adapter: the frozen model.
        heads: bound heads of the policy's layers.
        policy: layers, measure, scope, decoders and exit groups; its threshold is ignored.

    Raises:
        PolicyError: no rows, no layers, missing heads, or the scope is choices and a row has none.
        NumericsError: a confidence that is NaN or infinite.
    """
    checked = check_readers(policy, heads)
    found = read_exits(
        dataset,
        adapter,
        checked | answer_readers(policy, heads),
        tuple(dict.fromkeys(policy.decoders)) or ("spade",),
        layers=policy.layers,
        scope=policy.scope,
        measures=[policy.measure],
    )
    table = found.table(policy, tuple(checked))
    if policy.exit_groups is None:
        return table
    return table.held_back(may_not_exit(dataset, policy))


def has_choices(dataset: StateDataset) -> bool:
    """Whether every row has choices to answer from."""
    return bool((dataset.labels["choice_count"] > 0).all())


@dataclass(frozen=True)
class _Part:
    """One batch's share of `CachedExits`."""

    readings: dict[str, list[Reading]]
    signals: dict[tuple[str, str], Tensor]
    answers: dict[Decoder, Tensor]
    full: Tensor


@dataclass(frozen=True)
class _Source:
    """Reads batches of cached rows."""

    unembed: Unembedding
    readers: Readers
    decoders: tuple[Decoder, ...]
    layers: tuple[int, ...]
    scope: Scope
    measures: Sequence[str]

    def read(self, batch: StateBatch, cached: Sequence[int]) -> _Part:
        """Statistics, signals and answers of one batch at every layer."""
        readings: dict[str, list[Reading]] = {reader: [] for reader in self.readers}
        signals: dict[tuple[str, str], list[Tensor]] = {}
        answers: dict[Any, list[Tensor]] = {word: [] for word in self.decoders}
        for layer in self.layers:
            place = cached.index(layer)
            for reader, heads in self.readers.items():
                state = batch.hidden[:, place]
                if heads is not None:
                    state = heads.translate(state, layer).to(state.dtype)
                logits = self._logits(state, batch)
                readings[reader].append(Reading.of([logits]).cpu())
                for name in self.measures:
                    value = find_measure(name).function(logits)  # pyright: ignore[reportOptionalCall]
                    signals.setdefault((reader, name), []).append(value.cpu())
                if reader in answers:
                    answers[reader].append(self._answer(logits, batch).cpu())
            if "spade" in answers:
                answers["spade"].append(self._spade(batch, place, len(cached)).cpu())
        return _Part(
            readings=readings,
            signals={key: torch.stack(values, dim=1) for key, values in signals.items()},
            answers={word: torch.stack(values, dim=1) for word, values in answers.items()},
            full=self._answer(self._logits(batch.final, batch), batch).cpu(),
        )

    def _logits(self, state: Tensor, batch: StateBatch) -> Tensor:
        """Logits over the vocabulary, or over each row's choices, padded with -inf."""
        if self.scope == "vocabulary":
            return self.unembed(state)
        logits = self.unembed.tokens(state, batch.choice_ids.long())
        return logits.masked_fill(~choice_mask(batch), -torch.inf)

    def _spade(self, batch: StateBatch, place: int, count: int) -> Tensor:
        if self.scope == "choices" and batch.target is not None:
            return self._answer(self._logits(batch.target[:, place], batch), batch)
        stored = target_logits(batch, "spade", self.unembed)
        return pick_answer(stored(slice(place, len(batch) * count, count)), batch)

    def _answer(self, logits: Tensor, batch: StateBatch) -> Tensor:
        if self.scope == "vocabulary":
            return pick_answer(logits, batch)
        return batch.choice_ids.long().gather(1, logits.argmax(-1, keepdim=True)).squeeze(1)


def at_layers(policy: ExitPolicy, layers: Sequence[int]) -> ExitPolicy:
    """The policy without a threshold, over other layers; one decoder for all of them."""
    return replace(policy, layers=tuple(layers), threshold=None)

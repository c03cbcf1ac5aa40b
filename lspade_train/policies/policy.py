"""`ExitPolicy`: when a row may exit, and how it then answers; `policy.json` beside the heads.

Independent of models and of how a policy is chosen (`lspade-train calibrate`).
"""

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal, Self, get_args

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from lspade_train.errors import PolicyError
from lspade_train.io.fetch import local_folder
from lspade_train.io.layout import GATE, POLICY
from lspade_train.io.remote import is_remote
from lspade_train.io.storage import file_digest, read_versioned, require_kinds, write_json
from lspade_train.policies.gate import Gate
from lspade_train.probes.measures import FIXED, GATED, MEASURES, Measure, find_measure
from lspade_train.recipe import PositionIds

FORMAT_VERSION = 1
REMEDY = "Choose one with lspade-train calibrate."

NO_GROUP = "(none)"
"""The name of rows without a group."""

Scope = Literal["vocabulary", "choices"]
Decoder = Literal["spade", "l-spade", "logit_lens", "tuned_lens"]
Reader = Literal["l-spade", "tuned_lens", "logit_lens"]


@dataclass(frozen=True, kw_only=True)
class ExitPolicy:
    """SPADE-EXIT's settings (SimExit in paper v2). Every default is ours, not the paper's.

    Attributes:
        layers: check layers, ascending, 0 (embedding output) to L-1.
        threshold: one for all check layers, one per check layer, or None: never exit. A row exits
            at or under it with `entropy` (nats), at or over it with `margin` and `max_prob`.
        measure: name of a registered measure: entropy, margin (difference of the two highest
            probabilities), max_prob (the highest probability), or one added with
            `probes.measures.register_measure`; `gate` is the learned gate's doubt (0 to 1, low
            means confident), `fixed` exits with every row, unchecked.
        reader: lens whose logits the measure uses: `l-spade`, `tuned_lens` or `logit_lens`; None:
            the given heads, or no head with the decoder `logit_lens`. A gate names its own readers.
        scope: tokens that probabilities are over: the vocabulary, or the task's choices only, which
            makes a check a d x |choices| product.
        decoder: how the answer is computed at the exit: by `spade` (the paper's), or from a head
            without running the remaining layers: `l-spade`, `tuned_lens` (heads fitted with target
            final), `logit_lens` (no head). One for all check layers, or one per check layer.
        positions: position ids of SPADE's two tokens, as the heads were trained.
        heads_digest: `weights_sha256` of the heads it was chosen for; None: not tied to any.
        tuned_lens_digest: the same for the tuned lens beside them, if the policy uses it.
        gate_digest: SHA-256 of `gate.safetensors`; None if the measure is not `gate`.
        gate: the learned gate itself; not part of `policy.json`.
        exit_groups: groups of the task whose rows may exit; every other row is answered by the full
            model, unchecked. None: any row may exit.
        calibration: free-form record of how it was chosen, including the curve.

    Raises:
        PolicyError: a value out of range.

    Source: arXiv:2507.17618, SPADE-EXIT.
    """

    layers: tuple[int, ...]
    threshold: float | tuple[float, ...] | None = None
    measure: str = "entropy"
    scope: Scope = "vocabulary"
    reader: Reader | None = None
    decoder: Decoder | tuple[Decoder, ...] = "spade"
    positions: PositionIds = "original"
    heads_digest: str | None = field(default=None, repr=False)
    tuned_lens_digest: str | None = field(default=None, repr=False)
    gate_digest: str | None = field(default=None, repr=False)
    gate: Gate | None = field(default=None, compare=False, repr=False)
    exit_groups: tuple[str, ...] | None = None
    calibration: dict[str, Any] = field(default_factory=dict[str, Any], repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "layers", tuple(self.layers))
        for name in ("threshold", "decoder", "exit_groups"):
            if isinstance(getattr(self, name), list):
                object.__setattr__(self, name, tuple(getattr(self, name)))
        _check_words(self)
        _check_layers(self.layers)
        _check_thresholds(self)
        _check_gate(self)

    @classmethod
    def every(cls, interval: int, num_layers: int, **settings: Any) -> Self:
        """Check layers `interval`, 2 x `interval`, ... below L.

        Raises:
            PolicyError: there is no such layer.
        """
        if not 1 <= interval < num_layers:
            raise PolicyError(
                f"A check every {interval} layers; expected 1 to {num_layers - 1} for "
                f"{num_layers} blocks. {REMEDY}"
            )
        return cls(layers=tuple(range(interval, num_layers, interval)), **settings)

    @classmethod
    def never(cls) -> Self:
        """The policy that never exits: the full model, unchanged."""
        return cls(layers=())

    @classmethod
    def always(cls, layer: int, **settings: Any) -> Self:
        """A fixed exit: every row exits at `layer`, unchecked."""
        return cls(layers=(layer,), measure=FIXED, threshold=0.0, **settings)

    @property
    def check_layers(self) -> tuple[int, ...]:
        """Layers where a check is computed; none with threshold None."""
        return self.layers if self.threshold is not None else ()

    def may_exit(self, group: str | None) -> bool:
        """Whether a row of that group may exit at all."""
        return self.exit_groups is None or (group or NO_GROUP) in self.exit_groups

    def require_no_groups(self, user: str) -> None:
        """Raise if the policy needs the rows' groups, which the caller does not know.

        Args:
            user: name of the caller, for the error message.

        Raises:
            PolicyError: only rows of some groups may exit.
        """
        if self.exit_groups is not None:
            raise PolicyError(
                f"The policy lets only rows of some groups exit, and {user} does not know the "
                "groups.\nCalibrate one with --small_groups exclude, or without --per_group."
            )

    def decoder_at(self, layer: int) -> Decoder:
        """The decoder of a row that exits at check layer `layer`."""
        return self.decoders[self.layers.index(layer)]

    @property
    def decoders(self) -> tuple[Decoder, ...]:
        """The decoder of each check layer."""
        if isinstance(self.decoder, tuple):
            return self.decoder
        return tuple(self.decoder for _ in self.layers)

    def at(self, layers: Sequence[int], threshold: float | tuple[float, ...] | None) -> Self:
        """The same policy with some of its check layers and another threshold."""
        decoder = self.decoder
        if isinstance(decoder, tuple):
            decoder = tuple(self.decoder_at(layer) for layer in layers)
        return replace(self, layers=tuple(layers), threshold=threshold, decoder=decoder)

    def exits(self, signal: Float[Tensor, "*rows"], layer: int) -> Bool[Tensor, "*rows"]:
        """Which rows exit at check layer `layer`; never those with a NaN signal."""
        limits = self.threshold
        if limits is None:
            return torch.zeros_like(signal, dtype=torch.bool)
        limit = limits[self.layers.index(layer)] if isinstance(limits, tuple) else limits
        return find_measure(self.measure).is_sure(signal, limit)

    def check_heads(self, digest: str | None, tuned_lens_digest: str | None = None) -> None:
        """Refuse heads other than those it was chosen for.

        Args:
            digest: `weights_sha256` in the heads' config.json.
            tuned_lens_digest: the same for the tuned lens beside them.

        Raises:
            PolicyError: another digest, or an unknown one.
        """
        for what, wanted, got in (
            ("heads", self.heads_digest, digest),
            ("tuned lens heads", self.tuned_lens_digest, tuned_lens_digest),
        ):
            if wanted is not None and got != wanted:
                found = f"{got[:12]}..." if got else "some without a heads folder"
                raise PolicyError(
                    f"The policy was calibrated for other {what} (expected {wanted[:12]}..., got "
                    f"{found}).\nLoad the heads beside policy.json, or run lspade-train calibrate "
                    "again."
                )

    def save(self, folder: Path) -> None:
        """Write `policy.json`, and `gate.safetensors` if there is a gate.

        Raises:
            PolicyError: the folder cannot be written.
        """
        values = {name: getattr(self, name) for name in _keys(type(self))}
        if self.gate is not None:
            # First: a policy.json whose gate is missing could not be loaded.
            values["gate_digest"] = self.gate.save(Path(folder) / GATE)
        write_json(Path(folder) / POLICY, {"format_version": FORMAT_VERSION, **values}, PolicyError)

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read a `policy.json`, or the one in a heads folder, which may be a URL.

        Raises:
            PolicyError: missing, malformed, or of an unknown format.
        """
        place = local_folder(path) if is_remote(path) else Path(path)
        file = place / POLICY if place.is_dir() else place
        values = read_versioned(file, FORMAT_VERSION, PolicyError, REMEDY)
        unknown = values.keys() - _keys(cls)
        if unknown or "layers" not in values:
            what = f"the unknown key {min(unknown)!r}" if unknown else "no 'layers'"
            raise PolicyError(f"{file} has {what}. {REMEDY}")
        require_kinds(values, {"layers": list}, file, PolicyError, REMEDY)
        if values.get("gate_digest") is not None:
            values["gate"] = _load_gate(file.with_name(GATE), values["gate_digest"])
        return cls(**values)

    @classmethod
    def from_pretrained(cls, path: str | Path, revision: str | None = None) -> Self:
        """The policy in a heads folder, or in a repository of the Hub.

        Args:
            path: folder such as `checkpoints/arc`, or `org/name`.
            revision: branch, tag or commit on the Hub.

        Raises:
            PolicyError: missing, malformed, or of an unknown format.
            HubError: neither a folder nor a readable repository.
        """
        return cls.load(local_folder(path, revision) / POLICY)


def _keys(policy: type[ExitPolicy]) -> set[str]:
    """The keys of `policy.json`."""
    return {item.name for item in fields(policy)} - {"gate"}


def _load_gate(path: Path, digest: str) -> Gate:
    gate = Gate.load(path)
    if file_digest(path, PolicyError) != digest:
        raise PolicyError(
            f"{path} does not match the gate in policy.json ({digest[:12]}...).\n"
            "Restore the file that was written beside policy.json, or run lspade-train calibrate."
        )
    return gate


def _check_gate(policy: ExitPolicy) -> None:
    if policy.gate is not None and not set(policy.layers) <= set(policy.gate.layers):
        missing = sorted(set(policy.layers) - set(policy.gate.layers))
        raise PolicyError(f"The gate was not fitted for layers {missing}. {REMEDY}")
    if policy.measure == GATED and policy.gate is None and policy.check_layers:
        raise PolicyError(
            "The measure is gate, but no gate is loaded: load the policy from its folder "
            f"(ExitPolicy.load), which holds {GATE}."
        )


def _check_words(policy: ExitPolicy) -> None:
    several = isinstance(policy.decoder, tuple)
    decoders: Any = policy.decoder if several else (policy.decoder,)
    if several and len(decoders) != len(policy.layers):
        raise PolicyError(
            f"{len(decoders)} decoders for {len(policy.layers)} check layers; expected one for all "
            f"or one each. {REMEDY}"
        )
    for name, values, words in (
        ("measure", [policy.measure], tuple(MEASURES)),
        ("scope", [policy.scope], get_args(Scope)),
        ("reader", [policy.reader], (*get_args(Reader), None)),
        ("decoder", decoders, get_args(Decoder)),
        ("positions", [policy.positions], get_args(PositionIds)),
    ):
        for value in values:
            if value not in words:
                known = ", ".join(str(word) for word in words if word is not None)
                raise PolicyError(f"{name} is {value!r}; expected {known}. {REMEDY}")
    digest: Any = policy.heads_digest
    record: Any = policy.calibration
    if not isinstance(digest, str | None) or not isinstance(record, dict):
        raise PolicyError(f"heads_digest must be text or null, calibration an object. {REMEDY}")
    groups: Any = policy.exit_groups
    named = isinstance(groups, tuple) and all(isinstance(group, str) for group in groups)
    if groups is not None and not named:
        raise PolicyError(f"exit_groups must be a list of names or null. {REMEDY}")


def _check_layers(layers: Sequence[Any]) -> None:
    whole = all(isinstance(layer, int) and layer >= 0 for layer in layers)
    if not whole or list(layers) != sorted(set(layers)):
        raise PolicyError(
            f"layers is {list(layers)}; expected ascending layers, each once, from 0. {REMEDY}"
        )


def _check_thresholds(policy: ExitPolicy) -> None:
    if policy.threshold is None:
        return
    several = isinstance(policy.threshold, tuple)
    limits: Any = policy.threshold if several else (policy.threshold,)
    if several and len(limits) != len(policy.layers):
        raise PolicyError(
            f"{len(limits)} thresholds for {len(policy.layers)} check layers; expected one for "
            f"all or one each. {REMEDY}"
        )
    measure = find_measure(policy.measure)
    low, high = measure.bounds(math.inf)
    for limit in limits:
        number = isinstance(limit, int | float) and low <= limit <= min(high, sys.float_info.max)
        if not number:
            raise PolicyError(
                f"threshold {limit!r} is out of range for {policy.measure}: expected "
                f"{_span(measure, low, high)}. {REMEDY}"
            )


def _span(measure: Measure, low: float, high: float) -> str:
    """Such as `0 nats or more`, or `0 to 1`."""
    upper = "or more" if high == math.inf else f"to {high:g}"
    return " ".join(filter(None, [f"{low:g}", measure.unit, upper]))

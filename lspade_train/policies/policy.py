"""`ExitPolicy`: when a row may stop, and how it then answers; `policy.json` beside the heads.

Knows nothing of models or of how a policy is chosen: `lspade-train calibrate` does that.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, Self, get_args

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from lspade_train.errors import PolicyError
from lspade_train.io.fetch import local_folder
from lspade_train.io.layout import POLICY
from lspade_train.io.remote import is_remote
from lspade_train.io.storage import read_json, require_kinds, write_json
from lspade_train.probes.measures import MEASURES, Measure, find_measure
from lspade_train.recipe import PositionIds

FORMAT_VERSION = 1
REMEDY = "Choose one with lspade-train calibrate."

Scope = Literal["vocabulary", "choices"]
Decoder = Literal["spade", "l-spade", "logit_lens", "tuned_lens"]
TARGETS = {"l-spade": "spade", "tuned_lens": "final"}


@dataclass(frozen=True, kw_only=True)
class ExitPolicy:
    """SPADE-EXIT's settings (SimExit in paper v2). Every default is ours, not the paper's.

    Attributes:
        layers: check layers, ascending, 0 (embedding output) to L-1.
        threshold: one for all check layers, one per check layer, or None: never exit. A row stops
            at or under it with `entropy` (nats), at or over it with `margin` and `max_prob`.
        measure: name of a registered measure: entropy, margin (probability of the likeliest token
            less that of the second), max_prob (probability of the likeliest token), or one of
            `probes.measures.register_measure`.
        scope: what the probabilities are over: the vocabulary, or the task's choices only, which
            makes a check a d x |choices| product.
        decoder: who answers at the exit: `spade` (the paper's), or the head's own distribution
            with no upper block at all: `l-spade`, `tuned_lens` (heads fitted with target final),
            `logit_lens` (no head).
        positions: position ids of SPADE's two tokens, as the heads were trained.
        heads_digest: `weights_sha256` of the heads it was chosen for; None: not tied to any.
        calibration: free-form record of how it was chosen, with the curve behind the choice.

    Raises:
        PolicyError: a value out of range.

    Source: arXiv:2507.17618, SPADE-EXIT.
    """

    layers: tuple[int, ...]
    threshold: float | tuple[float, ...] | None = None
    measure: str = "entropy"
    scope: Scope = "vocabulary"
    decoder: Decoder = "spade"
    positions: PositionIds = "original"
    heads_digest: str | None = None
    calibration: dict[str, Any] = field(default_factory=dict[str, Any])

    def __post_init__(self) -> None:
        object.__setattr__(self, "layers", tuple(self.layers))
        if isinstance(self.threshold, list):
            object.__setattr__(self, "threshold", tuple(self.threshold))
        _check_words(self)
        _check_layers(self.layers)
        _check_thresholds(self)

    @classmethod
    def every(cls, interval: int, num_layers: int, **settings: Any) -> Self:
        """Check layers `interval`, 2 x `interval`, ... below L.

        Raises:
            PolicyError: no layer of that kind.
        """
        if not 1 <= interval < num_layers:
            raise PolicyError(
                f"A check every {interval} layers; expected 1 to {num_layers - 1} for "
                f"{num_layers} blocks. {REMEDY}"
            )
        return cls(layers=tuple(range(interval, num_layers, interval)), **settings)

    @classmethod
    def never(cls) -> Self:
        """The full model, untouched."""
        return cls(layers=())

    @classmethod
    def always(cls, layer: int, **settings: Any) -> Self:
        """Every row stops at `layer`, whatever its confidence."""
        return cls(layers=(layer,), measure="max_prob", threshold=0.0, **settings)

    @property
    def check_layers(self) -> tuple[int, ...]:
        """Layers where a check is computed: none with threshold None."""
        return self.layers if self.threshold is not None else ()

    def exits(self, signal: Float[Tensor, "*rows"], layer: int) -> Bool[Tensor, "*rows"]:
        """Which rows stop at check layer `layer`; NaN never does."""
        limits = self.threshold
        if limits is None:
            return torch.zeros_like(signal, dtype=torch.bool)
        limit = limits[self.layers.index(layer)] if isinstance(limits, tuple) else limits
        return find_measure(self.measure).is_sure(signal, limit)

    def check_heads(self, digest: str | None, target: str | None = None) -> None:
        """Refuse heads other than the ones it was chosen for, or that its decoder cannot use.

        Args:
            digest: `weights_sha256` in the heads' config.json.
            target: what they were fitted to, `spade` or `final`; None where not recorded.

        Raises:
            PolicyError: another digest, or one that is not known; another target.
        """
        needed = TARGETS.get(self.decoder, target)
        if target is not None and target != needed:
            raise PolicyError(
                f"The decoder {self.decoder} needs heads fitted with model.target {needed}; these "
                f"have {target}. {REMEDY}"
            )
        if self.heads_digest is not None and digest != self.heads_digest:
            got = f"{digest[:12]}..." if digest else "not read from a heads folder"
            raise PolicyError(
                f"The policy was chosen for heads {self.heads_digest[:12]}..., these are {got}.\n"
                "Load the heads beside policy.json, or choose a policy for these with "
                "lspade-train calibrate."
            )

    def save(self, folder: Path) -> None:
        """Write `policy.json`, complete or not at all.

        Raises:
            PolicyError: the folder cannot be written.
        """
        values = {item.name: getattr(self, item.name) for item in fields(self)}
        write_json(Path(folder) / POLICY, {"format_version": FORMAT_VERSION, **values}, PolicyError)

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read a `policy.json`, or the one in a heads folder, which may be a URL.

        Raises:
            PolicyError: missing, malformed, or of an unknown format.
        """
        place = local_folder(path) if is_remote(path) else Path(path)
        file = place / POLICY if place.is_dir() else place
        if not file.exists():
            raise PolicyError(f"{file} does not exist. {REMEDY}")
        values = read_json(file, PolicyError)
        version = values.pop("format_version", None)
        if version != FORMAT_VERSION:
            raise PolicyError(
                f"{file} has format_version {version!r}; this lspade-train reads "
                f"{FORMAT_VERSION}. {REMEDY}"
            )
        unknown = values.keys() - {item.name for item in fields(cls)}
        if unknown or "layers" not in values:
            what = f"the unknown key {min(unknown)!r}" if unknown else "no 'layers'"
            raise PolicyError(f"{file} has {what}. {REMEDY}")
        require_kinds(values, {"layers": list}, file, PolicyError, REMEDY)
        return cls(**values)

    @classmethod
    def from_pretrained(cls, path: str | Path, revision: str | None = None) -> Self:
        """The policy in a heads folder, or in a repository of the Hub.

        Args:
            path: folder such as `checkpoints/arc`, or `org/name`.
            revision: branch, tag or commit on the Hub.

        Raises:
            PolicyError: none there, malformed, or of an unknown format.
            HubError: neither a folder nor a repository that can be read.
        """
        return cls.load(local_folder(path, revision) / POLICY)


def _check_words(policy: ExitPolicy) -> None:
    allowed = {
        "measure": tuple(MEASURES),
        "scope": get_args(Scope),
        "decoder": get_args(Decoder),
        "positions": get_args(PositionIds),
    }
    for name, words in allowed.items():
        if getattr(policy, name) not in words:
            raise PolicyError(
                f"{name} is {getattr(policy, name)!r}; expected {', '.join(words)}. {REMEDY}"
            )
    digest: Any = policy.heads_digest
    record: Any = policy.calibration
    if not isinstance(digest, str | None) or not isinstance(record, dict):
        raise PolicyError(f"heads_digest must be text or null, calibration an object. {REMEDY}")


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
        number = isinstance(limit, int | float) and low <= limit <= high and math.isfinite(limit)
        if not number:
            raise PolicyError(
                f"threshold {limit!r} is out of range for {policy.measure}: expected "
                f"{_span(measure, low, high)}. {REMEDY}"
            )


def _span(measure: Measure, low: float, high: float) -> str:
    """Such as `0 nats or more`, or `0 to 1`."""
    upper = "or more" if high == math.inf else f"to {high:g}"
    return " ".join(filter(None, [f"{low:g}", measure.unit, upper]))
